# ruff: noqa: N803 - constant arguments are in capitals, as everywhere in Triton
"""What a frozen decoder layer does beside attention and linear maps: RMS norm, gated activation, rotary embedding.

    rms_norm            n = x / sqrt(mean(x^2) + eps)            y = factor n
                        u = factor grad_y                        grad_x = (u - n mean(u n)) / sqrt(mean(x^2) + eps)
    gated_activation    f(g) = g s(p(g)),  s(p) = 1 / (1 + exp(-p))          y = f(gate) up
                        p(g) = g for silu, 2 sqrt(2 / pi) (g + 0.044715 g^3) for gelu_tanh
                        grad_gate = (s + g s (1 - s) p'(g)) up grad_y        grad_up = f(gate) grad_y
    rotate              y_1 = x_1 cos_1 - x_2 sin_1                          y_2 = x_2 cos_2 + x_1 sin_2

Memory bounds all of them: each number is read once and written once, with 16 bytes a thread and access. A norm keeps a
row in one program's registers; rows wider than `widest` are read twice, the second time out of a cache if that has
room for them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .launch import SubspaceParameters

ACTIVATIONS = ("silu", "gelu_tanh")
# 8 numbers of 16 bits, 16 bytes, for each of 128 threads.
BLOCK, NUM_WARPS = 1024, 4


@triton.jit(do_not_specialize=["rows"])
def _rms_norm_kernel(
    x,  # (N, D)
    grad_out,  # (N, D), or None for the norm itself
    factor,  # (D,)
    out,  # (N, D)
    rows,
    x_stride,
    grad_stride,
    D: tl.constexpr,
    EPS: tl.constexpr,
    ROUND: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DTYPE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    there = row < rows
    x += row * x_stride
    out += row * D
    if grad_out is not None:
        grad_out += row * grad_stride
    squares = tl.zeros([BLOCK_N], DTYPE)
    products = tl.zeros([BLOCK_N], DTYPE)
    for start in tl.static_range(0, D, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        inside = there[:, None] & (columns < D)[None, :]
        number = tl.load(x[:, None] + columns[None, :], mask=inside, other=0.0)
        value = number.to(DTYPE)
        weight = tl.load(factor + columns, mask=columns < D, other=0.0)
        squares += tl.sum(value * value, axis=1)
        if grad_out is not None:
            upstream = tl.load(grad_out[:, None] + columns[None, :], mask=inside, other=0.0).to(DTYPE)
            upstream *= weight[None, :]
            products += tl.sum(upstream * value, axis=1)
    scale = 1.0 / tl.sqrt(squares / D + EPS)
    along = products / D * scale * scale
    for start in tl.static_range(0, D, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        inside = there[:, None] & (columns < D)[None, :]
        if D > BLOCK_D:
            number = tl.load(x[:, None] + columns[None, :], mask=inside, other=0.0)
            value = number.to(DTYPE)
            weight = tl.load(factor + columns, mask=columns < D, other=0.0)
            if grad_out is not None:
                upstream = tl.load(grad_out[:, None] + columns[None, :], mask=inside, other=0.0).to(DTYPE)
                upstream *= weight[None, :]
        if grad_out is None:
            result = value * scale[:, None]
            if ROUND:
                result = result.to(number.dtype).to(DTYPE)
            result *= weight[None, :]
        else:
            result = (upstream - value * along[:, None]) * scale[:, None]
        tl.store(out[:, None] + columns[None, :], result.to(number.dtype), mask=inside)


@triton.jit
def _sigmoids(p):
    """1 / (1 + exp(-p)) and 1 / (1 + exp(p)), both to their last digits."""
    power = tl.exp(-tl.abs(p))
    large, small = 1.0 / (1.0 + power), power / (1.0 + power)
    return tl.where(p >= 0, large, small), tl.where(p >= 0, small, large)


@triton.jit
def _inner(g, GELU: tl.constexpr):
    """p(g) and its slope."""
    if GELU:
        bounded = tl.where(g > 32.0, 32.0, tl.where(g < -32.0, -32.0, g))  # beyond, s is 0 or 1; NaN stays
        square = bounded * bounded
        value = 1.5957691216057308 * bounded * (1.0 + 0.044715 * square)
        slope = 1.5957691216057308 * (1.0 + 0.134145 * square)
    else:
        value, slope = g, tl.full(g.shape, 1.0, g.dtype)
    return value, slope


@triton.jit(do_not_specialize=["rows"])
def _gated_activation_kernel(
    gate,  # (N, I)
    up,  # (N, I)
    grad_out,  # (N, I), or None for the product itself
    out,  # (N, I), or None
    grad_gate,  # (N, I), or None
    grad_up,  # (N, I), or None
    rows,
    width,
    gate_stride,
    up_stride,
    grad_stride,
    GELU: tl.constexpr,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
):
    blocks = tl.cdiv(width, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    columns = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    number = tl.load(gate + row * gate_stride + columns, mask=inside, other=0.0)
    g = number.to(DTYPE)
    value, slope = _inner(g, GELU)
    sigmoid, rest = _sigmoids(value)
    at = row * width + columns
    if grad_out is None:
        u = tl.load(up + row * up_stride + columns, mask=inside, other=0.0).to(DTYPE)
        activated = (g * sigmoid).to(number.dtype).to(DTYPE)
        tl.store(out + at, (activated * u).to(number.dtype), mask=inside)
    else:
        h = tl.load(grad_out + row * grad_stride + columns, mask=inside, other=0.0).to(DTYPE)
        if grad_gate is not None:
            u = tl.load(up + row * up_stride + columns, mask=inside, other=0.0).to(DTYPE)
            result = (sigmoid + g * (sigmoid * rest) * slope) * (u * h)
            tl.store(grad_gate + at, result.to(number.dtype), mask=inside)
        if grad_up is not None:
            tl.store(grad_up + at, (g * sigmoid * h).to(number.dtype), mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def _rotate_kernel(
    x,  # (B, H, T, E)
    cos,  # (B or 1, T, E)
    sin,  # (B or 1, T, E)
    out,  # (B, T, H, E)
    heads,
    tokens,
    x_batch_stride,
    x_head_stride,
    x_token_stride,
    cos_batch_stride,
    cos_token_stride,
    sin_batch_stride,
    sin_token_stride,
    HALF: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_E: tl.constexpr,
    DTYPE: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64)
    batch, token = place // tokens, place % tokens
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    column = tl.arange(0, BLOCK_E)
    inside = (head < heads)[:, None] & (column < HALF)[None, :]
    at = x + batch * x_batch_stride + token * x_token_stride + head[:, None] * x_head_stride + column[None, :]
    first, second = tl.load(at, mask=inside, other=0.0), tl.load(at + HALF, mask=inside, other=0.0)
    x_1, x_2 = first.to(DTYPE), second.to(DTYPE)
    cos += batch * cos_batch_stride + token * cos_token_stride + column
    sin += batch * sin_batch_stride + token * sin_token_stride + column
    within = column < HALF
    cos_1 = tl.load(cos, mask=within, other=0.0).to(DTYPE)[None, :]
    cos_2 = tl.load(cos + HALF, mask=within, other=0.0).to(DTYPE)[None, :]
    sin_1 = tl.load(sin, mask=within, other=0.0).to(DTYPE)[None, :]
    sin_2 = tl.load(sin + HALF, mask=within, other=0.0).to(DTYPE)[None, :]
    y_1 = (x_1 * cos_1).to(first.dtype).to(DTYPE) - (x_2 * sin_1).to(first.dtype).to(DTYPE)
    y_2 = (x_2 * cos_2).to(first.dtype).to(DTYPE) + (x_1 * sin_2).to(first.dtype).to(DTYPE)
    to = out + (place * heads + head[:, None]) * (2 * HALF) + column[None, :]
    tl.store(to, y_1.to(first.dtype), mask=inside)
    tl.store(to + HALF, y_2.to(first.dtype), mask=inside)


def rms_norm(
    x: Tensor,  # (N, D)
    grad_out: Tensor | None,  # (N, D)
    factor: Tensor,  # (D,)
    eps: float,
    round_normalized: bool,
    out: Tensor,  # (N, D)
    *,
    parameters: SubspaceParameters | None = None,
) -> None:
    """Fill `out` with the norm of the rows of `x`; with their gradient if there is a `grad_out`.

    Args:
        x: float16, bfloat16, float32 or float64. Rows may lie apart, but each is contiguous.
        grad_out: likewise, of the dtype of `x`.
        factor: contiguous; float32, float64 for float64 `x`.
        eps: what is added to the mean of the squares.
        round_normalized: whether n is rounded to the dtype of `x`. The gradient is not.
        out: filled, contiguous; of the dtype of `x`.
        parameters: launch parameters, those of the architecture if None.

    Raises:
        ValueError: shapes, dtypes or strides that do not fit, or tensors that no kernel can read.
    """
    maths = _rows("x", x)
    launch.check("out", out, tuple(x.shape), x, dtype=x.dtype, contiguous=True)
    launch.check("factor", factor, (x.shape[1],), x, dtype=maths, contiguous=True)
    if grad_out is not None:
        launch.check("grad_out", grad_out, tuple(x.shape), x, dtype=x.dtype)
    if not x.numel():
        return
    rows, width = x.shape
    parameters = parameters or launch.subspace_parameters(x.device, x.dtype)
    block_d = triton.next_power_of_2(width)
    if block_d > parameters.widest:
        block_d = parameters.tile
    block_n = min(max(1, parameters.tile // block_d), triton.next_power_of_2(rows))
    launch.run(
        _rms_norm_kernel,
        (triton.cdiv(rows, block_n),),
        *(x, grad_out, factor, out, rows, x.stride(0), 0 if grad_out is None else grad_out.stride(0)),
        D=width,
        EPS=eps,
        ROUND=round_normalized,
        BLOCK_N=block_n,
        BLOCK_D=block_d,
        **launch.row_threads(x, block_n * block_d, parameters),
    )


def gated_activation(
    gate: Tensor,  # (N, I)
    up: Tensor,  # (N, I)
    activation: str,
    out: Tensor,  # (N, I)
) -> None:
    """Fill `out` with f(gate) up.

    Args:
        gate: float16, bfloat16, float32 or float64. Rows may lie apart, but each is contiguous.
        up: likewise, of the dtype of `gate`.
        activation: one of `ACTIVATIONS`.
        out: filled, contiguous; of the dtype of `gate`. f(gate) is rounded to it before the product.

    Raises:
        ValueError: shapes, dtypes or strides that do not fit, or tensors that no kernel can read.
    """
    _check_like(gate, up=up)
    launch.check("out", out, tuple(gate.shape), gate, dtype=gate.dtype, contiguous=True)
    _gated_activation(gate, up, None, activation, out, None, None)


def gated_activation_backward(
    grad_out: Tensor,  # (N, I)
    gate: Tensor,  # (N, I)
    up: Tensor,  # (N, I)
    activation: str,
    *,
    grad_gate: Tensor | None = None,  # (N, I)
    grad_up: Tensor | None = None,  # (N, I)
) -> None:
    """Fill the gradients that are given, contiguous and of the dtype of `gate`; see `gated_activation`."""
    _check_like(gate, up=up, grad_out=grad_out)
    for name, gradient in (("grad_gate", grad_gate), ("grad_up", grad_up)):
        if gradient is not None:
            launch.check(name, gradient, tuple(gate.shape), gate, dtype=gate.dtype, contiguous=True)
    _gated_activation(gate, up, grad_out, activation, None, grad_gate, grad_up)


def rotate(
    x: Tensor,  # (B, H, T, E)
    cos: Tensor,  # (B or 1, T, E)
    sin: Tensor,  # (B or 1, T, E)
    out: Tensor,  # (B, T, H, E)
) -> None:
    """Fill `out` with the rotated heads; products and sums are rounded to the dtype.

    Args:
        x: float16, bfloat16, float32 or float64. Heads may lie anywhere, but each is contiguous.
        cos: of the dtype of `x`, its rows contiguous. E is even.
        sin: likewise.
        out: filled, contiguous; of the dtype of `x`.

    Raises:
        ValueError: shapes, dtypes or strides that do not fit, or tensors that no kernel can read.
    """
    if x.dim() != 4 or x.shape[-1] % 2 or not x.is_floating_point():
        raise ValueError(f"x: expected floating-point heads (B, H, T, E), E even, got {x.dtype}, {tuple(x.shape)}")
    batch, heads, tokens, width = x.shape
    launch.check("x", x, tuple(x.shape), x)
    launch.check("out", out, (batch, tokens, heads, width), x, dtype=x.dtype, contiguous=True)
    for name, table in (("cos", cos), ("sin", sin)):
        launch.check(name, table, (batch if table.shape[0] != 1 else 1, tokens, width), x, dtype=x.dtype)
    if not x.numel():
        return
    half = width // 2
    block_e = triton.next_power_of_2(half)
    block_h = min(triton.next_power_of_2(heads), max(1, 2 * BLOCK // block_e))
    strides = [(table.stride(0) if table.shape[0] != 1 else 0, table.stride(1)) for table in (cos, sin)]
    warp_size = launch.architecture(x.device).warp_size
    launch.run(
        _rotate_kernel,
        (batch * tokens, triton.cdiv(heads, block_h)),
        *(x, cos, sin, out, heads, tokens, x.stride(0), x.stride(1), x.stride(2), *strides[0], *strides[1]),
        num_warps=max(1, min(8, block_h * block_e // 8 // warp_size)),
        HALF=half,
        BLOCK_H=block_h,
        BLOCK_E=block_e,
        DTYPE=launch.math_type(x),
        enable_fp_fusion=False,
    )


def _gated_activation(
    gate: Tensor,
    up: Tensor,
    grad_out: Tensor | None,
    activation: str,
    out: Tensor | None,
    grad_gate: Tensor | None,
    grad_up: Tensor | None,
) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if not gate.numel():
        return
    rows, width = gate.shape
    block = min(BLOCK, max(32, triton.next_power_of_2(width)))
    tensors = (gate, up, grad_out, out, grad_gate, grad_up)
    launch.run(
        _gated_activation_kernel,
        (rows * triton.cdiv(width, block),),
        *(*tensors, rows, width, gate.stride(0), up.stride(0), 0 if grad_out is None else grad_out.stride(0)),
        num_warps=NUM_WARPS if block == BLOCK else 1,
        GELU=activation == "gelu_tanh",
        BLOCK=block,
        DTYPE=launch.math_type(gate),
    )


def _check_like(gate: Tensor, **others: Tensor) -> None:
    _rows("gate", gate)
    for name, tensor in others.items():
        launch.check(name, tensor, tuple(gate.shape), gate, dtype=gate.dtype)


def _rows(name: str, x: Tensor) -> torch.dtype:
    """The dtype of the maths for contiguous rows (N, D)."""
    if x.dim() != 2 or not x.is_floating_point():
        raise ValueError(f"{name}: expected floating-point rows (N, D), got {x.dtype} of shape {tuple(x.shape)}")
    launch.check(name, x, tuple(x.shape), x)
    return launch.math_dtype(x)
