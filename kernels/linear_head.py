# ruff: noqa: N803 - constant arguments are in capitals, as everywhere in Triton
"""Row kernels of the head losses: divergences between two softmax rows, and the log-probability of a label.

    x = W h + b,  y = tanh(scale x / c) or x,  z = a y with a = c / T or scale / T,  p = softmax(z);  q from the target
    d = log q - log p,  m = (1 - beta) p + beta q
    jsd         (1 - beta) KL(p || m) + beta KL(q || m)   dloss/dz = (1 - beta) p (log(p / m) - KL(p || m))
    forward_kl  KL(q || p) = sum q d                      dloss/dz = p - q
    reverse_kl  KL(p || q) = -sum p d                     dloss/dz = -p (d + KL(p || q))
    logprob     log p(label)                              dloss/dz = [v = label] - p

W h is made by the vendor's library; the kernels read it two or three times and write the gradient with respect to it.
Each row is split among several programs, since a chunk has fewer rows than a GPU wants programs. What a split finds
goes to a workspace, and each program of the next phase combines a row's splits again, in order: no atomics, and the
result depends on nothing but the inputs and the launch parameters.

    1. statistics   max y and sum exp(a (y - max y)) of both rows
    2. sums         the loss, and KL(p || m); for logprob, which has no sum, the logit of the label
    3. gradient     forward_kl makes it in phase 2

Only ratios to the larger of p and q are formed, with e = expm1(-|d|): the smaller one is larger (1 + e), and
log(m / larger) = log1p(e times the smaller one's weight), so that p and q may lie far apart or close together. d is
a (y_q - y_p) and a constant of the row, not a difference of rounded logarithms.

A logit of -inf is a probability of 0. A row that holds NaN, +inf or nothing but -inf gets NaN, and no other row does.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .launch import HeadParameters

_SPLITS = 64  # a row's splits are combined in one load of this many
_SLOTS = 6  # numbers that each split leaves in the workspace
_MAX_SPLITS = tl.constexpr(_SPLITS)
_FLOOR = tl.constexpr(-(2.0**66))  # stands for a logit of -inf, so that differences stay finite; exact in float32
_LOWEST = tl.constexpr(-3.4028234e38)  # below every logit but -inf
_TOP, _TOTAL, _TARGET_TOP, _TARGET_TOTAL, _LOSS, _KL = (tl.constexpr(slot) for slot in range(_SLOTS))


@triton.jit
def _exp(x):
    """exp(x), to a relative error of (4 + 1.5 |x|) 2^-24 in float32 if exp2 has one of 4; below 2^-126 it may be 0."""
    # In float32 tl.exp is this product and exp2, and three instructions for what is below 2^-126.
    return tl.exp(x) if x.dtype == tl.float64 else tl.exp2(x * 1.44269504)


@triton.jit
def _exponentials(x):
    """exp(x) and exp(x) - 1 for x <= 0, the latter to a relative error of 4 x 2^-24 in float32."""
    power = _exp(x)
    if x.dtype == tl.float64:
        # Kahan's quotient: the logarithm undoes the rounding of the exponential.
        near = tl.where(power == 1.0, x, (power - 1.0) * x / tl.log(power))
        minus_one = tl.where(power > 0.5, near, power - 1.0)
    else:
        # (expm1(x) - x) / x^2 interpolated at Chebyshev nodes of [-1, 0]
        series = 0.0013248180 + x * 0.00013742418
        series = 0.0083011705 + x * series
        series = 0.041659255 + x * series
        series = 0.16666603 + x * series
        series = 0.5 + x * series
        minus_one = tl.where(x > -1.0, x + x * x * series, power - 1.0)
    return power, minus_one


@triton.jit
def _log_mixture(excess, mixture, HALF: tl.constexpr):
    """log(mixture), where mixture = 1 + excess <= 1; HALF says that it is at least 1/2.

    The relative error, that of the arguments included, is at most 6 x 2^-24 in float32.
    """
    if excess.dtype == tl.float64:
        rounded = 1.0 + excess
        near = tl.where(rounded == 1.0, excess, tl.log(rounded) * excess / (rounded - 1.0))
        log = tl.where(excess > -0.5, near, tl.log(mixture))
    else:
        x = excess
        if not HALF:
            # tl.log branches for each number. Here mixture = 2^exponent (1 + x) with x in (-1/2, 0].
            bits = mixture.to(tl.int32, bitcast=True)
            exponent = ((bits - 1) >> 23) - 126
            fraction = (bits - (exponent << 23)).to(tl.float32, bitcast=True)
            x = tl.where(excess > -0.5, excess, fraction - 1.0)
        # (log1p(x) - x) / x^2 interpolated at Chebyshev nodes of [-1/2, 0]
        series = -1.5146328 + x * -1.2989286
        series = -1.1097159 + x * series
        series = -0.18017174 + x * series
        series = -0.22656341 + x * series
        series = 0.19390883 + x * series
        series = -0.25030509 + x * series
        series = 0.33332753 + x * series
        series = -0.5 + x * series
        log = x + x * x * series
        if not HALF:
            log += tl.where(excess > -0.5, 0, exponent).to(tl.float32) * 0.69314718
    return log


@triton.jit
def _tanh(x):
    """tanh(x), to a relative error of 6 x 2^-24 in float32."""
    _, minus_one = _exponentials(-2.0 * tl.abs(x))
    size = -minus_one / (2.0 + minus_one)
    return tl.where(x < 0, -size, size)


@triton.jit
def _transform(x, inner, HAS_SOFTCAP: tl.constexpr, NEGATIVE: tl.constexpr):
    """y of the logits x; z = a y with a >= 0. _FLOOR stands for -inf; a NaN stays one."""
    if HAS_SOFTCAP:
        x = _tanh(inner * x)
    elif NEGATIVE:
        x = -x
    return tl.where(x < _FLOOR, _FLOOR, x)


@triton.jit
def _load_row(logits, bias, columns, end, inner, HAS_SOFTCAP: tl.constexpr, NEGATIVE: tl.constexpr):
    """y at `columns` of the row that `logits` points to, _FLOOR from `end` on."""
    x = tl.load(logits + columns, mask=columns < end, other=0.0)
    if bias is not None:
        x += tl.load(bias + columns, mask=columns < end, other=0.0).to(x.dtype)
    return tl.where(columns < end, _transform(x, inner, HAS_SOFTCAP, NEGATIVE), _FLOOR)


@triton.jit
def _add_exponentials(y, inside, top, total, outer):
    """Running maximum of each lane, and sum of exp(outer (y - maximum)): one exponential a number."""
    power = _exp(-outer * tl.abs(y - top))
    higher = y > top
    total = tl.where(inside, tl.where(higher, total * power + 1.0, total + power), total)
    return tl.where(higher, y, top), total


@triton.jit
def _store_statistics(workspace, slot, stride, top, total, outer):
    row_top = tl.max(top, axis=0)
    row_total = tl.sum(total * _exp(-outer * (row_top - top)), axis=0)
    tl.store(workspace + slot * stride, row_top)
    tl.store(workspace + (slot + 1) * stride, row_total)


@triton.jit
def _combine_statistics(workspace, slot, stride, splits, outer):
    """Maximum and log of the sum over all splits of a row."""
    lanes = tl.arange(0, _MAX_SPLITS)
    tops = tl.load(workspace + slot * stride + lanes, mask=lanes < splits, other=_LOWEST)
    totals = tl.load(workspace + (slot + 1) * stride + lanes, mask=lanes < splits, other=0.0)
    top = tl.max(tops, axis=0)
    log_total = tl.log(tl.sum(totals * _exp(-outer * (top - tops)), axis=0))
    return top, tl.where(top <= _FLOOR, float("nan"), log_total)


@triton.jit
def _combine_sums(workspace, slot, stride, splits):
    lanes = tl.arange(0, _MAX_SPLITS)
    return tl.sum(tl.load(workspace + slot * stride + lanes, mask=lanes < splits, other=0.0), axis=0)


@triton.jit
def _store_divergence(loss, workspace, stride, splits):
    """Rounding may leave the sum below 0; a NaN stays one."""
    total = _combine_sums(workspace, _LOSS, stride, splits)
    tl.store(loss, tl.where(total < 0, 0.0, total).to(loss.dtype.element_ty))


@triton.jit
def _compare(y, target_y, top, log_total, target_top, target_log_total, outer):
    """d, whether it is positive, the larger of p and q, exp(-|d|) and exp(-|d|) - 1."""
    # The difference of two near numbers is exact. Maxima far apart have to be subtracted first.
    far = outer * tl.abs(top - target_top) > 8.0
    origin, target_origin = tl.where(far, top, 0.0), tl.where(far, target_top, 0.0)
    shift = tl.where(far, 0.0, outer * (top - target_top)) + (log_total - target_log_total)
    d = outer * ((target_y - target_origin) - (y - origin)) + shift
    above = d > 0
    log_larger = tl.where(above, outer * (target_y - target_top) - target_log_total, outer * (y - top) - log_total)
    power, minus_one = _exponentials(-tl.abs(d))
    return d, above, _exp(log_larger), power, minus_one


@triton.jit
def _log_m(d, above, power, minus_one, beta, rest, HALF: tl.constexpr):
    """Weight in m of the smaller of p and q, m / larger, its logarithm, and log(m / p); rest = 1 - beta."""
    if HALF:
        weight, other = 0.5, 0.5
    else:
        beta, rest = tl.zeros_like(d) + beta, tl.zeros_like(d) + rest  # in the dtype of d
        weight, other = tl.where(above, rest, beta), tl.where(above, beta, rest)
    mixture = other + weight * power
    log_mixture = _log_mixture(weight * minus_one, mixture, HALF)
    return weight, mixture, log_mixture, tl.where(above, log_mixture + d, log_mixture)


@triton.jit(do_not_specialize=["splits", "blocks"])
def _statistics_kernel(
    logits,  # (C, V)
    target_logits,  # (C, V) or None
    bias,  # (V,) or None
    target_bias,  # (V,) or None
    workspace,  # (slots, C, splits)
    inner,
    outer,
    splits,
    blocks,  # of BLOCK_V entries in a split
    stride,
    target_stride,
    V: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    NEGATIVE: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    logits += row * stride
    if target_logits is not None:
        target_logits += row * target_stride
    top = tl.full([BLOCK_V], _LOWEST, logits.dtype.element_ty)
    total = tl.zeros([BLOCK_V], logits.dtype.element_ty)
    target_top, target_total = top, total
    for block in range(split * blocks, tl.minimum((split + 1) * blocks, tl.cdiv(V, BLOCK_V))):
        columns = block * BLOCK_V + tl.arange(0, BLOCK_V)
        inside = columns < V
        y = _load_row(logits, bias, columns, V, inner, HAS_SOFTCAP, NEGATIVE)
        top, total = _add_exponentials(y, inside, top, total, outer)
        if target_logits is not None:
            target_y = _load_row(target_logits, target_bias, columns, V, inner, HAS_SOFTCAP, NEGATIVE)
            target_top, target_total = _add_exponentials(target_y, inside, target_top, target_total, outer)
    slots = tl.num_programs(0).to(tl.int64) * splits
    workspace += row * splits + split
    _store_statistics(workspace, _TOP, slots, top, total, outer)
    if target_logits is not None:
        _store_statistics(workspace, _TARGET_TOP, slots, target_top, target_total, outer)


@triton.jit(do_not_specialize=["splits", "blocks"])
def _sums_kernel(
    logits,  # (C, V)
    target_logits,  # (C, V)
    bias,  # (V,) or None
    target_bias,  # (V,) or None
    workspace,  # (slots, C, splits)
    grad_logits,  # (C, V) or None; for the forward KL divergence alone
    inner,
    outer,
    factor,  # dz/dx where the cap is flat, times grad_scale
    beta,
    rest,
    splits,
    blocks,
    stride,
    target_stride,
    grad_stride,
    V: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    HALF: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    NEGATIVE: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    # Backwards: what the phase before read last is what a cache still holds.
    row, split = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64), tl.num_programs(1) - 1 - tl.program_id(1)
    slots = tl.num_programs(0).to(tl.int64) * splits
    workspace += row * splits
    top, log_total = _combine_statistics(workspace, _TOP, slots, splits, outer)
    target_top, target_log_total = _combine_statistics(workspace, _TARGET_TOP, slots, splits, outer)
    logits += row * stride
    target_logits += row * target_stride
    if grad_logits is not None:
        grad_logits += row * grad_stride
    loss = tl.zeros([BLOCK_V], logits.dtype.element_ty)
    kl = loss
    for block in range(split * blocks, tl.minimum((split + 1) * blocks, tl.cdiv(V, BLOCK_V))):
        columns = block * BLOCK_V + tl.arange(0, BLOCK_V)
        y = _load_row(logits, bias, columns, V, inner, HAS_SOFTCAP, NEGATIVE)
        target_y = _load_row(target_logits, target_bias, columns, V, inner, HAS_SOFTCAP, NEGATIVE)
        d, above, larger, power, minus_one = _compare(y, target_y, top, log_total, target_top, target_log_total, outer)
        # Each divergence is summed in the form whose terms are all >= 0 and do not notice an error of log_total:
        # p - q and its like, which sum to 0, are added to each term.
        if DIVERGENCE == "jsd":
            weight, mixture, log_mixture, log_m_over_p = _log_m(d, above, power, minus_one, beta, rest, HALF)
            loss -= larger * (mixture * log_mixture + weight * power * tl.abs(d))
            kl -= tl.where(above, larger * power, larger) * log_m_over_p
        else:
            p_minus_q = larger * tl.where(above, minus_one, -minus_one)
            if DIVERGENCE == "forward_kl":
                q = tl.where(above, larger, larger * power)
                loss += tl.where((y <= _FLOOR) & (target_y > _FLOOR) & (q > 0), float("inf"), q * d) + p_minus_q
                if grad_logits is not None:
                    grad = factor * p_minus_q
                    if HAS_SOFTCAP:
                        grad *= (1.0 - y) * (1.0 + y)
                    tl.store(grad_logits + columns, grad.to(grad_logits.dtype.element_ty), mask=columns < V)
            else:
                p = tl.where(above, larger * power, larger)
                loss += tl.where((target_y <= _FLOOR) & (y > _FLOOR) & (p > 0), float("inf"), -p * d) - p_minus_q
    tl.store(workspace + _LOSS * slots + split, tl.sum(loss, axis=0))
    if DIVERGENCE == "jsd":
        tl.store(workspace + _KL * slots + split, tl.sum(kl, axis=0))


@triton.jit(do_not_specialize=["splits", "blocks"], do_not_specialize_on_alignment=["loss"])
def _gradient_kernel(
    logits,  # (C, V)
    target_logits,  # (C, V)
    bias,  # (V,) or None
    target_bias,  # (V,) or None
    workspace,  # (slots, C, splits)
    loss,  # (C,)
    grad_logits,  # (C, V)
    inner,
    outer,
    factor,
    beta,
    rest,
    splits,
    blocks,
    stride,
    target_stride,
    grad_stride,
    V: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    HALF: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    NEGATIVE: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slots = tl.num_programs(0).to(tl.int64) * splits
    workspace += row * splits
    top, log_total = _combine_statistics(workspace, _TOP, slots, splits, outer)
    target_top, target_log_total = _combine_statistics(workspace, _TARGET_TOP, slots, splits, outer)
    if split == 0:
        _store_divergence(loss + row, workspace, slots, splits)
    if DIVERGENCE == "jsd":
        kl = _combine_sums(workspace, _KL, slots, splits)
    else:
        kl = _combine_sums(workspace, _LOSS, slots, splits)
    logits += row * stride
    target_logits += row * target_stride
    grad_logits += row * grad_stride
    for block in range(split * blocks, tl.minimum((split + 1) * blocks, tl.cdiv(V, BLOCK_V))):
        columns = block * BLOCK_V + tl.arange(0, BLOCK_V)
        y = _load_row(logits, bias, columns, V, inner, HAS_SOFTCAP, NEGATIVE)
        target_y = _load_row(target_logits, target_bias, columns, V, inner, HAS_SOFTCAP, NEGATIVE)
        d, above, larger, power, minus_one = _compare(y, target_y, top, log_total, target_top, target_log_total, outer)
        ratio = d
        if DIVERGENCE == "jsd":
            _, _, _, ratio = _log_m(d, above, power, minus_one, beta, rest, HALF)
        grad = -factor * tl.where(above, larger * power, larger) * (ratio + kl)
        if HAS_SOFTCAP:
            grad *= (1.0 - y) * (1.0 + y)
        tl.store(grad_logits + columns, grad.to(grad_logits.dtype.element_ty), mask=columns < V)


@triton.jit(do_not_specialize=["splits"], do_not_specialize_on_alignment=["loss"])
def _divergence_kernel(
    workspace,  # (slots, C, splits)
    loss,  # (C,)
    splits,
):
    row = tl.program_id(0).to(tl.int64)
    _store_divergence(loss + row, workspace + row * splits, tl.num_programs(0).to(tl.int64) * splits, splits)


@triton.jit(do_not_specialize=["splits"], do_not_specialize_on_alignment=["labels", "loss"])
def _label_kernel(
    logits,  # (C, V)
    labels,  # (C,)
    bias,  # (V,) or None
    workspace,  # (slots, C, splits)
    loss,  # (C,)
    inner,
    outer,
    splits,
    stride,
    V: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    NEGATIVE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    slots = tl.num_programs(0).to(tl.int64) * splits
    top, log_total = _combine_statistics(workspace + row * splits, _TOP, slots, splits, outer)
    label = tl.load(labels + row)
    found = (label >= 0) & (label < V)
    x = tl.load(logits + row * stride + label, mask=found, other=0.0)
    if bias is not None:
        x += tl.load(bias + label, mask=found, other=0.0).to(x.dtype)
    y = _transform(x, inner, HAS_SOFTCAP, NEGATIVE)
    logprob = tl.where(y <= _FLOOR, float("-inf"), outer * (y - top)) - log_total
    logprob = tl.where(found, logprob, tl.where(label == -1, 0.0, float("nan")))
    tl.store(loss + row, logprob.to(loss.dtype.element_ty))


@triton.jit(do_not_specialize=["splits", "blocks"], do_not_specialize_on_alignment=["labels"])
def _logprob_gradient_kernel(
    logits,  # (C, V)
    labels,  # (C,)
    bias,  # (V,) or None
    workspace,  # (slots, C, splits)
    grad_logits,  # (C, V)
    inner,
    outer,
    factor,
    splits,
    blocks,
    stride,
    grad_stride,
    V: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    NEGATIVE: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slots = tl.num_programs(0).to(tl.int64) * splits
    top, log_total = _combine_statistics(workspace + row * splits, _TOP, slots, splits, outer)
    label = tl.load(labels + row)
    scored = label != -1
    log_total = tl.where((label >= 0) & (label < V), log_total, float("nan"))
    logits += row * stride
    grad_logits += row * grad_stride
    end = tl.where(scored, V, 0)
    for block in range(split * blocks, tl.minimum((split + 1) * blocks, tl.cdiv(V, BLOCK_V))):
        columns = block * BLOCK_V + tl.arange(0, BLOCK_V)
        y = _load_row(logits, bias, columns, end, inner, HAS_SOFTCAP, NEGATIVE)
        grad = factor * (tl.where(columns == label, 1.0, 0.0) - _exp(outer * (y - top) - log_total))
        if HAS_SOFTCAP:
            grad *= (1.0 - y) * (1.0 + y)
        grad = tl.where(scored, grad, 0.0)
        tl.store(grad_logits + columns, grad.to(grad_logits.dtype.element_ty), mask=columns < V)


def divergence_rows(
    logits: Tensor,  # (C, V)
    target_logits: Tensor,  # (C, V)
    *,
    bias: Tensor | None = None,  # (V,)
    target_bias: Tensor | None = None,  # (V,)
    divergence: str,
    logit_softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    beta: float = 0.5,
    loss: Tensor,  # (C,)
    grad_logits: Tensor | None = None,  # (C, V)
    grad_scale: float = 1.0,
    workspace: Tensor | None = None,
    parameters: HeadParameters | None = None,
) -> None:
    """Fill `loss` with the divergence of each row, and `grad_logits` with its gradient.

        z = softcap(scale (logits + bias)) / T,  p = softmax(z);  q likewise from `target_logits` and `target_bias`

    Args:
        logits: W h before the bias, float32 or float64. Rows may lie apart, but each is contiguous.
        target_logits: likewise for the target, of the same dtype.
        bias: of any floating-point dtype; -inf makes a probability 0.
        target_bias: likewise for the target.
        divergence: `jsd`, `forward_kl` or `reverse_kl`, see the module's docstring.
        logit_softcap: c of c tanh(x / c).
        logit_scale: factor on the logits before the cap.
        temperature: divisor of the logits after it.
        beta: weight of q in m, for `jsd`.
        loss: filled; of the dtype of `logits`. Infinite for a KL divergence if the second distribution is 0, through
            a logit of -inf, where the first is not.
        grad_logits: filled with grad_scale dloss/dlogits, in its own dtype. It may be `logits` itself.
        grad_scale: a power of two that keeps a float16 gradient from underflow.
        workspace: scratch memory of `workspace_numel` numbers of the dtype of `logits`; allocated if None.
        parameters: launch parameters, those of the architecture if None.

    The maths is that of the dtype of `logits`. On a GPU the numbers of the formula are float32 for float64 too.

    Raises:
        ValueError: shapes, dtypes or strides that do not fit, or tensors that no kernel can read.
    """
    if divergence not in ("jsd", "forward_kl", "reverse_kl"):
        raise ValueError(f"divergence: expected jsd, forward_kl or reverse_kl, got {divergence!r}")
    _check(logits, loss, grad_logits, target_logits=target_logits)
    bias, target_bias = _bias("bias", bias, logits), _bias("target_bias", target_bias, logits)
    rows, vocabulary = logits.shape
    if rows == 0:
        return
    inner, outer, factor, constants = _numbers(vocabulary, logit_softcap, logit_scale, temperature, grad_scale)
    if divergence == "jsd":
        factor *= 1 - beta
    mixing = {"DIVERGENCE": divergence, "HALF": beta == 0.5}

    def run(parameters: HeadParameters, grad_logits: Tensor | None) -> None:
        splits, blocks = _split(logits, parameters)
        space = _space(workspace, logits, splits)
        grid, shared = (rows, splits), {**constants, **_threads(logits, parameters)}
        tensors = (logits, target_logits, bias, target_bias, space)
        numbers = (inner, outer, factor, beta, 1 - beta, splits, blocks)
        strides = (logits.stride(0), target_logits.stride(0))
        launch.run(_statistics_kernel, grid, *tensors, inner, outer, splits, blocks, *strides, **shared)
        # The forward divergence needs no sum for its gradient, which is made along with the sum.
        early = grad_logits if divergence == "forward_kl" else None
        stride = 0 if grad_logits is None else grad_logits.stride(0)
        launch.run(_sums_kernel, grid, *tensors, early, *numbers, *strides, stride, **shared, **mixing)
        if grad_logits is early:
            launch.run(_divergence_kernel, (rows,), space, loss, splits, num_warps=1)
        else:
            tensors = (*tensors, loss, grad_logits)
            launch.run(_gradient_kernel, grid, *tensors, *numbers, *strides, stride, **shared, **mixing)

    run(parameters or _parameters(f"divergence_rows {divergence}", logits, grad_logits, run), grad_logits)


def logprob_rows(
    logits: Tensor,  # (C, V)
    labels: Tensor,  # (C,)
    *,
    bias: Tensor | None = None,  # (V,)
    logit_softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    loss: Tensor,  # (C,)
    grad_logits: Tensor | None = None,  # (C, V)
    grad_scale: float = 1.0,
    workspace: Tensor | None = None,
    parameters: HeadParameters | None = None,
) -> None:
    """Fill `loss` with log p(label) of each row, and `grad_logits` with its gradient.

    Args:
        logits: see `divergence_rows`, as for all arguments that are not named here.
        labels: int32 or int64, each from 0 to V - 1, or -1: loss 0 and gradient 0, even if the row holds NaN. Any
            other gives NaN.
        bias: of any floating-point dtype; -inf makes a probability 0.
        logit_softcap: c of c tanh(x / c).
        logit_scale: factor on the logits before the cap.
        temperature: divisor of the logits after it.
        loss: filled; of the dtype of `logits`.
        grad_logits: filled with grad_scale dlog p/dlogits, in its own dtype. It may be `logits` itself.
        grad_scale: a power of two that keeps a float16 gradient from underflow.
        workspace: scratch memory of `workspace_numel` numbers of the dtype of `logits`; allocated if None.
        parameters: launch parameters, those of the architecture if None.

    Raises:
        ValueError: shapes, dtypes or strides that do not fit, or tensors that no kernel can read.
    """
    _check(logits, loss, grad_logits)
    bias = _bias("bias", bias, logits)
    if labels.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"labels: expected int32 or int64, got {labels.dtype}")
    launch.check("labels", labels, (logits.shape[0],), logits, contiguous=True)
    rows, vocabulary = logits.shape
    if rows == 0:
        return
    inner, outer, factor, constants = _numbers(vocabulary, logit_softcap, logit_scale, temperature, grad_scale)

    def run(parameters: HeadParameters, grad_logits: Tensor | None) -> None:
        splits, blocks = _split(logits, parameters)
        space = _space(workspace, logits, splits)
        grid, shared = (rows, splits), {**constants, **_threads(logits, parameters)}
        numbers = (inner, outer, splits, blocks, logits.stride(0), 0)
        launch.run(_statistics_kernel, grid, logits, None, bias, None, space, *numbers, **shared)
        numbers = (inner, outer, splits, logits.stride(0))
        launch.run(_label_kernel, (rows,), logits, labels, bias, space, loss, *numbers, num_warps=1, **constants)
        if grad_logits is not None:
            tensors = (logits, labels, bias, space, grad_logits)
            numbers = (inner, outer, factor, splits, blocks, logits.stride(0), grad_logits.stride(0))
            launch.run(_logprob_gradient_kernel, grid, *tensors, *numbers, **shared)

    run(parameters or _parameters("logprob_rows", logits, grad_logits, run), grad_logits)


def workspace_numel(rows: int) -> int:
    """Numbers of scratch memory that suffice for up to `rows` rows at a time."""
    return _SLOTS * rows * _SPLITS


def _numbers(
    vocabulary: int, logit_softcap: float | None, logit_scale: float, temperature: float, grad_scale: float
) -> tuple[float, float, float, dict[str, int]]:
    """The formula's numbers as the kernels take them: inner and outer of z = outer tanh(inner x), factor, constants."""
    factor = logit_scale / temperature * grad_scale
    constants = {"V": vocabulary, "HAS_SOFTCAP": logit_softcap is not None, "NEGATIVE": logit_scale < 0}
    if logit_softcap is None:
        return 1.0, abs(logit_scale) / temperature, factor, constants
    return logit_scale / logit_softcap, logit_softcap / temperature, factor, constants


