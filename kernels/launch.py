"""How the Triton kernels are launched: parameters for each architecture, and a search for better ones on request.

No parameter here was measured. They follow from what a part holds (registers, warps, bytes under way that saturate its
memory) and from what the compiler makes of the kernels, see benchmarks/compile_matrix.md.

With `CDAS_FAST_TRITON_AUTOTUNE=1` in the environment a launcher times a few alternatives when it first meets a shape
and keeps the fastest for the life of the process. That waits for the device, and makes the order of the sums, hence the
last bits of a result, depend on timings. Nothing is timed while a CUDA graph is captured.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import JITFunction

AUTOTUNE_VARIABLE = "CDAS_FAST_TRITON_AUTOTUNE"


@dataclass(frozen=True)
class Architecture:
    """A GPU, as far as launches depend on it."""

    name: str  # sm_90, gfx942, ...
    warp_size: int
    multiprocessors: int


@dataclass(frozen=True)
class HeadParameters:
    """Launch of the kernels that run along rows of logits."""

    block: int = 1024  # vocabulary entries that a program holds at once, a power of two
    num_warps: int = 4
    programs: int = 6  # that fit on a multiprocessor, and that rows are split for


@dataclass(frozen=True)
class SubspaceParameters:
    """Launch of the kernels that run along rows of hidden states. Tiles and widths are powers of two."""

    tile: int = 4096  # numbers of hidden that a program holds at once, unless a row is longer
    widest: int = 8192  # row that a program holds whole
    reduction_tile: int = 8192  # numbers of W that a program holds while it sums over rows
    per_thread: int = 16  # of these numbers, unless that takes more than 512 threads
    resident: int = 512  # threads that fit on a multiprocessor, and that the sum over rows is split for


# Rows of logits: 6 programs of 128 threads that each load 4 x 16 bytes have 48 KiB under way, more than any of these
# parts' memory bandwidth per multiprocessor times its latency, and leave 80 registers a thread, which do.
# Rows of hidden: 512 threads have 128 registers each on NVIDIA's parts, 1024 on AMD's. No loop has a product of
# matrices, so `num_stages` has nothing to act on.
DEFAULT = HeadParameters(), SubspaceParameters()
TABLE = {
    "sm_80": DEFAULT,
    "sm_86": DEFAULT,
    "sm_89": DEFAULT,
    "sm_90": DEFAULT,
    "sm_100": DEFAULT,
    "sm_120": DEFAULT,
    "gfx942": (HeadParameters(), SubspaceParameters(resident=1024)),
}

Parameters = TypeVar("Parameters", HeadParameters, SubspaceParameters)
_fastest: dict[Hashable, Any] = {}


def head_parameters(device: torch.device) -> HeadParameters:
    """Those of the device's architecture, of `DEFAULT` if the table has none."""
    return TABLE.get(architecture(device).name, DEFAULT)[0]


