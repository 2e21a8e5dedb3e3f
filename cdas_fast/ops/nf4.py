"""Weights in NF4, as bitsandbytes stores them, back to floating point.

A weight is flattened row by row into blocks of 64 values, the last one perhaps shorter. A block is its largest
magnitude and, for each value, which of 16 fixed numbers times that magnitude comes nearest, two in a byte:

    value[i] = NF4[nibble i] absmax[i / 64]

With double quantisation the magnitudes are bytes themselves, in blocks of 256:

    absmax[b] = code[a[b]] nested_absmax[b / 256] + offset

All of it is float32, each step rounded, and the values are rounded to the dtype asked for: every implementation gives
the bits that this expression in plain PyTorch gives.

Source: Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs" (2023).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from cdas_fast.errors import InvalidInputError, expected_got
from cdas_fast.ops.implementation import Implementation, check_implementation, choose_implementation
from cdas_fast.ops.registration import register

BLOCK, NESTED_BLOCK = 64, 256
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The quantiles of a normal distribution, scaled to [-1, 1], that bitsandbytes writes as these numbers.
TABLE = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


@dataclass(frozen=True, eq=False)
class Nf4Weight:
    """A weight (O, I) in NF4, of n = O I values in blocks of 64. All tensors are contiguous, on one device.

    Of a weight whose magnitudes are not quantised, `absmax` is float32 and the three tensors that decode it are None.
    """

    packed: Tensor  # ((n + 1) / 2,) or ((n + 1) / 2, 1) uint8, the first of two values in the high nibble
    absmax: Tensor  # (blocks,) uint8
    nested_absmax: Tensor | None  # (blocks / 256, rounded up,) float32
    nested_code: Tensor | None  # (256,) float32
    offset: Tensor | None  # () or (1,) float32
    shape: tuple[int, int]  # (O, I)


def dequantize_nf4(
    weight: Nf4Weight,
    dtype: torch.dtype,
    *,
    out: Tensor | None = None,  # (O, I)
    impl: Implementation = "auto",
) -> Tensor:
    """The weight in floating point.

    Equivalent PyTorch::

        absmax = nested_code[absmax.int()] * nested_absmax.repeat_interleave(256)[:blocks] + offset
        nibbles = torch.stack([packed >> 4, packed & 15], -1).flatten()[: O * I]
        value = (NF4[nibbles.int()] * absmax.repeat_interleave(64)[: O * I]).to(dtype).view(O, I)

    Args:
        weight: what bitsandbytes' `quantize_4bit(..., blocksize=64, quant_type="nf4")` made.
        dtype: float32, bfloat16 or float16.
        out: filled and returned if given; contiguous, of this dtype and shape.
        impl: `auto`, `reference`, `cpp` or `triton`.

    Returns:
        A tensor (O, I). It carries no gradient.

    The result is that of the equivalent to the bit. bitsandbytes 0.50 gives it too, but for two things on a CPU with
    AVX-512: it makes subnormal results in bfloat16 zero, and rows of a length that 16 but not 64 divides wrong.

    Raises:
        InvalidInputError: sizes, dtypes, devices or strides that do not fit.
        MissingDependencyError: an implementation that is not installed.
    """
    _check(weight, dtype, out)
    check_implementation("dequantize_nf4", impl)
    tensors = (weight.packed, weight.absmax, weight.nested_absmax, weight.nested_code, weight.offset)
    with torch.no_grad():
        if out is None:
            result: Tensor = _dequantize_nf4(*tensors, *weight.shape, dtype, impl)
            return result
        _dequantize_nf4_out(*tensors, out, impl)
        return out


class Functions(Protocol):
    """What an implementation consists of."""

    def dequantize(
        self,
        packed: Tensor,
        absmax: Tensor,
        nested_absmax: Tensor | None,
        nested_code: Tensor | None,
        offset: Tensor | None,
        out: Tensor,  # (O, I), contiguous
    ) -> None:
        """Fill `out`."""

    def empty(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for a result."""


