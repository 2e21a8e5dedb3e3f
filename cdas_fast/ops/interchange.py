"""Distributed interchange intervention on a low-rank subspace of the residual stream.

    clamp:        Phi(h; a) = h + W^T (a - W h)
    interchange:  a = W h_source

W has R rows of width D. With orthonormal rows, W Phi(h; a) = a and the complement of the subspace is untouched; with
one row w of unit length this is h + (a - w.h) w. The rows are used as given: nothing is normalised here.

With g the gradient of Phi(h; a), and sums over the positions where the intervention is made:

    grad_h = g - W^T W g        grad_a = sum W g        grad_W = sum (a - W h) g^T - (W g) h^T

and for a = W h_source, grad_source = W^T grad_a and grad_W gains grad_a h_source^T. Elsewhere grad_h = g.

Source: Geiger et al., "Finding Alignments Between Interpretable Causal Variables and Distributed Neural
Representations" (2023); Wu et al., "Interpretability at Scale" (2023).
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from cdas_fast.errors import InvalidInputError, expected_got
from cdas_fast.ops.implementation import (
    Implementation,
    check_implementation,
    choose_implementation,
    math_dtype,
    require_floating,
    without_autocast,
)
from cdas_fast.ops.registration import no_second_derivative, register


def interchange(
    hidden: Tensor,  # (B, T, D) or (N, D)
    source: Tensor,  # (B, D) or (N, D)
    direction: Tensor,  # (R, D) or (K, R, D)
    *,
    mask: Tensor | None = None,  # (B, T) or (N,)
    direction_index: Tensor | None = None,  # (B,) or (N,)
    impl: Implementation = "auto",
) -> Tensor:
    """Give `hidden` the coordinates that `source` has in the subspace of `direction`.

        Phi(h) = h + W^T (W h_source - W h)

    Equivalent PyTorch for one shared direction::

        value = source @ direction.T                                        # (B, R)
        out = hidden + (value[:, None] - hidden @ direction.T) @ direction  # (B, T, D)
        out = torch.where(mask[..., None], out, hidden)

    Args:
        hidden: base activations, a batch (B, T, D) or packed rows (N, D).
        source: activations that are read, one per sequence (B, D) or one per packed row (N, D).
        direction: W, the R rows (R, D), or those of K concepts (K, R, D).
        mask: True where the intervention is made, (B, T) or (N,); everywhere if None.
        direction_index: for K concepts, the concept of each sequence (B,) or packed row (N,).
        impl: `auto`, `reference`, `cpp` or `triton`.

    Returns:
        A new tensor of the shape and dtype of `hidden`. The maths is float32 (float64 for float64 input), autocast or
        not.

    Gradients reach `hidden`, `source` and `direction`, the latter through both projections, once: there is no second
    derivative. Where the mask is False nothing is read, so `hidden` may hold NaN there; and `source`, if a whole
    sequence is masked.

    Raises:
        InvalidInputError: shapes, dtypes or devices that do not fit.
        MissingDependencyError: an implementation that is not installed.
    """
    _check_subspace("interchange", hidden, direction, mask, direction_index)
    require_floating("interchange", hidden=hidden, source=source, direction=direction)
    expected = (hidden.shape[0], hidden.shape[-1])
    if tuple(source.shape) != expected:
        raise InvalidInputError(expected_got("interchange: source", f"shape {expected}", tuple(source.shape)))
    check_implementation("interchange", impl)
    direction = direction.to(math_dtype(hidden.dtype))
    if mask is not None:
        # The source of a sequence without an intervention may hold NaN, which 0 * NaN would bring to the direction.
        is_read = mask if mask.dim() == 1 else mask.any(1)
        source = source.masked_fill(~is_read[:, None], 0.0)
    value = _project(source, direction, direction_index, impl)
    return _clamp(hidden, value, direction, mask, direction_index, impl)


def clamp(
    hidden: Tensor,  # (B, T, D) or (N, D)
    value: Tensor | float,  # scalar, (R,), or (B, R) / (N, R)
    direction: Tensor,  # (R, D) or (K, R, D)
    *,
    mask: Tensor | None = None,  # (B, T) or (N,)
    direction_index: Tensor | None = None,  # (B,) or (N,)
    impl: Implementation = "auto",
) -> Tensor:
    """Set the coordinates of `hidden` in the subspace of `direction` to `value`.

        Phi(h; a) = h + W^T (a - W h)

    Args:
        hidden: activations, a batch (B, T, D) or packed rows (N, D).
        value: a, the coordinates: one number for all, one per row of W (R,), or one set per sequence (B, R)
            or packed row (N, R).
        direction: W, the R rows (R, D), or those of K concepts (K, R, D).
        mask: True where the intervention is made, (B, T) or (N,); everywhere if None.
        direction_index: for K concepts, the concept of each sequence (B,) or packed row (N,).
        impl: `auto`, `reference`, `cpp` or `triton`.

    Returns:
        A new tensor of the shape and dtype of `hidden`. The maths is float32 (float64 for float64 input), autocast or
        not.

    Gradients reach `hidden`, `value` and `direction`, once: there is no second derivative. Where the mask is False
    nothing is read, so `hidden` may hold NaN there.

    Raises:
        InvalidInputError: shapes, dtypes or devices that do not fit.
        MissingDependencyError: an implementation that is not installed.
    """
    _check_subspace("clamp", hidden, direction, mask, direction_index)
    value = torch.as_tensor(value, dtype=math_dtype(hidden.dtype), device=hidden.device)
    require_floating("clamp", hidden=hidden, direction=direction)
    rows, rank = hidden.shape[0], direction.shape[-2]
    if tuple(value.shape) not in ((), (rank,), (rows, rank)):
        shapes = f"a number, shape ({rank},) or shape ({rows}, {rank})"
        raise InvalidInputError(expected_got("clamp: value", shapes, f"shape {tuple(value.shape)}"))
    check_implementation("clamp", impl)
    direction = direction.to(math_dtype(hidden.dtype))
    return _clamp(hidden, value.expand(rows, rank), direction, mask, direction_index, impl)


def project(
    source: Tensor,  # (B, D)
    direction: Tensor,  # (R, D) or (K, R, D)
    *,
    direction_index: Tensor | None = None,  # (B,)
    impl: Implementation = "auto",
) -> Tensor:
    """Coordinates W h_source (B, R) in the subspace of `direction`, in the dtype of the maths of `source`.

    With them as `value`, `clamp` is `interchange`; packed rows take those of their sequence, `project(...)[owners]`.
    Gradients reach `source` and `direction`. For arguments and errors see `interchange`.
    """
    _check_subspace("project", source, direction, None, direction_index)
    require_floating("project", source=source, direction=direction)
    check_implementation("project", impl)
    return _project(source, direction.to(math_dtype(source.dtype)), direction_index, impl)


class Functions(Protocol):
    """What an implementation consists of. Tensors may have any strides; results are new and contiguous."""

    def clamp_forward(
        self,
        hidden: Tensor,  # (B, T, D) or (N, D)
        value: Tensor,  # (B, R) or (N, R), in the dtype of the maths
        direction: Tensor,  # (R, D) or (K, R, D), in the dtype of the maths
        mask: Tensor | None,
        direction_index: Tensor | None,
    ) -> Tensor:
        """Phi(hidden; value), in the dtype of `hidden`."""

    def clamp_backward(
        self,
        grad_out: Tensor,  # of the shape and dtype of hidden
        hidden: Tensor | None,  # given if need_direction, as is value
        value: Tensor | None,
        direction: Tensor,
        mask: Tensor | None,
        direction_index: Tensor | None,
        need_hidden: bool,
        need_value: bool,
        need_direction: bool,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of hidden, value and direction, each in the dtype of what it belongs to; None where not needed."""

    def project(self, source: Tensor, direction: Tensor, direction_index: Tensor | None) -> Tensor:
        """W h_source of (B, D) or (N, D), (B, R) or (N, R) in the dtype of `direction`."""


