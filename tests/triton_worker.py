"""A second Python process for Triton kernels: interpreted on the CPU, or compiled for GPUs that are not there.

Triton decides once, when it is imported, whether kernels are interpreted, so each of the two needs its own process. The
functions of this module run there; no test module imports triton.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import mmap
import multiprocessing
import os
import pickle
import sys
import traceback
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Apart:
    """Rows that lie `stride` numbers apart in the worker's memory, of which only they are used."""

    rows: Tensor
    stride: int


@dataclass(frozen=True)
class Made:
    """What a function, named as module:name, returns in the worker."""

    function: str
    named: dict[str, Any]


# Every way a launch along rows can go at widths of tens: a row in one program's registers, several rows, parts of a
# row; and, of interventions, the directions in several blocks or in one.
_SMALL = {"tile": 64, "widest": 64, "reduction_tile": 64, "per_thread": 2, "resident": 512}
ROW_PARAMETERS = {
    "default": None,
    "row_in_one_program": Made("cdas_fast.kernels.launch:SubspaceParameters", _SMALL),
    "row_in_parts": Made("cdas_fast.kernels.launch:SubspaceParameters", {**_SMALL, "tile": 16, "widest": 8}),
}


class Worker:
    """The other process."""

    def __init__(self, pool: ProcessPoolExecutor) -> None:
        self._pool = pool

    def call(self, function: str, *arguments: Any, **named: Any) -> dict[str, Any]:
        """Call a function, named as module:name, and return its arguments by name as it leaves them.

        `return` is what it returns. ValueError is raised here, any other error as RuntimeError.
        """
        sent = pickle.dumps((function, arguments, named))
        received: dict[str, Any] = pickle.loads(self._pool.submit(_call, sent).result())
        return received


@contextmanager
def worker(interpret: bool) -> Iterator[Worker]:
    """A worker whose kernels are interpreted, or compiled. Skips the test if triton is not installed."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs triton: pip install 'cdas_fast[triton]'")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=_start, initargs=(interpret,)) as pool:
        yield Worker(pool)


def _start(interpret: bool) -> None:
    os.environ["TRITON_INTERPRET"] = "1" if interpret else "0"
    sys.path.insert(0, str(ROOT))  # for benchmarks
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # torch.empty is filled with NaN
    assert torch.empty(3).isnan().all()
    # numpy warns of what a kernel computes and then discards.
    warnings.simplefilter("ignore", RuntimeWarning)


def _call(sent: bytes) -> bytes:
    name, arguments, named = pickle.loads(sent)
    try:
        function = _function(name)
        bound = inspect.signature(function).bind(*arguments, **named)
        bound.apply_defaults()
        given = {name: _laid_out(value) for name, value in bound.arguments.items()}
        bound.arguments.update(given)
        given["return"] = function(*bound.args, **bound.kwargs)
        return pickle.dumps({name: _compact(value) for name, value in given.items()})
    except ValueError:
        raise
    except Exception:
        raise RuntimeError(traceback.format_exc()) from None


def _function(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _laid_out(value: Any) -> Any:
    if isinstance(value, Made):
        return _function(value.function)(**value.named)
    if not isinstance(value, Apart):
        return value
    (rows, width), size = value.rows.shape, value.rows.itemsize
    # Address space, of which nothing but the rows takes up memory.
    no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Python has it since 3.13
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    memory = mmap.mmap(-1, (rows * value.stride + width) * size, flags=flags)
    laid_out = torch.frombuffer(memory, dtype=value.rows.dtype).as_strided((rows, width), (value.stride, 1))
    return laid_out.copy_(value.rows)


def _compact(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
