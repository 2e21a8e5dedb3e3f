"""The stand-ins for liger_kernel against liger_kernel itself, and both against the formula in float64."""

from __future__ import annotations

import importlib.util
import inspect
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from head_cases import assert_as_right_as_torch, leaf
from torch import Tensor, nn

from cdas_fast import linear_jsd
from cdas_fast.dropin.liger import FusedLinearJSD, FusedLinearJSDLoss, fused_linear_jsd
from cdas_fast.errors import InvalidInputError

BETAS = [0.0, 0.1, 0.5, 0.9, 1.0]

needs_liger = pytest.mark.skipif(
    importlib.util.find_spec("liger_kernel") is None or importlib.util.find_spec("triton") is None,
    reason="needs liger_kernel and triton: pip install liger-kernel",
)


@dataclass
class Case:
    """Student and teacher of different width; about a third of the rows is ignored."""

    student: Tensor  # (N, D), a leaf that requires a gradient
    student_weight: Tensor
    teacher: Tensor
    teacher_weight: Tensor
    labels: Tensor
    student_bias: Tensor | None = None
    teacher_bias: Tensor | None = None

    def tensors(self) -> list[Any]:
        """In the order of Liger's arguments."""
        heads = [self.student, self.student_weight, self.teacher, self.teacher_weight, self.labels]
        return heads + ([] if self.student_bias is None else [self.student_bias, self.teacher_bias])

    def in_float64(self) -> Case:
        changed = {name: each.double() for name, each in vars(self).items() if each is not None and name != "labels"}
        changed["student"] = leaf(changed["student"])
        return replace(self, **changed)


def make_case(dtype: torch.dtype = torch.float32, rows: int = 23, bias: bool = False, lacking: int = 0) -> Case:
    """`lacking` is how many entries of the teacher's vocabulary the student does not have."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    labels = torch.randint(37, (rows,), generator=generator)
    labels[torch.rand(rows, generator=generator) < 1 / 3] = -100
    return Case(
        leaf(randn(rows, 13)),
        randn(37, 13) / 2,
        randn(rows, 11),
        randn(37 + lacking, 11) / 2,
        labels,
        randn(37) if bias else None,
        randn(37 + lacking) if bias else None,
    )


def truth(
    case: Case,
    beta: float,
    temperature: float = 1.0,
    ignore_index: int = -100,
    weight_hard_loss: float = 0.0,
    weight_soft_loss: float = 1.0,
) -> Tensor:
    """What Liger says that it computes, for a case in float64."""
    counted = case.labels != ignore_index
    logits, target_logits = (
        (case.student @ case.student_weight.T)[counted],
        (case.teacher @ case.teacher_weight.T)[counted],
    )
    if case.student_bias is not None and case.teacher_bias is not None:
        logits, target_logits = logits + case.student_bias, target_logits + case.teacher_bias
    hard = -logits.log_softmax(-1).gather(1, case.labels[counted][:, None]).sum()
    lacking = target_logits.shape[1] - logits.shape[1]
    logits = torch.cat([logits / temperature, logits.new_zeros(logits.shape[0], lacking)], -1)
    log_q, log_p = logits.log_softmax(-1), (target_logits / temperature).log_softmax(-1)  # Liger's P is the teacher
    p, q = log_p.exp(), log_q.exp()
    if beta == 0:
        soft = (p * (log_p - log_q)).sum()
    elif beta == 1:
        soft = (q * (log_q - log_p)).sum()
    else:
        log_m = (beta * p + (1 - beta) * q).log()
        soft = (beta * p * (log_p - log_m) + (1 - beta) * q * (log_q - log_m)).sum()
    return (weight_hard_loss * hard + weight_soft_loss * soft) / counted.sum()


def loss_and_gradient(function: Callable[..., Tensor], case: Case) -> tuple[Tensor, Tensor]:
    """Under an upstream gradient that is not 1."""
    loss = function(*case.tensors())
    (gradient,) = torch.autograd.grad(3 * loss, case.student)
    return loss.detach(), gradient


def assert_right(case: Case, ours: Callable[..., Tensor], liger: tuple[Tensor, Tensor], **options: Any) -> None:
    """Ours errs at most twice as much as Liger, which errs little enough to mean the same thing."""
    exact = case.in_float64()
    true_loss = truth(exact, **options)
    true = true_loss, *torch.autograd.grad(3 * true_loss, exact.student)
    close = {torch.float32: 1e-5, torch.bfloat16: 0.1}[case.student.dtype]
    for what, got, its, wanted in zip(("loss", "gradient"), loss_and_gradient(ours, case), liger, true, strict=True):
        wanted = wanted.detach()
        torch.testing.assert_close(its.double(), wanted, rtol=close, atol=close * wanted.abs().max().item())
        assert_as_right_as_torch(what, got, its, wanted, scale=4)


# LigerFusedLinearJSD, a Triton kernel, which a CPU runs in Triton's interpreter: in a process of its own

TRITON = """
import sys, torch
from liger_kernel.transformers import LigerFusedLinearJSD
from liger_kernel.transformers.functional import liger_fused_linear_jsd
results = []
for options, tensors in torch.load(sys.argv[1]):
    student = tensors[0].requires_grad_()
    loss = LigerFusedLinearJSD(**options)(student, *tensors[1:])
    torch.testing.assert_close(liger_fused_linear_jsd(student, *tensors[1:], **options), loss)
    results.append((loss.detach(), *torch.autograd.grad(3 * loss, student)))
