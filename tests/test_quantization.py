"""Packed copies: what bitsandbytes makes of the weights, readable by transformers, whole or absent at any moment."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model, tiny_tokenizer
from torch import nn

from cdas_fast import load_model, storage
from cdas_fast.errors import InvalidInputError, MissingDependencyError, StorageError, UnsupportedError
from cdas_fast.models import quantization, shards
from cdas_fast.models.quantization import PackedCopy, quantize_nf4
from cdas_fast.models.shards import INDEX, Shards
from cdas_fast.models.skeleton import layer_weights

bnb = pytest.importorskip("bitsandbytes")
ROOT = Path(__file__).resolve().parents[1]
IDS = torch.arange(24)[None] + 5
LINEAR = ["mlp.down_proj", "mlp.gate_proj", "mlp.up_proj", *(f"self_attn.{name}_proj" for name in "koqv")]
WIDE: dict[str, Any] = {
    "hidden_size": 64,
    "head_dim": 16,
    "intermediate_size": 128,
}  # 64 divides the rows, as of any real model: see `dequantize_nf4`


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of several shards with its tokenizer; no test may change it."""
    folder = tmp_path_factory.mktemp("source") / "tiny"
    model = tiny_model(**WIDE)
    model.generation_config.max_new_tokens = 3
    model.save_pretrained(folder, max_shard_size="60KB")
    tiny_tokenizer().save_pretrained(folder)
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return folder


def packed(source: Path, folder: Path, **options: Any) -> Path:
    """Have a whole packed copy made; its folder."""
    load_all(load_model(source, device="cpu", load_in_4bit=True, packed_dir=folder, **options)[0])
    (copy,) = folder.iterdir()
    return copy


def load_all(model: nn.Module) -> None:
    weights = layer_weights(model)
    assert weights is not None
    for layer in range(weights.count):
        weights.dense(layer, LINEAR[0], torch.float32)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


