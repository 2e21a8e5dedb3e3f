"""gated_activation against its formula in float64, and against the expressions of Hugging Face models."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from head_cases import DTYPES, Operations, assert_as_right_as_torch, leaf
from torch import Tensor

from cdas_fast.errors import InvalidInputError
from cdas_fast.ops import cpu_library
from cdas_fast.ops.gated_activation import gated_activation

SHAPES = [
    pytest.param((6, 64), id="aligned"),
    pytest.param((3, 67), id="ragged_I"),
    pytest.param((7, 1), id="I_1"),
    pytest.param((2, 5), id="I_below_a_vector"),
    pytest.param((2, 3, 48), id="3-D"),
    pytest.param((1, 1536), id="one_row"),
    pytest.param((19,), id="no_row_dimension"),
    pytest.param((40, 1000), id="several_parts"),
    pytest.param((0, 8), id="empty"),
    pytest.param((2, 0, 8), id="empty_3-D"),
]
each_activation = pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])

needs_kernels = pytest.mark.skipif(not cpu_library.available(), reason="needs the C++ kernels")
pytestmark = pytest.mark.usefixtures("nan_filled_empty")


def make_case(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """gate, up and an upstream gradient."""
    generator = torch.Generator().manual_seed(0)
    gate, up, upstream = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    return leaf((3 * gate).to(dtype)), leaf(up.to(dtype)), upstream.to(dtype)


def plain(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    if activation == "silu":
        return torch.nn.functional.silu(gate) * up
    return torch.nn.functional.gelu(gate, approximate="tanh") * up


def true(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """The definitions, in float64."""
    if activation == "silu":
        return gate * torch.sigmoid(gate) * up
    return 0.5 * gate * (1 + torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3))) * up


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_activation
@pytest.mark.parametrize("shape", SHAPES)
def test_as_right_as_torch(shape: tuple[int, ...], activation: Any, dtype: torch.dtype, each_impl: Any) -> None:
    gate, up, upstream = make_case(shape, dtype)
    exact = [leaf(gate.double()), leaf(up.double())]
    truth, theirs = true(exact[0], exact[1], activation), plain(gate, up, activation)
    ours = gated_activation(gate, up, activation=activation, impl=each_impl)
    assert (ours.dtype, ours.shape, ours.is_contiguous()) == (dtype, gate.shape, True)
    size = 32.0 if dtype == torch.float64 else 4.0  # the truth is float64 itself
    assert_as_right_as_torch("value", ours, theirs, truth, size)
    for name, got, wanted, true_gradient in zip(
        ("gate", "up"),
        torch.autograd.grad(ours, (gate, up), upstream),
        torch.autograd.grad(theirs, (gate, up), upstream),
        torch.autograd.grad(truth, exact, upstream.double()),
        strict=True,
    ):
        assert (got.dtype, got.shape) == (dtype, gate.shape)
        assert_as_right_as_torch(name, got, wanted, true_gradient, size)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@each_activation
def test_equals_the_expression(activation: Any, dtype: torch.dtype, each_impl: Any) -> None:
    """To the bit but where the activation lies between two numbers of 16 bits, and there to a rounding unit of it."""
    gate, up, _ = make_case((50, 300), dtype)
    ours, theirs = gated_activation(gate, up, activation=activation, impl=each_impl), plain(gate, up, activation)
    assert (ours == theirs)[gate > -1].double().mean() > 0.99
    unit = 2 * torch.finfo(dtype).eps  # one of the activation, and another of the product
    lost = torch.finfo(torch.float32).eps * (gate * up).double().abs()  # by torch, where tanh is nearly -1
    tiny = float(torch.finfo(dtype).tiny)
    assert ((ours.double() - theirs.double()).abs() <= unit * theirs.double().abs() + lost + tiny).all()
    unrounded = (plain(gate.float(), torch.ones(()), activation) * up).to(dtype)
    assert (unrounded == theirs)[gate > -1].double().mean() < 0.95, "else rounding the activation does nothing"


@each_activation
@pytest.mark.parametrize("shape", [(3, 19), (2, 2, 5)], ids=str)
def test_gradcheck(shape: tuple[int, ...], activation: Any, each_impl: Any) -> None:
    gate, up, _ = make_case(shape, torch.float64)
    for inputs in ((gate, up), (gate.detach(), up), (gate, up.detach())):
        assert torch.autograd.gradcheck(
            lambda *each: gated_activation(*each, activation=activation, impl=each_impl), inputs
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each_activation
def test_halves_of_one_tensor(activation: Any, dtype: torch.dtype, each_impl: Any) -> None:
    """As Phi-3 has them: not a bit of the kernels' results changes, and neither half is copied."""
    both = leaf(torch.randn(2, 5, 2 * 37, generator=torch.Generator().manual_seed(0)).to(dtype))
    halves = both.chunk(2, dim=-1)
    same = [leaf(half) for half in halves]
    ours = gated_activation(halves[0], halves[1], activation=activation, impl=each_impl)
    expected = gated_activation(same[0], same[1], activation=activation, impl=each_impl)
    tolerance: dict[str, Any] = {"rtol": 1e-6, "atol": 1e-6} if each_impl == "reference" else {"rtol": 0.0, "atol": 0.0}
    torch.testing.assert_close(ours, expected, **tolerance)
    upstream = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    wanted = torch.cat(torch.autograd.grad(expected, same, upstream), -1)
    for strided in (upstream, upstream.mT.contiguous().mT):
        (gradient,) = torch.autograd.grad(ours, both, strided, retain_graph=True)
        torch.testing.assert_close(gradient, wanted, **tolerance)
    if each_impl == "cpp":
        from cdas_fast.ops.elementwise_cpp import _evenly_strided

        assert all(_evenly_strided(half)[0].data_ptr() == half.data_ptr() for half in halves)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_activation