torch.save(results, sys.argv[2])
"""
TRITON_CASES: dict[str, tuple[dict[str, Any], torch.dtype]] = {
    f"beta{beta}-T{temperature}-{dtype}": ({"jsd_beta": beta, "temperature": temperature}, dtype)
    for beta in BETAS
    for temperature, dtype in ((1.0, torch.float32), (1.7, torch.float32), (1.7, torch.bfloat16))
} | {"ignore_index": ({"ignore_index": 5}, torch.float32)}


def triton_case(options: dict[str, Any], dtype: torch.dtype) -> Case:
    case = make_case(dtype)
    if "ignore_index" in options:
        case.labels = torch.arange(23) % 7
    return case


@pytest.fixture(scope="module")
def triton_results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Tensor, Tensor]]:
    folder = tmp_path_factory.mktemp("liger")
    cases = [(options, triton_case(options, dtype)) for options, dtype in TRITON_CASES.values()]
    torch.save([(options, [each.detach() for each in case.tensors()]) for options, case in cases], folder / "cases")
    done = subprocess.run(
        [sys.executable, "-c", TRITON, str(folder / "cases"), str(folder / "results")],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(TRITON_CASES, torch.load(folder / "results"), strict=True))


@needs_liger
@pytest.mark.parametrize("name", TRITON_CASES)
def test_fused_linear_jsd_is_ligers(name: str, triton_results: dict[str, tuple[Tensor, Tensor]]) -> None:
    options, dtype = TRITON_CASES[name]
    case = triton_case(options, dtype)
    known = {"beta": options.get("jsd_beta", 0.5)} | {key: options[key] for key in options if key != "jsd_beta"}
    assert_right(case, FusedLinearJSD(**options), triton_results[name], **known)
    loss = FusedLinearJSD(**options)(*case.tensors())
    assert torch.equal(fused_linear_jsd(*case.tensors(), **options), loss)
    assert loss.dtype == triton_results[name][0].dtype


# LigerFusedLinearJSDLoss, which is plain torch

OPTIONS: dict[str, dict[str, Any]] = {
    "soft_alone": {"weight_hard_loss": 0.0, "weight_soft_loss": 0.6},
    "hard_alone": {"weight_hard_loss": 0.6, "weight_soft_loss": 0.0},
    "defaults": {},
    "weights_and_temperature": {"weight_hard_loss": 0.7, "weight_soft_loss": 1.9, "temperature": 2.3},
    "bias": {"temperature": 0.8},
    "teacher_of_more_entries": {"temperature": 1.7},
    "teacher_of_more_entries_and_bias": {"weight_hard_loss": 0.2},
    "ignore_index": {"ignore_index": 5, "weight_hard_loss": 0.3},
}


def loss_case(options: str, dtype: torch.dtype) -> Case:
    case = make_case(dtype, bias="bias" in options, lacking=6 if "more_entries" in options else 0)
    if options == "ignore_index":
        case.labels = torch.arange(23) % 7
    return case


@needs_liger
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("options", OPTIONS)
def test_fused_linear_jsd_loss_is_ligers(options: str, beta: float, dtype: torch.dtype) -> None:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    case, given = loss_case(options, dtype), OPTIONS[options]
    theirs = LigerFusedLinearJSDLoss(beta=beta, compiled=False, chunk_size=8, **given)
    ours = FusedLinearJSDLoss(beta=beta, compiled=False, chunk_size=8, **given)
    known = {"weight_hard_loss": 0.5, "weight_soft_loss": 0.5, **given}
    assert_right(case, ours, loss_and_gradient(theirs, case), beta=beta, **known)


@needs_liger
@pytest.mark.parametrize("weight_hard_loss", [0.0, 0.4])
def test_both_losses_are_returned_where_they_are_asked_for(weight_hard_loss: float) -> None:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    case = make_case(bias=True)
    options: dict[str, Any] = {"weight_hard_loss": weight_hard_loss, "temperature": 1.7, "return_soft_hard_loss": True}
    theirs = LigerFusedLinearJSDLoss(**options, compiled=False)(*case.tensors())
    ours = FusedLinearJSDLoss(**options)(*case.tensors())
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    assert [each.requires_grad for each in ours] == [True, False, False]
    gradients = [torch.autograd.grad(each[0], case.student)[0] for each in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)


@needs_liger
def test_arguments_are_ligers() -> None:
    """Names, order and defaults; ours may have more, by keyword alone."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
    from liger_kernel.transformers import LigerFusedLinearJSD
    from liger_kernel.transformers.functional import liger_fused_linear_jsd

    pairs: list[tuple[Any, Any]] = [
        (FusedLinearJSD.__init__, LigerFusedLinearJSD.__init__),
        (FusedLinearJSD.forward, LigerFusedLinearJSD.forward),
        (FusedLinearJSDLoss.__init__, LigerFusedLinearJSDLoss.__init__),
        (FusedLinearJSDLoss.forward, LigerFusedLinearJSDLoss.forward),
        (fused_linear_jsd, liger_fused_linear_jsd),
    ]
    for ours, theirs in pairs:
        mine = list(inspect.signature(ours).parameters.values())
        own = [each for each in mine if each.kind is each.KEYWORD_ONLY]
        assert {each.name for each in own} <= {"impl", "chunk_bytes"}
        wanted = list(inspect.signature(theirs).parameters.values())
        assert [each.name for each in mine if each not in own] == [each.name for each in wanted]
        for mine_is, wanted_is in zip(mine, wanted, strict=False):
            assert wanted_is.default in (mine_is.default, inspect.Parameter.empty), mine_is.name


