"""Jensen-Shannon divergence between two linear heads, without the logits of all rows ever existing.

    z = softcap(scale (W h + b)) / T,  p = softmax(z);  q likewise from the target
    m = (1 - beta) p + beta q
    loss   = (1 - beta) KL(p || m) + beta KL(q || m)                       natural logarithm
    dloss/dz_v = (1 - beta) p_v (log(p_v / m_v) - KL(p || m))

The ratios are taken in logarithms, with d = log q - log p:

    log(m / p) = logaddexp(log(1 - beta), log beta + d)
    log(m / q) = logaddexp(log beta, log(1 - beta) - d)

so that neither an underflow of p or q nor a large d loses them.

Source: Lin, "Divergence measures based on the Shannon entropy" (1991).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cdas_fast.ops.implementation import Implementation
from cdas_fast.ops.linear_head import CHUNK_BYTES, HeadParameters, Reduction, divergence, register_divergence

_FLOOR = -1e30  # stands for log 0, so that differences of logarithms stay finite


def linear_jsd(
    hidden: Tensor,  # (..., D)
    target_hidden: Tensor,  # (..., D_target)
    weight: Tensor,  # (V, D)
    *,
    bias: Tensor | None = None,  # (V,)
    target_weight: Tensor | None = None,  # (V, D_target)
    target_bias: Tensor | None = None,  # (V,)
    logit_softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    beta: float = 0.5,
    row_weights: Tensor | None = None,  # (...)
    reduction: Reduction = "mean",
    impl: Implementation = "auto",
    chunk_bytes: int = CHUNK_BYTES,
) -> Tensor:
    """Jensen-Shannon divergence of softmax(head(hidden)) and softmax(head(target_hidden)), in nats.

        m = (1 - beta) p + beta q
        loss_n = (1 - beta) KL(p_n || m_n) + beta KL(q_n || m_n)           between 0 and ln 2 for beta = 1/2

    Equivalent PyTorch for beta = 1/2, which holds several (N, V) tensors::

        log_p = (hidden @ weight.T).float().log_softmax(-1)
        log_q = (target_hidden @ weight.T).float().log_softmax(-1)
        log_m = torch.logaddexp(log_p, log_q) - math.log(2)
        loss = ((log_p.exp() * (log_p - log_m)).sum(-1) + (log_q.exp() * (log_q - log_m)).sum(-1)) / 2

    Args:
        hidden: final hidden states of the trained pass, (..., D); float16, bfloat16, float32 or float64.
        target_hidden: final hidden states of the target pass, (..., D_target); no gradient.
        weight: the frozen head, (V, D).
        bias: its bias, (V,).
        target_weight: the target's head, (V, D_target), if it has its own.
        target_bias: its bias, (V,); the shared head's `bias` if there is no `target_weight`.
        logit_softcap: c of c tanh(x / c) on the scaled logits, as Gemma-2 has.
        logit_scale: factor on the logits before the cap, as Cohere has.
        temperature: divisor of both logits.
        beta: weight of the target in m, strictly between 0 and 1.
        row_weights: one number per row. `none` and `sum` multiply by it, `mean` divides by its sum as well. A row of
            weight 0 contributes nothing, even if it holds NaN.
        reduction: `mean`, `sum` or `none` (one loss per row, shape `hidden.shape[:-1]`).
        impl: `auto`, `reference`, `cpp` or `triton`.
        chunk_bytes: memory for the logits of one chunk of rows.

    Returns:
        float32 (float64 for float64 input), a scalar or one loss per row. Mean over no rows, or over rows of weight 0
        alone, is 0.

    Logits are formed and used in float32 (float64 for float64 input) whatever the input's dtype, autocast or not. The
    gradient reaches `hidden` and `row_weights`, once: there is no second derivative.

    Raises:
        InvalidInputError: shapes, dtypes, devices or numbers that do not fit, or a head or target that requires a
            gradient.
        MissingDependencyError: an implementation that is not installed.
    """
    return divergence(
        "linear_jsd",
        _linear_jsd,
        HeadParameters("jsd", logit_softcap, logit_scale, temperature, beta),
        hidden,
        target_hidden,
        weight,
        bias=bias,
        target_weight=target_weight,
        target_bias=target_bias,
        row_weights=row_weights,
        reduction=reduction,
        impl=impl,
        chunk_bytes=chunk_bytes,
    )


def reference_rows(
    log_p: Tensor,  # (C, V)
    log_q: Tensor,  # (C, V)
    parameters: HeadParameters,
    need_gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """Losses (C,), and their gradients with respect to z (C, V) if needed; overwrites what it is given."""
    log_beta, log_rest = math.log(parameters.beta), math.log1p(-parameters.beta)
    log_p.clamp_(min=_FLOOR)
    log_q.clamp_(min=_FLOOR)
    difference = log_q - log_p
    log_ratio = log_rest - difference
    torch.logaddexp(log_ratio, log_ratio.new_tensor(log_beta), out=log_ratio)  # log(m / q)
    kl_q = -log_q.exp_().mul_(log_ratio).sum(-1)
    torch.add(difference, log_beta, out=log_ratio)
    torch.logaddexp(log_ratio, log_ratio.new_tensor(log_rest), out=log_ratio)  # log(m / p)
    p = log_p.exp_()
    kl_p = -torch.mul(p, log_ratio, out=difference).sum(-1)
    loss = ((1 - parameters.beta) * kl_p + parameters.beta * kl_q).clamp_(min=0)
    if not need_gradient:
        return loss, None
    return loss, log_ratio.add_(kl_p[:, None]).mul_(p).mul_(parameters.beta - 1)


_linear_jsd = register_divergence("linear_jsd", reference_rows)
