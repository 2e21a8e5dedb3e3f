"""Packed attention on a CPU by the compiled kernels; see csrc/packed_attention.h for what happens inside."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cdas_fast.ops import cpu_library
from cdas_fast.ops.implementation import math_dtype

if TYPE_CHECKING:
    from cdas_fast.ops.packed_attention import Problem


def forward(problem: Problem) -> tuple[Tensor, Tensor]:
    """See `Functions` in packed_attention.py."""
    query = problem.query
    out = query.new_empty(*query.shape[:2], problem.value.shape[2])
    log_sum = query.new_empty(query.shape[:2], dtype=math_dtype(query.dtype))
    _run("forward", problem, {}, {"out": out, "log_sum": log_sum})
    return out, log_sum


def backward(problem: Problem, grad_out: Tensor, log_sum: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See `Functions` in packed_attention.py."""
    query, key, value = (torch.empty_like(each, memory_format=torch.contiguous_format) for each in problem[:3])
    results = {"grad_query": query, "grad_key": key, "grad_value": value, "log_sum": log_sum.contiguous()}
    _run("backward", problem, {"grad_out": grad_out}, results)
    return query, key, value


def _run(function: str, problem: Problem, more_heads: dict[str, Tensor], results: dict[str, Tensor]) -> None:
    """Call the kernel. Tensors (tokens, heads, width) are read by their strides; `results` are contiguous."""
    library = cpu_library.load()
    names = ("query", "key", "value", "prefix_key", "prefix_value")
    heads = {name: getattr(problem, name) for name in names} | more_heads
    heads = {name: each if each.stride(2) == 1 else each.contiguous() for name, each in heads.items()}
    starts = problem.starts.contiguous()
    arguments = cpu_library.PackedAttention(
        rows=starts.numel() - 1,
        heads=problem.query.shape[1],
        groups=problem.value.shape[1],
        width=problem.query.shape[2],
        value_width=problem.value.shape[2],
        prefix=problem.prefix_key.shape[0],
        starts=starts.data_ptr(),
        scale=problem.scaling,
        softcap=problem.softcap,
        window=problem.window,
        dtype=cpu_library.DTYPES[problem.query.dtype],
        threads=torch.get_num_threads(),
        **{name: cpu_library.Heads.of(each) for name, each in heads.items()},
        **{name: each.data_ptr() for name, each in results.items()},
    )
    workspace = cpu_library.workspace(library.cdas_packed_attention_workspace(ctypes.byref(arguments)))
    arguments.workspace = workspace.data_ptr()
    getattr(library, f"cdas_packed_attention_{function}")(ctypes.byref(arguments))
