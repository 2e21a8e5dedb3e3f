"""RMS norm, gated activation and rotary embedding on a GPU: shapes and memory for the Triton kernels."""

from __future__ import annotations

import torch
from torch import Tensor

import cdas_fast.kernels.elementwise as kernels


def rms_norm_forward(x: Tensor, factor: Tensor, eps: float, round_normalized: bool) -> Tensor:
    """See `Functions` in rms_norm.py."""
    out = _like(x)
    kernels.rms_norm(_flat(x), None, factor, eps, round_normalized, _flat(out))
    return out


def rms_norm_backward(grad_out: Tensor, x: Tensor, factor: Tensor, eps: float) -> Tensor:
    """See `Functions` in rms_norm.py."""
    grad = _like(x)
    kernels.rms_norm(_flat(x), _flat(grad_out), factor, eps, False, _flat(grad))
    return grad


def gated_activation_forward(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """See `Functions` in gated_activation.py."""
    out = _like(gate)
    kernels.gated_activation(_flat(gate), _flat(up), activation, _flat(out))
    return out


def gated_activation_backward(
    grad_out: Tensor, gate: Tensor, up: Tensor, activation: str, need_gate: bool, need_up: bool
) -> tuple[Tensor | None, Tensor | None]:
    """See `Functions` in gated_activation.py."""
    grad_gate, grad_up = (_like(gate) if need else None for need in (need_gate, need_up))
    kernels.gated_activation_backward(
        _flat(grad_out),
        _flat(gate),
        _flat(up),
        activation,
        grad_gate=None if grad_gate is None else _flat(grad_gate),
        grad_up=None if grad_up is None else _flat(grad_up),
    )
    return grad_gate, grad_up


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See `Functions` in rotary_embedding.py."""
    batch, heads, tokens, width = x.shape
    out = x.new_empty(batch, tokens, heads, width)
    kernels.rotate(*(each if each.stride(-1) == 1 else each.contiguous() for each in (x, cos, sin)), out)
    return out.transpose(1, 2)


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _flat(x: Tensor) -> Tensor:
    """(..., D) as rows (N, D) that may lie apart but are contiguous; copied where no one stride leads to each."""
    rows = x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty(0, x.shape[-1])
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()
