"""The stand-ins for trl's generalised knowledge distillation against trl itself, the loss alone and in training."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from head_cases import assert_as_right_as_torch, leaf
from tiny_models import CONFIGS, SIZES, tiny_model, tiny_tokenizer
from torch import Tensor
from transformers.models.cohere import CohereConfig
from transformers.models.granite import GraniteConfig

pytest.importorskip("trl", reason="needs trl: pip install trl")

from trl.experimental import gkd

from cdas_fast.dropin.transformers import HeadArguments
from cdas_fast.dropin.trl import GKDTrainer, generalized_jsd_loss
from cdas_fast.errors import InvalidInputError

BETAS = [0.0, 0.2, 0.5, 1.0]
VOCABULARY = 37
HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"logit_softcap": 2.0},
    "scale": {"logit_scale": 0.3},
    "all": {"bias": True, "logit_softcap": 2.0, "logit_scale": 0.3, "teacher_scale": 0.8},
}
REDUCTIONS: dict[str, dict[str, Any]] = {
    "batchmean": {},
    "sum": {"reduction": "sum"},
    "mean": {"reduction": "mean"},
    "items": {"num_items_in_batch": 11},
    "items_tensor": {"num_items_in_batch": torch.tensor(11)},
}


def make_head(width: int, seed: int, scale: float, bias: bool = False, softcap: float | None = None) -> HeadArguments:
    generator = torch.Generator().manual_seed(seed)
    weight, shift = torch.randn(VOCABULARY, width, generator=generator), torch.randn(VOCABULARY, generator=generator)
    return HeadArguments(weight=weight, bias=shift if bias else None, logit_softcap=softcap, logit_scale=scale)


def make_case(teacher_scale: float | None = None, **head: Any) -> tuple[Tensor, Tensor, HeadArguments, HeadArguments]:
    """Student (3, 5, 13) and teacher (3, 5, 11), with their heads."""
    generator = torch.Generator().manual_seed(0)
    scale, softcap = head.pop("logit_scale", 1.0), head.pop("logit_softcap", None)
    student = leaf(torch.randn(3, 5, 13, generator=generator))
    teacher = torch.randn(3, 5, 11, generator=generator)
    heads = [
        make_head(width, seed, each, softcap=softcap, **head)
        for seed, (width, each) in enumerate(((13, scale), (11, teacher_scale or scale)))
    ]
    return student, teacher, heads[0], heads[1]


def labels() -> Tensor:
    ids = torch.randint(VOCABULARY, (3, 5), generator=torch.Generator().manual_seed(1))
    ids[0, :3] = ids[1] = -100
    return ids


def through_logits(
    function: Callable[..., Tensor], dtype: torch.dtype, student: Tensor, teacher: Tensor, *heads: HeadArguments
) -> Callable[..., Tensor]:
    """`function` of the logits of those hidden states."""
    both = []
    for hidden, head in zip((student, teacher), heads, strict=True):
        logits = hidden.to(dtype) @ head["weight"].to(dtype).T
        if head["bias"] is not None:
            logits = logits + head["bias"].to(dtype)
        logits = logits * head["logit_scale"]
        if head["logit_softcap"] is not None:
            logits = head["logit_softcap"] * torch.tanh(logits / head["logit_softcap"])
        both.append(logits)
    return lambda **options: function(both[0], both[1], **options)


def true_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    num_items_in_batch: Any = None,
) -> Tensor:
    """The formula, in the dtype of the logits."""
    p, q = ((each / temperature).softmax(-1) for each in (student_logits, teacher_logits))
    if beta == 0:
        rows = (q * (q / p).log()).sum(-1)
    elif beta == 1:
        rows = (p * (p / q).log()).sum(-1)
    else:
        m = beta * q + (1 - beta) * p
        rows = (beta * q * (q / m).log() + (1 - beta) * p * (p / m).log()).sum(-1)
    counted = torch.ones_like(rows, dtype=torch.bool) if labels is None else labels != -100
    if num_items_in_batch is not None:
        divisor = int(num_items_in_batch)
    else:
        count = int(counted.sum())
        per_batch = len(rows) if labels is None else count
        divisor = {"batchmean": per_batch, "sum": 1, "mean": count * VOCABULARY}[reduction]
    return rows[counted].sum() / divisor


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("labelled", [True, False], ids=["labels", "no_labels"])
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("head", HEADS)
def test_loss_and_gradient_are_trls(head: str, beta: float, labelled: bool, reduction: str) -> None:
    case = make_case(**HEADS[head])
    options = {"beta": beta, "temperature": 1.7, "labels": labels() if labelled else None, **REDUCTIONS[reduction]}
    exact = leaf(case[0].double())
    true = through_logits(true_loss, torch.float64, exact, *case[1:])
    truth = true(**options)
    theirs = through_logits(gkd.GKDTrainer.generalized_jsd_loss, torch.float32, *case)(**options)
    ours = generalized_jsd_loss(*case, **options)
    # The maths of a row is on the scale of differences of logarithms; 15 rows at most are summed and divided.
    scale = 4 * float(truth / true(**{**options, "num_items_in_batch": 1}))
    torch.testing.assert_close(theirs.double(), truth, rtol=1e-5, atol=0)
    assert_as_right_as_torch("loss", ours.detach(), theirs.detach(), truth.detach(), 15 * scale)
    (gradient,), (their_gradient,) = (torch.autograd.grad(3 * loss, case[0]) for loss in (ours, theirs))
    (true_gradient,) = torch.autograd.grad(3 * truth, exact)
    largest = float(true_gradient.abs().max())
    torch.testing.assert_close(their_gradient.double(), true_gradient, rtol=1e-4, atol=1e-5 * largest)
    scale *= 3 * float(case[2]["weight"].abs().max())
    assert_as_right_as_torch("gradient", gradient, their_gradient, true_gradient, scale)


def test_no_row_may_count() -> None:
    case = make_case()
    nothing = torch.full((3, 5), -100)
    loss = generalized_jsd_loss(*case, labels=nothing)
    assert loss == through_logits(gkd.GKDTrainer.generalized_jsd_loss, torch.float32, *case)(labels=nothing) == 0
    assert not torch.autograd.grad(loss, case[0])[0].any()


def test_a_number_for_each_logit_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="reduction: expected batchmean, sum or mean, got 'none'"):
        generalized_jsd_loss(*make_case(), reduction="none")


# The trainer

EXTRA: dict[str, Any] = {
    "cohere": lambda: CohereConfig(**SIZES, logit_scale=0.25),
    "granite": lambda: GraniteConfig(**SIZES, logits_scaling=3.0),
}
ROWS = [
    {
        "messages": [
            {"role": "user", "content": f"Say {i} twice"},
            {"role": "assistant", "content": f"{i}, {i}." * (1 + i % 3)},
        ]
    }
    for i in range(8)
]


@pytest.fixture(autouse=True)
def more_models(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, config in EXTRA.items():
        monkeypatch.setitem(CONFIGS, name, config)


def make_trainer(kind: type, folder: Path, name: str = "llama", frozen: bool = True, **options: Any) -> Any:
    from datasets import Dataset

    student, teacher = tiny_model(name, seed=1), tiny_model(name, seed=2, hidden_size=48)
    student.get_output_embeddings().requires_grad_(not frozen)
    given: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "lmbda": 0.0,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "save_strategy": "no",
        "disable_tqdm": True,
        "max_length": 64,
    }
    return kind(
        model=student,
        teacher_model=teacher,
        args=gkd.GKDConfig(**{**given, **options}),
        train_dataset=Dataset.from_list(ROWS),
        eval_dataset=Dataset.from_list(ROWS[:3]),
        processing_class=tiny_tokenizer(),
    )


def train(kind: type, folder: Path, name: str, **options: Any) -> tuple[list[float], dict[str, Tensor]]:
    """The losses of two steps, and the weights of the student after them."""
    trainer = make_trainer(kind, folder, name, **options)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2
    return losses, {key: each.detach() for key, each in trainer.model.named_parameters()}


@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere", "granite"])
def test_training_is_trls(name: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"beta": {"gemma2": 0.0, "cohere": 1.0}.get(name, 0.3)}
    theirs, their_weights = train(gkd.GKDTrainer, tmp_path, name, **options)
    ours, our_weights = train(GKDTrainer, tmp_path, name, **options)
    assert theirs[0] > 1e-3
    assert theirs[0] != theirs[1]
    assert ours == pytest.approx(theirs, rel=1e-4)
    start = dict(tiny_model(name, seed=1).named_parameters())
    moved = [key for key, weight in their_weights.items() if not torch.equal(weight, start[key])]
    assert len(moved) > 10
    for key, weight in their_weights.items():
        step = (weight - start[key]).norm()
        assert (our_weights[key] - weight).norm() <= 1e-2 * step + 1e-12, key


def test_training_in_mixed_precision_is_trls_to_that_precision(tmp_path: Path) -> None:
    theirs, _ = train(gkd.GKDTrainer, tmp_path, "gemma2", bf16=True)
    ours, _ = train(GKDTrainer, tmp_path, "gemma2", bf16=True)
    assert ours == pytest.approx(theirs, rel=1e-2)


def test_on_policy_training_is_trls(tmp_path: Path) -> None:
    options: dict[str, Any] = {"lmbda": 1.0, "max_new_tokens": 6, "temperature": 0.9}
    results = []
    for kind in (gkd.GKDTrainer, GKDTrainer):
        torch.manual_seed(5)
        results.append(train(kind, tmp_path, "llama", **options)[0])
    assert results[1] == pytest.approx(results[0], rel=1e-4)


def test_evaluation_is_trls_with_and_without_outputs(tmp_path: Path) -> None:
    results = []
    for kind in (gkd.GKDTrainer, GKDTrainer):
        trainer = make_trainer(kind, tmp_path, "gemma2")
        trainer.args.prediction_loss_only = True
        loss_alone = trainer.evaluate()["eval_loss"]
        trainer.args.prediction_loss_only = False
        trainer.compute_metrics = lambda prediction: {"shape": prediction.predictions.shape[-1]}
        both = trainer.evaluate()
        assert both["eval_shape"] == 320
        results.append([loss_alone, both["eval_loss"]])
    assert math.isfinite(results[0][0])
    assert results[0][0] == pytest.approx(results[0][1], rel=1e-5)
    assert results[1] == pytest.approx(results[0], rel=1e-4)


def test_training_makes_no_logits(tmp_path: Path) -> None:
    trainer = make_trainer(GKDTrainer, tmp_path)
    seen: list[int] = []
    for model in (trainer.model, trainer.teacher_model):
        model.get_output_embeddings().register_forward_hook(lambda module, args, out: seen.append(out.numel()))
    trainer.train()
    inspected = [each for each in seen if each]
    assert inspected == [4 * 320] * 2
    assert len(seen) == 2 + 2 * 4


def test_a_head_that_is_trained_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"weight of the output head.*Freeze it"):
        make_trainer(GKDTrainer, tmp_path, frozen=False).train()
