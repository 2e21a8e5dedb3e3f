"""rms_norm against its formula in float64, and against the norms of Hugging Face models."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from head_cases import DTYPES, Operations, assert_as_right_as_torch, leaf
from torch import Tensor
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from cdas_fast.errors import InvalidInputError
from cdas_fast.ops import cpu_library
from cdas_fast.ops.rms_norm import rms_norm

EPS = 1e-5
SHAPES = [
    pytest.param((6, 64), id="aligned"),
    pytest.param((3, 67), id="ragged_D"),
    pytest.param((7, 1), id="D_1"),
    pytest.param((2, 5), id="D_below_a_vector"),
    pytest.param((2, 3, 4, 64), id="heads"),
    pytest.param((1, 576), id="one_row"),
    pytest.param((19,), id="no_row_dimension"),
    pytest.param((40, 1000), id="several_parts"),
    pytest.param((0, 8), id="empty"),
    pytest.param((2, 0, 8), id="empty_3-D"),
]
VARIANTS = [
    pytest.param({"offset": offset, "round_normalized": rounded}, id=f"offset_{offset}{'-rounded' * rounded}")
    for offset in (0.0, 1.0)
    for rounded in (False, True)
]
MODULES = [
    pytest.param(module, {"offset": offset, "round_normalized": rounded}, id=module.__name__)
    for module, offset, rounded in (
        (LlamaRMSNorm, 0.0, True),
        (Qwen3RMSNorm, 0.0, True),
        (Olmo2RMSNorm, 0.0, False),
        (Gemma2RMSNorm, 1.0, False),
    )
]

needs_kernels = pytest.mark.skipif(not cpu_library.available(), reason="needs the C++ kernels")
pytestmark = pytest.mark.usefixtures("nan_filled_empty")


def make_case(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x, a weight and an upstream gradient; the rows differ in size, and one is small enough for eps to matter."""
    generator = torch.Generator().manual_seed(0)
    x, upstream = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    x = x * torch.logspace(-2, 1, math.prod(shape[:-1]), dtype=torch.float64).reshape(*shape[:-1], 1)
    weight = torch.randn(shape[-1], generator=generator, dtype=torch.float64)
    return leaf(x.to(dtype)), weight.to(dtype), upstream.to(dtype)


def plain(x: Tensor, weight: Tensor, offset: float, round_normalized: bool) -> Tensor:
    """As the modules of Hugging Face write it."""
    maths = torch.promote_types(x.dtype, torch.float32)
    normalized = x.to(maths) * torch.rsqrt(x.to(maths).pow(2).mean(-1, keepdim=True) + EPS)
    if round_normalized:
        return (offset + weight) * normalized.to(x.dtype)
    return ((offset + weight.to(maths)) * normalized).to(x.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_as_right_as_torch(shape: tuple[int, ...], variant: dict[str, Any], dtype: torch.dtype, each_impl: Any) -> None:
    x, weight, upstream = make_case(shape, dtype)
    exact = leaf(x.double())
    # The factor of the rounded variant has the dtype of x by definition.
    factor = (
        (variant["offset"] + weight).double() if variant["round_normalized"] else variant["offset"] + weight.double()
    )
    truth = factor * exact / (exact.square().mean(-1, keepdim=True) + EPS).sqrt()
    theirs = plain(x, weight, **variant)
    ours = rms_norm(x, weight, EPS, **variant, impl=each_impl)
    assert (ours.dtype, ours.shape, ours.is_contiguous()) == (dtype, x.shape, True)
    size = 32.0 if dtype == torch.float64 else 4.0  # the truth is float64 itself
    assert_as_right_as_torch("value", ours, theirs, truth, size)
    (gradient,) = torch.autograd.grad(ours, x, upstream)
    (their_gradient,) = torch.autograd.grad(theirs, x, upstream)
    (true_gradient,) = torch.autograd.grad(truth, exact, upstream.double())
    assert (gradient.dtype, gradient.shape) == (dtype, x.shape)
    if truth.numel():
        size *= max(1.0, float(true_gradient.abs().max()))
    assert_as_right_as_torch("gradient", gradient, their_gradient, true_gradient, size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(50, 576), (2, 3, 4, 64), (3, 67)], ids=str)