# Contracts


def losses(case: Case) -> list[Tensor]:
    single: Tensor = FusedLinearJSD()(*case.tensors()[:5])
    both: Tensor = FusedLinearJSDLoss()(*case.tensors())
    return [single, both]


def test_ignored_rows_may_hold_anything_and_all_may_be_ignored() -> None:
    case = make_case()
    wanted = losses(case)
    gradients = [torch.autograd.grad(loss, case.student)[0] for loss in wanted]
    spoilt = replace(case, student=leaf(case.student), teacher=case.teacher.clone())
    with torch.no_grad():
        spoilt.student[case.labels == -100] = float("nan")
        spoilt.teacher[case.labels == -100] = float("nan")
    for loss, expected, gradient in zip(losses(spoilt), wanted, gradients, strict=True):
        assert torch.equal(loss, expected)
        (got,) = torch.autograd.grad(loss, spoilt.student)
        assert torch.equal(got, gradient)
        assert not got[case.labels == -100].any()
    for loss in losses(replace(case, labels=torch.full_like(case.labels, -100))):
        assert loss == 0
        assert not torch.autograd.grad(loss, case.student)[0].any()


def test_without_labels_every_row_counts() -> None:
    case = make_case()
    everything = replace(case, labels=case.labels.clamp(min=0))
    head = case.tensors()[:4]
    for loss in (FusedLinearJSD()(*head), FusedLinearJSD()(*head, None), fused_linear_jsd(*head)):
        assert torch.equal(loss, FusedLinearJSD()(*everything.tensors()))


