"""Losses from final hidden states and heads against those of the same models' logits, and what is refused."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from head_cases import Operations
from tiny_models import CONFIGS, SIZES, tiny_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaForCausalLM
from transformers.models.cohere import CohereConfig
from transformers.models.gpt2 import GPT2Config
from transformers.models.granite import GraniteConfig
from transformers.models.phi import PhiConfig

from cdas_fast import linear_cross_entropy, linear_jsd
from cdas_fast.dropin.transformers import HeadArguments, counted_rows, divergence, hidden_and_head
from cdas_fast.errors import InvalidInputError, UnsupportedError

ROOT = Path(__file__).resolve().parents[1]
BETAS = [0.0, 0.3, 0.5, 1.0]
EXTRA: dict[str, Any] = {
    "gpt2": lambda: GPT2Config(
        vocab_size=320, n_embd=32, n_layer=2, n_head=4, n_positions=128, bos_token_id=1, eos_token_id=2
    ),
    "phi": lambda: PhiConfig(**SIZES),  # its head has a bias
    "cohere": lambda: CohereConfig(**SIZES, logit_scale=0.25),
    "granite": lambda: GraniteConfig(**SIZES, logits_scaling=3.0),
}
NAMES = [*CONFIGS, *EXTRA]


@pytest.fixture(autouse=True)
def more_models(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, config in EXTRA.items():
        monkeypatch.setitem(CONFIGS, name, config)


def student_and_teacher(name: str, **teacher: Any) -> tuple[Any, Any]:
    """In float64, the teacher wider. The head of the student is frozen, biases are not 0."""
    teacher["n_embd" if name == "gpt2" else "hidden_size"] = 48
    models = tiny_model(name, seed=1), tiny_model(name, seed=2, **teacher)
    for model in models:
        model.double()
        head = model.get_output_embeddings()
        if head.bias is not None:
            nn.init.normal_(head.bias)
    models[0].get_output_embeddings().requires_grad_(False)
    return models


def batch() -> dict[str, Tensor]:
    """Two rows of 12 tokens, the second padded on the right."""
    ids = torch.randint(3, 300, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def labels_of(inputs: dict[str, Tensor]) -> Tensor:
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels[:, :5] = -100
    return labels[:, 1:]


def gradients(loss: Tensor, model: nn.Module) -> dict[str, Tensor | None]:
    trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
    return dict(zip(trained, torch.autograd.grad(loss, list(trained.values()), allow_unused=True), strict=True))


def assert_same(ours: Tensor, truth: Tensor, model: nn.Module) -> None:
    """Value and gradient of every parameter, in float64."""
    torch.testing.assert_close(ours, truth, rtol=1e-9, atol=1e-12)
    got, wanted = gradients(ours, model), gradients(truth, model)
    assert sum(each is not None and bool(each.any()) for each in wanted.values()) > 5
    for name, gradient in wanted.items():
        if gradient is None:
            assert got[name] is None, name
        else:
            torch.testing.assert_close({name: got[name]}, {name: gradient}, rtol=1e-7, atol=1e-11)


def true_divergence(logits: Tensor, target_logits: Tensor, beta: float, temperature: float = 1.0) -> Tensor:
    p, q = (logits / temperature).softmax(-1), (target_logits / temperature).softmax(-1)
    if beta == 0:
        return (q * (q / p).log()).sum(-1)
    if beta == 1:
        return (p * (p / q).log()).sum(-1)
    m = (1 - beta) * p + beta * q
    return ((1 - beta) * p * (p / m).log() + beta * q * (q / m).log()).sum(-1)


# The same as through the logits


@pytest.mark.parametrize("name", NAMES)
def test_hidden_states_and_head_give_the_logits_of_the_model(name: str) -> None:
    model, _ = student_and_teacher(name)
    inputs = batch()
    hidden, head = hidden_and_head(model, **inputs)
    logits = F.linear(hidden, head["weight"], head["bias"]) * head["logit_scale"]
    if head["logit_softcap"] is not None:
        logits = head["logit_softcap"] * torch.tanh(logits / head["logit_softcap"])
    torch.testing.assert_close(logits, model(**inputs).logits, rtol=1e-12, atol=1e-12)
    assert hidden.shape == (2, 12, 32)
    assert (head["logit_softcap"] is not None) == (name == "gemma2")
    assert head["logit_scale"] == pytest.approx({"cohere": 1 / 4, "granite": 1 / 3}.get(name, 1.0))


@pytest.mark.parametrize("name", NAMES)
def test_cross_entropy_is_that_of_the_logits(name: str) -> None:
    model, _ = student_and_teacher(name)
    inputs = batch()
    labels = labels_of(inputs)
    hidden, head = hidden_and_head(model, **inputs)
    ours = linear_cross_entropy(hidden[:, :-1], labels, **head)
    truth = F.cross_entropy(model(**inputs).logits[:, :-1].flatten(0, 1), labels.flatten())
    assert_same(ours, truth, model)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("name", ["llama", "gemma2", "phi", "cohere", "granite"])
def test_divergence_from_a_teacher_is_that_of_the_logits(name: str, beta: float) -> None:
    student, teacher = student_and_teacher(name)
    inputs = batch()
    counted = labels_of(inputs) != -100
    hidden, head = hidden_and_head(student, **inputs)
    with torch.no_grad():
        target_hidden, target_head = hidden_and_head(teacher, **inputs)
        target_logits = teacher(**inputs).logits
    assert target_hidden.shape[-1] == 48
    ours = divergence(
        hidden[:, :-1][counted], target_hidden[:, :-1][counted], head, target_head, beta=beta, temperature=1.7
    )
    truth = true_divergence(student(**inputs).logits, target_logits, beta, temperature=1.7)[:, :-1][counted].mean()
    assert truth > 1e-3
    assert_same(ours, truth, student)


@pytest.mark.parametrize("beta", BETAS)
def test_a_teacher_may_have_another_logit_scale(beta: float) -> None:
    """As the sizes of Granite have; the bias is scaled too."""
    student, teacher = student_and_teacher("granite", logits_scaling=0.7)
    inputs = batch()
    with torch.no_grad():
        target_hidden, target_head = hidden_and_head(teacher, **inputs)
        target_logits = teacher(**inputs).logits
    for bias in (torch.zeros(320, dtype=torch.float64), torch.randn(320, dtype=torch.float64)):
        target_head["bias"] = bias
        hidden, head = hidden_and_head(student, **inputs)
        truth = true_divergence(student(**inputs).logits, target_logits + bias / 0.7, beta).mean()
        assert_same(divergence(hidden, target_hidden, head, target_head, beta=beta), truth, student)


@pytest.mark.parametrize("beta", BETAS)
def test_a_shared_head_need_not_be_given_twice(beta: float) -> None:
    """As in steering, where one model is compared with itself."""
    model, _ = student_and_teacher("phi")
    inputs = batch()
    with torch.no_grad():
        target_hidden, head = hidden_and_head(model, **inputs)
    hidden = (target_hidden + 0.3 * torch.randn_like(target_hidden)).requires_grad_()
    once = divergence(hidden, target_hidden, head, beta=beta, reduction="none")
    torch.testing.assert_close(once, divergence(hidden, target_hidden, head, head, beta=beta, reduction="none"))
    assert once.shape == (2, 12)
    if beta == 0.5:
        torch.testing.assert_close(once, linear_jsd(hidden, target_hidden, **head, reduction="none"))
    weights = torch.rand(2, 12)
    weighted = divergence(hidden, target_hidden, head, beta=beta, row_weights=weights)
    torch.testing.assert_close(weighted, (once * weights).sum() / weights.sum())


def test_a_target_of_16_bits_keeps_a_scale_that_differs() -> None:
    """Its hidden states are scaled in float32."""
    hidden, target_hidden = torch.randn(5, 8), torch.randn(5, 8).bfloat16()
    head = HeadArguments(weight=torch.randn(30, 8), bias=None, logit_softcap=None, logit_scale=1.0)
    target_head = HeadArguments(weight=torch.randn(30, 8), bias=None, logit_softcap=None, logit_scale=1 / 3)
    truth = true_divergence(
        hidden.double() @ head["weight"].double().T, target_hidden.double() @ target_head["weight"].double().T / 3, 0.0
    )
    torch.testing.assert_close(
        divergence(hidden, target_hidden, head, target_head, beta=0.0), truth.mean().float(), rtol=1e-5, atol=0
    )


# The forward pass is the model's own, and makes no logits


def test_no_logits_are_made() -> None:
    """B x T x V float32 are 4 MiB here; nothing that torch allocates comes near."""
    model = tiny_model(vocab_size=4096).requires_grad_(False)
    ids = torch.randint(3, 300, (4, 64))
    edit = torch.zeros(32, requires_grad=True)
    model.model.layers[1].register_forward_hook(lambda module, args, output: output + edit)
    hidden_and_head(model, input_ids=ids[:, :4])
    with Operations() as plain:
        F.cross_entropy(model(input_ids=ids).logits.flatten(0, 1), ids.flatten()).backward()
    assert plain.largest >= 4 * 64 * 4096 * 4
    with Operations() as ours:
        hidden, head = hidden_and_head(model, input_ids=ids)
        linear_cross_entropy(hidden, ids, **head, chunk_bytes=2**16).backward()
    assert ours.largest <= plain.largest / 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_adapters_hooks_and_autocast_stay_in_force(dtype: torch.dtype) -> None:
    model = tiny_model("gemma2").requires_grad_(False)
    edit = torch.randn(32, requires_grad=True)
    model.model.layers[1].register_forward_hook(lambda module, args, output: output + edit)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        hidden, head = hidden_and_head(model, **batch())
        wanted = model.model(**batch()).last_hidden_state
    torch.testing.assert_close(hidden, wanted, rtol=0, atol=0)
    linear_cross_entropy(hidden, batch()["input_ids"], **head).backward()
    assert edit.grad is not None
    assert edit.grad.any()


def test_the_mixed_precision_of_accelerate_stays_in_force() -> None:
    """It wraps `forward`, so that logits in bfloat16 come out as float32 and would look like another head's."""
    accelerate = pytest.importorskip("accelerate")
    model = tiny_model("llama").requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        wanted = model.model(**batch()).last_hidden_state
    prepared = accelerate.Accelerator(mixed_precision="bf16", cpu=True).prepare_model(model, evaluation_mode=True)
    wrapped = prepared.forward
    hidden, _ = hidden_and_head(prepared, **batch())
    assert prepared.forward == wrapped
    torch.testing.assert_close(hidden, wanted, rtol=0, atol=0)
    assert not torch.equal(hidden, tiny_model("llama").model(**batch()).last_hidden_state)


