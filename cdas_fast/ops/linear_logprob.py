"""Log-probabilities of labels under a linear head, without the logits of all rows ever existing.

    z = softcap(scale (W h + b)) / T,  p = softmax(z)
    log p(y) = z_y - log sum_v exp(z_v)
    d log p(y) / dz_v = [v = y] - p_v

Cross-entropy is its negative, reduced.
"""

from __future__ import annotations

from torch import Tensor

from cdas_fast.ops.implementation import Implementation
from cdas_fast.ops.linear_head import CHUNK_BYTES, HeadParameters, Reduction, logprob, reduce, register_logprob


def linear_logprob(
    hidden: Tensor,  # (..., D)
    labels: Tensor,  # (...)
    weight: Tensor,  # (V, D)
    *,
    bias: Tensor | None = None,  # (V,)
    logit_softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    ignore_index: int = -100,
    impl: Implementation = "auto",
    chunk_bytes: int = CHUNK_BYTES,
) -> Tensor:
    """Log-probability of each label under softmax(head(hidden)), in nats.

    Equivalent PyTorch, which holds several (N, V) tensors::

        log_p = (hidden @ weight.T).float().log_softmax(-1)
        log_p.gather(-1, labels[..., None])[..., 0]

    Preference losses are sums of it: `linear_logprob(hidden, labels, weight).sum(-1)` is the log-probability of each
    sequence.

    Args:
        hidden: final hidden states, (..., D); float16, bfloat16, float32 or float64. Those of position k go with the
            label of position k + 1: nothing is shifted here.
        labels: (...) int64, each from 0 to V - 1 or `ignore_index`.
        weight: the frozen head, (V, D).
        bias: its bias, (V,).
        logit_softcap: c of c tanh(x / c) on the scaled logits, as Gemma-2 has.
        logit_scale: factor on the logits before the cap, as Cohere has.
        temperature: divisor of the logits.
        ignore_index: rows of this label have log-probability 0 and no gradient, even if they hold NaN.
        impl: `auto`, `reference`, `cpp` or `triton`.
        chunk_bytes: memory for the logits of one chunk of rows.

    Returns:
        The shape of `labels`, float32 (float64 for float64 input).

    Logits are formed and used in float32 (float64 for float64 input) whatever the input's dtype, autocast or not. The
    gradient reaches `hidden`, once: there is no second derivative. A label out of range raises an error on a CPU;
    elsewhere, and in a compiled function, where looking at it would cost time, its log-probability is NaN.

    Raises:
        InvalidInputError: shapes, dtypes, devices, labels or numbers that do not fit, or a head that requires a
            gradient.
        MissingDependencyError: an implementation that is not installed.
    """
    return logprob(
        "linear_logprob",
        _linear_logprob,
        HeadParameters("logprob", logit_softcap, logit_scale, temperature),
        hidden,
        labels,
        weight,
        bias=bias,
        ignore_index=ignore_index,
        impl=impl,
        chunk_bytes=chunk_bytes,
    )


def linear_cross_entropy(
    hidden: Tensor,  # (..., D)
    labels: Tensor,  # (...)
    weight: Tensor,  # (V, D)
    *,
    bias: Tensor | None = None,  # (V,)
    logit_softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    ignore_index: int = -100,
    row_weights: Tensor | None = None,  # (...)
    reduction: Reduction = "mean",
    impl: Implementation = "auto",
    chunk_bytes: int = CHUNK_BYTES,
) -> Tensor:
    """Cross-entropy of softmax(head(hidden)) with labels: the negative of `linear_logprob`, in nats.

    Equivalent PyTorch, which holds several (N, V) tensors::

        F.cross_entropy((hidden @ weight.T).float(), labels)

    Args:
        hidden: see `linear_logprob`, as for all arguments that are not named here.
        labels: (...) int64, each from 0 to V - 1 or `ignore_index`.
        weight: the frozen head, (V, D).
        bias: its bias, (V,).
        logit_softcap: c of c tanh(x / c) on the scaled logits.
        logit_scale: factor on the logits before the cap.
        temperature: divisor of the logits.
        ignore_index: rows of this label have loss 0 and no gradient, and do not count in the mean.
        row_weights: one number per row. `none` and `sum` multiply by it, `mean` divides by its sum over the rows that
            are not ignored as well. A row of weight 0 contributes nothing, even if it holds NaN.
        reduction: `mean`, `sum` or `none` (one loss per row, the shape of `labels`).
        impl: `auto`, `reference`, `cpp` or `triton`.
        chunk_bytes: memory for the logits of one chunk of rows.

    Returns:
        float32 (float64 for float64 input), a scalar or one loss per row. Mean over no rows, over ignored rows or over
        rows of weight 0 alone, is 0.

    Raises:
        InvalidInputError: shapes, dtypes, devices, labels or numbers that do not fit, or a head that requires a
            gradient.
        MissingDependencyError: an implementation that is not installed.
    """
    result = logprob(
        "linear_cross_entropy",
        _linear_logprob,
        HeadParameters("logprob", logit_softcap, logit_scale, temperature),
        hidden,
        labels,
        weight,
        bias=bias,
        ignore_index=ignore_index,
        row_weights=row_weights,
        reduction=reduction,
        impl=impl,
        chunk_bytes=chunk_bytes,
    )
    return reduce(-result, row_weights, reduction, counted=labels != ignore_index)


def reference_rows(
    log_p: Tensor,  # (C, V)
    labels: Tensor,  # (C,), -1 where the row is ignored
    parameters: HeadParameters,
    need_gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities (C,), and their gradients with respect to z (C, V) if needed; overwrites log_p."""
    ignored, index = labels < 0, labels.clamp(min=0)[:, None]
    picked = log_p.gather(1, index)
    result = picked[:, 0].masked_fill(ignored, 0.0)
    if not need_gradient:
        return result, None
    gradient = log_p.exp_().neg_().scatter_(1, index, 1 - picked.exp())
    return result, gradient.masked_fill_(ignored[:, None], 0.0)


_linear_logprob = register_logprob("linear_logprob", reference_rows)
