"""NF4 with double quantisation: what bitsandbytes stores of a matrix, and a packed copy of a model, layer by layer.

The copy has the names and the format of a model that transformers saves with `load_in_4bit`, a file a layer:

    FOLDER/model-layer-00012.safetensors    linear weights in 4 bits; norms and biases as they were
    FOLDER/model-end-00000.safetensors      embedding, final norm, head: a file each, once all layers are there
    FOLDER/config.json, ...                 index and tokenizer likewise

so a whole copy can be loaded by transformers, and what transformers saved, or others have published, can be read here.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cdas_fast.errors import MissingDependencyError, StorageError, UnsupportedError, expected_got
from cdas_fast.models.shards import INDEX, Shards, StoredTensor, read_header
from cdas_fast.ops.nf4 import Nf4Weight
from cdas_fast.storage import make_output_folder, write_atomically, write_json, write_tensors

BLOCK, NESTED_BLOCK = 64, 256  # values that share a scale, and scales that share one
_PART = 2**22  # values that are quantised at a time; whole blocks
STATE = "quant_state.bitsandbytes__nf4"
PIECES = ("absmax", "nested_absmax", "nested_quant_map")  # beside the packed values, as bitsandbytes names them
CONFIG: dict[str, Any] = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "load_in_8bit": False,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_quant_storage": "uint8",
    "llm_int8_skip_modules": ["lm_head"],
}

_BESIDE = ("*.json", "*.model", "*.jinja", "*.txt")  # of the checkpoint's folder: tokenizer and the like
_UNQUANTIZED = "Take the original model with --load-in-4bit."


def require_bitsandbytes() -> None:
    """Raise `MissingDependencyError` unless bitsandbytes is installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingDependencyError(
            "4-bit weights are made by bitsandbytes: install the extra with pip install 'cdas_fast[bnb]'"
        )


@torch.no_grad()
def quantize_nf4(weight: Tensor) -> dict[str, Tensor]:
    """A matrix (O, I) as bitsandbytes stores it: the packed values under "weight", the rest under "weight.NAME".

    On the device of `weight`, and bit for bit what `bitsandbytes.functional.quantize_4bit` makes of the whole. That is
    called for parts of it: on a CPU it takes 14 bytes a value. Raises `MissingDependencyError` without bitsandbytes.
    """
    require_bitsandbytes()
    from bitsandbytes.functional import QuantState, quantize_4bit, quantize_blockwise

    parts = [quantize_4bit(part, blocksize=BLOCK, quant_type="nf4") for part in weight.reshape(-1).split(_PART)]
    absmax = torch.cat([state.absmax for _, state in parts])
    offset = absmax.mean()
    nested_absmax, nested = quantize_blockwise(absmax - offset, blocksize=NESTED_BLOCK)
    state = QuantState(
        absmax=nested_absmax,
        shape=weight.shape,
        dtype=weight.dtype,
        blocksize=BLOCK,
        code=parts[0][1].code,
        quant_type="nf4",
        offset=offset,
        state2=nested,
    )
    packed = torch.cat([each for each, _ in parts])
    return {"weight": packed, **{f"weight.{name}": each for name, each in state.as_dict(packed=True).items()}}


def nf4_state(stored: Mapping[str, StoredTensor], name: str) -> tuple[tuple[int, int], float | None]:
    """Shape of the quantised weight `name` of a checkpoint, and the offset of its scales (None if they are no bytes).

    Raises:
        StorageError: what is stored of it is incomplete.
        UnsupportedError: it is quantised in another way.
    """
    what = f"{stored[name].path}: {name}"
    try:
        state = json.loads(bytes(stored[f"{name}.{STATE}"].read().tolist()))
    except ValueError as error:
        remedy = "Download or copy the model again."
        raise StorageError(expected_got(what, "a state in JSON", str(error), remedy)) from error
    nested = state.get("nested_blocksize")
    if state.get("quant_type") != "nf4" or state.get("blocksize") != BLOCK or nested not in (None, NESTED_BLOCK):
        wanted = f"NF4 in blocks of {BLOCK}, and scales in blocks of {NESTED_BLOCK} or whole"
        got = f"{state.get('quant_type')} in blocks of {state.get('blocksize')}, and scales in blocks of {nested}"
        raise UnsupportedError(expected_got(what, wanted, got, _UNQUANTIZED))
    pieces = PIECES[:1] if nested is None else PIECES
    if missing := [piece for piece in pieces if f"{name}.{piece}" not in stored]:
        raise StorageError(expected_got(what, f"a tensor {name}.{missing[0]} beside it", "none", _UNQUANTIZED))
    rows, columns = state["shape"]
    return (rows, columns), None if nested is None else float(state["nested_offset"])


def nf4_weight(pieces: Mapping[str, Tensor], shape: tuple[int, int], offset: float | None) -> Nf4Weight:
    """What `dequantize_nf4` takes, of the tensors that bitsandbytes stores: "weight" and those of `PIECES`."""
    packed, absmax = pieces["weight"].view(-1).view(torch.uint8), pieces["absmax"]  # stored in a dtype of any size
    if offset is None:
        return Nf4Weight(packed, absmax, None, None, None, shape)
    nested = pieces["nested_absmax"], pieces["nested_quant_map"]
    return Nf4Weight(packed, absmax, *nested, torch.tensor(offset, device=packed.device), shape)