@pytest.fixture(scope="module")
def copy(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole packed copy that was made in peace; no test may change it."""
    return packed(source, tmp_path_factory.mktemp("packed"))


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):  # else it rounds the scales to bfloat16 where the CPU can do it
            module.support_avx512bf16_for_cpu = False
    found: torch.Tensor = model(input_ids=IDS).logits
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(64, 64), (48, 32), (7, 96), (1, 64), (300, 64)])
def test_pieces_are_those_of_bitsandbytes(shape: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape).to(dtype)
    pieces = quantize_nf4(weight)
    values, state = bnb.functional.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    expected = {"weight": values, **{f"weight.{name}": each for name, each in state.as_dict(packed=True).items()}}
    assert pieces.keys() == expected.keys()
    for name, tensor in pieces.items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, expected[name]), name


def test_copy_holds_what_bitsandbytes_makes_and_the_rest_as_it_was(source: Path, copy: Path) -> None:
    originals, found = Shards(source), Shards(copy)
    quantised = {name for name in originals if name.startswith("model.layers.") and "proj" in name}
    assert len(quantised) == 5 * 7
    for name, stored in originals.items():
        if name not in quantised:
            assert torch.equal(found[name].read(), stored.read())
            continue
        values, state = bnb.functional.quantize_4bit(
            stored.read(), blocksize=64, compress_statistics=True, quant_type="nf4"
        )
        assert torch.equal(found[name].read(), values)
        for piece, tensor in state.as_dict(packed=True).items():
            assert torch.equal(found[f"{name}.{piece}"].read(), tensor)
    of_quantised = {each for each in found if each.partition(".weight.")[0] + ".weight" in quantised}
    assert set(found) == set(originals) | of_quantised, "nothing else"
    index = json.loads((copy / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(stored.nbytes for stored in found.values())


def test_copy_has_what_lay_beside_the_weights(source: Path, copy: Path) -> None:
    beside = {path.name for path in source.iterdir() if path.suffix != ".safetensors"} - {"config.json", INDEX}
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "merges.txt"} <= beside
    for name in beside:
        assert (copy / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whole_copy_is_a_model_here_and_in_transformers(dtype: torch.dtype, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    tiny_model(dtype=dtype, **WIDE).save_pretrained(tmp_path / "tiny")
    tiny_tokenizer().save_pretrained(tmp_path / "tiny")
    copy = packed(tmp_path / "tiny", tmp_path / "packed")
    model, _ = load_model(tmp_path / "tiny", device="cpu", load_in_4bit=True, packed_dir=copy.parent)
    expected = logits(model)
    assert expected.dtype == dtype
    for resident in (0, 2, 5):
        again, tokenizer = load_model(copy, device="cpu", resident_layers=resident)
        assert torch.equal(logits(again), expected)
        assert tokenizer("ab")["input_ids"] == tiny_tokenizer()("ab")["input_ids"]
    again, _ = load_model(copy, device="cpu", load_in_4bit=True, packed_dir=tmp_path / "none")
    assert torch.equal(logits(again), expected)
    assert not (tmp_path / "none").exists(), "a copy is not copied"
    theirs = AutoModelForCausalLM.from_pretrained(copy)
    assert sum(type(module) is bnb.nn.Linear4bit for module in theirs.modules()) == 35
    assert {module.compute_dtype for module in theirs.modules() if isinstance(module, bnb.nn.Linear4bit)} == {dtype}
    assert type(theirs.lm_head) is nn.Linear
    tolerance = 1e-5 if dtype == torch.float32 else 0.05  # they round elsewhere
    torch.testing.assert_close(logits(theirs), expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


def test_whole_copy_is_only_read(monkeypatch: pytest.MonkeyPatch, model_folder: Path, tmp_path: Path) -> None:
    """As one that an administrator has put where users may not write."""
    packed(model_folder, tmp_path / "packed")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "packed").rglob("*")}

    def refuse(path: Path, what: str) -> None:
        raise StorageError(what)

    monkeypatch.setattr(quantization, "make_output_folder", refuse)
    model, _ = load_model(model_folder, device="cpu", load_in_4bit=True, packed_dir=tmp_path / "packed")
    assert torch.isfinite(logits(model)).all()
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "packed").rglob("*")} == before
    with pytest.raises(StorageError, match="folder of packed weights"):
        load_model(model_folder, device="cpu", load_in_4bit=True, packed_dir=tmp_path / "other")


def saved_by_transformers(source: Path, folder: Path, **changes: Any) -> nn.Module:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, **changes}
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=BitsAndBytesConfig(**settings))
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"bnb_4bit_use_double_quant": False},
        {"bnb_4bit_quant_storage": torch.bfloat16},
        {"bnb_4bit_quant_storage": torch.float32, "bnb_4bit_use_double_quant": False},
        {"llm_int8_skip_modules": ["lm_head", "down_proj"]},
    ],
    ids=["double", "single", "stored as bfloat16", "single, stored as float32", "some left as they were"],
)
def test_what_transformers_saves_is_read(changes: dict[str, Any], source: Path, tmp_path: Path) -> None:
    theirs = saved_by_transformers(source, tmp_path, **changes)
    model, _ = load_model(tmp_path, device="cpu", resident_layers=1)
    weights = layer_weights(model)
    assert weights is not None
    quantised = 0
    for layer in range(5):
        for name in LINEAR:
            own: Any = theirs.get_submodule(f"model.layers.{layer}.{name}").weight
            if isinstance(own, bnb.nn.Params4bit):
                quantised += 1
                own = bnb.functional.dequantize_4bit(own.data, own.quant_state)
            assert torch.equal(weights.dense(layer, name, torch.float32), own), (layer, name)
    assert quantised == (30 if "llm_int8_skip_modules" in changes else 35)
    torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bnb_4bit_quant_type": "fp4"}, "got fp4 by bitsandbytes"),
        ({"load_in_4bit": False, "load_in_8bit": True}, "got bitsandbytes in 8 bits"),
    ],
)
@pytest.mark.parametrize("load_in_4bit", [True, False])
def test_other_formats_of_bitsandbytes_are_refused(
    changes: dict[str, Any], message: str, load_in_4bit: bool, source: Path, tmp_path: Path
) -> None:
    saved_by_transformers(source, tmp_path / "model", **changes)
    for without_config in (False, True):
        if without_config:  # as if someone had deleted it
            message = r"expected floating-point numbers, or NF4 by bitsandbytes, got torch\.u?int8\. Take the|place for"
            config = json.loads((tmp_path / "model" / "config.json").read_text())
            del config["quantization_config"]
            (tmp_path / "model" / "config.json").write_text(json.dumps(config))
        with pytest.raises((UnsupportedError, InvalidInputError), match=message) as caught:
            load_model(
                tmp_path / "model",
                device="cpu",
                resident_layers=1,
                load_in_4bit=load_in_4bit,
                packed_dir=tmp_path / "packed",
            )
        if not without_config:
            assert str(caught.value).endswith("Take the original model with --load-in-4bit.")
    assert not (tmp_path / "packed").exists()


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "mxfp4", "compressed-tensors"])
def test_other_methods_are_refused(method: str, source: Path, tmp_path: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    for path in source.iterdir():
        os.link(path, tmp_path / path.name)
    (tmp_path / "config.json").unlink()
    quantised = {"quant_method": method, "bits": 4, "group_size": 128}
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": quantised}))
    message = rf"expected weights that are not quantised, or in NF4 by bitsandbytes, got {method}\. Take the original"
    with pytest.raises(UnsupportedError, match=message):
        load_model(tmp_path, device="cpu", load_in_4bit=True)


def changed_copy(copy: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A copy with another third layer."""
    folder.mkdir()
    for path in copy.iterdir():
        os.link(path, folder / path.name)
    path = folder / "model-layer-00002.safetensors"
    tensors = load_file(path)
    path.unlink()
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


QUANTISED = "model.layers.2.mlp.up_proj.weight"


def other_state(tensors: dict[str, torch.Tensor], **changes: Any) -> None:
    name = f"{QUANTISED}.{quantization.STATE}"
    state = {**json.loads(bytes(tensors[name].tolist())), **changes}
    tensors[name] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


def without_piece(tensors: dict[str, torch.Tensor], piece: str) -> None:
    del tensors[f"{QUANTISED}.{piece}"]


def broken_state(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{QUANTISED}.{quantization.STATE}"] = torch.tensor([123], dtype=torch.uint8)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (
            partial(other_state, blocksize=128),
            UnsupportedError,
            "got nf4 in blocks of 128, .* of 256. Take the original",
        ),
        (partial(other_state, nested_blocksize=64), UnsupportedError, "got nf4 .* in blocks of 64. Take the original"),
        (partial(other_state, quant_type="fp4"), UnsupportedError, "got fp4 in blocks of 64, .* Take the original"),
        (partial(other_state, shape=[64, 128]), InvalidInputError, r"shape \(128, 64\), .*, got \(64, 128\)"),
        (
            partial(without_piece, piece="nested_absmax"),
            StorageError,
            r"a tensor .*\.nested_absmax beside it, got none",
        ),
        (partial(without_piece, piece="absmax"), StorageError, r"a tensor .*\.weight\.absmax beside it, got none"),
        (broken_state, StorageError, "expected a state in JSON, got .*Download or copy the model again"),
    ],
    ids=["blocks", "nested blocks", "fp4", "shape", "no nested scales", "no scales", "broken state"],
)
def test_quantised_weight_that_is_not_read_is_named_at_once(
    change: Callable[[dict[str, torch.Tensor]], None],
    kind: type[Exception],
    message: str,
    copy: Path,
    tmp_path: Path,
) -> None:
    folder = changed_copy(copy, tmp_path / "changed", change)
    with pytest.raises(kind, match=rf"model-layer-00002\.safetensors: {QUANTISED}.*{message}") as caught:
        load_model(folder, device="cpu", resident_layers=0)
    assert "\n" not in str(caught.value)