@pytest.mark.parametrize("name", ["student_weight", "student_bias"])
def test_a_head_that_is_trained_is_refused(name: str) -> None:
    case = make_case(bias=True)
    trained = replace(case, **{name: nn.Parameter(vars(case)[name])})
    with pytest.raises(InvalidInputError, match=rf"^{name}: expected a frozen tensor.*{name}\.detach\(\)"):
        FusedLinearJSDLoss()(*trained.tensors())
    with torch.no_grad():
        assert torch.equal(FusedLinearJSDLoss()(*trained.tensors()), FusedLinearJSDLoss()(*case.tensors()))
    if name == "student_weight":
        with pytest.raises(InvalidInputError, match="student_weight"):
            FusedLinearJSD()(*trained.tensors()[:5])


def test_the_teacher_gets_no_gradient_as_in_liger() -> None:
    case = make_case(bias=True)
    for name in ("teacher", "teacher_weight", "teacher_bias"):
        setattr(case, name, nn.Parameter(vars(case)[name]))
    for loss in losses(case):
        loss.backward()
    assert case.student.grad is not None
    assert all(vars(case)[name].grad is None for name in ("teacher", "teacher_weight", "teacher_bias"))


def test_what_does_not_fit_is_refused() -> None:
    case = make_case()
    fewer = replace(case, teacher_weight=case.teacher_weight[:-1])
    with pytest.raises(InvalidInputError, match="teacher_weight: expected 37 vocabulary entries"):
        FusedLinearJSD()(*fewer.tensors())
    with pytest.raises(InvalidInputError, match="target_weight"):
        FusedLinearJSDLoss()(*fewer.tensors())
    with pytest.raises(InvalidInputError, match=r"teacher_weight: expected 37 vocabulary entries, .* got 43"):
        FusedLinearJSD()(*make_case(lacking=6).tensors())
    for labels in (case.labels[:-1], case.labels[None]):
        with pytest.raises(InvalidInputError, match="labels"):
            FusedLinearJSD()(*replace(case, labels=labels).tensors())
    with pytest.raises(InvalidInputError, match="beta"):
        FusedLinearJSD(jsd_beta=1.5)(*case.tensors())
    with pytest.raises(InvalidInputError, match="temperature"):
        FusedLinearJSD(temperature=0.0)(*case.tensors())


def test_the_implementation_can_be_named() -> None:
    case = make_case()
    for module in (
        FusedLinearJSD(impl="reference", chunk_bytes=1),
        FusedLinearJSDLoss(impl="reference", chunk_bytes=1),
    ):
        plain = type(module)()
        torch.testing.assert_close(module(*case.tensors()), plain(*case.tensors()))
    with pytest.raises(InvalidInputError, match="impl"):
        FusedLinearJSD(impl="nothing")(*case.tensors())  # type: ignore[arg-type]


def test_the_rows_that_are_ignored_are_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Size] = []

    def noted(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append(hidden.shape)
        return linear_jsd(hidden, *args, **kwargs)

    monkeypatch.setattr("cdas_fast.dropin.transformers.linear_jsd", noted)
    case = make_case()
    losses(case)
    assert seen == [torch.Size([int((case.labels != -100).sum()), 13])] * 2
