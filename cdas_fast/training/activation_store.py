"""Activations of single sequences on the disk: found again after an interruption, and by every later run.

One folder holds stores of several identities (model, layers, prefix, ...), each in a folder of its own:

    FOLDER/5f1c0a9e3b7d2846/identity.json               what the entries belong to
    FOLDER/5f1c0a9e3b7d2846/segment-TIME-RANDOM.bin     tensors one behind the other, each at a multiple of 64 bytes
    FOLDER/5f1c0a9e3b7d2846/segment-TIME-RANDOM.jsonl   a line an entry: key, crc32, offset, shape and dtype by name

Files are only appended to, and each writer has a segment of its own, so that any number of processes may share a store
without locks. A line is written when its data are on the disk: a process killed at any moment leaves whole entries and
nothing that would be taken for one. Deleting a store in use takes nothing from who has it open (on Windows it fails).
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import logging
import math
import mmap
import os
import re
import secrets
import shutil
import sys
import time
import weakref
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import torch
from torch import Tensor

from cdas_fast.errors import InvalidInputError, StorageError, expected_got
from cdas_fast.storage import fsync_folder, make_output_folder, read_json, write_json

IDENTITY = "identity.json"
ALIGNMENT = 64  # bytes; a cache line, and the widest vector register
_FORMAT = 1  # of segments; a store of another one is another store
_KEY = re.compile(r"[0-9a-f]{16,128}")
_OWN_FILE = re.compile(r"segment-[0-9a-f]+-[0-9a-f]+\.(bin|jsonl)|\.?identity\.json(\..*\.partial)?")
_DTYPES: Final[dict[str, torch.dtype]] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32, torch.int64, torch.uint8)
}
_CHUNK = 2**22  # bytes read at a time while an entry is checked
_NO_RESERVE = 0x4000 if sys.platform == "linux" else 0  # the mmap module has no name for it

_logger = logging.getLogger(__name__)


def base_key(ids: Sequence[int], layer: int) -> str:
    """Key of a sequence's activations at `layer`."""
    return _hash("base", list(ids), layer)


def source_key(ids: Sequence[int], prompt_length: int, position: int, layers: Sequence[int]) -> str:
    """Key of a sequence's final hidden states that predict its response, and activations of `layers` at `position`."""
    return _hash("source", list(ids), prompt_length, position, list(layers))


def prompt_key(ids: Sequence[int], layers: Sequence[int]) -> str:
    """Key of the activations of `layers` at a prompt's last token."""
    return _hash("prompt", list(ids), list(layers))


def prefix_key(ids: Sequence[int], layer: int) -> str:
    """Key of what a runner keeps of a prefix, for suffixes from `layer` on."""
    return _hash("prefix", list(ids), layer)


def check_key(ids: Sequence[int]) -> str:
    """Key of a sequence's final hidden states at all tokens, which a suffix is compared with."""
    return _hash("check", list(ids))


