"""linear_jsd against the formula in float64, and against what plain torch reaches at the same dtype."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import head_cases
import pytest
import torch
from head_cases import COMPILED, DTYPES, IMPLEMENTATIONS, REDUCTIONS, SHAPES, Case, Operations, gradients, leaf
from torch import Tensor

from cdas_fast import linear_jsd
from cdas_fast.errors import InvalidInputError
from cdas_fast.ops import head_gemm
from cdas_fast.ops.linear_head import HeadParameters, HeadProblem, rows_per_chunk, run_chunks
from cdas_fast.ops.linear_head_reference import ReferenceChunk
from cdas_fast.ops.linear_jsd import reference_rows

OPTIONS = head_cases.OPTIONS | {"beta": (), "all": head_cases.OPTIONS["all"]}
BETAS = {"beta": 0.3, "all": 0.3}

pytestmark = pytest.mark.usefixtures("nan_filled_empty")


def make_case(*options: str, **given: Any) -> Case:
    return head_cases.make_case(linear_jsd, *options, **given)


def option_case(name: str, **given: Any) -> Case:
    return make_case(*OPTIONS[name], **given, **({"beta": BETAS[name]} if name in BETAS else {}))


def truth(case: Case) -> Tensor:
    """(1 - beta) KL(p || m) + beta KL(q || m) as it is defined, on probabilities in float64."""
    p, q = case.log_p(torch.float64).exp(), case.log_q(torch.float64).exp()
    beta = case.options.get("beta", 0.5)
    m = (1 - beta) * p + beta * q

    def divergence_from_m(a: Tensor) -> Tensor:
        return (a * (a.clamp_min(1e-300) / m.clamp_min(1e-300)).log()).sum(-1)

    return (1 - beta) * divergence_from_m(p) + beta * divergence_from_m(q)


def plain(case: Case) -> Tensor:
    """What one writes in torch: the head at the dtype of the input, log softmax in float32."""
    log_p, log_q = case.log_p(case.hidden.dtype), case.log_q(case.hidden.dtype)
    beta = case.options.get("beta", 0.5)
    log_m = torch.logaddexp(log_p + math.log(1 - beta), log_q + math.log(beta))
    p_term, q_term = ((a.exp() * (a - log_m)).sum(-1) for a in (log_p, log_q))
    return (1 - beta) * p_term + beta * q_term


def assert_right(case: Case, **extra: Any) -> None:
    head_cases.assert_right(case, case.loss(**extra), plain, truth)


def reference_chunk(case: Case, need_gradient: bool = True) -> tuple[HeadProblem, ReferenceChunk]:
    """The problem of a case without a head of the target's own, and the reference for it."""
    parameters = HeadParameters("jsd", case.options.get("logit_softcap"))
    bias = case.options.get("bias")
    problem = HeadProblem(
        parameters, need_gradient, case.hidden, case.weight, bias, target_hidden=case.target, target_bias=bias
    )
    return problem, ReferenceChunk(problem, reference_rows)


# Truth


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS)
def test_loss_and_gradient_are_those_of_the_formula(options: str, dtype: torch.dtype, impl: str) -> None:
    assert_right(option_case(options, dtype=dtype), impl=impl)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape(shape: dict[str, Any], dtype: torch.dtype, impl: str) -> None:
    assert_right(make_case("bias", "target_weight", dtype=dtype, **shape), impl=impl)


