# ruff: noqa: N803 - constant arguments are in capitals, as everywhere in Triton
"""Kernels of the intervention on a low-rank subspace, forward and backward, on rows of hidden states (N, D).

    clamp       Phi(h; a) = h + W^T (a - W h)        W has R rows
    project     a = W h_source

With g the gradient of Phi, and sums over the rows where the intervention is made:

    grad_h = g - W^T W g        grad_a = sum W g        grad_W = sum (a - W h) g^T - (W g) h^T

clamp keeps a row in one program's registers: hidden is read once and written once, W comes out of a cache. grad_h is
clamp of g to 0. For grad_W a program keeps the sum over its share of the rows in registers; g and h are read once, and
once more out of a cache for each further block of R. The shares go to a workspace and are added up in order: no
atomics. Rows wider than `widest` are read twice, the second time out of a cache if it holds them.

The gradients of project are those of clamp at h = 0: with zeros for h, `clamp_forward` of grad_a gives W^T grad_a, and
`clamp_backward` of h_source for g and grad_a for a gives grad_a h_source^T.

N rows are sequences of `rows_per_sequence` rows, each with its own a and, for K directions, its own direction. What a
mask bars is not read, except to be copied, so it may hold NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .launch import SubspaceParameters


@triton.jit
def _load_direction(direction, concept, rank, columns, K, R: tl.constexpr, D: tl.constexpr, DTYPE: tl.constexpr):
    """Part of row `rank` of a concept's W, NaN for a concept that there is not."""
    known = (concept >= 0) & (concept < K)
    end = tl.where(known, D, 0)
    row = tl.load(direction + (concept * R + rank) * D + columns, mask=columns < end, other=0.0).to(DTYPE)
    return tl.where(known, row, float("nan"))


@triton.jit
def _place(direction_index, group_rows, BLOCK_N: tl.constexpr):
    """The rows of a program, which of them there are, and their concept: a group of rows shares its direction."""
    tiles = tl.cdiv(group_rows, BLOCK_N)
    group, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    local = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    concept = 0 if direction_index is None else tl.load(direction_index + group)
    return group.to(tl.int64) * group_rows + local, local < group_rows, tl.full((), concept, tl.int64)


