"""Checkpoints of one file or several, read tensor by tensor, and what is said about broken ones."""

from __future__ import annotations

import json
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model

from cdas_fast.errors import InvalidInputError, StorageError
from cdas_fast.models import shards
from cdas_fast.models.shards import INDEX, SINGLE, Shards, read_header

ROOT = Path(__file__).resolve().parents[1]
AGAIN = r"The file is truncated or corrupt: download or copy it again\."
DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
]


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert torch.equal(found, expected)


def file_of(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file with this header, an object or bytes."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_every_dtype_comes_back(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {
        "matrix": torch.arange(-7, 8).reshape(3, 5).to(dtype),
        "one": torch.ones(1, dtype=dtype),
        "scalar": torch.tensor(3).to(dtype),
        "empty": torch.empty(0, dtype=dtype),
        "no rows": torch.empty(0, 4, dtype=dtype),
    }
    save_file(tensors, tmp_path / SINGLE, metadata={"format": "pt"})
    shards = Shards(tmp_path)
    assert set(shards) == set(tensors)
    for name, tensor in tensors.items():
        assert_same(shards[name].read(), tensor)
        assert (shards[name].numel, shards[name].nbytes) == (tensor.numel(), tensor.nbytes)


def test_tensors_at_odd_places_come_back(tmp_path: Path) -> None:
    """The format does not align what it stores."""
    for odd in range(1, 8):
        tensors = {"a": torch.ones(odd, dtype=torch.uint8), "b": torch.randn(3, 7), "c": torch.randn(5).bfloat16()}
        save_file(tensors, tmp_path / SINGLE)
        shards = Shards(tmp_path)
        for name, tensor in tensors.items():
            assert_same(shards[name].read(), tensor)


def test_reading_fills_the_memory_that_it_is_given(tmp_path: Path) -> None:
    save_file({"a": torch.arange(10.0)}, tmp_path / SINGLE)
    stored, room = Shards(tmp_path)["a"], torch.full((60,), 7, dtype=torch.uint8)
    stored.read_into(room[8 : 8 + stored.nbytes])
    assert_same(room[8:48].clone().view(torch.float32), torch.arange(10.0))
    assert (room[:8] == 7).all()
    assert (room[48:] == 7).all()


