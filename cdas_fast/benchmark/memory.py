"""How much memory is free, and how much a call takes at its peak beyond what lay in memory before."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

import cdas_fast
from cdas_fast.ops import cpu_library

_PROC = Path("/proc/self")


class PeakUnknownError(Exception):
    """The peak cannot be measured; the message says why."""


def free_bytes(device: torch.device) -> int | None:
    """Bytes that can still be allocated on `device`, None if the system does not say."""
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by torch, for what comes
        return torch.cuda.mem_get_info(device)[0] + held
    found = [_kib(Path("/proc/meminfo"), "MemAvailable")]
    try:  # a container may have less than the machine
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        found.append(limit - used + int(statistics["inactive_file"]))
    except (OSError, ValueError, KeyError):  # no such group, or "max": no limit
        pass
    return min((each for each in found if each is not None), default=None)


def peak_on_gpu(call: Callable[[], object]) -> int:
    """Most bytes that torch has allocated for `call` at a time."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def peak_on_cpu(call: Callable[[], object]) -> int:
    """Most bytes resident during `call` beyond those before it, as Linux counts them.

    Raises:
        PeakUnknownError: the system has no such count, or does not let this process set it back.
    """
    cpu_library.release_workspace()  # what an earlier call has kept for this one is this one's need
    gc.collect()
    _return_freed_memory()
    try:
        (_PROC / "clear_refs").write_text("5")
    except OSError as error:
        raise PeakUnknownError(f"the peak of a process cannot be set back here ({error})") from error
    before = _kib(_PROC / "status", "VmRSS")
    call()
    peak = _kib(_PROC / "status", "VmHWM")
    if before is None or peak is None:
        raise PeakUnknownError("this system does not tell the peak of a process")
    return max(0, peak - before)


def peak_in_child(subject: str, settings: Mapping[str, Any]) -> int:
    """`peak_on_cpu` in a process of its own, so that no allocator holds memory that somebody else has freed.

    Args:
        subject: `loss`, `interchange` or `train`.
        settings: JSON values from which the benchmark of that name makes the call (`memory_call`).

    Raises:
        PeakUnknownError: as `peak_on_cpu`, or the process failed.
    """
    if not _PROC.exists():
        raise PeakUnknownError("only Linux tells the peak of a process")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(os.path.abspath(path) for path in sys.path),
        "MALLOC_MMAP_THRESHOLD_": str(2**20),  # tensors go back to the system when they are freed
        "MKL_DISABLE_FAST_MM": "1",  # and so do MKL's buffers
    }
    command = [sys.executable, "-m", "cdas_fast.benchmark", subject, json.dumps(dict(settings))]
    root = Path(cdas_fast.__file__).parents[1]  # -m puts the working directory first on the path
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    if done.returncode != 0 or not lines:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise PeakUnknownError(f"the process that measures it failed with code {done.returncode}: {last}")
    answer = json.loads(lines[-1])
    if "unknown" in answer:
        raise PeakUnknownError(answer["unknown"])
    return int(answer["peak_bytes"])


def _kib(path: Path, name: str) -> int | None:
    """Bytes of the line `name: ... kB`."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)


def _return_freed_memory() -> None:
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):  # not glibc; TypeError on Windows
        return
