"""linear_logprob and linear_cross_entropy against the formula in float64, and against plain torch at the same dtype."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import head_cases
import pytest
import torch
import torch.nn.functional as F
from head_cases import COMPILED, DTYPES, IMPLEMENTATIONS, REDUCTIONS, SHAPES, Case, gradients, leaf
from head_cases import LABEL_OPTIONS as OPTIONS
from torch import Tensor

from cdas_fast import linear_cross_entropy, linear_logprob
from cdas_fast.errors import InvalidInputError

pytestmark = pytest.mark.usefixtures("nan_filled_empty")


def make_case(*options: str, ignore: bool = False, **given: Any) -> Case:
    """Some labels are -100 if `ignore`."""
    case = head_cases.make_case(linear_logprob, *options, labels=True, **given)
    if ignore:
        case.target.flatten()[1::3] = -100
    return case


def log_probability(case: Case, log_p: Tensor) -> Tensor:
    ignored = case.target == case.options.get("ignore_index", -100)
    picked = log_p.gather(-1, case.target.masked_fill(ignored, 0)[..., None])[..., 0]
    return torch.where(ignored, 0.0, picked)


def truth(case: Case) -> Tensor:
    return log_probability(case, case.log_p(torch.float64))


def plain(case: Case) -> Tensor:
    """What one writes in torch: the head at the dtype of the input, log softmax in float32."""
    return log_probability(case, case.log_p(case.hidden.dtype))


def assert_right(case: Case, **extra: Any) -> None:
    head_cases.assert_right(case, case.loss(None, **extra), plain, truth, scale=4)


# Truth


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ignore", [False, True], ids=["all_count", "some_ignored"])
@pytest.mark.parametrize("options", OPTIONS)
def test_value_and_gradient_are_those_of_the_formula(options: str, ignore: bool, dtype: torch.dtype, impl: str) -> None:
    assert_right(make_case(*OPTIONS[options], ignore=ignore, dtype=dtype), impl=impl)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape(shape: dict[str, Any], dtype: torch.dtype, impl: str) -> None:
    assert_right(make_case("bias", dtype=dtype, **shape), impl=impl)


@pytest.mark.parametrize("impl", COMPILED)
@pytest.mark.parametrize("options", OPTIONS)
def test_gradcheck(options: str, impl: str) -> None:
    case = make_case(*OPTIONS[options], ignore=True, rows=(2, 2), width=3, vocabulary=5, dtype=torch.float64)

    def function(hidden: Tensor) -> Tensor:
        return replace(case, hidden=hidden).loss(None, chunk_bytes=1, impl=impl)

    assert torch.autograd.gradcheck(function, case.hidden)


@pytest.mark.parametrize("impl", COMPILED)
def test_chunk_bytes_never_matters(impl: str) -> None:
    case = make_case(*OPTIONS["all"], ignore=True)
    whole = case.loss(None, impl=impl)
    (gradient,) = gradients(whole, case.hidden)
    for rows in (0.1, 1, 2, 3, 6, 7, 8):
        result = case.loss(None, chunk_bytes=int(rows * 4 * 37 * 3), impl=impl)
        torch.testing.assert_close(result, whole)
        torch.testing.assert_close(gradients(result, case.hidden)[0], gradient)


@pytest.mark.parametrize("impl", COMPILED)
def test_bfloat16_with_the_logits_of_a_language_model_is_right_to_a_thousandth(impl: str) -> None:
    """Logits of +-22 over 16384 entries and labels of any probability, where logits in bfloat16 are wrong by 0.1."""
    generator = torch.Generator().manual_seed(0)
    hidden = leaf((1.2 * torch.randn(16, 576, generator=generator)).bfloat16())
    weight = (0.15 * torch.randn(16384, 576, generator=generator)).bfloat16()
    rank = torch.logspace(0, 14, 16, base=2).long() - 1
    labels = (hidden.double() @ weight.double().T).argsort(-1, descending=True)[torch.arange(16), rank]
    case = Case(linear_logprob, hidden, labels, weight, {})
    expected, ours = truth(case), case.loss(None, impl=impl)
    assert expected.min() < -20
    assert (plain(case) - expected).abs().max() > 0.02, "the case is too easy"
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=2e-5)
    exact = case.in_float64()
    wanted, got = gradients(truth(exact), exact.hidden)[0], gradients(ours, hidden)[0].double()
    assert (wanted - got).norm() < 3e-3 * wanted.norm(), "the gradients of the logits meet the head in bfloat16"


# Laws


@pytest.mark.parametrize("impl", COMPILED)
def test_probabilities_of_all_labels_sum_to_one(impl: str) -> None:
    case = make_case("bias", "logit_softcap", "temperature", rows=(1,), dtype=torch.float64)
    every = replace(case, hidden=case.hidden.detach().expand(37, 13), target=torch.arange(37))
    torch.testing.assert_close(every.loss(None, impl=impl).exp().sum(), torch.tensor(1.0, dtype=torch.float64))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_of_eight_thousand_stay_finite_and_right(dtype: torch.dtype, impl: str) -> None:
    """The likeliest label, the least likely, one of two that tie, one of four."""
    big = 2.0**13
    logits = torch.tensor([[big, -big, -big, 0], [big, -big, 0, 0], [big, big, -big, -big], [0, 0, 0, 0]]).to(dtype)
    case = Case(linear_logprob, leaf(logits), torch.tensor([0, 1, 1, 3]), torch.eye(4, dtype=dtype), {})
    result = case.loss(None, impl=impl)
    torch.testing.assert_close(result, torch.tensor([0.0, -(2.0**14), -math.log(2), -math.log(4)], dtype=result.dtype))
    ours, wanted = (gradients(each, case.hidden)[0].double() for each in (result, truth(case)))
    torch.testing.assert_close(ours, wanted, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_bias_of_minus_infinity_takes_entries_out(dtype: torch.dtype, impl: str) -> None:
    """A label that is barred has probability 0."""
    bias = torch.zeros(37, dtype=dtype).masked_fill(torch.arange(37) % 3 == 0, -math.inf)
    case = make_case(dtype=dtype, bias=bias)
    case.target = case.target // 3 * 3 + 1
    assert_right(case, impl=impl)
    case.target = case.target - 1
    assert (case.loss(None, impl=impl) == -math.inf).all()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("options", ["bias", "all"])
@pytest.mark.parametrize("ignore_index", [-100, -1, 0, 5, 1000])
def test_ignored_rows_may_hold_anything_and_reach_nothing(ignore_index: int, options: str, impl: str) -> None:
    """An `ignore_index` may be the number of a vocabulary entry, such as that of padding."""
    clean = make_case(*OPTIONS[options])
    clean.options["ignore_index"] = ignore_index
    ignored = torch.arange(7) % 3 == 1
    clean.target[ignored] = ignore_index
    case = clean.copy()
    case.hidden.data[ignored] = math.nan
    ours, expected = (each.loss(None, impl=impl) for each in (case, clean))
    assert torch.equal(ours[ignored], torch.zeros(2))
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(expected.double(), truth(clean), rtol=1e-5, atol=1e-5)
    got, wanted = gradients(ours, case.hidden)[0], gradients(expected, clean.hidden)[0]
    assert torch.equal(got[ignored], torch.zeros(2, 13))
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_row_reaches_only_itself(bad: float, impl: str) -> None:
    clean = make_case("bias")
    case = clean.copy()
    case.hidden.data[2, 4] = bad
    ours, expected = (each.loss(None, impl=impl) for each in (case, clean))
    assert ours[2].isnan()
    others = torch.arange(7) != 2
    torch.testing.assert_close(ours[others], expected[others])
    got, wanted = gradients(ours, case.hidden)[0], gradients(expected, clean.hidden)[0]
    assert got[2].isnan().all()
    torch.testing.assert_close(got[others], wanted[others])


def test_label_out_of_range_is_nan_where_it_is_not_checked() -> None:
    """As on a GPU; ignored rows and the others are what they are."""
    case = make_case("bias", ignore=True)
    expected = case.loss(None).detach()
    labels = case.target.clone()
    labels[0], labels[2], labels[3] = 37, -1, -101
    arguments = (case.hidden, labels, case.weight, case.options["bias"], None, 1.0, 1.0, -100, "auto", 2**20, True)
    result, _ = torch.ops.cdas_fast.linear_logprob(*arguments)
    assert result[[0, 2, 3]].isnan().all()
    torch.testing.assert_close(result[[1, 4, 5, 6]], expected[[1, 4, 5, 6]])


# Sums over sequences, and cross-entropy


@pytest.mark.parametrize("impl", COMPILED)
def test_preference_loss_is_that_of_plain_torch(impl: Any) -> None:
    """-log sigmoid of the difference of two sums of log-probabilities, as in direct preference optimisation."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(11, 5, generator=generator, dtype=torch.float64)
    hidden = torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(11, (2, 3, 4), generator=generator)
    labels[0, 1, 2:] = labels[1, 2, 3:] = -100
    reference = torch.randn(3, generator=generator, dtype=torch.float64)

    def preference(log_p: Tensor) -> Tensor:
        chosen, rejected = log_p.sum(-1)
        return -F.logsigmoid(0.1 * (chosen - rejected - reference)).mean()

    every = (hidden @ weight.T).log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    expected = preference(torch.where(labels == -100, 0.0, every))
    ours = preference(linear_logprob(hidden, labels, weight, impl=impl))
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(gradients(ours, hidden), gradients(expected, hidden))


