"""A linear map by frozen weights that are found anew whenever they are needed.

    y = x W^T + b        grad_x = grad_y W

What is kept for the backward pass is a handle, that is who to ask for W, and never W itself or the bytes it was made
of. Kept bytes would be wrong as soon as the memory holds another layer's (streaming), and would fill the memory that
they were to leave (ZeRO-3): both happen to bitsandbytes' `MatMul4Bit`, the former without any sign of it.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cdas_fast.ops.frozen_linear import onednn_is_faster, onednn_product


class WeightHandle(Protocol):
    """Who knows a weight (O, I)."""

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight in `dtype` on the device of the activations, for reading until the next call at most."""


def handle_linear(
    x: Tensor,  # (..., I)
    handle: WeightHandle,
    bias: Tensor | None = None,  # (O,)
) -> Tensor:
    """x W^T + b as `torch.nn.functional.linear` has it, W in the dtype of `x`; (..., O).

    A gradient reaches `x`, once; the bias gets none. The handle is asked in the forward pass and, if there is one, in
    the backward pass again. Within autocast, `x` is cast as `linear` would.
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    result: Tensor = _HandleLinear.apply(x, handle, bias)
    return result


class _HandleLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, handle: WeightHandle, bias: Tensor | None) -> Tensor:
        ctx.handle = handle
        return _product(x, handle.dense(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, None, None]:
        return _product(grad_out, ctx.handle.dense(grad_out.dtype).T, None), None, None


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if x.dtype == torch.float32 and onednn_is_faster(x.device):
        return onednn_product(x, weight, bias)
    return torch.nn.functional.linear(x, weight, bias)