def test_a_wrapper_is_run_and_looked_into(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model, _ = student_and_teacher("llama")
        inputs = batch()
        wrapped = nn.parallel.DistributedDataParallel(model)
        hidden, head = hidden_and_head(wrapped, **inputs)
        linear_cross_entropy(hidden, inputs["input_ids"], **head).backward()
        got = {name: each.grad for name, each in model.named_parameters() if each.requires_grad}
        truth = F.cross_entropy(model(**inputs).logits.flatten(0, 1), inputs["input_ids"].flatten())
        for name, gradient in gradients(truth, model).items():
            torch.testing.assert_close(got[name], gradient, rtol=1e-7, atol=1e-11)
    finally:
        torch.distributed.destroy_process_group()


def test_the_model_is_inspected_once_left_as_it_was_and_not_kept_alive() -> None:
    model = tiny_model().requires_grad_(False).train()
    calls = []
    handle = model.model.register_forward_hook(lambda *_: calls.append(1))
    for runs in (2, 3, 4):
        hidden_and_head(model, **batch())
        assert len(calls) == runs
    assert model.training
    handle.remove()
    head = model.get_output_embeddings()
    assert not head._forward_pre_hooks
    with pytest.raises(ValueError, match="input_ids"):
        hidden_and_head(model)
    assert not head._forward_pre_hooks
    assert model(**batch()).logits.shape == (2, 12, 320)
    gone = weakref.ref(model)
    del model, handle, head
    gc.collect()
    assert gone() is None


def test_a_head_that_changes_is_read_anew() -> None:
    model = tiny_model().requires_grad_(False)
    hidden_and_head(model, **batch())
    model.double()
    model.resize_token_embeddings(330)
    hidden, head = hidden_and_head(model, **batch())
    assert head["weight"].shape == (330, 32)
    assert hidden.dtype == head["weight"].dtype == torch.float64


def test_labels_stay_behind_and_no_cache_is_built() -> None:
    model = tiny_model().requires_grad_(False)
    seen: list[dict[str, Any]] = []
    model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    inputs = batch()
    hidden_and_head(model, **inputs, labels=inputs["input_ids"])
    assert set(seen[-1]) == {"input_ids", "attention_mask", "use_cache"}
    assert seen[-1]["use_cache"] is False
    hidden_and_head(model, **inputs, use_cache=True)
    assert seen[-1]["use_cache"] is True


# What is refused


def test_a_head_that_is_trained_is_refused() -> None:
    for name, frozen in (("llama", ""), ("phi", "weight")):
        model = tiny_model(name)
        head = model.get_output_embeddings()
        if frozen:
            head.weight.requires_grad_(False)
        wanted = "bias" if frozen else "weight"
        with pytest.raises(InvalidInputError, match=rf"{wanted} of the output head.*Freeze it"):
            hidden_and_head(model, **batch())
        with torch.no_grad():
            hidden_and_head(model, **batch())
        head.requires_grad_(False)
        assert hidden_and_head(model, **batch())[0].requires_grad


class Doubled(LlamaForCausalLM):
    """Does to its logits what no configuration tells."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 2
        return output


class Adapted(nn.Linear):
    """A head with an adapter that as yet adds nothing."""

    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden) + 0.0


class Twice(LlamaForCausalLM):
    """Uses its head twice once it is told to."""

    again = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        if self.again:
            self.lm_head(self.model(*args, **kwargs).last_hidden_state)
        return output


def test_a_head_that_does_something_else_is_refused() -> None:
    config = CONFIGS["llama"]()
    with pytest.raises(UnsupportedError, match="does something else to its logits"):
        hidden_and_head(Doubled(config).requires_grad_(False), **batch())
    adapted = tiny_model().requires_grad_(False)
    adapted.lm_head = Adapted(32, 320).requires_grad_(False)
    with pytest.raises(UnsupportedError, match="Adapted"):
        hidden_and_head(adapted, **batch())
    twice = Twice(config).requires_grad_(False)
    hidden_and_head(twice, **batch())
    twice.again = True
    with pytest.raises(UnsupportedError, match="expected 1, got 2"):
        hidden_and_head(twice, **batch())
    sharded = tiny_model().requires_grad_(False)
    sharded.lm_head.weight = nn.Parameter(torch.empty(0), requires_grad=False)
    with pytest.raises(UnsupportedError, match="all of it in this process"):
        hidden_and_head(sharded, **batch())
    with pytest.raises(UnsupportedError, match="output head"):
        hidden_and_head(tiny_model().model, **batch())


def test_bad_arguments_of_divergence_are_refused() -> None:
    hidden = torch.randn(3, 4)
    head = HeadArguments(weight=torch.randn(7, 4), bias=None, logit_softcap=None, logit_scale=1.0)
    for beta in (-0.1, 1.1):
        with pytest.raises(InvalidInputError, match="beta"):
            divergence(hidden, hidden, head, beta=beta)
    capped = HeadArguments(weight=torch.randn(7, 4), bias=None, logit_softcap=30.0, logit_scale=1.0)
    with pytest.raises(UnsupportedError, match=r"softcap.*None, got 30\.0"):
        divergence(hidden, hidden, head, capped)
    with pytest.raises(InvalidInputError, match="target_weight"):
        divergence(hidden, hidden, head, HeadArguments(**{**head, "weight": torch.randn(8, 4)}))
    with pytest.raises(InvalidInputError, match="same rows"):
        counted_rows(torch.zeros(4), -100, hidden)


# Imports


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_nothing_foreign_is_imported() -> None:
    code = """
import sys; sys.path.insert(0, ".")
import torch, cdas_fast, cdas_fast.dropin, cdas_fast.dropin.liger, cdas_fast.dropin.transformers
print(sorted({name.partition(".")[0] for name in sys.modules} & {"liger_kernel", "trl", "pyvene", "transformers"}))
"""
    assert python(code) == "[]"


@pytest.mark.parametrize("name", ["trl", "pyvene"])
def test_a_missing_package_is_named(name: str) -> None:
    code = f"""
import sys; sys.path.insert(0, ".")
sys.modules["{name}"] = None
from cdas_fast.errors import MissingDependencyError
try:
    import cdas_fast.dropin.{name}
except MissingDependencyError as error:
    print(error)
"""
    assert f"cdas_fast.dropin.{name} needs {name}: pip install {name}" in python(code)
