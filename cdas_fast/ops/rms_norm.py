"""RMS norm of activations by a frozen weight.

    n = x / sqrt(mean(x^2) + eps)        y = (offset + weight) n

With g the gradient of y and u = (offset + weight) g:

    grad_x = (u - n mean(u n)) / sqrt(mean(x^2) + eps)

Nothing but x and the weight is kept for the backward pass: mean(x^2) is found anew in the sweep that finds mean(u n).

Source: Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019).
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from cdas_fast.errors import InvalidInputError, expected_got
from cdas_fast.ops.implementation import (
    Implementation,
    check_implementation,
    elementwise_functions,
    math_dtype,
    require_floating,
    without_autocast,
)
from cdas_fast.ops.registration import no_second_derivative, register


def rms_norm(
    x: Tensor,  # (..., D)
    weight: Tensor,  # (D,)
    eps: float,
    *,
    offset: float = 0.0,
    round_normalized: bool = True,
    impl: Implementation = "auto",
) -> Tensor:
    """Divide each row of `x` by its root mean square, and multiply by a frozen weight.

        y = (offset + weight) x / sqrt(mean(x^2) + eps)

    Equivalent PyTorch::

        n = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
        y = (offset + weight).to(x.dtype) * n.to(x.dtype)  # round_normalized, as in Llama and Qwen
        y = ((offset + weight.float()) * n).to(x.dtype)  # otherwise, as in OLMo-2 and, with offset=1, Gemma

    Args:
        x: activations (..., D) of any strides; float16, bfloat16, float32 or float64.
        weight: the frozen factor of each column, (D,).
        eps: what is added to the mean of the squares.
        offset: what is added to the weight.
        round_normalized: whether n and the factor are rounded to the dtype of `x` before they are multiplied.
        impl: `auto`, `reference`, `cpp` or `triton`.

    Returns:
        A new contiguous tensor of the shape and dtype of `x`. The maths is float32 (float64 for float64 input),
        autocast or not.

    The gradient reaches `x`, once: there is no second derivative. It is made without rounding in between, and rounded
    to the dtype of `x`.

    Raises:
        InvalidInputError: shapes, dtypes or devices that do not fit, or a weight that requires a gradient.
        MissingDependencyError: an implementation that is not installed.
    """
    require_floating("rms_norm", x=x, weight=weight)
    if not x.dim():
        raise InvalidInputError(expected_got("rms_norm: x", "shape (..., D)", "shape ()"))
    if tuple(weight.shape) != (x.shape[-1],):
        raise InvalidInputError(
            expected_got("rms_norm: weight", f"shape ({x.shape[-1]},)", f"shape {tuple(weight.shape)}")
        )
    if weight.requires_grad and torch.is_grad_enabled():
        remedy = "Only x receives a gradient; pass weight.detach()."
        raise InvalidInputError(expected_got("rms_norm: weight", "a frozen tensor", "one that requires grad", remedy))
    check_implementation("rms_norm", impl)
    return _rms_norm(x, weight, eps, offset, round_normalized, impl)


class Functions(Protocol):
    """What an implementation consists of. Activations may have any strides; results are new and contiguous."""

    def rms_norm_forward(
        self,
        x: Tensor,  # (..., D)
        factor: Tensor,  # (D,), contiguous, in the dtype of the maths
        eps: float,
        round_normalized: bool,
    ) -> Tensor:
        """The norm of the rows, in the dtype of `x`."""

    def rms_norm_backward(self, grad_out: Tensor, x: Tensor, factor: Tensor, eps: float) -> Tensor:
        """The gradient of `x`, in its dtype."""


class Reference:
    """The formulas in plain PyTorch."""

    @staticmethod
    def rms_norm_forward(x: Tensor, factor: Tensor, eps: float, round_normalized: bool) -> Tensor:
        """See `Functions`."""
        normalized = x.to(factor.dtype) * _scale(x.to(factor.dtype), eps)
        if round_normalized:
            normalized = normalized.to(x.dtype).to(factor.dtype)
        return (factor * normalized).to(x.dtype).contiguous()

    @staticmethod
    def rms_norm_backward(grad_out: Tensor, x: Tensor, factor: Tensor, eps: float) -> Tensor:
        """See `Functions`."""
        scale = _scale(x.to(factor.dtype), eps)
        normalized = x.to(factor.dtype) * scale
        upstream = factor * grad_out
        along = (upstream * normalized).mean(-1, keepdim=True)
        return (scale * (upstream - normalized * along)).to(x.dtype).contiguous()


def _scale(x: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def _functions(impl: str, x: Tensor) -> Functions:
    functions: Functions = elementwise_functions("rms_norm", impl, x, Reference())
    return functions


def _factor(x: Tensor, weight: Tensor, offset: float, round_normalized: bool) -> Tensor:
    factor = weight.to(math_dtype(x.dtype))
    if offset:
        factor = factor + offset
    if round_normalized:
        factor = factor.to(x.dtype).to(factor.dtype)
    return factor.contiguous()


def _kernel(x: Tensor, weight: Tensor, eps: float, offset: float, round_normalized: bool, impl: str) -> Tensor:
    with without_autocast(x.device):
        factor = _factor(x, weight, offset, round_normalized)
        return _functions(impl, x).rms_norm_forward(x, factor, eps, round_normalized)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, *ctx.parameters = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    gradient = _rms_norm_backward(grad_out, *ctx.saved_tensors, *ctx.parameters) if ctx.needs_input_grad[0] else None
    return gradient, None, None, None, None, None


def _backward_kernel(
    grad_out: Tensor, x: Tensor, weight: Tensor, eps: float, offset: float, round_normalized: bool, impl: str
) -> Tensor:
    with without_autocast(x.device):
        factor = _factor(x, weight, offset, round_normalized)
        return _functions(impl, x).rms_norm_backward(grad_out, x, factor, eps)


_rms_norm = register(
    "rms_norm(Tensor x, Tensor weight, float eps, float offset, bool round_normalized, str impl) -> Tensor",
    _kernel,
    fake=lambda x, *_: x.new_empty(x.shape),
    setup_context=_setup_context,
    backward=_backward,
)
_rms_norm_backward = register(
    "rms_norm_backward(Tensor grad_out, Tensor x, Tensor weight, float eps, float offset, bool round_normalized, "
    "str impl) -> Tensor",
    _backward_kernel,
    fake=lambda grad_out, x, *_: x.new_empty(x.shape),
    backward=no_second_derivative("rms_norm has"),
)
