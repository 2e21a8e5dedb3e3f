"""Packed attention on a CPU by the compiled kernels; see csrc/packed_attention.h for what happens inside."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from cdas_fast.ops import cpu_library
from cdas_fast.ops.implementation import math_dtype


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    scaling: float,
    softcap: float,
    window: int,
) -> tuple[Tensor, Tensor]:
    """See `Functions` in packed_attention.py."""
    out = query.new_empty(*query.shape[:2], value.shape[2])
    log_sum = query.new_empty(query.shape[:2], dtype=math_dtype(query.dtype))
    heads = {"query": query, "key": key, "value": value, "prefix_key": prefix_key, "prefix_value": prefix_value}
    _run("forward", heads, starts, {"out": out, "log_sum": log_sum}, scale=scaling, softcap=softcap, window=window)
    return out, log_sum


def backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    log_sum: Tensor,
    scaling: float,
    softcap: float,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `Functions` in packed_attention.py."""
    gradients = {
        f"grad_{name}": torch.empty_like(each, memory_format=torch.contiguous_format)
        for name, each in (("query", query), ("key", key), ("value", value))
    }
    heads = {"query": query, "key": key, "value": value, "prefix_key": prefix_key, "prefix_value": prefix_value}
    _run(
        "backward",
        {**heads, "grad_out": grad_out},
        starts,
        {**gradients, "log_sum": log_sum.contiguous()},
        scale=scaling,
        softcap=softcap,
        window=window,
    )
    return gradients["grad_query"], gradients["grad_key"], gradients["grad_value"]


def _run(
    function: str, heads: dict[str, Tensor], starts: Tensor, results: dict[str, Tensor], **numbers: float | int
) -> None:
    """`heads` are read, by strides; `results` are contiguous."""
    library = cpu_library.load()
    heads = {name: each if each.stride(2) == 1 else each.contiguous() for name, each in heads.items()}
    starts = starts.contiguous()
    query, value = heads["query"], heads["value"]
    arguments = cpu_library.PackedAttention(
        rows=starts.numel() - 1,
        heads=query.shape[1],
        groups=value.shape[1],
        width=query.shape[2],
        value_width=value.shape[2],
        prefix=heads["prefix_key"].shape[0],
        starts=starts.data_ptr(),
        dtype=cpu_library.DTYPES[query.dtype],
        threads=torch.get_num_threads(),
        **{name: cpu_library.Heads.of(each) for name, each in heads.items()},
        **{name: each.data_ptr() for name, each in results.items()},
        **numbers,
    )
    size = library.cdas_packed_attention_workspace(ctypes.byref(arguments))
    workspace = cpu_library.workspace(size)
    arguments.workspace = workspace.data_ptr()
    getattr(library, f"cdas_packed_attention_{function}")(ctypes.byref(arguments))
