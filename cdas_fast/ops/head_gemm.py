"""The products with a linear head, in the dtype of the activations whatever that of the head."""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK_BYTES = 16 * 2**20  # of the head that are cast at a time


def head_logits(hidden: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """hidden @ weight.T in the dtype of `hidden`: (C, D), (V, D) -> (C, V)."""
    if weight.dtype == hidden.dtype:
        return torch.mm(hidden, weight.T, out=out)
    logits = hidden.new_empty(hidden.shape[0], weight.shape[0]) if out is None else out
    for columns in _blocks(weight, hidden.dtype):
        torch.mm(hidden, weight[columns].to(hidden.dtype).T, out=logits[:, columns])
    return logits


def times_head(grad_logits: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """grad_logits @ weight in the dtype of `grad_logits`, into `out`: (C, V), (V, D) -> (C, D)."""
    if weight.dtype == grad_logits.dtype:
        return torch.mm(grad_logits, weight, out=out)
    out.zero_()
    for columns in _blocks(weight, grad_logits.dtype):
        out.addmm_(grad_logits[:, columns], weight[columns].to(grad_logits.dtype))
    return out


def _blocks(weight: Tensor, dtype: torch.dtype) -> list[slice]:
    """Slices of the vocabulary whose weights take at most `_BLOCK_BYTES` in `dtype`."""
    rows = max(1, _BLOCK_BYTES // (dtype.itemsize * weight.shape[1]))
    return [slice(start, start + rows) for start in range(0, weight.shape[0], rows)]
