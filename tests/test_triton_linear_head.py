"""The Triton row kernels of the head losses, interpreted, against the formulas in float64 and against plain torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from head_cases import assert_as_right_as_torch
from torch import Tensor
from triton_worker import Apart, Made, Worker, worker

KERNELS = "cdas_fast.kernels.linear_head:"
DIVERGENCES = ["jsd", "forward_kl", "reverse_kl"]
LOSSES = [*DIVERGENCES, "logprob"]
NUMBERS: dict[str, Any] = {"logit_softcap": 3.0, "logit_scale": 0.7, "temperature": 1.7}
OPTIONS: dict[str, dict[str, Any]] = {
    "no_option": {},
    "bias": {"bias": torch.float32},
    "bias_in_bfloat16": {"bias": torch.bfloat16},
    "softcap": {"logit_softcap": 3.0},
    "scale": {"logit_scale": 0.7},
    "scale_of_0": {"logit_scale": 0.0},
    "negative_scale": {"logit_scale": -0.7},
    "negative_scale_and_softcap": {"logit_scale": -0.7, "logit_softcap": 3.0},
    "temperature": {"temperature": 1.7},
    "grad_scale": {"grad_scale": 1024.0},
    "all": {"bias": torch.float32, **NUMBERS},
}
OPTIONS_OF_DIVERGENCES: dict[str, dict[str, Any]] = {
    **OPTIONS,
    "target_bias_alone": {"target_bias": torch.float32},
    "all": {"bias": torch.float32, "target_bias": torch.float16, **NUMBERS},
}
OPTIONS_OF_JSD: dict[str, dict[str, Any]] = {
    **OPTIONS_OF_DIVERGENCES,
    "beta": {"beta": 0.3},
    "beta_near_0": {"beta": 1e-6},
    "beta_near_1": {"beta": 1 - 1e-6},
    "all": {**OPTIONS_OF_DIVERGENCES["all"], "beta": 0.3},
}
VARIANTS = [
    pytest.param(loss, chosen, id=f"{loss}-{name}")
    for loss, options in (
        ("jsd", OPTIONS_OF_JSD),
        ("forward_kl", OPTIONS_OF_DIVERGENCES),
        ("reverse_kl", OPTIONS_OF_DIVERGENCES),
        ("logprob", OPTIONS),
    )
    for name, chosen in options.items()
]
PARAMETERS = "cdas_fast.kernels.launch:HeadParameters"
SMALL_BLOCKS = Made(PARAMETERS, {"block": 16, "num_warps": 1, "programs": 64})
FEW_PROGRAMS = Made(PARAMETERS, {"block": 16, "num_warps": 1, "programs": 1})

pytestmark = pytest.mark.usefixtures("nan_filled_empty")


@pytest.fixture(scope="module")
def kernels() -> Iterator[Worker]:
    with worker(interpret=True) as process:
        yield process


@dataclass
class Case:
    """Arguments of a row kernel: logits, and the target's logits or labels."""

    loss: str
    logits: Tensor
    target: Tensor
    options: dict[str, Any] = field(default_factory=dict)

    def run(
        self, kernels: Worker, grad_dtype: torch.dtype | None = torch.float32, **extra: Any
    ) -> tuple[Tensor, Tensor]:
        """Losses, and gradients with respect to the logits (empty if `grad_dtype` is None)."""
        named = {**self.options, **extra, "loss": torch.empty(self.logits.shape[0], dtype=self.logits.dtype)}
        if grad_dtype is not None:
            named.setdefault("grad_logits", torch.empty(self.logits.shape, dtype=grad_dtype))
        if self.loss != "logprob":
            named["divergence"] = self.loss
        function = "logprob_rows" if self.loss == "logprob" else "divergence_rows"
        given = kernels.call(KERNELS + function, self.logits, self.target, **named)
        return given["loss"], torch.empty(0) if given["grad_logits"] is None else given["grad_logits"]

    def expected(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The formula in torch at `dtype`, through autograd."""
        logits = self.logits.to(dtype, copy=True).requires_grad_()
        log_p = self._log_softmax(logits, "bias")
        if self.loss == "logprob":
            loss = log_p.gather(1, self.target.clamp(min=0).long()[:, None])[:, 0].masked_fill(self.target == -1, 0.0)
        else:
            loss = divergence(self.loss, log_p, self._log_softmax(self.target.to(dtype), "target_bias"), self.beta)
        (gradient,) = torch.autograd.grad(loss.sum(), logits)
        return loss.detach(), gradient * self.options.get("grad_scale", 1.0)

    def _log_softmax(self, logits: Tensor, bias: str) -> Tensor:
        if bias in self.options:
            logits = logits + self.options[bias].to(logits.dtype)
        logits = logits * self.options.get("logit_scale", 1.0)
        cap = self.options.get("logit_softcap")
        logits = logits if cap is None else cap * torch.tanh(logits / cap)
        return (logits / self.options.get("temperature", 1.0)).log_softmax(-1)

    @property
    def beta(self) -> float:
        return float(self.options.get("beta", 0.5))


def divergence(loss: str, log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    if loss == "forward_kl":
        return (log_q.exp() * (log_q - log_p)).sum(-1)
    if loss == "reverse_kl":
        return (log_p.exp() * (log_p - log_q)).sum(-1)
    log_m = torch.logaddexp(log_p + math.log1p(-beta), log_q + math.log(beta))
    p_term, q_term = ((log.exp() * (log - log_m)).sum(-1) for log in (log_p, log_q))
    return (1 - beta) * p_term + beta * q_term


def make_case(
    loss: str, rows: int = 5, vocabulary: int = 37, dtype: torch.dtype = torch.float32, **options: Any
) -> Case:
    """Random logits of about +-6."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    logits, other = (2 * randn(rows, vocabulary)).to(dtype), (2 * randn(rows, vocabulary)).to(dtype)
    labels = torch.randint(vocabulary, (rows,), generator=generator)
    for name in ("bias", "target_bias"):
        if name in options:
            options[name] = randn(vocabulary).to(options[name])
    return Case(loss, logits, labels if loss == "logprob" else other, options)


def assert_right(case: Case, kernels: Worker, grad_dtype: torch.dtype | None = None, **extra: Any) -> None:
    """Loss and gradient, to numbers of the size of the largest loss, since that of KL is a sum of larger ones."""
    ours = case.run(kernels, grad_dtype or case.logits.dtype, **extra)
    truth, plain = case.expected(torch.float64), case.expected(case.logits.dtype)
    scale = max(1.0, truth[0].abs().max().item())
    assert_as_right_as_torch("loss", ours[0], plain[0], truth[0], scale)
    scale *= abs(case.options.get("logit_scale", 1.0)) * case.options.get("grad_scale", 1.0)
    assert_as_right_as_torch("gradient", ours[1], plain[1], truth[1], scale)


# Truth


@pytest.mark.parametrize(("loss", "options"), VARIANTS)
def test_loss_and_gradient_are_those_of_the_formula(loss: str, options: dict[str, Any], kernels: Worker) -> None:
    assert_right(make_case(loss, **options), kernels)


@pytest.mark.parametrize("options", [{}, {"bias": torch.float64, **NUMBERS}], ids=["no_option", "all"])
@pytest.mark.parametrize("loss", LOSSES)
def test_float64(loss: str, options: dict[str, Any], kernels: Worker) -> None:
    options = options if loss != "jsd" or not options else {**options, "beta": 0.3}
    assert_right(make_case(loss, dtype=torch.float64, **options), kernels, parameters=SMALL_BLOCKS)


@pytest.mark.parametrize(
    ("rows", "vocabulary", "parameters"),
    [
        pytest.param(4, 64, SMALL_BLOCKS, id="aligned"),
        pytest.param(3, 37, SMALL_BLOCKS, id="ragged_V"),
        pytest.param(5, 7, SMALL_BLOCKS, id="V_below_a_block"),
        pytest.param(9, 1, SMALL_BLOCKS, id="one_vocabulary_entry"),
        pytest.param(1, 16 * 37, SMALL_BLOCKS, id="one_row_in_37_splits"),
        pytest.param(1, 16 * 64 + 5, SMALL_BLOCKS, id="more_blocks_than_splits"),
        pytest.param(9, 50, FEW_PROGRAMS, id="more_rows_than_programs"),
        pytest.param(3, 5000, None, id="several_blocks_of_the_default_size"),
    ],
)
@pytest.mark.parametrize("loss", LOSSES)
def test_every_shape(loss: str, rows: int, vocabulary: int, parameters: Any, kernels: Worker) -> None:
    assert_right(make_case(loss, rows, vocabulary, bias=torch.float32), kernels, parameters=parameters)


@pytest.mark.parametrize("grad_dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("loss", LOSSES)
def test_gradient_in_16_bits(loss: str, grad_dtype: torch.dtype, kernels: Worker) -> None:
    """The interpreter cuts bfloat16 off instead of rounding it, which is up to 1 unit in the last place."""
    case = make_case(loss, grad_scale=256.0, **NUMBERS)
    exact, rounded = case.run(kernels)[1], case.run(kernels, grad_dtype)[1]
    assert rounded.dtype == grad_dtype
    torch.testing.assert_close(rounded.float(), exact, rtol=torch.finfo(grad_dtype).eps, atol=1e-6)


@pytest.mark.parametrize("parameters", [None, SMALL_BLOCKS], ids=["one_split", "several_splits"])
@pytest.mark.parametrize("loss", LOSSES)
def test_loss_alone_is_the_same_loss(loss: str, parameters: Any, kernels: Worker) -> None:
    case = make_case(loss, bias=torch.float32)
    alone, nothing = case.run(kernels, None, parameters=parameters)
    assert nothing.numel() == 0
    assert torch.equal(alone, case.run(kernels, parameters=parameters)[0])


@pytest.mark.parametrize("beta", [0.5, 0.1])
@pytest.mark.parametrize("loss", DIVERGENCES)
def test_digits_of_a_small_divergence(loss: str, beta: float, kernels: Worker) -> None:
    """Logits that differ by a thousandth: a loss of 1e-7, of which plain torch is a fifth to two thirds off."""
    case = make_case(loss, rows=3, vocabulary=500, beta=beta)
    noise = torch.randn(case.logits.shape, generator=torch.Generator().manual_seed(1))
    case.target = case.logits + 1e-3 * noise
    truth, gradient = case.expected(torch.float64)
    ours, our_gradient = case.run(kernels)
    assert (truth < 1e-6).all()
    assert (ours / truth - 1).abs().max() < 1e-3
    # p - q notices an error of the sums of exponentials.
    assert (our_gradient - gradient).abs().max() < (1e-6 if loss == "jsd" else 3e-4) * gradient.abs().max()


@pytest.mark.parametrize("options", [{}, {"beta": 0.2}, {"logit_softcap": 30.0}], ids=["plain", "beta", "softcap"])
@pytest.mark.parametrize("loss", DIVERGENCES)
def test_equal_rows_have_neither_divergence_nor_gradient(loss: str, options: dict[str, Any], kernels: Worker) -> None:
    case = make_case(loss, **options)
    case.target = case.logits.clone()
    ours, gradient = case.run(kernels, parameters=SMALL_BLOCKS)
    assert (ours == 0).all()
    assert (gradient == 0).all()


# Extreme numbers


@pytest.mark.parametrize("parameters", [None, SMALL_BLOCKS], ids=["one_split", "several_splits"])
@pytest.mark.parametrize("size", [1e4, 1e9])
@pytest.mark.parametrize("loss", LOSSES)
def test_huge_logits(loss: str, size: float, parameters: Any, kernels: Worker) -> None:
    case = make_case(loss)
    case.logits, case.target = size / 6 * case.logits, case.target * (1 if loss == "logprob" else size / 6)
    assert all(each.isfinite().all() for each in case.run(kernels, parameters=parameters))
    assert_right(case, kernels, parameters=parameters)


@pytest.mark.parametrize("shift", [1e4, -1e4])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_number_added_to_all_logits_never_matters(loss: str, shift: float, kernels: Worker) -> None:
    """Logits of which one side lies far off, and to which the number can be added without rounding."""
    case = make_case(loss)
    case.logits = (64 * case.logits).round() / 64
    moved = replace(case, logits=case.logits + shift)
    for ours, expected in zip(moved.run(kernels), case.run(kernels), strict=True):
        torch.testing.assert_close(ours, expected, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("beta", [0.5, 0.1])
def test_distributions_that_do_not_overlap(beta: float, kernels: Worker) -> None:
    case = Case("jsd", torch.tensor([[1e4, -1e4, 0.0]]), torch.tensor([[-1e4, 1e4, 0.0]]), {"beta": beta})
    entropy = -beta * math.log(beta) - (1 - beta) * math.log1p(-beta)
    ours, gradient = case.run(kernels)
    torch.testing.assert_close(ours, torch.tensor([entropy]))
    assert torch.equal(gradient, torch.zeros(1, 3))


@pytest.mark.parametrize("size", [1e-6, 1e-3, 1.0, 1e2, 1e4, 1e30])
def test_softcap_of_any_logit(size: float, kernels: Worker) -> None:
    case = make_case("logprob", logit_softcap=30.0)
    case.logits *= size
    assert_right(case, kernels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("parameters", [None, SMALL_BLOCKS], ids=["one_split", "several_splits"])
def test_bias_of_minus_infinity_takes_entries_out(
    parameters: Any, loss: str, dtype: torch.dtype, kernels: Worker
) -> None:
    case = make_case(loss, vocabulary=70, dtype=dtype, bias=torch.float32)
    kept = torch.ones(70, dtype=torch.bool)
    kept[16:48] = kept[3] = False  # two whole blocks among them
    case.options["bias"][~kept] = -math.inf
    if loss == "logprob":
        case.target = kept.nonzero()[case.target % int(kept.sum()), 0]
        target = kept.cumsum(0)[case.target] - 1
    else:
        case.options["target_bias"] = case.options["bias"]
        target = case.target[:, kept]
    biases = {name: bias[kept] for name, bias in case.options.items()}
    fewer = Case(loss, case.logits[:, kept], target, biases)
    ours, gradient = case.run(kernels, parameters=parameters)
    truth, true_gradient = fewer.expected(torch.float64)
    torch.testing.assert_close(ours.double(), truth, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient[:, kept].double(), true_gradient, rtol=1e-5, atol=1e-7)
    assert torch.equal(gradient[:, ~kept], torch.zeros_like(gradient[:, ~kept]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("side", ["bias", "target_bias"])
@pytest.mark.parametrize("loss", DIVERGENCES)
def test_an_entry_that_one_side_bars(loss: str, side: str, dtype: torch.dtype, kernels: Worker) -> None:
    """KL divergence is infinite where its second distribution is 0 and its first is not."""
    options: dict[str, Any] = {side: torch.float32}
    case = make_case(loss, dtype=dtype, **options)
    case.options[side][4] = -math.inf
    ours, gradient = case.run(kernels)
    second = {"forward_kl": "bias", "reverse_kl": "target_bias"}.get(loss)
    if side == second:
        assert (ours == math.inf).all()
        return
    case.options[side][4] = -1e3  # as good as infinite, and no trouble to torch
    truth, true_gradient = case.expected(torch.float64)
    torch.testing.assert_close(ours.double(), truth, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient.double(), true_gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_logprob_of_a_barred_label_is_minus_infinity(dtype: torch.dtype, kernels: Worker) -> None:
    case = make_case("logprob", dtype=dtype, bias=torch.float32)
    case.options["bias"][case.target[0]] = -math.inf
    ours, gradient = case.run(kernels)
    assert ours[0] == -math.inf
    assert ours[case.target != case.target[0]].isfinite().all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("parameters", [None, SMALL_BLOCKS], ids=["one_split", "several_splits"])
@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize(
    ("loss", "side"), [("logprob", "logits"), *((loss, side) for loss in DIVERGENCES for side in ("logits", "target"))]
)
def test_a_bad_row_reaches_only_itself(loss: str, side: str, value: float, parameters: Any, kernels: Worker) -> None:
    case, clean = make_case(loss), make_case(loss)
    getattr(case, side)[2, 30] = value
    for ours, expected in zip(*(each.run(kernels, parameters=parameters) for each in (case, clean)), strict=True):
        assert ours[2].isnan().all()
        assert torch.equal(ours[[0, 1, 3, 4]], expected[[0, 1, 3, 4]])


@pytest.mark.parametrize("loss", LOSSES)
def test_a_row_of_minus_infinity_is_nan(loss: str, kernels: Worker) -> None:
    case = make_case(loss)
    case.logits[1] = -math.inf
    ours, gradient = case.run(kernels)
    assert ours.isnan().tolist() == [False, True, False, False, False]
    assert torch.equal(gradient.isnan().all(1), ours.isnan())


# Labels


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
def test_ignored_labels(dtype: torch.dtype, kernels: Worker) -> None:
    case = make_case("logprob", bias=torch.float32, logit_softcap=3.0)
    case.target[[0, 3]] = -1
    case.target = case.target.to(dtype)
    assert_right(case, kernels)
    case.logits[[0, 3]] = math.nan
    ours, gradient = case.run(kernels, parameters=SMALL_BLOCKS)
    assert ours[[0, 3]].tolist() == [0, 0]
    assert torch.equal(gradient[[0, 3]], torch.zeros(2, 37))
    assert ours[[1, 2, 4]].isfinite().all()


@pytest.mark.parametrize("label", [-2, -100, 37, 2**40])
def test_labels_out_of_range_give_nan(label: int, kernels: Worker) -> None:
    case = make_case("logprob", bias=torch.float32)
    case.target[1] = label
    ours, gradient = case.run(kernels)
    assert ours.isnan().tolist() == [False, True, False, False, False]
    assert torch.equal(gradient.isnan().all(1), ours.isnan())


# Memory


@pytest.mark.parametrize("loss", LOSSES)
def test_gradient_may_take_the_place_of_the_logits(loss: str, kernels: Worker) -> None:
    """Several splits, of which each overwrites its part of the row while others may still read theirs."""
    case = make_case(loss, bias=torch.float32, **NUMBERS)
    expected = case.run(kernels, parameters=SMALL_BLOCKS)
    ours = case.run(kernels, parameters=SMALL_BLOCKS, grad_logits=case.logits)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(ours, expected, strict=True))


@pytest.mark.parametrize("loss", LOSSES)
def test_inputs_stay_as_they_are(loss: str, kernels: Worker) -> None:
    case = make_case(loss, bias=torch.float32)
    function, named = "divergence_rows", {"divergence": loss}
    if loss == "logprob":
        function, named = "logprob_rows", {}
    outputs = {"loss": torch.empty(5), "grad_logits": torch.empty(5, 37)}
    given = kernels.call(KERNELS + function, case.logits, case.target, bias=case.options["bias"], **named, **outputs)
    assert torch.equal(given["logits"], case.logits)
    assert torch.equal(given["labels" if loss == "logprob" else "target_logits"], case.target)
    assert torch.equal(given["bias"], case.options["bias"])


@pytest.mark.parametrize("stride", [40, 2**30], ids=["padded_rows", "beyond_2^31_numbers"])
@pytest.mark.parametrize("loss", LOSSES)
def test_rows_may_lie_apart(loss: str, stride: int, kernels: Worker) -> None:
    case = make_case(loss, rows=3)
    expected = case.run(kernels)
    logits = Apart(case.logits, stride)
    named: dict[str, Any] = {"loss": torch.empty(3), "grad_logits": Apart(torch.empty(3, 37), stride)}
    if loss == "logprob":
        given = kernels.call(KERNELS + "logprob_rows", logits, case.target, **named)
    else:
        target = Apart(case.target, stride)
        given = kernels.call(KERNELS + "divergence_rows", logits, target, divergence=loss, **named)
    assert torch.equal(given["loss"], expected[0])
    assert torch.equal(given["grad_logits"], expected[1])


@pytest.mark.parametrize("loss", LOSSES)
def test_workspace_that_is_given(loss: str, kernels: Worker) -> None:
    case = make_case(loss, vocabulary=70)
    enough = kernels.call(KERNELS + "workspace_numel", 5)["return"]
    expected = case.run(kernels, parameters=SMALL_BLOCKS)
    ours = case.run(kernels, parameters=SMALL_BLOCKS, workspace=torch.empty(enough))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(ours, expected, strict=True))
    with pytest.raises(
        ValueError, match=r"^workspace: expected at least \d+ contiguous numbers of torch.float32, got 3"
    ):
        case.run(kernels, parameters=SMALL_BLOCKS, workspace=torch.empty(3))


@pytest.mark.parametrize("loss", LOSSES)
def test_no_rows(loss: str, kernels: Worker) -> None:
    ours, gradient = make_case(loss, rows=0).run(kernels)
    assert ours.shape == (0,)
    assert gradient.shape == (0, 37)


# Parts


@pytest.mark.parametrize("function", ["exp", "expm1", "tanh"])
def test_error_of_a_function(function: str, kernels: Worker) -> None:
    """The bounds that the functions' docstrings give."""
    size = torch.cat([torch.logspace(-30, 2, 20_000), torch.linspace(0, 20, 20_000), torch.linspace(0.9, 1.1, 5_000)])
    x = torch.cat([-size, size]) if function == "tanh" else -size
    truth = getattr(torch, function)(x.double())
    ours = kernels.call("triton_probes:apply", function, x)["return"].double()
    bounds: dict[str, Any] = {"exp": 4 + 1.5 * x.double().abs(), "expm1": 4.0, "tanh": 6.0}
    assert ((ours - truth).abs() <= bounds[function] * 2.0**-24 * truth.abs() + 2.0**-126).all()


@pytest.mark.parametrize(
    ("function", "weight"),
    [("log of half", 0.5), *(("log", each) for each in (0.5, 0.25, 0.75, 1 - 2.0**-10, 2.0**-20, 1 - 2.0**-20))],
)
def test_error_of_the_logarithm_of_a_mixture(function: str, weight: float, kernels: Worker) -> None:
    x = -torch.cat([torch.logspace(-30, 2, 20_000), torch.linspace(0, 20, 20_000)])
    truth = torch.log1p(weight * torch.expm1(x.double()))
    ours = kernels.call("triton_probes:apply", function, x, weight)["return"].double()
    assert ((ours - truth).abs() <= 6 * 2.0**-24 * truth.abs() + 2.0**-126).all()


# Splits


@pytest.mark.parametrize("programs", [1, 528, 1824])
def test_splits_cover_each_block_once(programs: int, kernels: Worker) -> None:
    for rows in (1, 3, 64, 200, 527, 529, 5000):
        for blocks in (1, 2, 63, 64, 65, 126, 1000):
            splits, each = kernels.call(KERNELS + "_balanced_split", rows, blocks, programs)["return"]
            assert 1 <= splits <= 64
            assert (splits - 1) * each < blocks <= splits * each, "the last split has blocks, and none is left over"


def test_splits_fill_the_gpu_with_a_chunk_of_few_rows(kernels: Worker) -> None:
    """Of the programs that run at once, at least nine tenths have work for 50 to 250 rows on 132 multiprocessors."""
    for rows in range(50, 251, 10):
        splits, each = kernels.call(KERNELS + "_balanced_split", rows, 126, 132 * 6)["return"]
        rounds = -(-rows * splits // (132 * 6))
        assert rows * 126 > 0.75 * rounds * each * 132 * 6, (rows, splits, each)


def test_search_for_launch_parameters(kernels: Worker) -> None:
    """Each candidate is timed once, on a gradient of its own: that of the call may take the place of the logits."""
    case = make_case("jsd")
    expected = case.run(kernels)
    outputs = {"loss": torch.empty(5), "grad_logits": case.logits}
    given = kernels.call("triton_probes:divergence_with_autotune", case.logits, case.target, **outputs)
    first, second, candidates = given["return"]
    assert first == candidates > 1
    assert second == 0
    torch.testing.assert_close((given["loss"], given["grad_logits"]), expected)


# Bad arguments


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"logits": torch.zeros(5, 7).half()},
            r"logits: expected float32 or float64 of shape \(C, V\), got torch.float16",
        ),
        ({"logits": torch.zeros(35)}, r"logits: expected .* of shape \(C, V\), got torch.float32 of shape \(35,\)"),
        ({"logits": torch.zeros(7, 5).T}, r"logits: expected contiguous rows of .*strides \(1, 5\)"),
        ({"target_logits": torch.zeros(5, 7).double()}, "target_logits: expected .*torch.float32.* got torch.float64"),
        ({"target_logits": torch.zeros(4, 7)}, r"target_logits: expected .*shape \(5, 7\).* got .*shape \(4, 7\)"),
        ({"bias": torch.zeros(6)}, r"bias: expected .*shape \(7,\).* got .*shape \(6,\)"),
        ({"target_bias": torch.zeros(7, device="meta")}, "target_bias: expected .* on cpu, got .* on meta"),
        ({"loss": torch.zeros(4)}, r"loss: expected .*shape \(5,\).* got .*shape \(4,\)"),
        ({"loss": torch.zeros(5).half()}, "loss: expected .*torch.float32.* got torch.float16"),
        ({"grad_logits": torch.zeros(5, 6)}, r"grad_logits: expected .*shape \(5, 7\).* got .*shape \(5, 6\)"),
        ({"divergence": "kl"}, "divergence: expected jsd, forward_kl or reverse_kl, got 'kl'"),
    ],
    ids=lambda change: "-".join(change) if isinstance(change, dict) else "",
)
def test_bad_arguments_of_a_divergence(change: dict[str, Any], message: str, kernels: Worker) -> None:
    good = {
        "logits": torch.zeros(5, 7),
        "target_logits": torch.zeros(5, 7),
        "divergence": "jsd",
        "loss": torch.zeros(5),
    }
    with pytest.raises(ValueError, match=f"^{message}"):
        kernels.call(KERNELS + "divergence_rows", **{**good, **change})


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.zeros(5), "expected int32 or int64, got torch.float32"),
        (torch.zeros(4, dtype=torch.int64), r"expected .*shape \(5,\).* got .*shape \(4,\)"),
        (torch.zeros(10, dtype=torch.int64)[::2], r"expected contiguous .*strides \(2,\)"),
        (torch.zeros(5, dtype=torch.int64, device="meta"), "expected .* on cpu, got .* on meta"),
    ],
    ids=["not_whole_numbers", "too_few", "not_contiguous", "other_device"],
)
def test_bad_labels(labels: Tensor, message: str, kernels: Worker) -> None:
    with pytest.raises(ValueError, match=f"^labels: {message}"):
        kernels.call(KERNELS + "logprob_rows", torch.zeros(5, 7), labels, loss=torch.zeros(5))