class Reference:
    """The formulas in plain PyTorch."""

    @staticmethod
    def dequantize(
        packed: Tensor,
        absmax: Tensor,
        nested_absmax: Tensor | None,
        nested_code: Tensor | None,
        offset: Tensor | None,
        out: Tensor,
    ) -> None:
        """See `Functions`."""
        if nested_absmax is not None:
            assert nested_code is not None
            assert offset is not None
            scales = nested_absmax.repeat_interleave(NESTED_BLOCK)[: absmax.numel()]
            absmax = nested_code[absmax.int()] * scales + offset
        nibbles = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], -1).flatten()[: out.numel()]
        values = torch.tensor(TABLE, dtype=torch.float32, device=packed.device)[nibbles.int()]
        out.copy_((values * absmax.repeat_interleave(BLOCK)[: out.numel()]).view(out.shape))

    @staticmethod
    def empty(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """See `Functions`."""
        return torch.empty(shape, dtype=dtype, device=device)


def _functions(impl: str, device: torch.device) -> Functions:
    match choose_implementation("dequantize_nf4", impl, device):
        case "cpp":
            from cdas_fast.ops import nf4_cpp

            return nf4_cpp
        case "triton":
            from cdas_fast.ops import nf4_triton

            return nf4_triton
        case _:
            return Reference()


def _check(weight: Nf4Weight, dtype: torch.dtype, out: Tensor | None) -> None:
    if dtype not in DTYPES:
        raise InvalidInputError(expected_got("dequantize_nf4: dtype", "float32, bfloat16 or float16", dtype))
    shape = tuple(weight.shape)
    if len(shape) != 2 or min(shape) < 0:
        raise InvalidInputError(expected_got("dequantize_nf4: shape", "(O, I)", shape))
    count = math.prod(shape)
    bytes_, blocks = -(-count // 2), -(-count // BLOCK)
    packed = ((bytes_,), (bytes_, 1))
    device = weight.packed.device if isinstance(weight.packed, Tensor) else None
    _check_tensor("packed", weight.packed, torch.uint8, packed, device)
    nested = {
        "nested_absmax": (weight.nested_absmax, ((-(-blocks // NESTED_BLOCK),),)),
        "nested_code": (weight.nested_code, ((256,),)),
        "offset": (weight.offset, ((), (1,))),
    }
    given = [name for name, (tensor, _) in nested.items() if tensor is not None]
    if given and len(given) < len(nested):
        wanted = f"{', '.join(nested)} together, or none of them"
        raise InvalidInputError(expected_got("dequantize_nf4", wanted, " and ".join(given)))
    _check_tensor("absmax", weight.absmax, torch.uint8 if given else torch.float32, ((blocks,),), device)
    for name in given:
        _check_tensor(name, nested[name][0], torch.float32, nested[name][1], device)
    if out is not None:
        _check_tensor("out", out, dtype, (shape,), device)
        if out.requires_grad and torch.is_grad_enabled():
            remedy = "Nothing passes a gradient on; pass out.detach()."
            raise InvalidInputError(
                expected_got("dequantize_nf4: out", "a tensor without gradient", "one that requires grad", remedy)
            )


def _check_tensor(
    name: str,
    tensor: object,
    dtype: torch.dtype,
    shapes: tuple[tuple[int, ...], ...],
    device: torch.device | None,
) -> None:
    what = f"dequantize_nf4: {name}"
    if not isinstance(tensor, Tensor):
        raise InvalidInputError(expected_got(what, "a torch.Tensor", type(tensor).__name__))
    if tensor.dtype != dtype:
        raise InvalidInputError(expected_got(what, dtype, tensor.dtype))
    if tuple(tensor.shape) not in shapes:
        wanted = " or ".join(map(str, shapes))
        raise InvalidInputError(expected_got(what, f"shape {wanted}", f"shape {tuple(tensor.shape)}"))
    if tensor.device != device:
        raise InvalidInputError(expected_got(what, f"a tensor on {device}", f"one on {tensor.device}"))
    if tensor.layout != torch.strided or not tensor.is_contiguous():
        got = f"strides {tensor.stride()}" if tensor.layout == torch.strided else tensor.layout
        raise InvalidInputError(expected_got(what, "a contiguous tensor", got))


def _kernel(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    offset: Tensor | None,
    rows: int,
    columns: int,
    dtype: torch.dtype,
    impl: str,
) -> Tensor:
    functions = _functions(impl, packed.device)
    out = functions.empty((rows, columns), dtype, packed.device)
    functions.dequantize(packed, absmax, nested_absmax, nested_code, offset, out)
    return out


def _out_kernel(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    offset: Tensor | None,
    out: Tensor,
    impl: str,
) -> None:
    _functions(impl, packed.device).dequantize(packed, absmax, nested_absmax, nested_code, offset, out)


_TENSORS = "Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? nested_code, Tensor? offset"
_dequantize_nf4 = register(
    f"dequantize_nf4({_TENSORS}, SymInt rows, SymInt columns, ScalarType dtype, str impl) -> Tensor",
    _kernel,
    fake=lambda packed, _a, _n, _c, _o, rows, columns, dtype, _: packed.new_empty(rows, columns, dtype=dtype),
)
_dequantize_nf4_out = register(
    f"dequantize_nf4_out({_TENSORS}, Tensor(a!) out, str impl) -> ()",
    _out_kernel,
    fake=lambda *_: None,
)
