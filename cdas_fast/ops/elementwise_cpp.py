"""RMS norm, gated activation and rotary embedding on a CPU by the compiled kernels of csrc/elementwise.h."""

from __future__ import annotations

import ctypes
import math
from typing import Any

import torch
from torch import Tensor

from cdas_fast.ops import cpu_library


def rms_norm_forward(x: Tensor, factor: Tensor, eps: float, round_normalized: bool) -> Tensor:
    """See `Functions` in rms_norm.py."""
    call = _Call(cpu_library.RmsNorm, x, eps=eps, round_normalized=round_normalized)
    call.arguments.factor = factor.data_ptr()
    out = call.result("out", x)
    call.run("cdas_rms_norm_forward", x=x)
    return out


def rms_norm_backward(grad_out: Tensor, x: Tensor, factor: Tensor, eps: float) -> Tensor:
    """See `Functions` in rms_norm.py."""
    call = _Call(cpu_library.RmsNorm, x, eps=eps)
    call.arguments.factor = factor.data_ptr()
    grad = call.result("out", x)
    call.run("cdas_rms_norm_backward", x=x, grad_out=grad_out)
    return grad


def gated_activation_forward(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """See `Functions` in gated_activation.py."""
    call = _Call(cpu_library.GatedActivation, gate, activation=cpu_library.ACTIVATIONS[activation])
    out = call.result("out", gate)
    call.run("cdas_gated_activation_forward", gate=gate, up=up)
    return out


def gated_activation_backward(
    grad_out: Tensor, gate: Tensor, up: Tensor, activation: str, need_gate: bool, need_up: bool
) -> tuple[Tensor | None, Tensor | None]:
    """See `Functions` in gated_activation.py."""
    call = _Call(cpu_library.GatedActivation, gate, activation=cpu_library.ACTIVATIONS[activation])
    grad_gate = call.result("grad_gate", gate) if need_gate else None
    grad_up = call.result("grad_up", up) if need_up else None
    call.run("cdas_gated_activation_backward", gate=gate, up=up, grad_out=grad_out)
    return grad_gate, grad_up


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See `Functions` in rotary_embedding.py."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    batch, heads, tokens, width = x.shape
    out = cpu_library.in_huge_pages(x.new_empty(batch, tokens, heads, width))
    tables = [each.expand(batch, tokens, width) for each in (cos, sin)]
    tables = [each if each.stride(-1) == 1 else each.contiguous() for each in tables]
    arguments = cpu_library.Rotary(
        rows=batch * tokens,
        heads=heads,
        width=width,
        x=cpu_library.Rows(x.data_ptr(), max(tokens, 1), x.stride(2), x.stride(0)),
        head_stride=x.stride(1),
        **{
            name: cpu_library.Rows(each.data_ptr(), max(tokens, 1), each.stride(1), each.stride(0))
            for name, each in zip(("cos", "sin"), tables, strict=True)
        },
        out=out.data_ptr(),
        dtype=cpu_library.DTYPES[x.dtype],
        threads=torch.get_num_threads(),
    )
    cpu_library.load().cdas_rotary(ctypes.byref(arguments))
    return out.transpose(1, 2)


class _Call:
    """The arguments of one call on rows like those of `activations`."""

    def __init__(self, structure: type[ctypes.Structure], activations: Tensor, **numbers: Any) -> None:
        self.arguments: Any = structure(
            rows=math.prod(activations.shape[:-1]),
            width=activations.shape[-1],
            dtype=cpu_library.DTYPES[activations.dtype],
            threads=torch.get_num_threads(),
            **numbers,
        )

    def result(self, name: str, like: Tensor) -> Tensor:
        """A new contiguous tensor that the kernel fills."""
        new = cpu_library.in_huge_pages(torch.empty_like(like, memory_format=torch.contiguous_format))
        setattr(self.arguments, name, new.data_ptr())
        return new

    def run(self, function: str, **activations: Tensor) -> None:
        """Call the kernel on tensors of any strides."""
        kept = {name: _evenly_strided(tensor) for name, tensor in activations.items()}
        for name, (_, rows) in kept.items():
            setattr(self.arguments, name, rows)
        getattr(cpu_library.load(), function)(ctypes.byref(self.arguments))


def _evenly_strided(tensor: Tensor) -> tuple[Tensor, cpu_library.Rows]:
    """Where the rows of (..., D) lie, and the tensor that holds them.

    That is a copy only where a row is not contiguous, or the rows lie at more than two strides.
    """
    if not tensor.is_contiguous():
        leading: list[tuple[int, int]] = []  # sizes and strides, those that follow from each other made one
        for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True):
            if size == 1:
                continue
            if leading and leading[-1][1] == size * stride:
                leading[-1] = (leading[-1][0] * size, stride)
            else:
                leading.append((size, stride))
        if len(leading) <= 2 and (tensor.stride(-1) == 1 or tensor.shape[-1] == 1):
            (_, outer_stride), (inner, inner_stride) = [(1, 0), (1, 0), *leading][-2:]
            return tensor, cpu_library.Rows(tensor.data_ptr(), inner, inner_stride, outer_stride)
        tensor = tensor.contiguous()
    rows = max(math.prod(tensor.shape[:-1]), 1)
    return tensor, cpu_library.Rows(tensor.data_ptr(), rows, tensor.shape[-1], 0)