FORKED = """
import os, random, resource, signal, sys, time
from pathlib import Path
import torch
from cdas_fast import load_model
from cdas_fast.errors import StorageError

import bitsandbytes

torch.set_num_threads(1)
load_model(sys.argv[1], device="cpu", resident_layers=0)  # imports what the forked ones need
source, folder, kills = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])

def pack(place):
    weights = load_model(source, device="cpu", load_in_4bit=True, packed_dir=folder / place)[0].layer_weights
    for layer in range(weights.count):
        weights.dense(layer, "mlp.up_proj", torch.float32)

def forked(act, *args):
    child = os.fork()
    if child:
        return child
    act(*args)
    os._exit(0)

def limited():
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    try:
        pack("limited")
    except StorageError as error:
        (folder / "error").write_text(str(error))

began = time.monotonic()
assert os.waitpid(forked(pack, "in peace"), 0)[1] == 0
took, moments = time.monotonic() - began, random.Random(0)
for number in range(kills):
    child = forked(pack, f"killed {number}")
    time.sleep(moments.random() * took)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
for child in [forked(pack, "together") for _ in range(4)]:
    assert os.waitpid(child, 0)[1] == 0
assert os.waitpid(forked(limited), 0)[1] == 0
"""
KILLS = 10


@pytest.fixture(scope="module")
def forked(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders that processes were packing in when they were killed at random moments, beside each other, or stopped."""
    if sys.platform == "win32":
        pytest.skip("forks")
    folder = tmp_path_factory.mktemp("forked")
    command = [sys.executable, "-c", FORKED, str(source), str(folder), str(KILLS)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return folder


def test_sigkill_leaves_whole_files_and_the_next_run_finishes(forked: Path, source: Path, copy: Path) -> None:
    expected, counts = files_of(copy), []
    for number in range(KILLS):
        for folder in (forked / f"killed {number}").glob("*"):
            left = files_of(folder)
            for name, content in left.items():
                assert name.endswith(".partial") or expected[name] == content, name
            counts.append(len(left))
            packed(source, folder.parent)
            assert files_of(folder) == expected
    assert sum(0 < count < len(expected) for count in counts) >= 2, "some were in the middle of it"


def test_processes_pack_the_same_copy(forked: Path, copy: Path) -> None:
    (folder,) = (forked / "together").iterdir()
    assert files_of(folder) == files_of(copy)


def test_disk_that_refuses_in_the_middle_of_a_file(forked: Path) -> None:
    """Python ignores SIGXFSZ, so that the write fails."""
    message = (forked / "error").read_text()
    assert re.search(r"model-layer-00000\.safetensors: .*File too large", message)
    assert "\n" not in message
    (folder,) = (forked / "limited").iterdir()
    assert files_of(folder) == {}


WRITES = 5 + 3 + 5 + 2  # layers; embedding, norm, head; what lies beside them; index and configuration


@pytest.mark.parametrize("at", range(1, WRITES + 1))
def test_interruption_before_each_file_and_after_it(
    at: int, source: Path, copy: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The process dies with a file half written, and in the next run once that file is there."""
    own, writes, expected = storage.write_atomically, 0, files_of(copy)

    def dying(path: Any, write: Any, after: bool) -> Path:
        nonlocal writes
        writes += 1
        if writes == at and not after:
            Path(path).with_name(f".{Path(path).name}.x.partial").write_bytes(b"half")
            raise KeyboardInterrupt
        written = own(path, write)
        if writes == at:
            raise KeyboardInterrupt
        return written

    for after in (False, True):
        writes = 0
        with monkeypatch.context() as patch:
            for module in (storage, quantization, shards):
                patch.setattr(module, "write_atomically", partial(dying, after=after))
            with pytest.raises(KeyboardInterrupt):
                packed(source, tmp_path / str(after))
        (folder,) = (tmp_path / str(after)).iterdir()
        left = {name: content for name, content in files_of(folder).items() if not name.endswith(".partial")}
        assert left.items() <= expected.items()
        assert len(left) == at - 1 + after
        assert ("config.json" in left) == (after and at == WRITES), "it says that the copy is whole"
        packed(source, tmp_path / str(after))
        assert files_of(folder) == expected


def test_each_layer_is_packed_once(source: Path, copy: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    own, packings = PackedCopy._pack, []

    def noted(self: PackedCopy, layer: int) -> None:
        packings.append(layer)
        own(self, layer)

    monkeypatch.setattr(PackedCopy, "_pack", noted)
    model, _ = load_model(source, device="cpu", load_in_4bit=True, packed_dir=tmp_path, resident_layers=0)
    assert packings == [], "a layer is packed when it is needed"
    for _ in range(2):
        logits(model)
    assert packings == [0, 1, 2, 3, 4]
    packed(source, tmp_path)
    assert len(packings) == 5


@pytest.mark.parametrize("room", [0, 3, 6, 9])
def test_full_disk(room: int, source: Path, copy: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """So many files can be written, and half of one more."""
    own, written = storage.write_atomically, 0

    def full(path: Any, write: Any) -> Path:
        nonlocal written
        written += 1

        def half(temporary: Path) -> None:
            write(temporary)
            if written > room:
                os.truncate(temporary, temporary.stat().st_size // 2)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        return own(path, half)

    for module in (storage, quantization, shards):
        monkeypatch.setattr(module, "write_atomically", full)
    with pytest.raises(StorageError, match=r"no space left on the disk; .* Free some space and run again\.") as caught:
        packed(source, tmp_path)
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    (folder,) = tmp_path.iterdir()
    left = files_of(folder)
    assert len(left) == room
    assert left.items() <= files_of(copy).items()
    packed(source, tmp_path)
    assert files_of(folder) == files_of(copy)


def test_other_checkpoint_of_the_same_name_has_a_copy_of_its_own(source: Path, copy: Path, tmp_path: Path) -> None:
    models = {}
    for number, (seed, dtype) in enumerate([(0, torch.float32), (1, torch.float32), (0, torch.bfloat16)]):
        folder = tmp_path / str(number) / "tiny"
        tiny_model(seed=seed, dtype=dtype, **WIDE).save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
        models[number] = load_model(
            folder, device="cpu", dtype="float32", load_in_4bit=True, packed_dir=tmp_path / "packed"
        )[0]
        load_all(models[number])
    folders = sorted((tmp_path / "packed").iterdir())
    assert len(folders) == 3
    assert all(folder.name.startswith("tiny-") for folder in folders)
    assert copy.name in [folder.name for folder in folders], "however it is cut into files"
    results = [logits(model) for model in models.values()]
    assert not torch.equal(results[0], results[1])
    assert len({weights.fingerprint for model in models.values() if (weights := layer_weights(model))}) == 3


def test_other_tensor_in_the_middle_is_another_checkpoint(source: Path, tmp_path: Path) -> None:
    """A fine-tuned matrix whose beginning was kept."""
    for path in source.iterdir():
        os.link(path, tmp_path / path.name)
    stored = Shards(tmp_path)["model.layers.3.mlp.up_proj.weight"]
    tensors = load_file(stored.path)
    stored.path.unlink()
    tensors[stored.name][64:] += 1
    save_file(tensors, stored.path, metadata={"format": "pt"})
    from cdas_fast.models.skeleton import checkpoint_hash

    assert checkpoint_hash(Shards(tmp_path)) != checkpoint_hash(Shards(source))


def test_truncated_layer_of_a_copy_says_what_to_do(source: Path, copy: Path, tmp_path: Path) -> None:
    folder = packed(source, tmp_path)
    path = folder / "model-layer-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(
        StorageError, match=rf"{path.name}: expected .* If you delete it, it is made again from the orig"
    ):
        packed(source, tmp_path)
    path.unlink()
    packed(source, tmp_path)
    assert files_of(folder) == files_of(copy)


def test_folder_that_cannot_be_made(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match=r"folder of packed weights: expected .*Choose another folder of packed"):
        load_model(source, device="cpu", load_in_4bit=True, packed_dir=tmp_path / "file")


def test_without_bitsandbytes_the_extra_is_named(
    source: Path, copy: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import importlib.util

    own = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: own(name) if name != "bitsandbytes" else None)
    message = r"4-bit weights are made by bitsandbytes: install the extra with pip install 'cdas_fast\[bnb\]'"
    with pytest.raises(MissingDependencyError, match=message):
        load_model(source, device="cpu", load_in_4bit=True, packed_dir=tmp_path)
    with pytest.raises(MissingDependencyError, match=message):
        quantize_nf4(torch.ones(64, 64))
    assert list(tmp_path.iterdir()) == []
    load_all(load_model(copy, device="cpu", resident_layers=0)[0])  # what is packed can be read without it
