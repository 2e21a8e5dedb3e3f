"""Interchange and clamp on a GPU: shapes and memory for the Triton kernels, see `interchange.Functions`."""

from __future__ import annotations

import torch
from torch import Tensor

import cdas_fast.kernels.interchange as kernels


def clamp_forward(
    hidden: Tensor, value: Tensor, direction: Tensor, mask: Tensor | None, direction_index: Tensor | None
) -> Tensor:
    """See `Functions`."""
    if not direction.numel():  # a subspace of no dimension, for which there is no kernel
        return hidden.clone(memory_format=torch.contiguous_format)
    out = hidden.new_empty(hidden.shape)
    kernels.clamp_forward(
        _flat(hidden),
        value.contiguous(),
        direction.contiguous(),
        mask=_flat_mask(mask),
        direction_index=_index(direction_index),
        rows_per_sequence=_rows_per_sequence(hidden),
        out=_flat(out),
    )
    return out


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
    sequences, rank = grad_out.shape[0], direction.shape[-2]
    if not direction.numel():
        return (
            grad_out.clone(memory_format=torch.contiguous_format) if need_hidden else None,
            direction.new_zeros(sequences, rank) if need_value else None,
            torch.zeros_like(direction) if need_direction else None,
        )
    grad_hidden = grad_out.new_empty(grad_out.shape) if need_hidden else None
    grad_value = direction.new_empty(sequences, rank) if need_value else None
    grad_direction = direction.new_empty(direction.shape) if need_direction else None
    kernels.clamp_backward(
        _flat(grad_out),
        None if hidden is None else _flat(hidden),
        None if value is None else value.contiguous(),
        direction.contiguous(),
        mask=_flat_mask(mask),
        direction_index=_index(direction_index),
        rows_per_sequence=_rows_per_sequence(grad_out),
        grad_hidden=None if grad_hidden is None else _flat(grad_hidden),
        grad_value=grad_value,
        grad_direction=grad_direction,
    )
    return grad_hidden, grad_value, grad_direction


def project(source: Tensor, direction: Tensor, direction_index: Tensor | None) -> Tensor:
    """See `Functions`."""
    out = direction.new_zeros(source.shape[0], direction.shape[-2])
    if not direction.numel():
        return out
    kernels.project(source.contiguous(), direction.contiguous(), _index(direction_index), out)
    return out


def _flat(activations: Tensor) -> Tensor:
    """(B, T, D) or (N, D) as contiguous rows."""
    return activations.flatten(0, -2).contiguous()


def _flat_mask(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.reshape(-1).contiguous()


def _index(direction_index: Tensor | None) -> Tensor | None:
    return None if direction_index is None else direction_index.long().contiguous()


def _rows_per_sequence(activations: Tensor) -> int:
    return activations.shape[1] if activations.dim() == 3 else 1
