"""Tensors of a safetensors checkpoint, in one file or several, read one at a time into memory that is there already.

A file is an 8-byte length, a header in JSON, and the data: https://huggingface.co/docs/safetensors. What is read does
not go through a memory map, so that nothing but the tensor asked for counts as memory of the process.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from cdas_fast.errors import InvalidInputError, StorageError, expected_got
from cdas_fast.storage import read_json, write_atomically

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES: Final[dict[str, torch.dtype]] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_COPIED_BYTES = 16 * 2**20  # at a time
_LONGEST_HEADER = 100_000_000  # bytes; that of the format
_AGAIN = "The file is truncated or corrupt: download or copy it again."


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in a file."""

    path: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int  # from the beginning of the file

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size."""
        return self.numel * self.dtype.itemsize

    def read(self) -> Tensor:
        """The tensor, in new memory of the CPU."""
        data = torch.empty(self.nbytes, dtype=torch.uint8)
        self.read_into(data)
        return data.view(self.dtype).view(self.shape) if self.numel else torch.empty(self.shape, dtype=self.dtype)

    def read_into(self, data: Tensor, begin: int = 0) -> None:
        """Read bytes from `begin` on into `data`, uint8 on the CPU, until it is full.

        Raises:
            StorageError: the file is gone, shorter than it was, or cannot be read.
        """
        wanted = data.numel()
        if not wanted:
            return
        view, done = memoryview(data.numpy()), 0  # type: ignore[arg-type]
        try:
            with open(self.path, "rb", buffering=0) as file:
                file.seek(self.offset + begin)
                while done < wanted:
                    count = file.readinto(view[done:])
                    if not count:
                        break
                    done += count
        except OSError as error:
            remedy = "Mend the disk or its mount, or copy the file again, and resume."
            raise StorageError(
                expected_got(f"{self.path}: {self.name}", "to be read", error.strerror, remedy)
            ) from error
        if done < wanted:
            what, expected = f"{self.path}: {self.name}", f"{wanted} bytes at {self.offset + begin}"
            raise StorageError(expected_got(what, expected, done, _AGAIN))

    def copy_to(self, path: Path) -> None:
        """Write a safetensors file of this tensor alone, whole or not at all, piece by piece."""
        (dtype,) = (name for name, each in _DTYPES.items() if each == self.dtype)
        entry = {"dtype": dtype, "shape": self.shape, "data_offsets": [0, self.nbytes]}
        header = json.dumps({"__metadata__": {"format": "pt"}, self.name: entry}).encode()
        header += b" " * (-len(header) % 8)  # data begin at a multiple of 8 bytes
        piece = torch.empty(min(_COPIED_BYTES, self.nbytes), dtype=torch.uint8)

        def write(temporary: Path) -> None:
            with temporary.open("wb") as file:
                file.write(struct.pack("<Q", len(header)) + header)
                for begin in range(0, self.nbytes, _COPIED_BYTES):
                    part = piece[: self.nbytes - begin]
                    self.read_into(part, begin)
                    file.write(memoryview(part.numpy()))  # type: ignore[arg-type]

        write_atomically(path, write)


class Shards(Mapping[str, StoredTensor]):
    """The tensors of a checkpoint folder by name. Every file's header is read and its length checked; no data are.

    Args:
        folder: holds `model.safetensors`, or `model.safetensors.index.json` and the files that it names.

    Raises:
        InvalidInputError: there is neither, or an index that is none.
        StorageError: a file that is missing, truncated or corrupt, by name.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self._tensors: dict[str, StoredTensor] = {}
        if (self.folder / SINGLE).is_file():  # first, as transformers does: an index may be an older save's
            names = [SINGLE]
        elif (self.folder / INDEX).is_file():
            names = self._indexed()
        else:
            wanted = f"{SINGLE} or {INDEX} in the model's folder"
            remedy = "Save the model with save_pretrained(..., safe_serialization=True)."
            raise InvalidInputError(expected_got(f"model {self.folder}", wanted, "neither", remedy))
        for name in names:
            self._tensors |= read_header(self.folder / name)
        self.paths = tuple(self.folder / name for name in names)

    def _indexed(self) -> list[str]:
        try:
            index = read_json(self.folder / INDEX)
        except StorageError as error:
            raise StorageError(f"{error}. {_AGAIN}") from error
        files = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
            raise InvalidInputError(
                expected_got(str(self.folder / INDEX), "an index with a weight_map", "none", _AGAIN)
            )
        return sorted(set(files.values()))

    def __getitem__(self, name: str) -> StoredTensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file.

    Raises:
        StorageError: the file is missing, truncated or corrupt.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            head = file.read(8)
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else -1
            if not 0 < length <= min(_LONGEST_HEADER, size - 8):
                raise StorageError(expected_got(str(path), "a safetensors file", f"{size} bytes of another", _AGAIN))
            header = json.loads(file.read(length))
    except StorageError:  # which is an OSError
        raise
    except OSError as error:
        remedy = "Download or copy the model again."
        raise StorageError(expected_got(str(path), "a safetensors file", error.strerror, remedy)) from error
    except (ValueError, RecursionError) as error:
        raise StorageError(expected_got(str(path), "a safetensors header", str(error), _AGAIN)) from error
    if not isinstance(header, dict):
        raise StorageError(expected_got(str(path), "a safetensors header", type(header).__name__, _AGAIN))
    tensors = {}
    try:
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            begin, end = entry["data_offsets"]
            if entry["dtype"] not in _DTYPES:
                remedy = "Save the model in one of these."
                raise StorageError(expected_got(f"{path}: {name}", " or ".join(_DTYPES), entry["dtype"], remedy))
            if any(type(number) is not int or number < 0 for number in (*entry["shape"], begin, end)):
                got = f"shape {entry['shape']} at {begin}"
                raise StorageError(expected_got(f"{path}: {name}", "sizes from 0", got, _AGAIN))
            stored = StoredTensor(path, name, _DTYPES[entry["dtype"]], tuple(entry["shape"]), 8 + length + begin)
            if stored.nbytes != end - begin or 8 + length + end > size:
                wanted = f"{stored.nbytes} bytes of {name}, and a file of at least {8 + length + end}"
                raise StorageError(expected_got(str(path), wanted, f"{end - begin}, and {size}", _AGAIN))
            tensors[name] = stored
    except (KeyError, TypeError, ValueError) as error:
        raise StorageError(expected_got(str(path), "a safetensors header", f"one without {error}", _AGAIN)) from error
    return tensors