def _hash(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


class ActivationStore:
    """Tensors by key, memory-mapped: what is handed out takes no memory that the system could not take back.

    Every entry is checked against its checksum before it is handed out for the first time. One that is broken, or whose
    data are missing, is dropped with a warning in the log, as if it had never been stored. Of several entries with the
    same key, the one in the oldest segment is handed out. Not for use by several threads.

    Args:
        folder: folder of stores, made if there is none.
        identity: what else the tensors depend on, in JSON values.

    Raises:
        InvalidInputError: an identity that is not JSON.
        StorageError: a folder that cannot be read or written, belongs to another identity or holds other files.
    """

    def __init__(self, folder: str | os.PathLike[str], identity: Mapping[str, Any]) -> None:
        try:
            canonical = json.dumps({**identity, "format": _FORMAT}, sort_keys=True, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise InvalidInputError(expected_got("identity of activations", "JSON values", str(error))) from error
        self.identity: dict[str, Any] = json.loads(canonical)
        self.path = Path(folder) / hashlib.sha256(canonical.encode()).hexdigest()[:16]
        self._segments: dict[str, _Segment | None] = {}  # by name; None if it has no data
        self._entries: dict[str, list[_Entry]] = {}  # by key, those that are not known to be broken
        make_output_folder(self.path, "folder of cached activations")
        self._check_identity()
        self.refresh()

    def find(self, keys: Iterable[str]) -> set[str]:
        """Those of the keys whose entries are there and whole, those that others have stored meanwhile included."""
        self.refresh()
        return {key for key in keys if self._intact(key) is not None}

    def get(self, key: str) -> dict[str, Tensor] | None:
        """The tensors of an entry, on the CPU; None if there is none.

        They are views of a private memory map: what is written to them is seen by this process alone, and takes memory.
        """
        entry = self._intact(key)
        return None if entry is None else entry.tensors()

    def writer(self, expected_bytes: int = 0) -> StoreWriter:
        """A writer with a segment of its own.

        Args:
            expected_bytes: how much will be stored, as far as is known.

        Raises:
            StorageError: there is less room than that on the disk.
        """
        try:
            free = shutil.disk_usage(self.path).free
        except OSError as error:
            raise StorageError(expected_got(str(self.path), "a folder to write to", error.strerror)) from error
        if expected_bytes > free:
            raise _no_room(self.path, expected_bytes, f"{free / 2**20:.0f} MiB")
        return StoreWriter(self)

    def refresh(self) -> None:
        """Take up what other processes have stored since the store was opened."""
        for path in sorted(self.path.glob("segment-*.jsonl")):
            if path.stem not in self._segments:
                self._segments[path.stem] = _Segment.open(path)
        for segment in filter(None, self._segments.values()):
            self._take_up(segment.read_index())

    @property
    def size(self) -> int:
        """Bytes of all files of the store."""
        return sum(path.stat().st_size for path in self.path.iterdir()) if self.path.is_dir() else 0

    def remove(self) -> None:
        """Delete the store. Tensors that were handed out, here or to other processes, stay as they are.

        Raises:
            StorageError: there are other files in its folder, or it cannot be deleted.
        """
        if not self.path.exists():
            return
        names = self._names()
        self._segments.clear()
        self._entries.clear()
        try:
            for name in sorted(names, key=lambda name: (name == IDENTITY, name.endswith(".bin"))):
                (self.path / name).unlink(missing_ok=True)
            self.path.rmdir()
        except FileNotFoundError:
            pass  # somebody else deletes it too
        except OSError as error:
            raise StorageError(expected_got(str(self.path), "a store that can be deleted", error.strerror)) from error

    def _names(self) -> list[str]:
        names = sorted(path.name for path in self.path.iterdir())
        foreign = [name for name in names if not _OWN_FILE.fullmatch(name)]
        if foreign:
            got = ", ".join(foreign[:4]) + (", ..." if len(foreign) > 4 else "")
            remedy = "Choose another folder for cached activations."
            raise StorageError(expected_got(str(self.path), "nothing but cached activations", got, remedy))
        return names

    def _check_identity(self) -> None:
        names = self._names()
        path = self.path / IDENTITY
        if not path.exists():  # it is written before any segment
            if any(name.startswith("segment-") for name in names):
                remedy = "Delete the folder; nobody can say what its activations belong to."
                raise StorageError(expected_got(str(self.path), f"a file {IDENTITY}", "none", remedy))
            write_json(path, self.identity)
            return
        found = read_json(path)
        if found != self.identity:
            found = found if isinstance(found, dict) else {}
            different = [
                name for name in sorted({*found, *self.identity}) if found.get(name) != self.identity.get(name)
            ]
            changes = "; ".join(f"{name} {found.get(name)!r}" for name in different)
            wanted = "; ".join(f"{name} {self.identity.get(name)!r}" for name in different)
            remedy = "The folder was changed by hand: delete it, or choose another one."
            raise StorageError(expected_got(str(path), wanted, changes, remedy))

    def _intact(self, key: str) -> _Entry | None:
        """The first entry of a key that holds what was stored; broken ones before it are dropped."""
        entries = self._entries.get(key, [])
        while entries:
            if entries[0].check():
                return entries[0]
            del entries[0]
        return None

    def _take_up(self, entries: Iterable[_Entry]) -> None:
        for entry in entries:
            self._entries.setdefault(entry.key, []).append(entry)


class StoreWriter:
    """Appends entries to a segment of its own. As a context manager it commits at the end, also upon an exception."""

    def __init__(self, store: ActivationStore) -> None:
        self._store = store
        self._path = store.path / f"segment-{time.time_ns():016x}-{secrets.token_hex(8)}.jsonl"
        self._end = 0  # of the data of whole entries
        self._index_end = 0  # of the committed lines
        self._added: dict[str, _Entry] = {}  # and not committed
        try:
            self._data = io.FileIO(self._path.with_suffix(".bin"), "x")
            self._index = io.FileIO(self._path, "x")
            fsync_folder(store.path)
            self._segment = _Segment(self._path)
        except OSError as error:
            raise self._failed(error, 0) from error
        store._segments[self._path.stem] = self._segment

    def add(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Append an entry, which counts from the next `commit` on. A key that is there already is left as it is.

        Raises:
            InvalidInputError: a key that is no hash, no tensors, or tensors of an unusual dtype.
            StorageError: the disk is full or the folder cannot be written. Entries added before are not affected.
        """
        if not _KEY.fullmatch(key):
            raise InvalidInputError(expected_got("key of an entry", "16 to 128 hexadecimal digits", repr(key)))
        if key in self._added or self._store._intact(key) is not None:
            return
        if not tensors:
            raise InvalidInputError(expected_got(f"entry {key}", "at least one tensor", "none"))
        pieces = {}
        pads = []
        end = self._end
        for name, tensor in tensors.items():
            if tensor.dtype not in _DTYPES.values():
                raise InvalidInputError(expected_got(f"entry {key}: {name}", " or ".join(_DTYPES), tensor.dtype))
            offset = -(-end // ALIGNMENT) * ALIGNMENT
            pads.append(offset - end)
            pieces[name] = _Piece(offset, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
            end = offset + pieces[name].nbytes
        checksum = _checksum_of_header(key, pieces)
        try:
            self._data.seek(self._end)
            for pad, tensor in zip(pads, tensors.values(), strict=True):
                content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
                checksum = zlib.crc32(content, checksum)
                _write(self._data, bytes(pad))
                _write(self._data, content)
        except OSError as error:
            _cut(self._data, self._end)
            raise self._failed(error, end - self._end) from error
        self._added[key] = _Entry(key, self._segment, pieces, checksum, checked=True)
        self._end = end

    def commit(self) -> None:
        """Bring the entries added so far to the disk, first their data, then their lines.

        Raises:
            StorageError: the disk is full or the folder cannot be written. Entries committed before are not affected.
        """
        if not self._added:
            return
        lines = "".join(entry.to_line() for entry in self._added.values()).encode()
        try:
            os.fsync(self._data.fileno())
            self._index.seek(self._index_end)
            _write(self._index, lines)
            os.fsync(self._index.fileno())
        except OSError as error:
            _cut(self._index, self._index_end)
            raise self._failed(error, sum(entry.nbytes for entry in self._added.values())) from error
        self._index_end += len(lines)
        self._segment.index_read = self._index_end
        self._store._take_up(self._added.values())
        self._added = {}

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.commit()
        except StorageError as second:
            if error is None:
                raise
            _logger.warning("%s", second)
        finally:
            self._close()

    def _close(self) -> None:
        for file in (self._index, self._data):
            file.close()
        if self._index_end == 0:
            for path in (self._path, self._path.with_suffix(".bin")):
                path.unlink(missing_ok=True)

    def _failed(self, error: OSError, wanted_bytes: int) -> StorageError:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return _no_room(self._store.path, wanted_bytes, error.strerror)
        remedy = "Entries stored before are kept."
        return StorageError(expected_got(str(self._store.path), "a folder to write to", error.strerror, remedy))


@dataclass(frozen=True)
class _Piece:
    """Where a tensor lies in its segment."""

    offset: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * _DTYPES[self.dtype].itemsize


class _Segment:
    """The data of one writer, mapped, and how far its index was read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data = io.FileIO(path.with_suffix(".bin"))  # kept open, so that deleting the store takes nothing away
        self.index_read = 0  # bytes
        self._map: mmap.mmap | None = None
        weakref.finalize(self, self.data.close)

    @classmethod
    def open(cls, path: Path) -> _Segment | None:
        """The segment whose index lies at `path`; None if its data cannot be read."""
        try:
            return cls(path)
        except OSError as error:
            if path.exists():  # not if its writer ended without an entry just now
                _logger.warning("%s: cannot be read (%s); its activations are computed again", path, error.strerror)
            return None

    def read_index(self) -> Iterator[_Entry]:
        """The entry of each whole line that was not read before."""
        try:
            if self.path.stat().st_size <= self.index_read:
                return
            with self.path.open("rb") as index:
                index.seek(self.index_read)
                *lines, _ = index.read().split(b"\n")  # the last one is being written, or never will be whole
        except FileNotFoundError:
            return  # the store was deleted
        except OSError as error:
            _logger.warning("%s: cannot be read (%s)", self.path, error.strerror)
            return
        size = os.fstat(self.data.fileno()).st_size
        for line in lines:
            self.index_read += len(line) + 1
            try:
                entry = _Entry.from_line(line, self)
            except (ValueError, KeyError, TypeError, AttributeError):
                _logger.warning("%s: a line that is no entry is left out", self.path)
                continue
            if entry.end > size:
                wanted = f"{entry.end} bytes of data"
                _logger.warning("%s", expected_got(str(self.path.with_suffix(".bin")), wanted, size, _AGAIN))
                continue
            yield entry

    def map(self, end: int) -> mmap.mmap:
        """A private map of the data up to `end` at least."""
        if self._map is None or len(self._map) < end:
            descriptor, size = self.data.fileno(), os.fstat(self.data.fileno()).st_size
            if os.name == "nt":
                self._map = mmap.mmap(descriptor, size, access=mmap.ACCESS_COPY)
            else:  # as that does, but the system need not set memory aside for what might be written
                protection = mmap.PROT_READ | mmap.PROT_WRITE
                self._map = mmap.mmap(descriptor, size, flags=mmap.MAP_PRIVATE | _NO_RESERVE, prot=protection)
        return self._map


@dataclass
class _Entry:
    """Tensors of one key in a segment."""

    key: str
    segment: _Segment = field(repr=False)
    pieces: dict[str, _Piece]
    crc32: int  # of key, names, shapes and dtypes, then the data
    checked: bool = False

    @classmethod
    def from_line(cls, line: bytes, segment: _Segment) -> _Entry:
        """Read a line of an index. Raises one of several errors if it is none."""
        values = json.loads(line)
        pieces = {
            name: _Piece(int(piece["offset"]), tuple(map(int, piece["shape"])), piece["dtype"])
            for name, piece in values["tensors"].items()
        }
        if not _KEY.fullmatch(values["key"]) or not all(
            piece.offset >= 0 and piece.offset % ALIGNMENT == 0 and min(piece.shape, default=0) >= 0
            for piece in pieces.values()
        ):
            raise ValueError("no key, or a tensor at no possible place")
        entry = cls(values["key"], segment, pieces, int(values["crc32"]))
        assert entry.nbytes >= 0  # raises KeyError upon an unknown dtype
        return entry

    def to_line(self) -> str:
        """The entry as a line of JSON."""
        tensors = {
            name: {"offset": piece.offset, "shape": piece.shape, "dtype": piece.dtype}
            for name, piece in self.pieces.items()
        }
        return json.dumps({"key": self.key, "crc32": self.crc32, "tensors": tensors}) + "\n"

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(piece.nbytes for piece in self.pieces.values())

    @property
    def end(self) -> int:
        """Bytes of the segment up to and with this entry."""
        return max((piece.offset + piece.nbytes for piece in self.pieces.values()), default=0)

    def check(self) -> bool:
        """Whether the data are what was stored; read and compared once."""
        if not self.checked:
            try:
                self.checked = self._checksum() == self.crc32
                found: str | None = "others"
            except OSError as error:
                found = error.strerror
            if not self.checked:
                what = f"{self.segment.path.with_suffix('.bin')}: entry {self.key}"
                _logger.warning("%s", expected_got(what, "the bytes that were stored", found, _AGAIN))
        return self.checked

    def tensors(self) -> dict[str, Tensor]:
        """Views of the memory map by name."""
        return {name: self._view(piece) for name, piece in self.pieces.items()}

    def _view(self, piece: _Piece) -> Tensor:
        dtype, count = _DTYPES[piece.dtype], math.prod(piece.shape)
        if count == 0:
            return torch.empty(piece.shape, dtype=dtype)
        mapped = self.segment.map(self.end)
        return torch.frombuffer(mapped, dtype=dtype, count=count, offset=piece.offset).view(piece.shape)

    def _checksum(self) -> int:
        """Read, not mapped: a disk that fails is an error then, and no signal."""
        checksum = _checksum_of_header(self.key, self.pieces)
        buffer = memoryview(bytearray(min(_CHUNK, max((piece.nbytes for piece in self.pieces.values()), default=0))))
        for piece in self.pieces.values():
            self.segment.data.seek(piece.offset)
            left = piece.nbytes
            while left:
                count = self.segment.data.readinto(buffer[: min(left, len(buffer))])
                if not count:
                    raise OSError(errno.EIO, "fewer bytes")
                checksum = zlib.crc32(buffer[:count], checksum)
                left -= count
        return checksum


_AGAIN = "It is computed again."


def _checksum_of_header(key: str, pieces: Mapping[str, _Piece]) -> int:
    header = [key, *([name, piece.shape, piece.dtype] for name, piece in pieces.items())]
    return zlib.crc32(json.dumps(header).encode())


def _write(file: io.FileIO, content: bytes | memoryview) -> None:
    rest = memoryview(content)
    while rest:
        rest = rest[file.write(rest) :]


def _cut(file: io.FileIO, size: int) -> None:
    """Take back what was written behind `size`, as far as the disk allows; nothing refers to it."""
    try:
        file.truncate(size)
    except OSError:
        _logger.warning("%s: a part of an entry stays there, unused", file.name)


def _no_room(path: Path, wanted_bytes: int, got: str | None) -> StorageError:
    remedy = "Free some space or choose another folder, and run again: what was stored before is kept."
    return StorageError(
        expected_got(str(path), f"{wanted_bytes / 2**20:.1f} MiB free for cached activations", got, remedy)
    )