@pytest.mark.parametrize(("module", "variant"), MODULES)
def test_equals_the_module(
    module: Any, variant: dict[str, Any], shape: tuple[int, ...], dtype: torch.dtype, each_impl: Any
) -> None:
    """To a rounding unit everywhere, and to the bit nearly everywhere where results have 16 bits."""
    x, weight, _ = make_case(shape, dtype)
    norm = module(shape[-1], eps=EPS).to(dtype).requires_grad_(False)
    norm.weight.copy_(weight)
    ours, theirs = rms_norm(x, weight, EPS, **variant, impl=each_impl), norm(x)
    assert ours.dtype == theirs.dtype
    unit = torch.finfo(dtype).eps if dtype != torch.float32 else 1e-6
    assert ((ours.double() - theirs.double()).abs() <= unit * theirs.double().abs()).all()
    if dtype != torch.float32:
        assert (ours == theirs).double().mean() > 0.99
        other = rms_norm(x, weight, EPS, **{**variant, "round_normalized": not variant["round_normalized"]})
        assert (other == theirs).double().mean() < 0.95, "else the flag does nothing"


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", [(3, 19), (2, 2, 5)], ids=str)
def test_gradcheck(shape: tuple[int, ...], variant: dict[str, Any], each_impl: Any) -> None:
    x, weight, _ = make_case(shape, torch.float64)
    assert torch.autograd.gradcheck(lambda x: rms_norm(x, weight, EPS, **variant, impl=each_impl), x)


def assert_same(ours: Tensor, expected: Tensor, impl: str) -> None:
    """To the bit but for the reference, since torch sums strided rows in another order."""
    if impl == "reference":
        torch.testing.assert_close(ours, expected)
    else:
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("layout", "is_copied"),
    [
        pytest.param(lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), True, id="three_strides_of_rows"),
        pytest.param(lambda x: x[:1].transpose(1, 2).contiguous().transpose(1, 2), False, id="heads_first"),
        pytest.param(lambda x: torch.cat([x, x], -1)[..., :64], False, id="half_of_a_row"),
        pytest.param(lambda x: torch.cat([x, x], 2)[:, :, :4], False, id="half_of_the_heads"),
        pytest.param(lambda x: x[:1, ::2], False, id="every_second_position"),
        pytest.param(lambda x: x.mT.contiguous().mT, True, id="columns_first"),
        pytest.param(lambda x: x[:1, :1].expand(2, 5, 4, 64), False, id="one_row_repeated"),
    ],
)
def test_strides(layout: Any, is_copied: bool, dtype: torch.dtype, each_impl: Any) -> None:
    """Not a bit of the kernels' results changes, and no copy is made where two strides lead to every row."""
    whole, weight, _ = make_case((2, 5, 4, 64), dtype)
    x = layout(whole.detach()).requires_grad_()
    assert not x.is_contiguous()
    same = leaf(x.detach().contiguous())
    ours, expected = (rms_norm(each, weight, EPS, impl=each_impl) for each in (x, same))
    assert_same(ours, expected, each_impl)
    upstream = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    for strided in (upstream, upstream.mT.contiguous().mT, upstream.transpose(0, 2).contiguous().transpose(0, 2)):
        (gradient,) = torch.autograd.grad(ours, x, strided, retain_graph=True)
        assert_same(gradient, torch.autograd.grad(expected, same, upstream, retain_graph=True)[0], each_impl)
    if each_impl == "cpp":
        from cdas_fast.ops.elementwise_cpp import _evenly_strided

        assert (_evenly_strided(x)[0].data_ptr() != x.data_ptr()) == is_copied


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_extremes(dtype: torch.dtype, each_impl: Any) -> None:
    """Rows of zeros, of the smallest and of large numbers are right; NaN and infinity stay in their rows."""
    x, weight, upstream = make_case((7, 35), dtype)
    x = x.detach()
    x[1], x[2], x[3] = 0, torch.finfo(dtype).tiny, 1e4
    clean = leaf(x)
    x[4, 3], x[5, 34] = math.nan, math.inf
    spoilt = x.requires_grad_()
    exact = leaf(clean.double())
    truth = weight.double() * exact / (exact.square().mean(-1, keepdim=True) + EPS).sqrt()
    results = []
    for each in (clean, spoilt):
        out = rms_norm(each, weight, EPS, impl=each_impl)
        results.append((out.detach(), torch.autograd.grad(out, each, upstream)[0]))
    theirs = plain(clean, weight, 0.0, True)
    assert_as_right_as_torch("value", results[0][0], theirs, truth, 4.0)
    (true_gradient,) = torch.autograd.grad(truth, exact, upstream.double())
    (their_gradient,) = torch.autograd.grad(theirs, clean, upstream)
    assert results[0][1].isfinite().all()
    for row in (1, 2, 3):
        scale = 4 * max(1.0, float(true_gradient[row].abs().max()))
        assert_as_right_as_torch("gradient", results[0][1][row], their_gradient[row], true_gradient[row], scale)
    kept = [0, 1, 2, 3, 6]
    for ours, spoilt_result in zip(results[0], results[1], strict=True):
        assert torch.equal(ours[kept], spoilt_result[kept])
        assert spoilt_result[4].isnan().all()
        assert not spoilt_result[5].isfinite().all()