@triton.jit
def _coordinates(
    hidden,  # pointers to rows (BLOCK_N,)
    made,
    direction,
    concept,
    K,
    R: tl.constexpr,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """W h of each row (BLOCK_N, BLOCK_R), 0 of a row that is not `made`."""
    ranks = tl.arange(0, BLOCK_R)[None, :]
    coordinates = tl.zeros([BLOCK_N, BLOCK_R], DTYPE)
    for start in range(0, D, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        inside = made[:, None] & (columns < D)[None, :]
        h = tl.load(hidden[:, None] + columns[None, :], mask=inside, other=0.0).to(DTYPE)
        for rank in range(R):
            w = _load_direction(direction, concept, rank, columns, K, R, D, DTYPE)
            coordinates += tl.where(ranks == rank, tl.sum(h * w[None, :], axis=1)[:, None], 0.0)
    return coordinates


@triton.jit(do_not_specialize=["group_rows"])
def _project_kernel(
    source,  # (N, D)
    direction,  # (K, R, D)
    mask,  # (N,) or None
    direction_index,  # (S,) or None
    out,  # (N, R)
    group_rows,
    K,
    source_stride,
    R: tl.constexpr,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    DTYPE: tl.constexpr,
):
    rows, there, concept = _place(direction_index, group_rows, BLOCK_N)
    made = there
    if mask is not None:
        made = tl.load(mask + rows, mask=there, other=0) != 0
    at = source + rows * source_stride
    result = _coordinates(at, made, direction, concept, K, R, D, BLOCK_N, BLOCK_D, BLOCK_R, DTYPE)
    ranks = tl.arange(0, BLOCK_R)
    inside = there[:, None] & (ranks < R)[None, :]
    tl.store(out + rows[:, None] * R + ranks[None, :], result.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["group_rows", "rows_per_sequence"])
def _clamp_kernel(
    hidden,  # (N, D)
    value,  # (S, R) or None: 0
    direction,  # (K, R, D)
    mask,  # (N,) or None
    direction_index,  # (S,) or None
    out,  # (N, D)
    group_rows,
    rows_per_sequence,
    K,
    hidden_stride,
    out_stride,
    R: tl.constexpr,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    DTYPE: tl.constexpr,
):
    rows, there, concept = _place(direction_index, group_rows, BLOCK_N)
    made = there
    if mask is not None:
        made = tl.load(mask + rows, mask=there, other=0) != 0
    hidden += rows * hidden_stride
    out += rows * out_stride
    if value is not None:
        value += (rows // rows_per_sequence) * R
    if D <= BLOCK_D:
        columns = tl.arange(0, BLOCK_D)
        inside = there[:, None] & (columns < D)[None, :]
        h = tl.load(hidden[:, None] + columns[None, :], mask=inside, other=0.0)
        base = h.to(DTYPE)
        result = base
        for rank in range(R):
            w = _load_direction(direction, concept, rank, columns, K, R, D, DTYPE)
            missing = -tl.sum(base * w[None, :], axis=1)
            if value is not None:
                missing += tl.load(value + rank, mask=made, other=0.0).to(DTYPE)
            result += missing[:, None] * w[None, :]
        tl.store(out[:, None] + columns[None, :], tl.where(made[:, None], result.to(h.dtype), h), mask=inside)
    else:
        ranks = tl.arange(0, BLOCK_R)[None, :]
        missing = -_coordinates(hidden, made, direction, concept, K, R, D, BLOCK_N, BLOCK_D, BLOCK_R, DTYPE)
        if value is not None:
            wanted = made[:, None] & (ranks < R)
            missing += tl.load(value[:, None] + ranks, mask=wanted, other=0.0).to(DTYPE)
        for start in range(0, D, BLOCK_D):
            columns = start + tl.arange(0, BLOCK_D)
            inside = there[:, None] & (columns < D)[None, :]
            h = tl.load(hidden[:, None] + columns[None, :], mask=inside, other=0.0)
            result = h.to(DTYPE)
            for rank in range(R):
                w = _load_direction(direction, concept, rank, columns, K, R, D, DTYPE)
                result += tl.sum(tl.where(ranks == rank, missing, 0.0), axis=1)[:, None] * w[None, :]
            tl.store(out[:, None] + columns[None, :], tl.where(made[:, None], result.to(h.dtype), h), mask=inside)


@triton.jit(do_not_specialize=["rows", "rows_per_sequence"])
def _direction_gradient_kernel(
    grad_out,  # (N, D)
    hidden,  # (N, D)
    value,  # (S, R)
    direction,  # (K, R, D)
    mask,  # (N,) or None
    order,  # (S,) the sequences by concept, or None
    begins,  # (K + 1,) where each concept begins in order, or None
    along_grad,  # (N, R) W g
    along_hidden,  # (N, R) W h, or None: neither is known, and along_grad is filled
    partial,  # (K, parts, R, D)
    rows,
    rows_per_sequence,
    grad_stride,
    hidden_stride,
    R: tl.constexpr,
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DTYPE: tl.constexpr,
):
    rank_blocks: tl.constexpr = tl.cdiv(R, BLOCK_R)
    ranks = (tl.program_id(0) % rank_blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = (tl.program_id(0) // rank_blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    part, parts = tl.program_id(1), tl.num_programs(1)
    concept = tl.program_id(2).to(tl.int64)
    inside = (ranks < R)[:, None] & (columns < D)[None, :]
    at = ranks[:, None] * D + columns[None, :]
    if along_hidden is None:
        w = tl.load(direction + concept * R * D + at, mask=inside, other=0.0).to(DTYPE)
    total = tl.zeros([BLOCK_R, BLOCK_D], DTYPE)
    begin, count = concept * 0, concept * 0 + rows
    if order is not None:
        begin = tl.load(begins + concept)
        count = (tl.load(begins + concept + 1) - begin) * rows_per_sequence
    share = tl.cdiv(count, parts)
    for position in range(part * share, tl.minimum((part + 1) * share, count)):
        sequence = begin + position // rows_per_sequence
        if order is not None:
            sequence = tl.load(order + sequence)
        row = sequence * rows_per_sequence + position % rows_per_sequence
        end, rank_end = D, R
        if mask is not None:
            made = tl.load(mask + row) != 0
            end, rank_end = tl.where(made, D, 0), tl.where(made, R, 0)
        g = tl.load(grad_out + row * grad_stride + columns, mask=columns < end, other=0.0).to(DTYPE)
        h = tl.load(hidden + row * hidden_stride + columns, mask=columns < end, other=0.0).to(DTYPE)
        missing = tl.load(value + sequence * R + ranks, mask=ranks < rank_end, other=0.0).to(DTYPE)
        if along_hidden is None:
            along_g = tl.sum(w * g[None, :], axis=1)
            missing -= tl.sum(w * h[None, :], axis=1)
            tl.store(along_grad + row * R + ranks, along_g, mask=ranks < R)
        else:
            along_g = tl.load(along_grad + row * R + ranks, mask=ranks < R, other=0.0)
            missing -= tl.load(along_hidden + row * R + ranks, mask=ranks < R, other=0.0)
        total += missing[:, None] * g[None, :] - along_g[:, None] * h[None, :]
    tl.store(partial + (concept * parts + part) * R * D + at, total, mask=inside)


def clamp_forward(
    hidden: Tensor,  # (N, D)
    value: Tensor,  # (S, R)
    direction: Tensor,  # (R, D) or (K, R, D)
    *,
    mask: Tensor | None = None,  # (N,)
    direction_index: Tensor | None = None,  # (S,)
    rows_per_sequence: int = 1,
    out: Tensor,  # (N, D)
    parameters: SubspaceParameters | None = None,
) -> None:
    """Fill `out` with h + W^T (a - W h) where the mask is True, with h elsewhere.

    Args:
        hidden: S sequences of `rows_per_sequence` rows; float16, bfloat16, float32 or float64. Rows may lie apart, but
            each is contiguous.
        value: a of each sequence, of any floating-point dtype.
        direction: W, contiguous and of any floating-point dtype; of K concepts exactly if there is a `direction_index`.
        mask: bool.
        direction_index: whole numbers, the concept of each sequence. One that there is not gives NaN.
        rows_per_sequence: 1 for packed rows.
        out: filled; of the dtype of `hidden`. It may be `hidden` itself.
        parameters: launch parameters, those of the architecture if None.

    The maths is float32, float64 for float64 `hidden`.

    Raises:
        ValueError: shapes, dtypes or strides that do not fit, or tensors that no kernel can read.
    """
    if not hidden.numel():
        return
    sequences, direction_index = _check(hidden, direction, mask, direction_index, rows_per_sequence)
    value = value.contiguous()
    launch.check("value", value, (sequences, direction.shape[-2]), hidden)
    launch.check("out", out, tuple(hidden.shape), hidden, dtype=hidden.dtype)
    _clamp(hidden, value, direction, mask, direction_index, rows_per_sequence, out, parameters)


def clamp_backward(
    grad_out: Tensor,  # (N, D)
    hidden: Tensor | None,  # (N, D)
    value: Tensor | None,  # (S, R)
    direction: Tensor,  # (R, D) or (K, R, D)
    *,
    mask: Tensor | None = None,  # (N,)
    direction_index: Tensor | None = None,  # (S,)
    rows_per_sequence: int = 1,
    grad_hidden: Tensor | None = None,  # (N, D)
    grad_value: Tensor | None = None,  # (S, R)
    grad_direction: Tensor | None = None,  # the shape of direction
    parameters: SubspaceParameters | None = None,
) -> None:
    """Fill the gradients that are given, see the module's docstring.

    Args:
        grad_out: gradient of the result of `clamp_forward`, as all arguments that are not named here.
        hidden: of the dtype of `grad_out`; read for `grad_direction` alone.
        value: likewise, a of each sequence.
        direction: W. Concepts that no sequence has get a gradient of 0.
        mask: rows where the intervention was made; those of `grad_hidden` elsewhere are those of `grad_out`.
        direction_index: a concept that there is not gives NaN in `grad_hidden` and `grad_value`.
        rows_per_sequence: 1 for packed rows.
        grad_hidden: filled; of the dtype of `grad_out`. It may be `grad_out` itself.
        grad_value: filled, contiguous; float32, float64 for float64 `grad_out`.
        grad_direction: likewise.
        parameters: launch parameters, those of the architecture if None.

    Raises:
        ValueError: shapes, dtypes or strides that do not fit, or tensors that no kernel can read.
    """
    if not grad_out.numel():
        for gradient in (grad_value, grad_direction):
            if gradient is not None:
                gradient.zero_()
        return
    sequences, direction_index = _check(grad_out, direction, mask, direction_index, rows_per_sequence)
    rank, dtype = direction.shape[-2], launch.math_dtype(grad_out)
    place = (mask, direction_index, rows_per_sequence)
    if grad_hidden is not None:
        launch.check("grad_hidden", grad_hidden, tuple(grad_out.shape), grad_out, dtype=grad_out.dtype)
    if grad_value is not None:
        launch.check("grad_value", grad_value, (sequences, rank), grad_out, dtype=dtype, contiguous=True)
    along = None
    if grad_direction is not None:
        launch.check("grad_direction", grad_direction, tuple(direction.shape), grad_out, dtype=dtype, contiguous=True)
        if hidden is None or value is None:
            raise ValueError("grad_direction: expected hidden and value to be given with it")
        launch.check("hidden", hidden, tuple(grad_out.shape), grad_out, dtype=grad_out.dtype)
        value = value.contiguous()
        launch.check("value", value, (sequences, rank), grad_out)
        along = _direction_gradient(grad_out, hidden, value, direction, *place, grad_direction, parameters)
    elif grad_value is not None:
        along = grad_out.new_empty(grad_out.shape[0], rank, dtype=dtype)
        _project(grad_out, direction, *place, along, parameters)
    if grad_value is not None:
        assert along is not None
        torch.sum(along.view(sequences, rows_per_sequence, rank), dim=1, out=grad_value)
    if grad_hidden is not None:
        _clamp(grad_out, None, direction, *place, grad_hidden, parameters)


def project(
    source: Tensor,  # (S, D)
    direction: Tensor,  # (R, D) or (K, R, D)
    direction_index: Tensor | None,  # (S,)
    out: Tensor,  # (S, R)
    *,
    parameters: SubspaceParameters | None = None,
) -> None:
    """Fill `out`, of any floating-point dtype, with W h of each row of `source`; see `clamp_forward`."""
    if not source.numel():
        return
    _, direction_index = _check(source, direction, None, direction_index, 1)
    launch.check("out", out, (source.shape[0], direction.shape[-2]), source, contiguous=True)
    _project(source, direction, None, direction_index, 1, out, parameters)


def _clamp(
    hidden: Tensor,
    value: Tensor | None,
    direction: Tensor,
    mask: Tensor | None,
    direction_index: Tensor | None,
    rows_per_sequence: int,
    out: Tensor,
    parameters: SubspaceParameters | None,
) -> None:
    group_rows = _group_rows(hidden, direction_index, rows_per_sequence)
    numbers = (group_rows, rows_per_sequence, _concepts(direction), hidden.stride(0), out.stride(0))

    def run(parameters: SubspaceParameters, out: Tensor) -> None:
        grid, constants = _tiles(hidden, direction, group_rows, parameters)
        launch.run(_clamp_kernel, grid, hidden, value, direction, mask, direction_index, out, *numbers, **constants)

    if parameters is None:
        parameters = _parameters("clamp", hidden, direction, lambda each: run(each, torch.empty_like(out)))
    run(parameters, out)


def _project(
    source: Tensor,
    direction: Tensor,
    mask: Tensor | None,
    direction_index: Tensor | None,
    rows_per_sequence: int,
    out: Tensor,
    parameters: SubspaceParameters | None,
) -> None:
    group_rows = _group_rows(source, direction_index, rows_per_sequence)
    numbers = (group_rows, _concepts(direction), source.stride(0))

    def run(parameters: SubspaceParameters) -> None:
        grid, constants = _tiles(source, direction, group_rows, parameters)
        constants["resident"] = parameters.resident
        launch.run(_project_kernel, grid, source, direction, mask, direction_index, out, *numbers, **constants)

    run(parameters or _parameters("project", source, direction, run))


def _direction_gradient(
    grad_out: Tensor,
    hidden: Tensor,
    value: Tensor,
    direction: Tensor,
    mask: Tensor | None,
    direction_index: Tensor | None,
    rows_per_sequence: int,
    grad_direction: Tensor,
    parameters: SubspaceParameters | None,
) -> Tensor:
    """Fill `grad_direction` and return W g of each row (N, R), which is needed for it and sums to grad_value."""
    (rows, width), (rank, concepts) = grad_out.shape, (direction.shape[-2], _concepts(direction))
    along_grad = grad_out.new_empty(rows, rank, dtype=grad_direction.dtype)
    order = begins = None
    if direction_index is not None:
        # A sequence of a concept that there is not is in no concept's share.
        along_grad.fill_(torch.nan)
        by_concept, order = torch.sort(direction_index, stable=True)
        begins = torch.searchsorted(by_concept, torch.arange(concepts + 1, device=order.device, dtype=by_concept.dtype))
    where = (mask, direction_index, rows_per_sequence)

    def run(parameters: SubspaceParameters) -> None:
        block_d = triton.next_power_of_2(width)
        along_hidden = None
        if block_d > parameters.widest:
            block_d = parameters.tile
            along_hidden = torch.empty_like(along_grad)
            _project(grad_out, direction, *where, along_grad, parameters)
            _project(hidden, direction, *where, along_hidden, parameters)
        block_r = min(triton.next_power_of_2(rank), max(1, parameters.reduction_tile // block_d))
        blocks = triton.cdiv(rank, block_r) * triton.cdiv(width, block_d)
        constants = launch.row_threads(grad_out, block_r * block_d, parameters)
        constants["resident"] = parameters.resident
        gpu = launch.architecture(grad_out.device)
        together = gpu.multiprocessors * max(1, parameters.resident // (constants["num_warps"] * gpu.warp_size))
        # Fewer than 8 rows a program are not worth what the workspace costs.
        parts = max(1, min(together // (concepts * blocks), triton.cdiv(rows, 8 * concepts)))
        partial = grad_direction.new_empty(concepts, parts, rank, width)
        tensors = (grad_out, hidden, value, direction, mask, order, begins, along_grad, along_hidden, partial)
        numbers = (rows, rows_per_sequence, grad_out.stride(0), hidden.stride(0))
        constants |= {"R": rank, "D": width, "BLOCK_R": block_r, "BLOCK_D": block_d}
        launch.run(_direction_gradient_kernel, (blocks, parts, concepts), *tensors, *numbers, **constants)
        torch.sum(partial, dim=1, out=grad_direction.view(concepts, rank, width))

    run(parameters or _parameters("direction_gradient", grad_out, direction, run))
    return along_grad


def _tiles(
    hidden: Tensor, direction: Tensor, group_rows: int, parameters: SubspaceParameters
) -> tuple[tuple[int], dict[str, Any]]:
    """Grid and constants of a kernel whose programs take several rows, or parts of one after another if it is wide."""
    (rows, width), rank = hidden.shape, direction.shape[-2]
    block_d = triton.next_power_of_2(width)
    if block_d > parameters.widest:
        block_d = parameters.tile
    block_n = min(max(1, parameters.tile // block_d), triton.next_power_of_2(group_rows))
    constants = launch.row_threads(hidden, block_n * block_d, parameters)
    constants |= {"R": rank, "D": width, "BLOCK_N": block_n, "BLOCK_D": block_d}
    constants["BLOCK_R"] = triton.next_power_of_2(rank)
    return (rows // group_rows * triton.cdiv(group_rows, block_n),), constants


def _parameters(
    name: str, hidden: Tensor, direction: Tensor, run: Callable[[SubspaceParameters], None]
) -> SubspaceParameters:
    parameters = launch.subspace_parameters(hidden.device, hidden.dtype)
    if not launch.autotunes(hidden.device):
        return parameters
    key = (name, hidden.device, hidden.dtype, direction.shape, hidden.shape[1], hidden.shape[0].bit_length())
    return launch.fastest(key, launch.subspace_candidates(parameters), run)


def _group_rows(hidden: Tensor, direction_index: Tensor | None, rows_per_sequence: int) -> int:
    """Consecutive rows that share a direction."""
    return hidden.shape[0] if direction_index is None else rows_per_sequence


def _concepts(direction: Tensor) -> int:
    return direction.shape[0] if direction.dim() == 3 else 1


def _check(
    hidden: Tensor, direction: Tensor, mask: Tensor | None, direction_index: Tensor | None, rows_per_sequence: int
) -> tuple[int, Tensor | None]:
    """Number of sequences and int64 index, or ValueError for what a kernel would misread or read beyond the end of."""
    if hidden.dim() != 2 or not hidden.is_floating_point():
        raise ValueError(
            f"hidden: expected floating-point rows (N, D), got {hidden.dtype} of shape {tuple(hidden.shape)}"
        )
    rows, width = hidden.shape
    if rows_per_sequence < 1 or rows % rows_per_sequence:
        raise ValueError(f"rows_per_sequence: expected a divisor of {rows} rows, got {rows_per_sequence}")
    sequences = rows // rows_per_sequence
    launch.check("hidden", hidden, (rows, width), hidden)
    if direction.dim() != (2 if direction_index is None else 3) or not direction.is_floating_point():
        wanted = "(R, D), or (K, R, D) with a direction_index"
        raise ValueError(
            f"direction: expected floating-point {wanted}, got {direction.dtype} of shape {tuple(direction.shape)}"
        )
    launch.check("direction", direction, (*direction.shape[:-1], width), hidden, contiguous=True)
    if mask is not None:
        launch.check("mask", mask, (rows,), hidden, dtype=torch.bool)
    if direction_index is not None:
        direction_index = direction_index.to(torch.int64).contiguous()
        launch.check("direction_index", direction_index, (sequences,), hidden)
    return sequences, direction_index