def test_extremes(activation: Any, dtype: torch.dtype, each_impl: Any) -> None:
    """Large gates give 0 or the gate itself, with gradients to match; NaN stays where it is."""
    most = torch.finfo(dtype).max / 4
    gates = [-most, -1e4, -200.0, -60.0, 0.0, 60.0, 200.0, 1e4, most, math.nan, 1.0]
    gate = leaf(torch.tensor(gates, dtype=dtype))
    up = leaf(torch.full_like(gate, 2))
    out = gated_activation(gate, up, activation=activation, impl=each_impl)
    grad_gate, grad_up = torch.autograd.grad(out.sum(), (gate, up))
    positive = gate.detach()[5:9]
    assert torch.equal(out[5:9], 2 * positive)
    assert torch.equal(grad_gate[5:9], torch.full_like(positive, 2))
    assert torch.equal(grad_up[5:9], positive)
    for result in (out, grad_gate, grad_up):
        assert result[:4].double().abs().max() < 1e-20
        assert result[9].isnan()
        assert result[[*range(9), 10]].isfinite().all()
    assert (out[4].item(), grad_gate[4].item(), grad_up[4].item()) == (0, 1, 0)


def test_keeps_nothing_of_its_own_for_the_backward_pass(each_impl: Any) -> None:
    gate, up, _ = make_case((64, 32), torch.bfloat16)
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        gated_activation(gate, up, impl=each_impl)
    assert set(kept) == {gate.data_ptr(), up.data_ptr()}


@needs_kernels
def test_allocates_its_results_alone() -> None:
    gate, up, upstream = make_case((500, 32), torch.bfloat16)
    with Operations() as operations:
        torch.autograd.grad(gated_activation(gate, up, impl="cpp"), (gate, up), upstream)
    assert operations.peak <= 3 * gate.numel() * 2


@needs_kernels
@each_activation
def test_threads_change_not_a_bit(activation: Any) -> None:
    gate, up, upstream = make_case((300, 577), torch.float32)
    results = []
    for threads in (1, 2, 7):
        torch.set_num_threads(threads)
        out = gated_activation(gate, up, activation=activation, impl="cpp")
        results.append((out.detach(), *torch.autograd.grad(out, (gate, up), upstream)))
    for result in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(result, results[0], strict=True))


@pytest.mark.parametrize(
    ("gate", "up", "activation", "message"),
    [
        (torch.ones(()), torch.ones(()), "silu", r"gate: expected shape \(\.\.\., I\), got shape \(\)"),
        (torch.ones(2, 3), torch.ones(3), "silu", r"up: expected shape \(2, 3\), got shape \(3,\)"),
        (torch.ones(3), torch.ones(3).half(), "silu", r"up: expected dtype torch.float32, got torch.float16"),
        (torch.ones(3), torch.ones(3), "gelu", r"activation: expected silu or gelu_tanh, got 'gelu'"),
        (torch.ones(3).int(), torch.ones(3), "silu", r"gate: expected a floating-point dtype"),
        (torch.ones(3), torch.ones(3, device="meta"), "silu", r"up: expected a tensor on cpu"),
    ],
)
def test_refused(gate: Tensor, up: Tensor, activation: Any, message: str) -> None:
    with pytest.raises(InvalidInputError, match=f"^gated_activation: {message}"):
        gated_activation(gate, up, activation=activation)