def _threads(logits: Tensor, parameters: HeadParameters) -> dict[str, int | None]:
    threads = parameters.num_warps * launch.architecture(logits.device).warp_size
    resident = None if logits.dtype == torch.float64 else parameters.programs * threads
    return {"BLOCK_V": parameters.block, "num_warps": parameters.num_warps, "resident": resident}


def _split(logits: Tensor, parameters: HeadParameters) -> tuple[int, int]:
    """Into how many splits of how many blocks a row goes."""
    multiprocessors = launch.architecture(logits.device).multiprocessors
    blocks = triton.cdiv(logits.shape[1], parameters.block)
    return _balanced_split(logits.shape[0], blocks, multiprocessors * parameters.programs)


@cache
def _balanced_split(rows: int, blocks: int, programs: int) -> tuple[int, int]:
    """The split that takes the fewest block times if `programs` run at once and to start one takes as long as 2."""

    def time(splits: int) -> int:
        return triton.cdiv(rows * splits, programs) * (triton.cdiv(blocks, splits) + 2)

    each = triton.cdiv(blocks, min(range(1, min(_SPLITS, blocks) + 1), key=time))
    return triton.cdiv(blocks, each), each


def _space(workspace: Tensor | None, logits: Tensor, splits: int) -> Tensor:
    needed = _SLOTS * logits.shape[0] * splits
    if workspace is None:
        return logits.new_empty(needed)
    if workspace.numel() < needed or workspace.dtype != logits.dtype or not workspace.is_contiguous():
        wanted, got = f"{needed} contiguous numbers of {logits.dtype}", f"{workspace.numel()} of {workspace.dtype}"
        raise ValueError(f"workspace: expected at least {wanted}, got {got}")
    return workspace