def test_weight_of_another_dtype(each_impl: Any) -> None:
    """It is rounded to that of x exactly if the norm is."""
    x, _, _ = make_case((9, 40), torch.bfloat16)
    weight = torch.randn(40, generator=torch.Generator().manual_seed(2))
    for given, rounded in ((weight.bfloat16(), True), (weight.bfloat16().float(), False)):
        out = rms_norm(x, given, EPS, round_normalized=rounded, impl=each_impl)
        assert torch.equal(out, plain(x, given, 0.0, rounded))
    rounded_weight = rms_norm(x, weight, EPS, impl=each_impl)
    assert torch.equal(rounded_weight, rms_norm(x, weight.bfloat16(), EPS, impl=each_impl))
    strided = torch.stack([weight, weight], 1)[:, 1]
    assert torch.equal(rms_norm(x, strided, EPS, impl=each_impl), rounded_weight)


def test_keeps_nothing_of_its_own_for_the_backward_pass(each_impl: Any) -> None:
    x, weight, _ = make_case((64, 32), torch.bfloat16)
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        rms_norm(x, weight, EPS, impl=each_impl)
    assert set(kept) == {x.data_ptr(), weight.data_ptr()}


@needs_kernels
def test_allocates_its_results_alone() -> None:
    x, weight, upstream = make_case((500, 32), torch.bfloat16)
    with Operations() as operations:
        out = rms_norm(x, weight.float(), EPS, round_normalized=False, impl="cpp")
        torch.autograd.grad(out, x, upstream)
    assert operations.peak <= 2 * x.numel() * 2 + 4096


@needs_kernels
def test_threads_change_not_a_bit() -> None:
    x, weight, upstream = make_case((300, 577), torch.float32)
    results = []
    for threads in (1, 2, 7):
        torch.set_num_threads(threads)
        out = rms_norm(x, weight, EPS, impl="cpp")
        results.append((out.detach(), torch.autograd.grad(out, x, upstream)[0]))
    for result in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(result, results[0], strict=True))


def test_the_weight_is_frozen(each_impl: Any) -> None:
    x, weight, _ = make_case((3, 8), torch.float32)
    weight.requires_grad_()
    with pytest.raises(
        InvalidInputError, match=r"rms_norm: weight: expected a frozen tensor, got one that requires grad"
    ):
        rms_norm(x, weight, EPS, impl=each_impl)
    with torch.no_grad():
        assert not rms_norm(x, weight, EPS, impl=each_impl).requires_grad


@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [
        (torch.ones(()), torch.ones(1), r"x: expected shape \(\.\.\., D\), got shape \(\)"),
        (torch.ones(2, 3), torch.ones(2), r"weight: expected shape \(3,\), got shape \(2,\)"),
        (torch.ones(2, 3), torch.ones(1, 3), r"weight: expected shape \(3,\), got shape \(1, 3\)"),
        (torch.ones(2, 3).int(), torch.ones(3), r"x: expected a floating-point dtype"),
        (torch.ones(2, 3), torch.ones(3, device="meta"), r"weight: expected a tensor on cpu"),
    ],
)
def test_refused(x: Tensor, weight: Tensor, message: str) -> None:
    with pytest.raises(InvalidInputError, match=f"^rms_norm: {message}"):
        rms_norm(x, weight, EPS)