class Reference:
    """The formulas in plain PyTorch."""

    @staticmethod
    def clamp_forward(
        hidden: Tensor, value: Tensor, direction: Tensor, mask: Tensor | None, direction_index: Tensor | None
    ) -> Tensor:
        """See `Functions`."""
        rows = _rows(direction, direction_index)
        base = hidden.to(direction.dtype)
        if hidden.dim() == 3:
            value = value[:, None]
        out = base + _times_rows(value - _times_columns(base, rows), rows)
        if mask is not None:
            out = torch.where(mask[..., None], out, base)
        return out.to(hidden.dtype).contiguous()

    @staticmethod
    def clamp_backward(
        grad_out: Tensor,
        hidden: Tensor | None,
        value: Tensor | None,
        direction: Tensor,
        mask: Tensor | None,
        direction_index: Tensor | None,
        need_hidden: bool,
        need_value: bool,
        need_direction: bool,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """See `Functions`."""
        rows = _rows(direction, direction_index)

        def where_made(tensor: Tensor) -> Tensor:
            return tensor if mask is None else tensor.masked_fill(~mask[..., None], 0.0)

        gradient = where_made(grad_out).to(direction.dtype)
        along = _times_columns(gradient, rows)  # W g
        grad_hidden = grad_value = grad_direction = None
        if need_hidden:
            grad_hidden = (grad_out - _times_rows(along, rows)).to(grad_out.dtype).contiguous()
        if need_value:
            grad_value = along.sum(1) if along.dim() == 3 else along
        if need_direction:
            assert hidden is not None
            assert value is not None
            base = where_made(hidden).to(direction.dtype)
            if hidden.dim() == 3:
                value = value[:, None]
            missing = where_made(value - _times_columns(base, rows))  # a - W h
            grad_direction = _outer(missing, gradient, direction, direction_index)
            grad_direction -= _outer(along, base, direction, direction_index)
        return grad_hidden, grad_value, grad_direction

    @staticmethod
    def project(source: Tensor, direction: Tensor, direction_index: Tensor | None) -> Tensor:
        """See `Functions`."""
        return _times_columns(source.to(direction.dtype), _rows(direction, direction_index))


def _rows(direction: Tensor, direction_index: Tensor | None) -> Tensor:
    """(R, D) as it is; of (K, R, D) the one of each sequence, (B, R, D)."""
    return direction if direction_index is None else direction.index_select(0, direction_index.long())


def _times_columns(activations: Tensor, rows: Tensor) -> Tensor:
    """W h: (..., D) -> (..., R)."""
    if rows.dim() == 2:
        return activations @ rows.T
    if activations.dim() == 3:
        return activations @ rows.mT
    return (rows @ activations[..., None])[..., 0]


def _times_rows(coordinates: Tensor, rows: Tensor) -> Tensor:
    """W^T a: (..., R) -> (..., D)."""
    if rows.dim() == 2 or coordinates.dim() == 3:
        return coordinates @ rows
    return (coordinates[:, None] @ rows)[:, 0]


def _outer(coordinates: Tensor, activations: Tensor, direction: Tensor, direction_index: Tensor | None) -> Tensor:
    """Sum of a h^T over the positions of each direction: (..., R), (..., D) -> the shape of `direction`."""
    if direction_index is None:
        return coordinates.flatten(0, -2).T @ activations.flatten(0, -2)
    if coordinates.dim() == 2:
        coordinates, activations = coordinates[:, None], activations[:, None]
    return torch.zeros_like(direction).index_add_(0, direction_index.long(), coordinates.mT @ activations)


def _functions(op: str, impl: str, direction: Tensor) -> Functions:
    match choose_implementation(op, impl, direction.device, direction.dtype):
        case "reference":
            return Reference()
        case "triton":
            from cdas_fast.ops import interchange_triton

            return interchange_triton
        case "cpp":
            from cdas_fast.ops import interchange_cpp

            return interchange_cpp


def _clamp_kernel(
    hidden: Tensor,
    value: Tensor,
    direction: Tensor,
    mask: Tensor | None,
    direction_index: Tensor | None,
    impl: str,
) -> Tensor:
    with without_autocast(hidden.device):
        functions = _functions("clamp", impl, direction)
        return functions.clamp_forward(hidden, value, direction, mask, direction_index)


def _clamp_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    hidden, value, direction, mask, direction_index, ctx.impl = inputs
    read = (hidden, value) if ctx.needs_input_grad[2] else (None, None)
    ctx.save_for_backward(*read, direction, mask, direction_index)


def _clamp_backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad[:3]
    gradients = iter(_clamp_backward_op(grad_out, *ctx.saved_tensors, *needed, ctx.impl))
    return *(next(gradients) if need else None for need in needed), None, None, None


def _clamp_backward_kernel(
    grad_out: Tensor,
    hidden: Tensor | None,
    value: Tensor | None,
    direction: Tensor,
    mask: Tensor | None,
    direction_index: Tensor | None,
    need_hidden: bool,
    need_value: bool,
    need_direction: bool,
    impl: str,
) -> list[Tensor]:
    with without_autocast(grad_out.device):
        gradients = _functions("clamp", impl, direction).clamp_backward(
            grad_out, hidden, value, direction, mask, direction_index, need_hidden, need_value, need_direction
        )
    return [gradient for gradient in gradients if gradient is not None]


def _clamp_backward_fake(
    grad_out: Tensor,
    hidden: Tensor | None,
    value: Tensor | None,
    direction: Tensor,
    mask: Tensor | None,
    direction_index: Tensor | None,
    need_hidden: bool,
    need_value: bool,
    need_direction: bool,
    impl: str,
) -> list[Tensor]:
    gradients = [grad_out.new_empty(grad_out.shape)] if need_hidden else []
    if need_value:
        gradients.append(direction.new_empty(grad_out.shape[0], direction.shape[-2]))
    if need_direction:
        gradients.append(direction.new_empty(direction.shape))
    return gradients


def _project_kernel(source: Tensor, direction: Tensor, direction_index: Tensor | None, impl: str) -> Tensor:
    with without_autocast(source.device):
        return _functions("interchange", impl, direction).project(source, direction, direction_index)


def _project_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    source, direction, direction_index, _ = inputs
    ctx.save_for_backward(source if ctx.needs_input_grad[1] else None, direction, direction_index)
    ctx.dtype = source.dtype


def _project_backward(ctx: Any, grad_value: Tensor) -> tuple[Tensor | None, ...]:
    source, direction, direction_index = ctx.saved_tensors
    grad_source = grad_direction = None
    with without_autocast(grad_value.device):
        if ctx.needs_input_grad[0]:
            grad_source = _times_rows(grad_value, _rows(direction, direction_index)).to(ctx.dtype)
        if ctx.needs_input_grad[1]:
            grad_direction = _outer(grad_value, source.to(direction.dtype), direction, direction_index)
    return grad_source, grad_direction, None, None


_clamp = register(
    "clamp(Tensor hidden, Tensor value, Tensor direction, Tensor? mask, Tensor? direction_index, str impl) -> Tensor",
    _clamp_kernel,
    fake=lambda hidden, *_: hidden.new_empty(hidden.shape),
    setup_context=_clamp_setup_context,
    backward=_clamp_backward,
)
_clamp_backward_op = register(
    "clamp_backward(Tensor grad_out, Tensor? hidden, Tensor? value, Tensor direction, Tensor? mask, "
    "Tensor? direction_index, bool need_hidden, bool need_value, bool need_direction, str impl) -> Tensor[]",
    _clamp_backward_kernel,
    fake=_clamp_backward_fake,
    backward=no_second_derivative("clamp and interchange have"),
)
_project = register(
    "project(Tensor source, Tensor direction, Tensor? direction_index, str impl) -> Tensor",
    _project_kernel,
    fake=lambda source, direction, *_: direction.new_empty(source.shape[0], direction.shape[-2]),
    setup_context=_project_setup_context,
    backward=_project_backward,
)


def _check_subspace(
    op: str, hidden: Tensor, direction: Tensor, mask: Tensor | None, direction_index: Tensor | None
) -> None:
    require_floating(op, hidden=hidden, direction=direction)
    if hidden.dim() not in (2, 3):
        shapes = "shape (B, T, D) or (N, D)"
        raise InvalidInputError(expected_got(f"{op}: hidden", shapes, f"shape {tuple(hidden.shape)}"))
    width = hidden.shape[-1]
    if direction.dim() not in (2, 3) or direction.shape[-1] != width:
        shapes = f"shape (R, {width}) or (K, R, {width})"
        raise InvalidInputError(expected_got(f"{op}: direction", shapes, f"shape {tuple(direction.shape)}"))
    if (direction.dim() == 3) != (direction_index is not None):
        wanted = "given exactly if direction is (K, R, D)"
        got = f"{'none' if direction_index is None else 'one'} with direction {tuple(direction.shape)}"
        raise InvalidInputError(expected_got(f"{op}: direction_index", wanted, got))
    for name, tensor, shape in (
        ("mask", mask, tuple(hidden.shape[:-1])),
        ("direction_index", direction_index, (hidden.shape[0],)),
    ):
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise InvalidInputError(expected_got(f"{op}: {name}", "a torch.Tensor", type(tensor).__name__))
        if tuple(tensor.shape) != shape:
            raise InvalidInputError(expected_got(f"{op}: {name}", f"shape {shape}", f"shape {tuple(tensor.shape)}"))
        if tensor.device != hidden.device:
            raise InvalidInputError(expected_got(f"{op}: {name}", f"a tensor on {hidden.device}", tensor.device))
    if mask is not None and mask.dtype != torch.bool:
        raise InvalidInputError(expected_got(f"{op}: mask", "dtype torch.bool", mask.dtype))
    if direction_index is not None and (direction_index.is_floating_point() or direction_index.dtype == torch.bool):
        raise InvalidInputError(expected_got(f"{op}: direction_index", "an integer dtype", direction_index.dtype))
    # Elsewhere than on a CPU this would wait for the device, whose own check stops a bad index.
    if direction_index is not None and direction_index.device.type == "cpu" and not torch.compiler.is_compiling():
        concepts = direction.shape[0]
        bad = direction_index[(direction_index < 0) | (direction_index >= concepts)]
        if bad.numel():
            wanted = f"indices of the {concepts} directions, 0 to {concepts - 1}"
            raise InvalidInputError(expected_got(f"{op}: direction_index", wanted, bad[0].item()))
