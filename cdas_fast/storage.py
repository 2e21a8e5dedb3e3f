"""Files that are either whole or absent: temporary file, fsync, rename."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from cdas_fast.errors import StorageError, expected_got


def make_output_folder(path: Path, what: str = "output folder") -> None:
    """Make the folder unless it exists, so that what cannot be written is refused before anything is computed.

    Errors call it `what`.

    Raises:
        StorageError: it cannot be made, or not be written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        remedy = f"Choose another {what}."
        raise StorageError(expected_got(what, f"{path} to be a folder", error.strerror, remedy)) from error
    if not os.access(path, os.R_OK | os.W_OK):
        raise StorageError(expected_got(what, f"{path} to be writable", "no permission", "Choose another one."))


def write_atomically(path: str | os.PathLike[str], write: Callable[[Path], None]) -> Path:
    """Let `write` fill a temporary file beside `path`, flush it to the disk and rename it to `path`.

    A reader sees the old content or the new one, never a part, even if the process is killed.
    Raises `StorageError` if the folder cannot be written or the disk is full; the old file is then untouched.
    """
    path = Path(path)
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
        os.close(descriptor)
        temporary = Path(name)
        write(temporary)
        descriptor = os.open(temporary, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp makes files that only their owner can read
        temporary.replace(path)
        temporary = None
        fsync_folder(path.parent)
    except StorageError:  # of what `write` reads
        raise
    except (OSError, SafetensorError) as error:
        raise StorageError(_explain(path, error)) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
    return path


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write `text` as UTF-8, whole or not at all."""

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    return write_atomically(path, write)


def write_json(path: str | os.PathLike[str], value: Any) -> Path:
    """Write `value` as indented JSON, whole or not at all. NaN and infinity are refused, as JSON has neither."""
    return write_text(path, json.dumps(value, indent=2, sort_keys=False, allow_nan=False) + "\n")


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> Path:
    """Write tensors as safetensors, whole or not at all."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return write_atomically(
        path, lambda temporary: save_file(contiguous, str(temporary), metadata=dict(metadata or {}))
    )


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file. Raises `StorageError` if it is missing or broken."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise StorageError(_explain(Path(path), error)) from error
    except ValueError as error:
        raise StorageError(expected_got(str(path), "a JSON file", f"text that does not parse ({error})")) from error


def read_tensors(path: str | os.PathLike[str], device: str = "cpu") -> dict[str, torch.Tensor]:
    """Read a safetensors file. Raises `StorageError` if it is missing, truncated or of another format."""
    if not Path(path).is_file():
        raise StorageError(expected_got(str(path), "a safetensors file", "no file"))
    try:
        with safe_open(str(path), framework="pt", device=device) as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        remedy = "The file is corrupt or truncated; copy or make it again."
        raise StorageError(expected_got(str(path), "a safetensors file", f"{error}", remedy)) from error


def sha256_of(*parts: str | bytes) -> str:
    """Hex SHA-256 of the parts, each preceded by its length so that the split matters."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


def _explain(path: Path, error: Exception) -> str:
    if isinstance(error, OSError):
        code = error.errno
    else:  # of safetensors, which tells the number in its text alone
        found = re.search(r"\(os error (\d+)\)", str(error))
        code = int(found[1]) if found else None
    if code == errno.ENOSPC:
        return f"{path}: no space left on the disk; nothing was overwritten. Free some space and run again."
    if code in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{path}: cannot be written or read ({os.strerror(code)}). Choose another folder, or mend permissions."
    if code in (errno.ENOTDIR, errno.EEXIST):
        return f"{path}: a part of this path is a file, not a folder. Choose another output folder."
    if code == errno.ENOENT:
        return f"{path}: no such file. Check the path."
    return f"{path}: {error}"


def fsync_folder(folder: Path) -> None:
    """Bring the names of the files in a folder to the disk."""
    if os.name == "nt":  # folders cannot be opened there, and the rename is durable without it
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
