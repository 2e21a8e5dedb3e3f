"""The gated activation of an MLP.

    y = f(gate) up        f(g) = g s(p(g)),  s(p) = 1 / (1 + exp(-p))

    silu:       p(g) = g
    gelu_tanh:  p(g) = 2 sqrt(2 / pi) (g + 0.044715 g^3)

The second is g (1 + tanh(p / 2)) / 2, the tanh approximation of GELU. With h the gradient of y:

    grad_gate = f'(gate) up h        grad_up = f(gate) h        f'(g) = s + g s (1 - s) p'(g)

Nothing but gate and up is kept for the backward pass: f(gate) is made anew.

Source: Shazeer, "GLU Variants Improve Transformer" (2020).
"""

from __future__ import annotations

import math
from typing import Any, Literal, Protocol

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

Activation = Literal["silu", "gelu_tanh"]


def gated_activation(
    gate: Tensor,  # (..., I)
    up: Tensor,  # (..., I)
    *,
    activation: Activation = "silu",
    impl: Implementation = "auto",
) -> Tensor:
    """Multiply `up` by the activation of `gate`.

        y = f(gate) up

    Equivalent PyTorch::

        y = torch.nn.functional.silu(gate) * up
        y = torch.nn.functional.gelu(gate, approximate="tanh") * up

    Args:
        gate: what the activation is applied to, (..., I) of any strides; float16, bfloat16, float32 or float64.
        up: what it gates, of the same shape and dtype. Both may be halves of one tensor.
        activation: `silu` or `gelu_tanh`.
        impl: `auto`, `reference`, `cpp` or `triton`.

    Returns:
        A new contiguous tensor of their shape and dtype. The maths is float32 (float64 for float64 input), autocast or
        not; f(gate) is rounded to the dtype before the product, as in the equivalent.

    Gradients reach `gate` and `up`, once: there is no second derivative. They are made without rounding in between.

    Raises:
        InvalidInputError: shapes, dtypes, devices or an activation that do not fit.
        MissingDependencyError: an implementation that is not installed.
    """
    require_floating("gated_activation", gate=gate, up=up)
    if not gate.dim():
        raise InvalidInputError(expected_got("gated_activation: gate", "shape (..., I)", "shape ()"))
    if up.shape != gate.shape:
        raise InvalidInputError(
            expected_got("gated_activation: up", f"shape {tuple(gate.shape)}", f"shape {tuple(up.shape)}")
        )
    if up.dtype != gate.dtype:
        raise InvalidInputError(expected_got("gated_activation: up", f"dtype {gate.dtype}", up.dtype))
    if activation not in ("silu", "gelu_tanh"):
        raise InvalidInputError(expected_got("gated_activation: activation", "silu or gelu_tanh", repr(activation)))
    check_implementation("gated_activation", impl)
    return _gated_activation(gate, up, activation, impl)


class Functions(Protocol):
    """What an implementation consists of. Tensors may have any strides; results are new and contiguous."""

    def gated_activation_forward(self, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        """f(gate) up, in their dtype."""

    def gated_activation_backward(
        self, grad_out: Tensor, gate: Tensor, up: Tensor, activation: str, need_gate: bool, need_up: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of gate and up, in their dtype; None where not needed."""


class Reference:
    """The formulas in plain PyTorch."""

    @staticmethod
    def gated_activation_forward(gate: Tensor, up: Tensor, activation: str) -> Tensor:
        """See `Functions`."""
        if activation == "silu":
            activated = torch.nn.functional.silu(gate)
        else:
            activated = torch.nn.functional.gelu(gate, approximate="tanh")
        return (activated * up).contiguous()

    @staticmethod
    def gated_activation_backward(
        grad_out: Tensor, gate: Tensor, up: Tensor, activation: str, need_gate: bool, need_up: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """See `Functions`."""
        maths = math_dtype(gate.dtype)
        g, gradient = gate.to(maths), grad_out.to(maths)
        value, slope = g, torch.ones((), dtype=maths, device=g.device)
        if activation == "gelu_tanh":
            bounded = g.clamp(-32, 32)  # beyond, s is 0 or 1, and the cube of g may be infinite
            value = 2 * math.sqrt(2 / math.pi) * (bounded + 0.044715 * bounded**3)
            slope = 2 * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * bounded**2)
        sigmoid, rest = value.sigmoid(), (-value).sigmoid()
        grad_gate = grad_up = None
        if need_gate:
            grad_gate = ((sigmoid + g * (sigmoid * rest) * slope) * (up * gradient)).to(gate.dtype).contiguous()
        if need_up:
            grad_up = (g * sigmoid * gradient).to(gate.dtype).contiguous()
        return grad_gate, grad_up


def _functions(impl: str, gate: Tensor) -> Functions:
    functions: Functions = elementwise_functions("gated_activation", impl, gate, Reference())
    return functions


def _kernel(gate: Tensor, up: Tensor, activation: str, impl: str) -> Tensor:
    with without_autocast(gate.device):
        return _functions(impl, gate).gated_activation_forward(gate, up, activation)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gate, up, *ctx.parameters = inputs
    ctx.save_for_backward(gate, up)


def _backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    gate, up = ctx.saved_tensors
    activation, impl = ctx.parameters
    needed = ctx.needs_input_grad[:2]
    gradients = iter(_gated_activation_backward(grad_out, gate, up, activation, *needed, impl))
    return *(next(gradients) if need else None for need in needed), None, None


def _backward_kernel(
    grad_out: Tensor, gate: Tensor, up: Tensor, activation: str, need_gate: bool, need_up: bool, impl: str
) -> list[Tensor]:
    with without_autocast(gate.device):
        gradients = _functions(impl, gate).gated_activation_backward(grad_out, gate, up, activation, need_gate, need_up)
    return [gradient for gradient in gradients if gradient is not None]


def _backward_fake(
    grad_out: Tensor, gate: Tensor, up: Tensor, activation: str, need_gate: bool, need_up: bool, impl: str
) -> list[Tensor]:
    return [gate.new_empty(gate.shape) for need in (need_gate, need_up) if need]


_gated_activation = register(
    "gated_activation(Tensor gate, Tensor up, str activation, str impl) -> Tensor",
    _kernel,
    fake=lambda gate, *_: gate.new_empty(gate.shape),
    setup_context=_setup_context,
    backward=_backward,
)
_gated_activation_backward = register(
    "gated_activation_backward(Tensor grad_out, Tensor gate, Tensor up, str activation, bool need_gate, bool need_up, "
    "str impl) -> Tensor[]",
    _backward_kernel,
    fake=_backward_fake,
    backward=no_second_derivative("gated_activation has"),
)