@pytest.mark.parametrize("impl", COMPILED)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", ["bias", "all"])
def test_chunk_bytes_never_matters(options: str, dtype: torch.dtype, impl: str) -> None:
    """Chunks of 1 to N + 1 rows of the reference: among them N < C, N = C, N = kC and N = kC + 1."""
    case = option_case(options, rows=(7,), dtype=dtype)
    whole = case.loss(impl=impl)
    (gradient,) = gradients(whole, case.hidden)
    per_row = 5 * 37 * torch.promote_types(dtype, torch.float32).itemsize
    for chunk_bytes in (1, *(rows * per_row for rows in range(1, 9))):
        loss = case.loss(chunk_bytes=chunk_bytes, impl=impl)
        torch.testing.assert_close(loss, whole, rtol=1e-6, atol=1e-7)
        (ours,) = gradients(loss, case.hidden)
        torch.testing.assert_close(ours, gradient, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


class RecordingChunk:
    """A kernel that notes the rows it is given."""

    def __init__(self, bytes_per_row: int, row_multiple: int) -> None:
        self.bytes_per_row, self.row_multiple = bytes_per_row, row_multiple
        self.chunks: list[int] = []

    def run(self, rows: slice, loss: Tensor, gradient: Tensor | None) -> None:
        assert gradient is not None
        assert (rows.stop - rows.start,) * 2 == (len(loss), len(gradient))
        self.chunks.append(len(loss))
        loss.copy_(torch.arange(rows.start, rows.stop))
        gradient.copy_(loss[:, None])


@pytest.mark.parametrize(
    ("row_multiple", "chunk_bytes", "chunks"),
    [
        (0, 1, [1] * 11),
        (0, 399, [3, 3, 3, 2]),
        (0, 1100, [11]),
        (0, 10**9, [11]),
        (4, 399, [3, 3, 3, 2]),
        (4, 400, [4, 4, 3]),
        (4, 799, [4, 4, 3]),
        (4, 800, [8, 3]),
    ],
)
def test_chunks_are_what_the_bytes_hold(row_multiple: int, chunk_bytes: int, chunks: list[int]) -> None:
    problem, _ = reference_chunk(make_case(rows=(11,), dtype=torch.bfloat16))
    kernel = RecordingChunk(100, row_multiple)
    loss, gradient = run_chunks(problem, kernel, chunk_bytes)
    assert kernel.chunks == chunks
    assert torch.equal(loss, torch.arange(11.0))
    assert gradient is not None
    assert torch.equal(gradient, torch.arange(11.0)[:, None].expand(11, 13)), "every row once, in float32"


@pytest.mark.parametrize("impl", COMPILED)
def test_bfloat16_with_the_logits_of_a_language_model_is_right_to_a_thousandth(impl: str) -> None:
    """Logits of +-22 over 49152 entries, where logits in bfloat16 are wrong by percents; the head is cast in blocks."""
    generator = torch.Generator().manual_seed(0)
    hidden = 1.2 * torch.randn(16, 576, generator=generator)
    target = hidden + 0.09 * torch.randn(16, 576, generator=generator)
    weight = 0.15 * torch.randn(49152, 576, generator=generator)
    case = Case(linear_jsd, leaf(hidden.bfloat16()), target.bfloat16(), weight.bfloat16(), {})
    expected, ours = truth(case), case.loss(impl=impl)
    assert 0.005 < expected.mean() < 0.02
    assert (plain(case) / expected - 1).abs().max() > 0.05, "the case is too easy"
    assert (ours / expected - 1).abs().max() < 1e-3
    exact = case.in_float64()
    wanted, got = gradients(truth(exact), exact.hidden)[0], gradients(ours, case.hidden)[0].double()
    assert (wanted - got).norm() < 3e-3 * wanted.norm(), "the gradients of the logits meet the head in bfloat16"


@pytest.mark.parametrize("impl", COMPILED)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradcheck(reduction: str, options: str, impl: str) -> None:
    case = option_case(options, rows=(2, 2), width=3, vocabulary=5, dtype=torch.float64)
    row_weights = torch.tensor([[0.5, 2.0], [0.0, 1.0]], dtype=torch.float64, requires_grad=True)

    def function(hidden: Tensor, row_weights: Tensor) -> Tensor:
        return replace(case, hidden=hidden).loss(reduction, row_weights=row_weights, chunk_bytes=1, impl=impl)

    assert torch.autograd.gradcheck(function, (case.hidden, row_weights))


@pytest.mark.parametrize(
    ("weight_dtype", "target_dtype"),
    [(torch.bfloat16, torch.float16), (torch.float32, torch.bfloat16), (torch.float64, torch.float64)],
    ids=str,
)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_dtype_of_hidden_rules(
    dtype: torch.dtype, weight_dtype: torch.dtype, target_dtype: torch.dtype, impl: str
) -> None:
    case = make_case("bias", dtype=dtype)
    mixed = replace(case, target=case.target.to(target_dtype), weight=case.weight.to(weight_dtype))
    loss, expected = mixed.loss(impl=impl), truth(mixed)
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    ours, wanted = (gradients(each, mixed.hidden)[0] for each in (loss, expected))
    assert ours.dtype == dtype
    atol = torch.finfo(dtype).eps * float(wanted.abs().max()) + 2e-5
    torch.testing.assert_close(ours, wanted, rtol=2 * torch.finfo(dtype).eps, atol=atol)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("target_bias", [False, True])
def test_target_weight_that_is_the_head_brings_its_own_bias_or_none(target_bias: bool, impl: str) -> None:
    case = make_case("bias", *["target_bias"] * target_bias, dtype=torch.float64)
    shared = case.loss(target_weight=case.weight, impl=impl)
    torch.testing.assert_close(shared, case.loss(target_weight=case.weight.clone(), impl=impl))
    torch.testing.assert_close(shared, truth(replace(case, options=case.options | {"target_weight": case.weight})))


# Laws


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("beta", [0.5, 0.1])
def test_equal_distributions_have_no_divergence_and_no_gradient(beta: float, dtype: torch.dtype, impl: str) -> None:
    case = make_case("bias", "logit_softcap", dtype=dtype, beta=beta)
    case.target = case.hidden.detach()
    eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    loss = case.loss(impl=impl)
    assert (loss >= 0).all()
    assert loss.max() <= 4 * eps
    assert gradients(loss, case.hidden)[0].abs().max() <= 16 * eps


@pytest.mark.parametrize("beta", [0.5, 0.2])
def test_swapping_both_sides_and_beta_changes_nothing(beta: float) -> None:
    case = make_case(dtype=torch.float64)
    forward = linear_jsd(case.hidden, case.target, case.weight, beta=beta, reduction="none")
    back = linear_jsd(case.target, case.hidden.detach(), case.weight, beta=1 - beta, reduction="none")
    torch.testing.assert_close(forward, back)
    if beta != 0.5:
        assert (forward - case.loss(beta=1 - beta)).abs().max() > 1e-3, "the case does not tell beta from 1 - beta"


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("beta", [0.5, 0.2, 1e-6, 1 - 1e-6])
def test_between_zero_and_the_entropy_of_beta(beta: float, impl: Any) -> None:
    """The bound is ln 2 at beta 1/2, and is reached by distributions that do not overlap."""
    bound = -beta * math.log(beta) - (1 - beta) * math.log1p(-beta)
    overlapping = make_case(rows=(50,), dtype=torch.float64, beta=beta).loss(impl=impl)
    assert (overlapping > 0).all()
    assert (overlapping < bound).all()
    apart = linear_jsd(torch.eye(2)[:1] * 1e4, torch.eye(2)[1:] * 1e4, torch.eye(2), beta=beta, impl=impl)
    torch.testing.assert_close(apart, torch.tensor(bound), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_of_ten_thousand_stay_finite_and_right(dtype: torch.dtype, impl: str) -> None:
    """One-hot against one-hot, ties against one-hot, and sharp against flat, with logits of +-1e4."""
    big = 1e4
    p_logits = torch.tensor([[big, -big, -big, 0], [big, big, -big, -big], [big, big, big, -big], [0, 0, 0, 0]])
    q_logits = torch.tensor([[-big, big, 0, -big], [-big, big, -big, -big], [0, 0, 0, 0], [-big, big, -big, big]])
    case = Case(linear_jsd, leaf(p_logits.to(dtype)), q_logits.to(dtype), torch.eye(4, dtype=dtype), {})
    loss = case.loss(impl=impl)
    assert float(loss[0].detach()) == pytest.approx(math.log(2))
    torch.testing.assert_close(loss.double(), truth(case), rtol=1e-6, atol=0)
    ours, wanted = (gradients(each, case.hidden)[0].double() for each in (loss, truth(case)))
    assert wanted[1:].abs().max() > 0.1
    torch.testing.assert_close(ours, wanted, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("side", ["both_sides", "hidden", "target"])
@pytest.mark.parametrize("cap", [None, 3.0])
def test_bias_of_minus_infinity_takes_entries_out(side: str, cap: float | None, dtype: torch.dtype, impl: str) -> None:
    bias = torch.randn(37, generator=torch.Generator().manual_seed(3)).to(dtype)
    barred = bias.masked_fill(torch.arange(37) % 3 == 0, -math.inf)
    p_bias, q_bias = {"both_sides": (barred, barred), "hidden": (barred, bias), "target": (bias, barred)}[side]
    assert_right(make_case(dtype=dtype, bias=p_bias, target_bias=q_bias, logit_softcap=cap), impl=impl)


# Reductions, row weights


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("weights", [None, [1.0, 0.5, 0.0, 3.0]], ids=["equal", "weighted"])
@pytest.mark.parametrize("rows", [(4,), (2, 2)], ids=str)
def test_reductions(rows: tuple[int, ...], weights: list[float] | None, reduction: str) -> None:
    case = make_case(rows=rows, dtype=torch.float64)
    each = truth(case)
    row_weights = torch.tensor(weights or [1.0] * 4, dtype=torch.float64).reshape(rows).requires_grad_()
    weighted = each * row_weights
    expected = {"none": weighted, "sum": weighted.sum(), "mean": weighted.sum() / row_weights.sum()}[reduction]
    if weights is None:
        torch.testing.assert_close(case.loss(reduction), expected)
        torch.testing.assert_close(gradients(case.loss(reduction), case.hidden), gradients(expected, case.hidden))
    else:
        ours = case.loss(reduction, row_weights=row_weights)
        torch.testing.assert_close(ours, expected)
        inputs = (case.hidden, row_weights)
        torch.testing.assert_close(gradients(ours, *inputs), gradients(expected, *inputs))


def test_mean_is_the_default() -> None:
    case = make_case()
    assert torch.equal(linear_jsd(case.hidden, case.target, case.weight), case.loss().mean())


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize(
    ("rows", "row_weights"), [((0,), None), ((0,), torch.zeros(0)), ((7,), torch.zeros(7))], ids=str
)
def test_nothing_to_reduce_is_zero(rows: tuple[int, ...], row_weights: Tensor | None, reduction: str) -> None:
    case = make_case(rows=rows)
    loss = case.loss(reduction, row_weights=row_weights)
    assert loss == 0
    assert torch.equal(gradients(loss, case.hidden)[0], torch.zeros(*rows, 13))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("side", ["hidden", "target"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_row_of_weight_zero_contributes_nothing(reduction: str, side: str, bad: float) -> None:
    clean = make_case()
    row_weights = leaf(torch.tensor([1.0, 2.0, 0.0, 0.5, 0.0, 1.0, 3.0]))
    case = clean.copy()
    (case.hidden if side == "hidden" else case.target).data[2] = bad
    ours, expected = (each.loss(reduction, row_weights=row_weights) for each in (case, clean))
    torch.testing.assert_close(ours, expected)
    (ours_hidden, ours_weights), (hidden, weights) = (
        gradients(loss, each.hidden, row_weights) for loss, each in ((ours, case), (expected, clean))
    )
    assert torch.equal(ours_hidden[2], torch.zeros(13))
    torch.testing.assert_close(ours_hidden, hidden)
    others = torch.arange(7) != 2
    torch.testing.assert_close(ours_weights[others], weights[others])
    assert ours_weights.isfinite().all()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("side", ["hidden", "target"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bad_row_reaches_only_itself(dtype: torch.dtype, side: str, bad: float, impl: str) -> None:
    clean = make_case("bias", dtype=dtype)
    case = clean.copy()
    (case.hidden if side == "hidden" else case.target).data[2, 4] = bad
    ours, expected = (each.loss(impl=impl) for each in (case, clean))
    assert ours[2].isnan()
    others = torch.arange(7) != 2
    torch.testing.assert_close(ours[others], expected[others])
    got, wanted = gradients(ours, case.hidden)[0], gradients(expected, clean.hidden)[0]
    assert got[2].isnan().all()
    torch.testing.assert_close(got[others], wanted[others])
    unused = gradients(case.loss(impl=impl)[others], case.hidden)[0]
    assert torch.equal(unused[2], torch.zeros(13, dtype=dtype)), "a loss that is not used has no gradient"


@pytest.mark.parametrize("weights", [None, torch.ones(7)], ids=["equal", "weighted"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_bad_row_that_counts_is_not_hidden(reduction: str, weights: Tensor | None) -> None:
    case = make_case()
    case.target[2] = math.nan
    assert case.loss(reduction, row_weights=weights).isnan()


# Contracts


def test_frozen_hidden_gets_no_gradient() -> None:
    case = make_case()
    case.hidden = case.hidden.detach()
    assert not case.loss().requires_grad
    row_weights = torch.ones(7, requires_grad=True)
    case.loss("sum", row_weights=row_weights).backward()
    assert case.hidden.grad is None
    torch.testing.assert_close(row_weights.grad, case.loss())


def test_only_hidden_gets_a_gradient_and_no_input_changes() -> None:
    case = make_case(*OPTIONS["all"])
    tensors = [case.hidden, case.target, case.weight, *(v for v in case.options.values() if isinstance(v, Tensor))]
    before = [tensor.detach().clone() for tensor in tensors]
    case.loss("mean").backward()
    assert [tensor.grad is not None for tensor in tensors] == [True] + [False] * 5
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(tensors, before, strict=True))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_grad_mode_the_gradient_is_neither_kept_nor_made(context: Callable[[], Any]) -> None:
    """The head is multiplied with once, not twice; and what requires a gradient may be given."""
    case = make_case()
    case.weight.requires_grad_()
    with context(), Operations() as operations:
        loss = case.loss()
    assert loss.grad_fn is None
    assert operations.arguments[operations.names.index("cdas_fast.linear_jsd")][-1] is False, "need_gradient"
    case.weight.requires_grad_(False)
    torch.testing.assert_close(loss.clone(), case.loss())
    for need_gradient, products in ((False, 1), (True, 2)):
        problem, kernel = reference_chunk(case, need_gradient)
        with torch.no_grad(), Operations() as operations:
            _, gradient = run_chunks(problem, kernel, 2**20)
        assert operations.names.count("aten.mm") == products
        assert (gradient is not None) == need_gradient


def test_gradient_scales_with_the_upstream_gradient() -> None:
    case = make_case(dtype=torch.float64)
    once, thrice = (gradients(case.loss("mean"), case.hidden, upstream=torch.tensor(x))[0] for x in (1.0, -3.0))
    torch.testing.assert_close(thrice, -3 * once)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_non_contiguous_inputs(dtype: torch.dtype, impl: str) -> None:
    case = make_case("bias", "target_weight", rows=(3, 4), dtype=dtype)

    def strided(tensor: Tensor) -> Tensor:
        wide = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1]), math.nan, dtype=tensor.dtype)
        wide[..., ::2] = tensor.detach()
        return wide[..., ::2]

    options = {name: strided(tensor) for name, tensor in case.options.items()}
    other = Case(linear_jsd, strided(case.hidden).requires_grad_(), strided(case.target), strided(case.weight), options)
    assert not any(tensor.is_contiguous() for tensor in (other.hidden, other.target, other.weight, *options.values()))
    ours, expected = (each.loss(impl=impl) for each in (other, case))
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(gradients(ours, other.hidden), gradients(expected, case.hidden))


def test_expanded_target_and_upstream_gradient() -> None:
    case = make_case(rows=(5,))
    case.target = case.target[:1].expand(5, 13)
    case.loss().sum().backward()
    torch.testing.assert_close(case.hidden.grad, torch.autograd.grad(truth(case).sum(), case.hidden)[0])


def test_meta_tensors_give_shape_and_dtype() -> None:
    hidden = torch.empty(2, 3, 4, device="meta", dtype=torch.bfloat16)
    loss = linear_jsd(hidden, hidden, torch.empty(9, 4, device="meta"), reduction="none")
    assert (loss.shape, loss.dtype, loss.device.type) == ((2, 3), torch.float32, "meta")


# Memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [(), ("logit_softcap", "bias")], ids=["plain", "softcap"])
def test_memory_is_that_of_one_chunk(options: tuple[str, ...], dtype: torch.dtype) -> None:
    """At most `chunk_bytes`, the gradient, a block of the head in float32 and rows of one chunk without a vocabulary.

    The logits of all rows are 1 MiB.
    """
    rows, width, vocabulary, chunk_bytes = 128, 4, 2048, 2**18
    case = make_case(*options, rows=(rows,), width=width, vocabulary=vocabulary, dtype=dtype)
    problem, kernel = reference_chunk(case)
    with torch.no_grad(), Operations() as operations:
        loss, _ = run_chunks(problem, kernel, chunk_bytes)
    assert loss.shape == (rows,)
    chunk = rows_per_chunk(kernel, chunk_bytes)
    assert 1 < chunk < rows / 8
    assert operations.largest <= chunk_bytes / 2
    head = 0 if dtype == torch.float32 else 4 * vocabulary * width
    others = 4 * rows * (width + 1) + 4 * 2 * chunk * (width + 2)
    assert chunk_bytes / 2 < operations.peak <= chunk_bytes + others + head


def test_a_head_of_another_dtype_is_cast_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 8 rows, the last of 5."""
    monkeypatch.setattr(head_gemm, "_BLOCK_BYTES", 8 * 4 * 13)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(37, 13, generator=generator).bfloat16()
    hidden, grad_logits = (torch.randn(3, size, generator=generator) for size in (13, 37))
    for function, given, expected in (
        (head_gemm.head_logits, hidden, hidden @ weight.float().T),
        (head_gemm.times_head, grad_logits, grad_logits @ weight.float()),
    ):
        out = torch.empty_like(expected)
        with Operations() as operations:
            function(given, weight, out)
        torch.testing.assert_close(out, expected)
        assert operations.largest == 8 * 4 * 13


# Bad inputs

HIDDEN, WEIGHT = torch.zeros(2, 3, 4), torch.zeros(9, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": [1.0]}, "hidden: expected a torch.Tensor, got list"),
        *(({name: None}, f"{name}: .* got NoneType") for name in ("hidden", "target_hidden", "weight")),
        ({"hidden": HIDDEN.long()}, "hidden: expected a floating-point dtype, got torch.int64. Cast it first."),
        ({"weight": WEIGHT.to(torch.uint8)}, "weight: expected .* got torch.uint8. Dequantise it first."),
        (
            {"row_weights": torch.ones(2, 3, dtype=torch.bool)},
            "row_weights: expected a floating-point .* got torch.bool",
        ),
        ({"weight": WEIGHT.to("meta")}, "weight: expected a tensor on cpu, got one on meta"),
        ({"row_weights": torch.ones(2, 3, device="meta")}, "row_weights: expected a tensor on .*, got one on "),
        ({"hidden": torch.zeros(())}, r"hidden and target_hidden: expected the same rows .* got \(\) and \(2, 3, 4\)"),
        ({"target_hidden": HIDDEN[:, 1:]}, r"expected the same rows .* got \(2, 3, 4\) and \(2, 2, 4\)"),
        ({"target_hidden": HIDDEN[..., 1:]}, r"target_weight: expected shape \(9, 3\), got shape \(9, 4\)"),
        ({"weight": WEIGHT[:, 1:]}, r"weight: expected shape \(V, 4\), got shape \(9, 3\)"),
        ({"weight": WEIGHT[0]}, r"weight: expected shape \(V, 4\), got shape \(4,\)"),
        ({"weight": WEIGHT[:0]}, r"weight: expected at least one vocabulary entry .* got shape \(0, 4\)"),
        (
            {"hidden": HIDDEN[..., :0], "target_hidden": HIDDEN[..., :0], "weight": WEIGHT[:, :0]},
            r"weight: expected .* of at least one number, got shape \(9, 0\)",
        ),
        ({"bias": torch.zeros(8)}, r"bias: expected shape \(9,\), got shape \(8,\)"),
        ({"bias": torch.zeros(9, 1)}, r"bias: expected shape \(9,\), got shape \(9, 1\)"),
        ({"target_weight": WEIGHT[1:]}, r"target_weight: expected shape \(9, 4\), got shape \(8, 4\)"),
        ({"target_bias": torch.zeros(1)}, r"target_bias: expected shape \(9,\), got shape \(1,\)"),
        ({"row_weights": torch.ones(6)}, r"row_weights: expected shape \(2, 3\), got shape \(6,\)"),
        *(
            ({name: tensor.clone().requires_grad_()}, rf"{name}: expected a frozen tensor, got .* {name}\.detach\(\)")
            for name, tensor in {
                "target_hidden": HIDDEN,
                "weight": WEIGHT,
                "bias": torch.zeros(9),
                "target_weight": WEIGHT,
                "target_bias": torch.zeros(9),
            }.items()
        ),
        *(({"beta": beta}, f"beta: expected .* between 0 and 1, got {beta}") for beta in (0.0, 1.0, -0.5, math.nan)),
        *(
            ({name: number}, f"{name}: expected .*finite number above 0, got {number}")
            for name in ("temperature", "logit_softcap")
            for number in (0.0, -1.0, math.inf, math.nan)
        ),
        *(({"logit_scale": number}, f"scale: expected a finite .* got {number}") for number in (math.inf, math.nan)),
        ({"reduction": "batchmean"}, "reduction: expected mean, sum or none, got 'batchmean'"),
        *(({"chunk_bytes": size}, f"chunk_bytes: expected .* above 0, got {size}") for size in (0, -1, 1e6)),
        ({"impl": "cuda"}, "impl: expected auto, reference, cpp or triton, got 'cuda'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_bad_input(change: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"hidden": HIDDEN, "target_hidden": HIDDEN, "weight": WEIGHT}
    linear_jsd(**good)
    with pytest.raises(InvalidInputError, match=rf"^linear_jsd: .*{message}"):
        linear_jsd(**{**good, **change})
