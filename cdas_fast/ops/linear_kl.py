"""Kullback-Leibler divergence between two linear heads, without the logits of all rows ever existing.

    z = softcap(scale (W h + b)) / T,  p = softmax(z);  q likewise from the target
    forward    KL(q || p) = sum_v q_v (log q_v - log p_v),   dloss/dz_v = p_v - q_v
    reverse    KL(p || q) = sum_v p_v (log p_v - log q_v),   dloss/dz_v = p_v (log p_v - log q_v - KL(p || q))

Source: Kullback and Leibler, "On information and sufficiency" (1951). Forward is the divergence of Hinton et al.,
"Distilling the Knowledge in a Neural Network" (2015), reverse that of Gu et al., "MiniLLM" (2024).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from cdas_fast.errors import InvalidInputError, expected_got
from cdas_fast.ops.implementation import Implementation
from cdas_fast.ops.linear_head import CHUNK_BYTES, HeadParameters, Reduction, divergence, register_divergence

Direction = Literal["forward", "reverse"]


def linear_kl(
    hidden: Tensor,  # (..., D)
    target_hidden: Tensor,  # (..., D_target)
    weight: Tensor,  # (V, D)
    *,
    direction: Direction = "forward",
    bias: Tensor | None = None,  # (V,)
    target_weight: Tensor | None = None,  # (V, D_target)
    target_bias: Tensor | None = None,  # (V,)
    logit_softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    row_weights: Tensor | None = None,  # (...)
    reduction: Reduction = "mean",
    impl: Implementation = "auto",
    chunk_bytes: int = CHUNK_BYTES,
) -> Tensor:
    """Kullback-Leibler divergence of softmax(head(hidden)) and softmax(head(target_hidden)), in nats.

        forward: loss_n = KL(q_n || p_n)        reverse: loss_n = KL(p_n || q_n)

    Equivalent PyTorch, which holds several (N, V) tensors::

        log_p = (hidden @ weight.T).float().log_softmax(-1)
        log_q = (target_hidden @ weight.T).float().log_softmax(-1)
        loss = (log_q.exp() * (log_q - log_p)).sum(-1)                 # forward; reverse swaps p and q

    Args:
        hidden: final hidden states of the trained pass, (..., D); float16, bfloat16, float32 or float64.
        target_hidden: final hidden states of the target pass, (..., D_target); no gradient.
        weight: the frozen head, (V, D).
        direction: `forward` for KL(target || trained), `reverse` for KL(trained || target).
        bias: its bias, (V,).
        target_weight: the target's head, (V, D_target), if it has its own.
        target_bias: its bias, (V,); the shared head's `bias` if there is no `target_weight`.
        logit_softcap: c of c tanh(x / c) on the scaled logits, as Gemma-2 has.
        logit_scale: factor on the logits before the cap, as Cohere has.
        temperature: divisor of both logits. The loss is not multiplied by its square, as distillation often does.
        row_weights: one number per row. `none` and `sum` multiply by it, `mean` divides by its sum as well. A row of
            weight 0 contributes nothing, even if it holds NaN.
        reduction: `mean`, `sum` or `none` (one loss per row, shape `hidden.shape[:-1]`).
        impl: `auto`, `reference`, `cpp` or `triton`.
        chunk_bytes: memory for the logits of one chunk of rows.

    Returns:
        float32 (float64 for float64 input), a scalar or one loss per row. Mean over no rows, or over rows of weight 0
        alone, is 0. The loss is infinite where a bias of -inf bars what the other side allows.

    Logits are formed and used in float32 (float64 for float64 input) whatever the input's dtype, autocast or not. The
    gradient reaches `hidden` and `row_weights`, once: there is no second derivative.

    Raises:
        InvalidInputError: shapes, dtypes, devices or numbers that do not fit, or a head or target that requires a
            gradient.
        MissingDependencyError: an implementation that is not installed.
    """
    if direction not in ("forward", "reverse"):
        raise InvalidInputError(expected_got("linear_kl: direction", "forward or reverse", repr(direction)))
    loss: Literal["forward_kl", "reverse_kl"] = "forward_kl" if direction == "forward" else "reverse_kl"
    return divergence(
        "linear_kl",
        _linear_kl,
        HeadParameters(loss, logit_softcap, logit_scale, temperature),
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
    if parameters.loss == "forward_kl":
        difference = log_q - log_p
        q = log_q.exp_()
        loss = difference.mul_(q).masked_fill_(q == 0, 0.0).sum(-1).clamp_(min=0)
        return loss, log_p.exp_().sub_(q) if need_gradient else None
    difference = log_p - log_q
    p = log_p.exp_()
    barred = p == 0  # there log p - log q may be -inf or NaN
    loss = torch.mul(p, difference, out=log_q).masked_fill_(barred, 0.0).sum(-1).clamp_(min=0)
    if not need_gradient:
        return loss, None
    return loss, difference.sub_(loss[:, None]).mul_(p).masked_fill_(barred, 0.0)


_linear_kl = register_divergence("linear_kl", reference_rows)
