"""The linear map by handle: values, gradients, and that nothing but the handle is kept."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from cdas_fast.models.handle_linear import HandleLinear
from cdas_fast.ops.handle_linear import handle_linear

SHAPES = [(5, 7, 3), (1, 16, 8), (0, 4, 6), (33, 65, 129)]  # tokens, in, out


@dataclass
class Given:
    """A handle whose weight may be exchanged."""

    weight: Tensor
    asked: list[torch.dtype] = field(default_factory=list)

    def dense(self, dtype: torch.dtype) -> Tensor:
        self.asked.append(dtype)
        return self.weight.to(dtype)


def problem(tokens: int, width: int, out: int, dtype: torch.dtype) -> tuple[Tensor, Given, Tensor, Tensor]:
    torch.manual_seed(0)
    x, bias, upstream = torch.randn(tokens, width), torch.randn(out), torch.randn(tokens, out)
    weight = Given(torch.randn(out, width).to(dtype))
    return x.to(dtype).requires_grad_(), weight, bias.to(dtype), upstream.to(dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_values_and_gradients_are_those_of_linear(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    x, handle, bias, upstream = problem(*shape, dtype)
    expected = torch.nn.functional.linear(x, handle.weight, bias)
    (wanted,) = torch.autograd.grad(expected, x, upstream)
    ours = handle_linear(x, handle, bias)
    (got,) = torch.autograd.grad(ours, x, upstream)
    rounding = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(ours, expected, rtol=rounding, atol=rounding * shape[1] ** 0.5)
    torch.testing.assert_close(got, wanted, rtol=rounding, atol=rounding * shape[2] ** 0.5)
    assert handle.asked == [dtype, dtype]


def test_gradients_in_float64() -> None:
    x, handle, bias, _ = problem(3, 5, 4, torch.float64)
    assert torch.autograd.gradcheck(lambda x: handle_linear(x[None], handle, bias), x)


def test_the_backward_pass_takes_what_the_handle_says_then() -> None:
    x, handle, _, upstream = problem(4, 6, 5, torch.float32)
    out = handle_linear(x, handle)
    handle.weight = torch.randn(5, 6)
    (gradient,) = torch.autograd.grad(out, x, upstream)
    torch.testing.assert_close(gradient, upstream @ handle.weight)


def test_nothing_is_kept_but_the_handle() -> None:
    kept: list[Tensor] = []
    x, handle, bias, _ = problem(4, 6, 5, torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):  # type: ignore[func-returns-value]
        out = handle_linear(x, handle, bias)
    assert not kept
    assert not any(isinstance(value, Tensor) for value in vars(out.grad_fn).values())


def test_a_bias_gets_no_gradient_and_x_may_need_none() -> None:
    x, handle, bias, upstream = problem(4, 6, 5, torch.float32)
    bias.requires_grad_()
    handle_linear(x, handle, bias).backward(upstream)
    assert bias.grad is None
    assert not handle_linear(x.detach(), handle, bias.detach()).requires_grad


def test_autocast_casts_as_linear_does() -> None:
    x, handle, bias, _ = problem(4, 6, 5, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ours = handle_linear(x, handle, bias)
        expected = torch.nn.functional.linear(x, handle.weight, bias)
    assert ours.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(ours, expected)
    ours.float().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32


def test_the_module_shows_itself_as_a_linear_map() -> None:
    module = HandleLinear(Given(torch.randn(3, 2)), (3, 2), torch.nn.Parameter(torch.zeros(3)))
    assert str(module) == "HandleLinear(in_features=2, out_features=3, bias=True)"
    assert module(torch.ones(1, 2)).shape == (1, 3)
