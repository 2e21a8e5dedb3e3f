"""Rotary position embedding of queries and keys.

With x = (x_1, x_2) the halves of a head, and those of the tables likewise:

    y_1 = x_1 cos_1 - x_2 sin_1        y_2 = x_2 cos_2 + x_1 sin_2

The gradient is a rotation as well, by the tables cos and -(sin_2, sin_1); nothing but the tables is kept for it.

Source: Su et al., "RoFormer" (2021), in the layout of GPT-NeoX.
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
    require_floating,
    without_autocast,
)
from cdas_fast.ops.registration import register


def rotary_embedding(
    query: Tensor,  # (B, H, T, E)
    key: Tensor,  # (B, G, T, E)
    cos: Tensor,  # (B or 1, T, E)
    sin: Tensor,  # (B or 1, T, E)
    *,
    impl: Implementation = "auto",
) -> tuple[Tensor, Tensor]:
    """Rotate the heads of queries and keys by the positions of their tokens.

    Equivalent PyTorch, for the query::

        first, second = query.chunk(2, -1)
        query * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]

    Args:
        query: H heads of B times T tokens, of any strides; float16, bfloat16, float32 or float64.
        key: G heads.
        cos: frozen factors of the columns, E even.
        sin: those of the columns of the other half.
        impl: `auto`, `reference`, `cpp` or `triton`.

    Returns:
        Query and key of the same shapes and dtype, the heads of a token next to each other in memory. Products and
        sums are rounded to the dtype, autocast or not, as in the equivalent.

    Gradients reach `query` and `key`.

    Raises:
        InvalidInputError: shapes, dtypes or devices that do not fit, or tables that require a gradient.
        MissingDependencyError: an implementation that is not installed.
    """
    tensors = {"query": query, "key": key, "cos": cos, "sin": sin}
    require_floating("rotary_embedding", **tensors)
    for name in ("query", "key"):
        if tensors[name].dim() != 4:
            got = f"shape {tuple(tensors[name].shape)}"
            raise InvalidInputError(expected_got(f"rotary_embedding: {name}", "shape (B, H, T, E)", got))
    batch, _, tokens, width = query.shape
    if width % 2:
        raise InvalidInputError(expected_got("rotary_embedding: query", "heads of an even width", width))
    shapes = {
        "key": ((batch, key.shape[1], tokens, width),),
        "cos": ((1, tokens, width), (batch, tokens, width)),
        "sin": (tuple(cos.shape),),
    }
    for name, fitting in shapes.items():
        if tuple(tensors[name].shape) not in fitting:
            got = f"shape {tuple(tensors[name].shape)}"
            raise InvalidInputError(expected_got(f"rotary_embedding: {name}", f"shape {fitting[-1]}", got))
        if tensors[name].dtype != query.dtype:
            raise InvalidInputError(expected_got(f"rotary_embedding: {name}", query.dtype, tensors[name].dtype))
    if (cos.requires_grad or sin.requires_grad) and torch.is_grad_enabled():
        raise InvalidInputError(
            expected_got("rotary_embedding: cos and sin", "frozen tensors", "one that requires grad")
        )
    check_implementation("rotary_embedding", impl)
    rotated: tuple[Tensor, Tensor] = _rotate(query, key, cos, sin, impl)
    return rotated


class Functions(Protocol):
    """What an implementation consists of."""

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Heads (B, H, T, E) of any strides rotated, as a view of a new contiguous (B, T, H, E)."""


class Reference:
    """The formula in plain PyTorch."""

    @staticmethod
    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """See `Functions`."""
        heads = x.transpose(1, 2)
        first, second = heads.chunk(2, -1)
        rotated = heads * cos[:, :, None] + torch.cat([-second, first], -1) * sin[:, :, None]
        return rotated.contiguous().transpose(1, 2)


def _functions(impl: str, x: Tensor) -> Functions:
    functions: Functions = elementwise_functions("rotary_embedding", impl, x, Reference())
    return functions


def _kernel(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    functions = _functions(impl, query)
    with without_autocast(query.device):
        return functions.rotate(query, cos, sin), functions.rotate(key, cos, sin)


def _fake(query: Tensor, key: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    def rotated(x: Tensor) -> Tensor:
        batch, heads, tokens, width = x.shape
        return x.new_empty(batch, tokens, heads, width).transpose(1, 2)

    return rotated(query), rotated(key)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *_, cos, sin, ctx.impl = inputs
    ctx.save_for_backward(cos, sin)


def _backward(ctx: Any, grad_query: Tensor, grad_key: Tensor) -> tuple[Tensor | None, ...]:
    cos, sin = ctx.saved_tensors
    first, second = sin.chunk(2, -1)
    return *_rotate(grad_query, grad_key, cos, -torch.cat([second, first], -1), ctx.impl), None, None, None


_rotate = register(
    "rotary_embedding(Tensor query, Tensor key, Tensor cos, Tensor sin, str impl) -> (Tensor, Tensor)",
    _kernel,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