def _parameters(
    name: str, logits: Tensor, grad_logits: Tensor | None, run: Callable[[HeadParameters, Tensor | None], None]
) -> HeadParameters:
    parameters = launch.head_parameters(logits.device)
    if not launch.autotunes(logits.device):
        return parameters
    scratch = None if grad_logits is None else torch.empty_like(grad_logits)  # grad_logits may be logits itself
    key = (name, logits.device, logits.dtype, scratch is None or scratch.dtype, logits.shape[1])
    candidates = launch.head_candidates(parameters)
    return launch.fastest((*key, logits.shape[0].bit_length()), candidates, lambda each: run(each, scratch))


def _check(logits: Tensor, loss: Tensor, grad_logits: Tensor | None, target_logits: Tensor | None = None) -> None:
    """Raise ValueError for what a kernel would misread, or read or write beyond the end of."""
    if logits.dim() != 2 or logits.dtype not in (torch.float32, torch.float64):
        got = f"{logits.dtype} of shape {tuple(logits.shape)}"
        raise ValueError(f"logits: expected float32 or float64 of shape (C, V), got {got}")
    shape = tuple(logits.shape)
    launch.check("logits", logits, shape, logits)
    launch.check("loss", loss, shape[:1], logits, dtype=logits.dtype)
    if grad_logits is not None:
        launch.check("grad_logits", grad_logits, shape, logits)
    if target_logits is not None:
        launch.check("target_logits", target_logits, shape, logits, dtype=logits.dtype)


def _bias(name: str, bias: Tensor | None, logits: Tensor) -> Tensor | None:
    if bias is None:
        return None
    bias = bias.contiguous()
    launch.check(name, bias, tuple(logits.shape[1:]), logits)
    return bias