@pytest.mark.parametrize("size", ["1GB", "20KB"], ids=["one file", "several files"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_transformers_saves(dtype: torch.dtype, size: str, tmp_path: Path) -> None:
    model = tiny_model(dtype=dtype)
    model.save_pretrained(tmp_path, max_shard_size=size)
    shards = Shards(tmp_path)
    assert len(shards.paths) == len(list(tmp_path.glob("*.safetensors")))
    assert (len(shards.paths) > 3) == (size == "20KB")
    assert set(shards) == set(model.state_dict())
    for name, tensor in model.state_dict().items():
        assert_same(shards[name].read(), tensor)


def test_single_file_goes_before_the_index_of_an_older_save(tmp_path: Path) -> None:
    """transformers deletes the shards when it saves again, not their index, and then reads the single file itself."""
    tiny_model(seed=1).save_pretrained(tmp_path, max_shard_size="20KB")
    model = tiny_model()
    model.save_pretrained(tmp_path)
    assert (tmp_path / INDEX).exists()
    shards = Shards(tmp_path)
    assert_same(shards["lm_head.weight"].read(), model.state_dict()["lm_head.weight"])


def test_tensor_that_the_index_forgets_is_found(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2), "b": torch.zeros(2)}, tmp_path / "one.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "one.safetensors"}}))
    assert set(Shards(tmp_path)) == {"a", "b"}


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """A file of three tensors."""
    path = tmp_path / SINGLE
    save_file({"a": torch.arange(100.0), "b": torch.ones(7, dtype=torch.uint8), "c": torch.zeros(3, 3)}, path)
    return path


def test_cut_anywhere(whole: Path) -> None:
    data = whole.read_bytes()
    header_end = 8 + struct.unpack("<Q", data[:8])[0]
    for length in (0, 1, 7, 8, 9, header_end // 2, header_end - 1, header_end, len(data) // 2, len(data) - 1):
        whole.write_bytes(data[:length])
        with pytest.raises(StorageError, match=rf"{re.escape(str(whole))}: expected .*{AGAIN}") as caught:
            Shards(whole.parent)
        assert "\n" not in str(caught.value)
    whole.write_bytes(data)
    assert len(Shards(whole.parent)) == 3


def test_longer_file_is_read(whole: Path) -> None:
    """Some tools pad; what the header describes is there."""
    expected = load_file(whole)
    whole.write_bytes(whole.read_bytes() + b"\0" * 100)
    for name, stored in Shards(whole.parent).items():
        assert_same(stored.read(), expected[name])


GARBAGE = {
    "pickle": b"\x80\x04\x95 a pickle of torch.save",
    "zip": b"PK\x03\x04" + b"\0" * 100,
    "git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:1234\nsize 99\n",
    "no json": file_of(b"{'a': 1}"),
    "no utf-8": file_of(b"\xff\xfe garbage"),
    "deep": file_of(b"[" * 100_000),
    "list": file_of(["a"]),
    "text": file_of("a"),
    "null": file_of(None),
    "null entry": file_of({"a": None}),
    "text entry": file_of({"a": "b"}),
    "empty entry": file_of({"a": {}}),
    "list for a dtype": file_of({"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}, b"1234"),
    "number for a shape": file_of({"a": {"dtype": "F32", "shape": 1, "data_offsets": [0, 4]}}, b"1234"),
    "text in a shape": file_of({"a": {"dtype": "F32", "shape": ["1"], "data_offsets": [0, 4]}}, b"1234"),
    "float in a shape": file_of({"a": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}}, b"1234"),
    "negative shape": file_of({"a": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}}, b"1234"),
    "one offset": file_of({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}, b"1234"),
    "number for offsets": file_of({"a": {"dtype": "F32", "shape": [1], "data_offsets": 4}}, b"1234"),
    "negative offset": file_of({"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}, b"1234"),
    "fewer bytes than the shape": file_of({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, b"1234"),
    "beyond the end": file_of({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, b"1234"),
    "length of 2**63": file_of({}, length=2**63),
    "length of 10**12": file_of({}, length=10**12),
    "one byte too many in the length": file_of({}, length=3),
    "length of 0": file_of({}, length=0),
}


@pytest.mark.parametrize(
    "content",
    GARBAGE.values(),
    ids=GARBAGE,
)
def test_garbage_is_one_line(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / SINGLE
    path.write_bytes(content)
    with pytest.raises(StorageError, match=rf"{re.escape(str(path))}.*: expected .*, got .*{AGAIN}") as caught:
        Shards(tmp_path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_overlong_header_is_not_read(tmp_path: Path) -> None:
    """More than the format allows, in a sparse file that has room for it."""
    path = tmp_path / SINGLE
    path.write_bytes(file_of({}, length=100_000_001))
    with path.open("r+b") as file:
        file.truncate(200_000_000)
    with pytest.raises(StorageError, match=AGAIN):
        read_header(path)


def test_dtype_that_is_not_read_is_named(tmp_path: Path) -> None:
    save_file({"scaled": torch.ones(2).to(torch.float8_e4m3fn)}, tmp_path / SINGLE)
    with pytest.raises(StorageError, match=rf"{SINGLE}: scaled: expected F64 or F32 .*, got F8_E4M3\. Save the model"):
        Shards(tmp_path)


def sharded(folder: Path) -> list[Path]:
    tiny_model().save_pretrained(folder, max_shard_size="20KB")
    return sorted(folder.glob("model-*.safetensors"))


def test_missing_shard_is_named(tmp_path: Path) -> None:
    missing = sharded(tmp_path)[1]
    missing.unlink()
    message = rf"{missing.name}: expected a safetensors file, got No such file.*\. Download or copy the model again\."
    with pytest.raises(StorageError, match=message):
        Shards(tmp_path)
    missing.mkdir()
    with pytest.raises(StorageError, match=rf"{missing.name}: expected a safetensors file, got Is a directory"):
        Shards(tmp_path)


def test_truncated_shard_is_named(tmp_path: Path) -> None:
    paths = sharded(tmp_path)
    for path in paths[::2]:
        data = path.read_bytes()
        path.write_bytes(data[:-1])
        with pytest.raises(StorageError, match=rf"{path.name}: expected .*{AGAIN}"):
            Shards(tmp_path)
        path.write_bytes(data)


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("[]", InvalidInputError, "expected an index with a weight_map, got none"),
        ("{}", InvalidInputError, "expected an index with a weight_map, got none"),
        ('{"weight_map": ["a"]}', InvalidInputError, "expected an index with a weight_map, got none"),
        ('{"weight_map": {"a": 1}}', InvalidInputError, "expected an index with a weight_map, got none"),
        ('{"weight_map": {', StorageError, "expected a JSON file, got text that does not parse"),
        ("\0\1", StorageError, "expected a JSON file, got text that does not parse"),
    ],
)
def test_index_that_is_none(text: str, kind: type[Exception], message: str, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(kind, match=rf"{INDEX}: {message}.*{AGAIN}") as caught:
        Shards(tmp_path)
    assert "\n" not in str(caught.value)


def test_no_weights_at_all(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    message = (
        r"expected model\.safetensors or .* in the model's folder, got neither\. Save the model with save_pretrained"
    )
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(InvalidInputError, match=rf"{re.escape(str(folder))}: {message}"):
            Shards(folder)


def shrink(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (shrink, rf"{SINGLE}: c: expected 36 bytes at \d+, got 35\. {AGAIN}"),
        (Path.unlink, rf"{SINGLE}: c: expected to be read, got No such file.*\. Mend the disk or its mount, or copy"),
        (replace_by_folder, rf"{SINGLE}: c: expected to be read, got Is a directory.*and resume\."),
    ],
)
def test_file_that_changes_after_it_was_opened(change: Callable[[Path], Any], message: str, tmp_path: Path) -> None:
    save_file({"a": torch.arange(100.0), "c": torch.zeros(3, 3)}, tmp_path / SINGLE)
    shards = Shards(tmp_path)
    assert max(shards.values(), key=lambda stored: stored.offset).name == "c"
    change(tmp_path / SINGLE)
    with pytest.raises(StorageError, match=message) as caught:
        shards["c"].read()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("piece", [1, 7, 2**24])
def test_one_tensor_is_copied(piece: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shards, "_COPIED_BYTES", piece)
    tensors = {
        "a": torch.arange(15.0).view(3, 5).bfloat16(),
        "b": torch.tensor(3.5),
        "c": torch.empty(0, 4),
        "d": torch.arange(9, dtype=torch.int64),
    }
    save_file(tensors, tmp_path / SINGLE)
    for name, stored in Shards(tmp_path).items():
        stored.copy_to(tmp_path / "copy")
        found = load_file(tmp_path / "copy")
        assert list(found) == [name]
        assert torch.equal(found[name], tensors[name])
        assert (found[name].dtype, found[name].shape) == (tensors[name].dtype, tensors[name].shape)


def test_copy_of_a_file_that_shrank_leaves_nothing(tmp_path: Path) -> None:
    save_file({"a": torch.arange(100.0)}, tmp_path / SINGLE)
    stored = Shards(tmp_path)["a"]
    shrink(tmp_path / SINGLE)
    with pytest.raises(StorageError, match=rf"^{tmp_path / SINGLE}: a: expected 400 bytes at \d+, got 399"):
        stored.copy_to(tmp_path / "copy")
    assert [path.name for path in tmp_path.iterdir()] == [SINGLE]


MEMORY = """
import sys
import torch
from cdas_fast.models.shards import Shards

def sizes():
    with open("/proc/self/status") as status:
        lines = dict(line.split(":") for line in status)
    return [int(lines[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile", "VmHWM", "VmRSS")]

torch.ones(2**20, dtype=torch.uint8).view(torch.bfloat16)[::1024].sum()
room = torch.ones(2**21, dtype=torch.uint8)
shards = Shards(sys.argv[1])
before = sizes()
for stored in shards.values():
    stored.read_into(room)
assert shards.paths[0].name not in open("/proc/self/maps").read()
after = sizes()
print(after[0] - before[0], after[1] - before[1], after[2] - before[3])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_nothing_is_mapped(tmp_path: Path) -> None:
    save_file({f"layer.{number}": torch.ones(2**20, dtype=torch.bfloat16) for number in range(64)}, tmp_path / SINGLE)
    done = subprocess.run([sys.executable, "-c", MEMORY, str(tmp_path)], cwd=ROOT, capture_output=True, check=True)
    anonymous, of_files, peak = map(int, done.stdout.split())
    assert anonymous < 2 * 2**20
    assert of_files < 2 * 2**20
    assert peak < 4 * 2**20, "128 MiB were read through 2 MiB"
