"""dequantize_nf4 against bitsandbytes and against its formula, to the bit, on every implementation."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from triton_worker import Worker, worker

from cdas_fast.errors import InvalidInputError, MissingDependencyError
from cdas_fast.ops import cpu_library
from cdas_fast.ops.nf4 import DTYPES, TABLE, Nf4Weight, dequantize_nf4

KERNEL = "cdas_fast.kernels.nf4:dequantize"
SHAPES = [
    pytest.param((8, 128), id="aligned"),
    pytest.param((64, 1), id="one_block"),
    pytest.param((1, 1), id="one_value"),
    pytest.param((1, 2), id="one_byte"),
    pytest.param((1, 63), id="one_short_of_a_block"),
    pytest.param((1, 65), id="one_beyond_a_block"),
    pytest.param((5, 80), id="blocks_across_rows"),
    pytest.param((33, 66), id="last_block_short"),
    pytest.param((13, 77), id="odd"),
    pytest.param((257, 64), id="a_second_nested_block"),
    pytest.param((300, 577), id="several_parts_and_odd_rows"),
    pytest.param((0, 5), id="no_row"),
    pytest.param((5, 0), id="no_column"),
]
SCALES = [1.0, 1e30, 1e-3, 1e-37, 1e-41, 0.0]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
nestings = pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain"])

pytestmark = pytest.mark.usefixtures("nan_filled_empty")


@pytest.fixture(scope="module")
def kernels() -> Iterator[Worker]:
    with worker(interpret=True) as process:
        yield process


def any_weight(shape: tuple[int, int], nested: bool = True) -> Nf4Weight:
    """Any bytes, codes and magnitudes, negative ones too."""
    generator = torch.Generator().manual_seed(0)
    count = math.prod(shape)
    blocks = -(-count // 64)
    packed = torch.randint(256, (-(-count // 2),), generator=generator, dtype=torch.uint8)
    if not nested:
        return Nf4Weight(packed, torch.randn(blocks, generator=generator), None, None, None, shape)
    absmax = torch.randint(256, (blocks,), generator=generator, dtype=torch.uint8)
    nested_absmax = torch.rand(-(-blocks // 256), generator=generator)
    code = torch.randn(256, generator=generator)
    return Nf4Weight(packed, absmax, nested_absmax, code, torch.tensor(0.1), shape)


def formula(weight: Nf4Weight, dtype: torch.dtype) -> Tensor:
    """As the docstring of dequantize_nf4 writes it."""
    count = math.prod(weight.shape)
    absmax, packed = weight.absmax, weight.packed.flatten()
    if weight.nested_absmax is not None:
        assert weight.nested_code is not None
        assert weight.offset is not None
        nested = weight.nested_absmax.repeat_interleave(256)[: absmax.numel()]
        absmax = weight.nested_code[absmax.int()] * nested + weight.offset
    nibbles = torch.stack([packed >> 4, packed & 15], -1).flatten()[:count]
    values = torch.tensor(TABLE)[nibbles.int()] * absmax.repeat_interleave(64)[:count]
    return values.to(dtype).view(weight.shape)


def interpreted(kernels: Worker, weight: Nf4Weight, dtype: torch.dtype) -> Tensor:
    out = torch.empty(weight.shape, dtype=dtype)
    tensors = (weight.packed, weight.absmax, weight.nested_absmax, weight.nested_code, weight.offset)
    given: Tensor = kernels.call(KERNEL, *tensors, out)["out"]
    return given


class BitsAndBytes:
    """The package, its state and our weight of the same tensors."""

    def __init__(self, values: Tensor, nested: bool) -> None:
        self.functional = pytest.importorskip("bitsandbytes", reason="needs cdas_fast[bnb]").functional
        self.packed, state = self.functional.quantize_4bit(
            values, blocksize=64, compress_statistics=nested, quant_type="nf4"
        )
        self.state = state
        absmax, code, offset = (state.state2.absmax, state.state2.code, state.offset) if nested else (None, None, None)
        shape = (values.shape[0], values.shape[1])
        self.weight = Nf4Weight(self.packed, state.absmax, absmax, code, offset, shape)

    def dequantized(self, dtype: torch.dtype, flat: bool = False) -> Tensor:
        """Theirs; `flat` as one row, which their kernels get right whatever the length of a row."""
        self.state.dtype, shape = dtype, self.weight.shape
        self.state.shape = torch.Size([math.prod(shape)] if flat else shape)
        with torch.compiler.set_stance("force_eager"):  # rows of odd length, for each of which they compile anew
            theirs: Tensor = self.functional.dequantize_4bit(self.packed.view(-1), self.state)
        return theirs.reshape(shape)


def normal_values(shape: tuple[int, int], scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    largest = torch.finfo(dtype).max
    values = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * scale
    return values.clamp(-largest, largest).to(dtype)


# Truth


@dtypes
@nestings
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_formula(shape: tuple[int, int], nested: bool, dtype: torch.dtype, each_impl: Any) -> None:
    weight = any_weight(shape, nested)
    ours = dequantize_nf4(weight, dtype, impl=each_impl)
    assert (ours.dtype, tuple(ours.shape), ours.is_contiguous()) == (dtype, shape, True)
    assert torch.equal(ours, formula(weight, dtype))


@dtypes
@nestings
@pytest.mark.parametrize("shape", SHAPES)
def test_triton_equals_the_formula(shape: tuple[int, int], nested: bool, dtype: torch.dtype, kernels: Worker) -> None:
    weight = any_weight(shape, nested)
    assert torch.equal(interpreted(kernels, weight, dtype), formula(weight, dtype))


@dtypes
@nestings
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_bitsandbytes(
    shape: tuple[int, int], nested: bool, dtype: torch.dtype, each_impl: Any, kernels: Worker
) -> None:
    theirs = BitsAndBytes(normal_values(shape, dtype=dtype), nested)
    ours = dequantize_nf4(theirs.weight, dtype, impl=each_impl)
    if ours.numel():
        flat = shape[1] % 16 == 0 and shape[1] % 64 != 0  # they take the statistics of other blocks for such rows
        assert torch.equal(ours, theirs.dequantized(dtype, flat))
        assert (ours - normal_values(shape)).abs().mean() < 0.15, "the statistics are those of these values"
    assert torch.equal(interpreted(kernels, theirs.weight, dtype), ours)


@dtypes
@nestings
@pytest.mark.parametrize("scale", SCALES)
def test_extremes_equal_bitsandbytes(
    scale: float, nested: bool, dtype: torch.dtype, each_impl: Any, kernels: Worker
) -> None:
    """Blocks of zeros, of large and of subnormal numbers, side by side with others.

    Rounded from their float32, for their conversion to bfloat16 makes subnormal numbers zero.
    """
    values = normal_values((40, 96), scale)
    values[3:5], values[20:] = 0.0, values[20:] * 1e-3
    theirs = BitsAndBytes(values, nested)
    expected = theirs.dequantized(torch.float32, flat=True).to(dtype)
    assert torch.equal(dequantize_nf4(theirs.weight, dtype, impl=each_impl), expected)
    assert torch.equal(interpreted(kernels, theirs.weight, dtype), expected)


@dtypes
def test_subnormal_results_are_kept(dtype: torch.dtype, each_impl: Any, kernels: Worker) -> None:
    absmax = torch.tensor([0.5 * torch.finfo(dtype).tiny, 1.0])
    weight = replace(any_weight((2, 64), nested=False), absmax=absmax)
    ours = dequantize_nf4(weight, dtype, impl=each_impl)
    assert 0 < ours[0].abs().max() < torch.finfo(dtype).tiny
    assert torch.equal(ours, formula(weight, dtype))
    assert torch.equal(interpreted(kernels, weight, dtype), ours)


@dtypes
def test_nan_and_infinity_stay_in_their_block(dtype: torch.dtype, each_impl: Any, kernels: Worker) -> None:
    weight = any_weight((4, 64), nested=False)
    weight.absmax[1], weight.absmax[2] = math.nan, math.inf
    expected = formula(weight, dtype)
    for ours in (dequantize_nf4(weight, dtype, impl=each_impl), interpreted(kernels, weight, dtype)):
        torch.testing.assert_close(ours, expected, rtol=0, atol=0, equal_nan=True)
        assert ours[1].isnan().all()
        assert ours[[0, 3]].isfinite().all()


def test_every_byte(each_impl: Any, kernels: Worker) -> None:
    """The high nibble is the first value, and the numbers are these."""
    functional = pytest.importorskip("bitsandbytes", reason="needs cdas_fast[bnb]").functional
    assert torch.equal(torch.tensor(TABLE), functional.get_4bit_type("nf4", device="cpu"))
    packed = torch.arange(256).to(torch.uint8)
    weight = Nf4Weight(packed, torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0]), None, None, None, (256, 2))
    expected = torch.tensor(
        [[TABLE[byte // 16] * 2 ** (byte // 32), TABLE[byte % 16] * 2 ** (byte // 32)] for byte in range(256)]
    )
    for ours in (dequantize_nf4(weight, torch.float32, impl=each_impl), interpreted(kernels, weight, torch.float32)):
        assert torch.equal(ours, expected)
        assert ours[0x1F].tolist() == [-0.6961928009986877, 1.0]


def test_statistics_are_rounded_between_product_and_sum(each_impl: Any) -> None:
    """A fused instruction would round once, and give other bits."""
    weight = any_weight((4096, 64))
    assert weight.nested_absmax is not None
    assert weight.nested_code is not None
    assert weight.offset is not None
    nested = weight.nested_absmax.repeat_interleave(256).double()
    fused = (weight.nested_code[weight.absmax.int()].double() * nested + weight.offset.double()).float()
    ones = replace(weight, packed=torch.full_like(weight.packed, 0xFF))
    ours = dequantize_nf4(ones, torch.float32, impl=each_impl)
    assert torch.equal(ours, formula(ones, torch.float32))
    assert (ours[:, 0] != fused).any(), "else this case shows nothing"


@pytest.mark.skipif(not cpu_library.available(), reason="needs the C++ kernels")
def test_threads_change_not_a_bit() -> None:
    weight = any_weight((300, 1023))
    results = []
    for threads in (1, 2, 7):
        torch.set_num_threads(threads)
        results.append(dequantize_nf4(weight, torch.bfloat16, impl="cpp"))
    assert all(torch.equal(result, results[0]) for result in results)


# Memory and autograd


@dtypes
@pytest.mark.parametrize("shape", [(13, 77), (1, 1), (3, 64)], ids=str)
def test_out_is_filled_and_nothing_beside_it(shape: tuple[int, int], dtype: torch.dtype, each_impl: Any) -> None:
    weight, count = any_weight(shape), math.prod(shape)
    around = torch.full((count + 6,), 7.0, dtype=dtype)
    out = around[3 : 3 + count].view(shape)  # not aligned either
    assert dequantize_nf4(weight, dtype, out=out, impl=each_impl) is out
    assert torch.equal(out, formula(weight, dtype))
    assert torch.equal(around[:3], torch.full((3,), 7.0, dtype=dtype))
    assert torch.equal(around[-3:], torch.full((3,), 7.0, dtype=dtype))


def test_both_shapes_of_bytes_and_offset(each_impl: Any, kernels: Worker) -> None:
    weight = any_weight((13, 77))
    assert weight.offset is not None
    column = replace(weight, packed=weight.packed[:, None], offset=weight.offset.reshape(1))
    expected = dequantize_nf4(weight, torch.float32, impl=each_impl)
    assert torch.equal(dequantize_nf4(column, torch.float32, impl=each_impl), expected)
    assert torch.equal(interpreted(kernels, column, torch.float32), expected)


def test_carries_no_gradient(each_impl: Any) -> None:
    weight = any_weight((13, 77), nested=False)
    weight.absmax.requires_grad_()
    out = torch.empty(13, 77)
    assert not dequantize_nf4(weight, torch.float32, impl=each_impl).requires_grad
    assert not dequantize_nf4(weight, torch.float32, out=out, impl=each_impl).requires_grad
    with torch.inference_mode():
        assert torch.equal(dequantize_nf4(weight, torch.float32, impl=each_impl), out)


def test_compiles_into_one_graph(each_impl: Any) -> None:
    weight = any_weight((13, 77))

    def function(x: Tensor, out: Tensor | None) -> Tensor:
        return x @ dequantize_nf4(weight, torch.float32, out=out, impl=each_impl)

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 13)
    for out in (None, torch.empty(13, 77)):
        assert torch.equal(compiled(x, out), function(x, None))
        assert out is None or torch.equal(out, formula(weight, torch.float32))


# Bad arguments


WEIGHT = any_weight((13, 77))
META = {each.name: getattr(WEIGHT, each.name).to("meta") for each in fields(WEIGHT) if each.name != "shape"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": (13, 79)}, r"packed: expected shape \(514,\) or \(514, 1\), got shape \(501,\)"),
        ({"shape": (13,)}, r"shape: expected \(O, I\), got \(13,\)"),
        ({"shape": (-13, -77)}, r"shape: expected \(O, I\), got \(-13, -77\)"),
        ({"packed": WEIGHT.packed.int()}, r"packed: expected torch.uint8, got torch.int32"),
        ({"packed": WEIGHT.packed[None]}, r"packed: expected shape .*, got shape \(1, 501\)"),
        ({"packed": torch.zeros(1002).byte()[::2]}, r"packed: expected a contiguous tensor, got strides \(2,\)"),
        ({"packed": None}, r"packed: expected a torch.Tensor, got NoneType"),
        ({"absmax": WEIGHT.absmax.float()}, r"absmax: expected torch.uint8, got torch.float32"),
        ({"absmax": WEIGHT.absmax[1:]}, r"absmax: expected shape \(16,\), got shape \(15,\)"),
        ({"absmax": META["absmax"]}, r"absmax: expected a tensor on cpu, got one on meta"),
        ({"nested_absmax": torch.ones(2)}, r"nested_absmax: expected shape \(1,\), got shape \(2,\)"),
        ({"nested_code": torch.ones(16)}, r"nested_code: expected shape \(256,\), got shape \(16,\)"),
        ({"nested_code": torch.ones(256).half()}, r"nested_code: expected torch.float32, got torch.float16"),
        ({"offset": torch.ones(2)}, r"offset: expected shape \(\) or \(1,\), got shape \(2,\)"),
        ({"offset": META["offset"]}, r"offset: expected a tensor on cpu, got one on meta"),
        ({"offset": None}, r"expected nested_absmax, nested_code, offset together, or none of them, got nested_abs"),
        (dict.fromkeys(("nested_absmax", "nested_code", "offset")), r"absmax: expected torch.float32, got torch.uint8"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_weights(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=f"^dequantize_nf4:? ?{message}"):
        dequantize_nf4(replace(WEIGHT, **change), torch.float32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": torch.float64}, "dtype: expected float32, bfloat16 or float16, got torch.float64"),
        ({"out": torch.empty(13, 77).half()}, "out: expected torch.float32, got torch.float16"),
        ({"out": torch.empty(77, 13)}, r"out: expected shape \(13, 77\), got shape \(77, 13\)"),
        ({"out": torch.empty(77, 13).T}, r"out: expected a contiguous tensor, got strides \(1, 13\)"),
        ({"out": torch.empty(13, 77, device="meta")}, "out: expected a tensor on cpu, got one on meta"),
        ({"out": torch.zeros(13, 77, requires_grad=True)}, "out: expected a tensor without gradient, got one that req"),
        ({"impl": "cuda"}, "impl: expected auto, reference, cpp or triton, got 'cuda'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=f"^dequantize_nf4: {message}"):
        dequantize_nf4(WEIGHT, **{"dtype": torch.float32, **arguments})


def test_without_the_library_auto_takes_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = formula(WEIGHT, torch.bfloat16)
    monkeypatch.setattr(cpu_library, "_file", lambda: None)
    assert torch.equal(dequantize_nf4(WEIGHT, torch.bfloat16), expected)
    with pytest.raises(MissingDependencyError, match=r"^dequantize_nf4: impl='cpp'"):
        dequantize_nf4(WEIGHT, torch.bfloat16, impl="cpp")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"out": torch.zeros(13, 77).double()}, "out: expected float32, bfloat16 or float16, got torch.float64"),
        ({"out": torch.zeros(77, 13).T}, r"out: expected contiguous .*strides \(1, 13\)"),
        ({"out": torch.zeros(13, 79)}, r"packed: expected .*shape \(514,\).* got .*shape \(501,\)"),
        ({"packed": WEIGHT.packed.int()}, "packed: expected .*torch.uint8.* got torch.int32"),
        ({"absmax": WEIGHT.absmax.float()}, "absmax: expected .*torch.uint8.* got torch.float32"),
        ({"absmax": WEIGHT.absmax[1:]}, r"absmax: expected .*shape \(16,\).* got .*shape \(15,\)"),
        ({"nested_code": None}, "absmax: expected .*torch.float32.* got torch.uint8"),
        ({"nested_code": torch.ones(16)}, r"nested_code: expected .*shape \(256,\).* got .*shape \(16,\)"),
        ({"nested_absmax": torch.ones(3)}, r"nested_absmax: expected .*shape \(1,\).* got .*shape \(3,\)"),
        ({"offset": None}, "nested_code: expected nested_absmax and offset to be given with it"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_arguments_of_the_kernel(change: dict[str, Any], message: str, kernels: Worker) -> None:
    good = {each.name: getattr(WEIGHT, each.name) for each in fields(WEIGHT) if each.name != "shape"}
    with pytest.raises(ValueError, match=f"^{message}"):
        kernels.call(KERNEL, **{**good, "out": torch.zeros(13, 77), **change})
