"""linear_kl against the formula in float64, and against what plain torch reaches at the same dtype."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import head_cases
import pytest
import torch
from head_cases import COMPILED, DTYPES, IMPLEMENTATIONS, OPTIONS, REDUCTIONS, SHAPES, Case, gradients, leaf
from torch import Tensor

from cdas_fast import linear_jsd, linear_kl
from cdas_fast.errors import InvalidInputError

DIRECTIONS = ["forward", "reverse"]

pytestmark = pytest.mark.usefixtures("nan_filled_empty")


def make_case(direction: Any, *options: str, **given: Any) -> Case:
    return head_cases.make_case(partial(linear_kl, direction=direction), *options, **given)


def direction_of(case: Case) -> str:
    assert isinstance(case.function, partial)
    return case.function.keywords["direction"]


def divergence(case: Case, log_p: Tensor, log_q: Tensor) -> Tensor:
    """sum_v a_v (log a_v - log b_v), 0 where a_v is."""
    log_a, log_b = (log_q, log_p) if direction_of(case) == "forward" else (log_p, log_q)
    a = log_a.exp()
    log_a, log_b = (each.masked_fill(a == 0, 0.0) for each in (log_a, log_b))
    return (a * (log_a - log_b)).sum(-1)


def truth(case: Case) -> Tensor:
    return divergence(case, case.log_p(torch.float64), case.log_q(torch.float64))


def plain(case: Case) -> Tensor:
    """What one writes in torch: the head at the dtype of the input, log softmax in float32."""
    return divergence(case, case.log_p(case.hidden.dtype), case.log_q(case.hidden.dtype))


def assert_right(case: Case, scale: float = 1.0, **extra: Any) -> None:
    head_cases.assert_right(case, case.loss(**extra), plain, truth, scale)


# Truth. Divergences of the random cases are about 4, of differences of logarithms of about 10.


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_loss_and_gradient_are_those_of_the_formula(
    direction: str, options: str, dtype: torch.dtype, impl: str
) -> None:
    assert_right(make_case(direction, *OPTIONS[options], dtype=dtype), scale=4, impl=impl)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_every_shape(direction: str, shape: dict[str, Any], dtype: torch.dtype, impl: str) -> None:
    assert_right(make_case(direction, "bias", "target_weight", dtype=dtype, **shape), scale=8, impl=impl)


@pytest.mark.parametrize("impl", COMPILED)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_chunk_bytes_never_matters(direction: str, impl: str) -> None:
    case = make_case(direction, *OPTIONS["all"], rows=(7,))
    whole = case.loss(impl=impl)
    (gradient,) = gradients(whole, case.hidden)
    for rows in (0.1, 1, 2, 3, 6, 7, 8):
        loss = case.loss(chunk_bytes=int(rows * 4 * 37 * 5), impl=impl)
        torch.testing.assert_close(loss, whole)
        torch.testing.assert_close(gradients(loss, case.hidden)[0], gradient)


@pytest.mark.parametrize("impl", COMPILED)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_gradcheck(direction: str, options: str, impl: str) -> None:
    case = make_case(direction, *OPTIONS[options], rows=(2, 2), width=3, vocabulary=5, dtype=torch.float64)
    row_weights = torch.tensor([[0.5, 2.0], [0.0, 1.0]], dtype=torch.float64, requires_grad=True)

    def function(hidden: Tensor, row_weights: Tensor) -> Tensor:
        return replace(case, hidden=hidden).loss("mean", row_weights=row_weights, chunk_bytes=1, impl=impl)

    assert torch.autograd.gradcheck(function, (case.hidden, row_weights))


@pytest.mark.parametrize("impl", COMPILED)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_bfloat16_with_the_logits_of_a_language_model_is_right_to_a_thousandth(direction: str, impl: str) -> None:
    """Logits of +-22 over 16384 entries, where logits in bfloat16 are wrong by percents."""
    generator = torch.Generator().manual_seed(0)
    hidden = 1.2 * torch.randn(16, 576, generator=generator)
    target = hidden + 0.09 * torch.randn(16, 576, generator=generator)
    weight = 0.15 * torch.randn(16384, 576, generator=generator)
    case = replace(make_case(direction), hidden=leaf(hidden.bfloat16()), target=target.bfloat16())
    case.weight = weight.bfloat16()
    expected, ours = truth(case), case.loss(impl=impl)
    assert 0.02 < expected.mean() < 0.08
    assert (plain(case) / expected - 1).abs().max() > 0.05, "the case is too easy"
    assert (ours / expected - 1).abs().max() < 1e-3
    exact = case.in_float64()
    wanted, got = gradients(truth(exact), exact.hidden)[0], gradients(ours, case.hidden)[0].double()
    assert (wanted - got).norm() < 3e-3 * wanted.norm(), "the gradients of the logits meet the head in bfloat16"


# Laws


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_equal_distributions_have_no_divergence_and_no_gradient(direction: str, dtype: torch.dtype, impl: str) -> None:
    case = make_case(direction, "bias", "logit_softcap", dtype=dtype)
    case.target = case.hidden.detach()
    eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    loss = case.loss(impl=impl)
    assert (loss >= 0).all()
    assert loss.max() <= 8 * eps
    assert gradients(loss, case.hidden)[0].abs().max() <= 32 * eps


@pytest.mark.parametrize("impl", COMPILED)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_never_negative(direction: str, impl: str) -> None:
    """Of distributions so near that rounding alone would give either sign."""
    case = make_case(direction, rows=(200,))
    case.target = (case.hidden + 1e-6 * torch.randn(200, 13)).detach()
    assert (case.loss(impl=impl) >= 0).all()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_reverse_is_forward_with_both_sides_swapped(impl: Any) -> None:
    case = make_case("forward", "bias", "logit_softcap", dtype=torch.float64)
    arguments: dict[str, Any] = {**case.options, "reduction": "none", "impl": impl}
    swapped = linear_kl(case.target, case.hidden.detach(), case.weight, direction="reverse", **arguments)
    torch.testing.assert_close(case.loss(impl=impl), swapped)
    other = linear_kl(case.hidden, case.target, case.weight, direction="reverse", **arguments)
    assert (case.loss(impl=impl) - other).abs().min() > 1e-3, "the case does not tell the directions apart"


@pytest.mark.parametrize("impl", COMPILED)
@pytest.mark.parametrize(("direction", "beta"), [("forward", 1e-5), ("reverse", 1 - 1e-5)])
def test_divided_by_its_small_weight_jsd_becomes_kl(direction: str, beta: float, impl: Any) -> None:
    """JSD / beta -> KL(q || p) as beta -> 0, and JSD / (1 - beta) -> KL(p || q) as beta -> 1; so do the gradients."""
    case = make_case(direction, "bias", "temperature", dtype=torch.float64)
    jsd = linear_jsd(
        case.hidden, case.target, case.weight, **case.options, beta=beta, reduction="none", impl=impl
    ) / min(beta, 1 - beta)
    kl = case.loss(impl=impl)
    torch.testing.assert_close(jsd, kl, rtol=2e-3, atol=0)
    torch.testing.assert_close(*(gradients(each, case.hidden)[0] for each in (jsd, kl)), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_logits_of_eight_thousand_stay_finite_and_right(direction: str, dtype: torch.dtype, impl: str) -> None:
    """One-hot against one-hot is 2^14 nats; ties against one-hot; sharp against flat and flat against sharp."""
    big = 2.0**13
    p_logits = torch.tensor([[big, -big, -big, 0], [big, big, -big, -big], [big, big, big, -big], [0, 0, 0, 0]])
    q_logits = torch.tensor([[-big, big, 0, -big], [-big, big, -big, -big], [0, 0, 0, 0], [-big, big, -big, big]])
    case = make_case(direction)
    case = replace(case, hidden=leaf(p_logits.to(dtype)), target=q_logits.to(dtype), weight=torch.eye(4, dtype=dtype))
    loss, expected = case.loss(impl=impl), truth(case)
    assert float(loss[0].detach()) == 2**14
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    ours, wanted = (gradients(each, case.hidden)[0].double() for each in (loss, expected))
    torch.testing.assert_close(ours, wanted, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("side", ["both_sides", "first", "second"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_bias_of_minus_infinity(direction: str, side: str, dtype: torch.dtype, cap: float | None, impl: str) -> None:
    """What both sides or the first alone bar is left out; the divergence from a side that bars more is infinite."""
    bias = torch.randn(37, generator=torch.Generator().manual_seed(3)).to(dtype)
    barred = bias.masked_fill(torch.arange(37) % 3 == 0, -math.inf)
    first, second = {"both_sides": (barred, barred), "first": (barred, bias), "second": (bias, barred)}[side]
    p_bias, q_bias = (second, first) if direction == "forward" else (first, second)
    case = make_case(direction, dtype=dtype, bias=p_bias, target_bias=q_bias, logit_softcap=cap)
    if side != "second" or cap is not None:  # a cap makes -cap of -inf
        assert_right(case, scale=4, impl=impl)
        assert case.loss(impl=impl).isfinite().all()
        return
    loss = case.loss(impl=impl)
    assert (loss == math.inf).all()
    if direction == "forward":
        p, q = case.log_p(torch.float64).exp(), case.log_q(torch.float64).exp()
        upstream = torch.arange(1.0, 8.0, dtype=torch.float64)
        (ours,) = gradients(loss, case.hidden, upstream=upstream)
        expected = upstream[:, None] * (p - q).detach() @ case.weight.double()
        atol = torch.finfo(dtype).eps * float(expected.abs().max()) + 1e-5
        torch.testing.assert_close(ours.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=atol)


# Reductions


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_reductions(direction: str, reduction: str) -> None:
    case = make_case(direction, rows=(2, 2), dtype=torch.float64)
    row_weights = torch.tensor([[1.0, 0.5], [0.0, 3.0]], dtype=torch.float64, requires_grad=True)
    weighted = truth(case) * row_weights
    expected = {"none": weighted, "sum": weighted.sum(), "mean": weighted.sum() / row_weights.sum()}[reduction]
    ours, inputs = case.loss(reduction, row_weights=row_weights), (case.hidden, row_weights)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(gradients(ours, *inputs), gradients(expected, *inputs))


def test_forward_and_mean_are_the_defaults() -> None:
    case = make_case("forward")
    assert torch.equal(linear_kl(case.hidden, case.target, case.weight), case.loss().mean())


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("side", ["hidden", "target"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_bad_row_reaches_only_itself_and_nothing_at_weight_zero(
    direction: str, side: str, bad: float, impl: str
) -> None:
    clean = make_case(direction, "bias")
    case = clean.copy()
    (case.hidden if side == "hidden" else case.target).data[2, 4] = bad
    ours, expected = (each.loss(impl=impl) for each in (case, clean))
    assert ours[2].isnan()
    others = torch.arange(7) != 2
    torch.testing.assert_close(ours[others], expected[others])
    weights = others.float()
    ours, expected = (each.loss("mean", row_weights=weights, impl=impl) for each in (case, clean))
    torch.testing.assert_close(ours, expected)
    got, wanted = gradients(ours, case.hidden)[0], gradients(expected, clean.hidden)[0]
    assert torch.equal(got[2], torch.zeros(13))
    torch.testing.assert_close(got, wanted)


# Bad inputs


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"direction": "backward"}, "direction: expected forward or reverse, got 'backward'"),
        ({"direction": "jsd"}, "direction: expected forward or reverse, got 'jsd'"),
        ({"weight": torch.zeros(9, 5)}, r"weight: expected shape \(V, 4\), got shape \(9, 5\)"),
        ({"target_hidden": torch.zeros(3, 4)}, "expected the same rows"),
        ({"temperature": 0.0}, "temperature: expected a finite number above 0, got 0.0"),
        ({"reduction": "batchmean"}, "reduction: expected mean, sum or none, got 'batchmean'"),
        ({"target_hidden": torch.zeros(2, 4, requires_grad=True)}, "target_hidden: expected a frozen tensor"),
        ({"impl": "cuda"}, "impl: expected auto, reference, cpp or triton, got 'cuda'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_bad_input(change: dict[str, Any], message: str) -> None:
    """The rest is checked as for linear_jsd."""
    good: dict[str, Any] = {
        "hidden": torch.zeros(2, 4),
        "target_hidden": torch.zeros(2, 4),
        "weight": torch.zeros(9, 4),
    }
    linear_kl(**good)
    with pytest.raises(InvalidInputError, match=rf"^linear_kl: .*{message}"):
        linear_kl(**{**good, **change})