def subspace_parameters(device: torch.device, dtype: torch.dtype) -> SubspaceParameters:
    """Those of the device's architecture, of `DEFAULT` if the table has none; float64 takes twice the registers."""
    parameters = TABLE.get(architecture(device).name, DEFAULT)[1]
    if dtype != torch.float64:
        return parameters
    halved = ("tile", "widest", "reduction_tile", "resident")
    return replace(parameters, **{name: getattr(parameters, name) // 2 for name in halved})


def head_candidates(parameters: HeadParameters) -> list[HeadParameters]:
    """What is timed: half and double the block, and half the warps."""
    return [
        replace(parameters, block=block, num_warps=num_warps)
        for block in (parameters.block, parameters.block // 2, parameters.block * 2)
        for num_warps in (parameters.num_warps, parameters.num_warps // 2)
    ]


def subspace_candidates(parameters: SubspaceParameters) -> list[SubspaceParameters]:
    """What is timed: half and double the tile, and half the numbers of a thread."""
    return [
        replace(parameters, tile=tile, per_thread=per_thread)
        for tile in (parameters.tile, parameters.tile // 2, parameters.tile * 2)
        for per_thread in (parameters.per_thread, parameters.per_thread // 2)
    ]


def row_threads(x: Tensor, tile: int, parameters: SubspaceParameters) -> dict[str, Any]:
    """Warps for a tile of so many numbers of `x`, and the dtype of the maths."""
    num_warps = max(1, min(tile // parameters.per_thread, 512) // architecture(x.device).warp_size)
    return {"num_warps": num_warps, "DTYPE": math_type(x)}


def math_dtype(x: Tensor) -> torch.dtype:
    """The dtype of the maths for numbers such as those of `x`: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def math_type(x: Tensor) -> Any:
    """`math_dtype` as kernels take it."""
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def autotunes(device: torch.device) -> bool:
    """Whether candidates are to be timed."""
    if os.environ.get(AUTOTUNE_VARIABLE) != "1" or device.type != "cuda":
        return False
    return not torch.cuda.is_current_stream_capturing()


def fastest(key: Hashable, candidates: Sequence[Parameters], run: Callable[[Parameters], None]) -> Parameters:
    """The candidate with which `run` takes least time, found once for each key."""
    if key not in _fastest:
        _fastest[key] = min(candidates, key=lambda each: triton.testing.do_bench(lambda: run(each), warmup=5, rep=20))
    chosen: Parameters = _fastest[key]
    return chosen


def architecture(device: torch.device) -> Architecture:
    """What a device is; for the interpreter, which runs kernels on a CPU, a GPU of 4 multiprocessors."""
    if device.type != "cuda":
        return Architecture("interpreter", 32, 4)
    return _architecture(torch.cuda.current_device() if device.index is None else device.index)


@cache
def _architecture(index: int) -> Architecture:
    properties = torch.cuda.get_device_properties(index)
    name = f"sm_{properties.major}{properties.minor}"
    if torch.version.hip:
        name = properties.gcnArchName.partition(":")[0]
    return Architecture(name, 64 if name.startswith("gfx9") else 32, properties.multi_processor_count)


def run(
    kernel: Any, grid: tuple[int, ...], *arguments: Any, num_warps: int, resident: int | None = None, **constants: Any
) -> None:
    """Launch on the device of the first argument. Products and sums may be fused, whatever triton's default.

    `resident` is the number of threads that are to fit on a multiprocessor. Told the registers that leaves, NVIDIA's
    compiler uses them all; on its own it settles for fewer and spills the rest.
    """
    device = arguments[0].device
    if resident is not None and architecture(device).name.startswith("sm_"):
        constants["maxnreg"] = min(255, 65536 // max(resident, 32 * num_warps) // 8 * 8)
    _start(kernel, grid, device, arguments, {"num_warps": num_warps, "enable_fp_fusion": True, **constants})


def _start(
    kernel: Any, grid: tuple[int, ...], device: torch.device, arguments: tuple[Any, ...], constants: dict[str, Any]
) -> None:
    if device.type != "cuda" and isinstance(kernel, JITFunction):
        raise ValueError(f"expected tensors on a GPU, or TRITON_INTERPRET=1 when triton is imported, got {device}")
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](*arguments, **constants)


def check(
    name: str,
    tensor: Tensor,
    shape: tuple[int, ...],
    like: Tensor,
    dtype: torch.dtype | None = None,
    contiguous: bool = False,
) -> None:
    """Raise ValueError unless a tensor lies beside `like`, has this shape and dtype and at least contiguous rows."""
    fits = tuple(tensor.shape) == shape and tensor.device == like.device and dtype in (None, tensor.dtype)
    rows_are_contiguous = not contiguous and (tensor.stride(-1) == 1 or tensor.shape[-1] == 1)
    if not fits or not (tensor.is_contiguous() or rows_are_contiguous):
        wanted = f"{'contiguous' if contiguous else 'contiguous rows of'} {dtype or 'numbers'}, shape {shape}"
        got = f"{tensor.dtype}, shape {tuple(tensor.shape)}, strides {tensor.stride()} on {tensor.device}"
        raise ValueError(f"{name}: expected {wanted} on {like.device}, got {got}")