@pytest.mark.parametrize("impl", COMPILED)
@pytest.mark.parametrize("ignore_index", [-100, 5])
@pytest.mark.parametrize("rows", [(7,), (2, 3)], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_cross_entropy_is_that_of_torch(reduction: str, rows: tuple[int, ...], ignore_index: int, impl: Any) -> None:
    case = replace(make_case("bias", rows=rows, dtype=torch.float64), function=linear_cross_entropy)
    case.target.flatten()[1::3] = ignore_index
    logits = case.hidden @ case.weight.T + case.options["bias"]
    expected = F.cross_entropy(
        logits.flatten(0, -2), case.target.flatten(), reduction=reduction, ignore_index=ignore_index
    )
    expected = expected.reshape(rows) if reduction == "none" else expected
    ours = case.loss(reduction, ignore_index=ignore_index, impl=impl)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(gradients(ours, case.hidden), gradients(expected, case.hidden))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_row_weights_of_ignored_rows_do_not_count(reduction: str) -> None:
    case = replace(make_case(ignore=True, dtype=torch.float64), function=linear_cross_entropy)
    kept = case.target != -100
    row_weights = leaf(torch.tensor([1.0, 2.0, 0.0, 0.5, 4.0, 1.0, 3.0], dtype=torch.float64))
    weighted = -truth(case) * row_weights
    total, count = weighted.sum(), (row_weights * kept).sum()
    expected = {"none": weighted, "sum": total, "mean": total / count}[reduction]
    ours, inputs = case.loss(reduction, row_weights=row_weights), (case.hidden, row_weights)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(gradients(ours, *inputs), gradients(expected, *inputs))


def test_mean_is_the_default() -> None:
    case = make_case()
    expected = -case.loss(None).mean()
    assert torch.equal(linear_cross_entropy(case.hidden, case.target, case.weight), expected)


@pytest.mark.parametrize("impl", COMPILED)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("rows", [(0,), (7,)], ids=["no_rows", "all_ignored"])
def test_nothing_that_counts_is_zero(rows: tuple[int, ...], reduction: str, impl: str) -> None:
    case = replace(make_case(rows=rows), function=linear_cross_entropy)
    case.target.fill_(-100)
    loss = case.loss(reduction, impl=impl)
    assert (loss == 0).all()
    assert torch.equal(gradients(loss, case.hidden)[0], torch.zeros(*rows, 13))


# Bad inputs

HIDDEN, LABELS, WEIGHT = torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.long), torch.zeros(9, 4)
BOTH = pytest.mark.parametrize("function", [linear_logprob, linear_cross_entropy])


