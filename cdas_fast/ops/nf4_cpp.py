"""NF4 weights to floating point on a CPU by the compiled kernel of csrc/nf4.h."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from cdas_fast.ops import cpu_library


def dequantize(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    offset: Tensor | None,
    out: Tensor,
) -> None:
    """See `Functions` in nf4.py."""
    arguments = cpu_library.Nf4(
        count=out.numel(),
        packed=packed.data_ptr(),
        absmax=absmax.data_ptr(),
        nested_absmax=None if nested_absmax is None else nested_absmax.data_ptr(),
        nested_code=None if nested_code is None else nested_code.data_ptr(),
        offset=None if offset is None else offset.data_ptr(),
        out=out.data_ptr(),
        dtype=cpu_library.DTYPES[out.dtype],
        threads=torch.get_num_threads(),
    )
    cpu_library.load().cdas_dequantize_nf4(ctypes.byref(arguments))


def empty(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """See `Functions` in nf4.py."""
    return cpu_library.in_huge_pages(torch.empty(shape, dtype=dtype, device=device))