class PackedCopy:
    """A folder of quantised layers, made of a checkpoint as they are asked for and found again by later runs.

    Args:
        folder: of the copy; made if there is none.
        source: the checkpoint, not quantised.
        config: of the model, as JSON values.
        layer_names: the prefix of the tensors of each layer, such as `model.layers.0.`.
        linear: names of the weights that are quantised, without the prefix and `.weight`, such as `self_attn.q_proj`.
        device: on which matrices are quantised, one at a time.
    """

    def __init__(
        self,
        folder: Path,
        source: Shards,
        config: Mapping[str, Any],
        layer_names: list[str],
        linear: Iterable[str],
        device: torch.device,
    ) -> None:
        require_bitsandbytes()
        self.folder, self.source, self.layer_names, self.device = folder, source, layer_names, device
        self.linear, self._config = frozenset(linear), dict(config)
        if self._has_all_layers() and (folder / "config.json").exists():
            return  # nothing is to be written, and perhaps nothing can
        make_output_folder(folder, "folder of packed weights")
        if self._has_all_layers():  # whoever wrote the last one was killed
            with self._alone():
                self._complete()

    def layer(self, layer: int) -> dict[str, StoredTensor]:
        """The tensors of a layer by their names in the model; quantised and written now unless they were before.

        Of several processes that ask, one does it and the others wait.
        """
        path = self._path(layer)
        if not path.exists():
            with self._alone():
                if not path.exists():
                    self._pack(layer)
                    self._complete()
        try:
            return read_header(path)
        except StorageError as error:
            raise StorageError(f"{error} If you delete it, it is made again from the original.") from error

    def _has_all_layers(self) -> bool:
        return all(self._path(layer).exists() for layer in range(len(self.layer_names)))

    def _path(self, layer: int) -> Path:
        return self.folder / f"model-layer-{layer:05d}.safetensors"

    def _pack(self, layer: int) -> None:
        tensors: dict[str, Tensor] = {}
        prefix = self.layer_names[layer]
        for name, stored in self.source.items():
            if not name.startswith(prefix):
                continue
            own = name.removeprefix(prefix)
            if own.endswith(".weight") and own.removesuffix(".weight") in self.linear:
                pieces = quantize_nf4(stored.read().to(self.device))
                tensors |= {f"{name.removesuffix('weight')}{key}": each.cpu() for key, each in pieces.items()}
            else:
                tensors[name] = stored.read()
        write_tensors(self._path(layer), tensors, {"format": "pt"})

    def _complete(self) -> None:
        """When all layers are there: copy what belongs to none, and write what makes the folder a model's."""
        if not self._has_all_layers():
            return
        paths = [self._path(layer) for layer in range(len(self.layer_names))]
        outside = [name for name in self.source if not name.startswith(tuple(self.layer_names))]
        for number, name in enumerate(outside):  # a file each: a head alone may be some gigabytes
            path = self.folder / f"model-end-{number:05d}.safetensors"
            if not path.exists():
                self.source[name].copy_to(path)
            paths.append(path)
        for pattern in _BESIDE:
            for path in self.source.folder.glob(pattern):
                if path.name not in ("config.json", INDEX) and not (self.folder / path.name).exists():
                    write_atomically(self.folder / path.name, partial(shutil.copyfile, path))
        headers = {path.name: read_header(path) for path in paths}
        total = sum(stored.nbytes for header in headers.values() for stored in header.values())
        files = {name: file for file, header in headers.items() for name in header}
        write_json(self.folder / INDEX, {"metadata": {"total_size": total}, "weight_map": files})
        dtype = self._config.get("dtype") or self._config.get("torch_dtype") or "float32"  # by version of transformers
        settings = {**CONFIG, "bnb_4bit_compute_dtype": dtype}
        write_json(self.folder / "config.json", {**self._config, "quantization_config": settings})

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep other processes out; a killed one leaves nothing that would."""
        if sys.platform == "win32":  # both would write the same, whole or not at all
            yield
            return
        import fcntl

        with (self.folder / ".lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            for scrap in self.folder.glob(".*.partial"):  # of a killed process: nobody else is writing now
                scrap.unlink()
            yield


def is_quantized_copy(config: Mapping[str, Any]) -> bool:
    """Whether a model's configuration says that its weights are stored in 4 bits by bitsandbytes.

    Raises:
        UnsupportedError: they are stored by another method, in 8 bits, or as FP4.
    """
    found = config.get("quantization_config")
    if not found:
        return False
    method, kind = found.get("quant_method"), found.get("bnb_4bit_quant_type", "fp4")
    if method != "bitsandbytes" or not found.get("load_in_4bit") or kind != "nf4":
        wanted = "weights that are not quantised, or in NF4 by bitsandbytes"
        got = f"{method} in 8 bits" if found.get("load_in_8bit") else method
        got = f"{kind} by {method}" if found.get("load_in_4bit") else got
        raise UnsupportedError(expected_got("model", wanted, got, _UNQUANTIZED))
    return True