@BOTH
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": HIDDEN.long()}, "hidden: expected a floating-point dtype, got torch.int64. Cast it first."),
        ({"hidden": torch.zeros(())}, r"hidden: expected shape \(..., D\), got shape \(\)"),
        ({"weight": WEIGHT.to(torch.int8)}, "weight: expected .* got torch.int8. Dequantise it first."),
        ({"weight": WEIGHT.to(torch.float8_e4m3fn)}, "weight: expected .* got torch.float8_e4m3fn. Dequantise it"),
        ({"weight": WEIGHT.to_sparse()}, "weight: expected a dense tensor, got torch.sparse_coo"),
        ({"weight": WEIGHT[:, 1:]}, r"weight: expected shape \(V, 4\), got shape \(9, 3\)"),
        ({"weight": WEIGHT.clone().requires_grad_()}, r"weight: expected a frozen tensor, .* weight\.detach\(\)"),
        ({"bias": torch.zeros(8)}, r"bias: expected shape \(9,\), got shape \(8,\)"),
        ({"labels": [1]}, "labels: expected a torch.Tensor, got list"),
        ({"labels": LABELS.int()}, "labels: expected dtype torch.int64, got torch.int32"),
        ({"labels": LABELS.float()}, "labels: expected dtype torch.int64, got torch.float32"),
        ({"labels": LABELS.to("meta")}, "labels: expected a tensor on cpu, got meta"),
        ({"labels": LABELS[:, 1:]}, r"labels: expected shape \(2, 3\), got shape \(2, 2\)"),
        ({"labels": LABELS + 9}, "labels: expected labels from 0 to 8, or ignore_index -100, got 9"),
        ({"labels": LABELS - 1}, "labels: expected labels from 0 to 8, or ignore_index -100, got -1"),
        ({"labels": LABELS - 100, "ignore_index": -1}, "labels: expected .*, or ignore_index -1, got -100"),
        ({"ignore_index": 0.5}, "ignore_index: expected a whole number, got 0.5"),
        ({"temperature": math.nan}, "temperature: expected a finite number above 0, got nan"),
        ({"logit_softcap": -1.0}, "logit_softcap: expected None or a finite number above 0, got -1.0"),
        ({"chunk_bytes": 0}, "chunk_bytes: expected a whole number above 0, got 0"),
        ({"impl": "cuda"}, "impl: expected auto, reference, cpp or triton, got 'cuda'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_bad_input(function: Any, change: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"hidden": HIDDEN, "labels": LABELS, "weight": WEIGHT}
    function(**good)
    with pytest.raises(InvalidInputError, match=rf"^{function.__name__}: {message}"):
        function(**{**good, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"row_weights": torch.ones(3)}, r"row_weights: expected shape \(2, 3\), got shape \(3,\)"),
        ({"reduction": "batchmean"}, "reduction: expected mean, sum or none, got 'batchmean'"),
    ],
    ids=["row_weights", "reduction"],
)
def test_bad_reduction(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=f"^linear_cross_entropy: {message}"):
        linear_cross_entropy(HIDDEN, LABELS, WEIGHT, **change)
