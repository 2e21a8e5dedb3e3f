# ruff: noqa: N803 - constant arguments are in capitals, as everywhere in Triton
"""Weights in NF4, as bitsandbytes stores them, to floating point.

    value[i] = NF4[nibble i] absmax[i / 64], rounded to the dtype
    absmax[b] = code[a[b]] nested_absmax[b / 256] + offset for statistics that are quantised themselves

A program takes some blocks of 64 values. Each byte is read once and each value written once; the 16 numbers and the
code come out of a cache. Products and sums are not fused, so that results are those of plain PyTorch to the bit.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch

BLOCK, NESTED_BLOCK = 64, 256
# 16 bytes and 32 values for each of 128 threads.
BLOCKS, NUM_WARPS = 64, 4
TABLE = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


@triton.jit
def _round_to_bfloat16(x):
    """To the nearest, of two the even; the interpreter's own conversion cuts off."""
    bits = x.to(tl.uint32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where(x == x, rounded, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _dequantize_kernel(
    packed,  # ((count + 1) / 2,)
    absmax,  # (blocks,)
    nested_absmax,  # (blocks / 256, rounded up,) or None
    nested_code,  # (256,) or None
    offset,  # (1,) or None
    table,  # (16,)
    out,  # (count,)
    count,
    packed_count,
    blocks,
    BLOCK: tl.constexpr,
    NESTED_BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    scale = tl.load(absmax + block, mask=block < blocks, other=0)
    if nested_code is not None:
        nested = tl.load(nested_absmax + block // NESTED_BLOCK, mask=block < blocks, other=0.0)
        scale = tl.load(nested_code + scale.to(tl.int32)) * nested + tl.load(offset)
    at = block[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
    both = tl.load(packed + at, mask=at < packed_count, other=0).to(tl.int32)
    nibbles = tl.interleave(both >> 4, both & 15)
    values = tl.load(table + nibbles) * scale[:, None]
    if out.dtype.element_ty == tl.bfloat16:
        values = _round_to_bfloat16(values)
    place = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(out + place, values.to(out.dtype.element_ty), mask=place < count)


def dequantize(
    packed: Tensor,  # ((n + 1) / 2,) or ((n + 1) / 2, 1)
    absmax: Tensor,  # (blocks,)
    nested_absmax: Tensor | None,  # (blocks / 256, rounded up,)
    nested_code: Tensor | None,  # (256,)
    offset: Tensor | None,  # () or (1,)
    out: Tensor,  # of n values
) -> None:
    """Fill `out` with the values.

    Args:
        packed: uint8, two values a byte, the first in the high nibble.
        absmax: of each block of 64 values; uint8, float32 if the three that follow are None.
        nested_absmax: float32, of each 256 of these.
        nested_code: float32, what their bytes stand for.
        offset: float32, what is added to them.
        out: filled, contiguous; float32, bfloat16 or float16.

    Raises:
        ValueError: shapes, dtypes or strides that do not fit, or tensors that no kernel can read.
    """
    if out.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"out: expected float32, bfloat16 or float16, got {out.dtype}")
    launch.check("out", out, tuple(out.shape), packed, contiguous=True)
    count = out.numel()
    if not count:
        return
    packed_count, blocks = triton.cdiv(count, 2), triton.cdiv(count, BLOCK)
    packed = packed.flatten()
    launch.check("packed", packed, (packed_count,), out, dtype=torch.uint8, contiguous=True)
    is_nested = nested_code is not None
    launch.check("absmax", absmax, (blocks,), out, dtype=torch.uint8 if is_nested else torch.float32, contiguous=True)
    if nested_code is not None:
        if nested_absmax is None or offset is None:
            raise ValueError("nested_code: expected nested_absmax and offset to be given with it")
        offset = offset.reshape(1)
        nested_blocks = triton.cdiv(blocks, NESTED_BLOCK)
        launch.check("nested_absmax", nested_absmax, (nested_blocks,), out, dtype=torch.float32, contiguous=True)
        launch.check("nested_code", nested_code, (256,), out, dtype=torch.float32, contiguous=True)
        launch.check("offset", offset, (1,), out, dtype=torch.float32)
    tensors = (packed, absmax, nested_absmax, nested_code, offset, _table(out.device), out)
    constants = {"BLOCK": BLOCK, "NESTED_BLOCK": NESTED_BLOCK, "BLOCKS": BLOCKS, "enable_fp_fusion": False}
    grid = (triton.cdiv(blocks, BLOCKS),)
    launch.run(_dequantize_kernel, grid, *tensors, count, packed_count, blocks, num_warps=NUM_WARPS, **constants)


@cache
def _table(device: torch.device) -> Tensor:
    return torch.tensor(TABLE, dtype=torch.float32, device=device)
