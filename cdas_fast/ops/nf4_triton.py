"""NF4 weights to floating point on a GPU by the Triton kernel, see `Functions` in nf4.py."""

from __future__ import annotations

import torch
from torch import Tensor

import cdas_fast.kernels.nf4 as kernels

dequantize = kernels.dequantize


def empty(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """See `Functions`."""
    return torch.empty(shape, dtype=dtype, device=device)
