"""Layer by layer over all micro-batches: the same as micro-batch by micro-batch, with two reads of each weight."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import CONFIGS, tiny_model, tiny_tokenizer
from tiny_runs import PAIRS, tiny_config
from torch import Tensor

import cdas_fast
from cdas_fast.models import handle_linear as handle_module
from cdas_fast.models.layer_major import KeepUpTo, run_layer_major
from cdas_fast.models.layer_weights import LayerWeights
from cdas_fast.models.packed import PackedRunner, PaddedRunner, Rows
from cdas_fast.models.skeleton import layer_weights
from cdas_fast.models.structure import inspect_decoder
from cdas_fast.training import TrainingResult

LAYER = 1
PREFIX = (5, 6, 7)
LENGTHS = ((9, 4), (6,), (3, 3, 8))
runners = pytest.mark.parametrize("runner_type", [PackedRunner, PaddedRunner])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every tiny model as a folder."""
    place = tmp_path_factory.mktemp("models")
    for name in CONFIGS:
        tiny_model(name).save_pretrained(place / name)
    return {name: place / name for name in CONFIGS}


def streamed(folder: Path, **settings: Any) -> Any:
    """A model in float32 whose layers are read when they are needed."""
    settings = {"resident_layers": 1, **settings}
    return cdas_fast.load_model(folder, tiny_tokenizer(), dtype="float32", device="cpu", **settings)[0]


def results(runner: Any, weights: LayerWeights | None, keep: KeepUpTo, *, edited: bool, offload: bool = False) -> Any:
    """Final hidden states, and gradients of the hidden states given and of what an edit depends on."""
    generator = torch.Generator().manual_seed(3)
    delta = torch.full((runner.decoder.hidden_size,), 0.1, requires_grad=True)
    edits = {LAYER + 1: lambda x: x + delta, 4: lambda x: x * (1 + delta)} if edited else {}
    given, finals, upstream, passes, entering = [], [], [], [], []
    for lengths in LENGTHS:
        rows = Rows(lengths, len(PREFIX))
        hidden = torch.randn(sum(lengths), runner.decoder.hidden_size, generator=generator).requires_grad_()
        positions = torch.randperm(sum(lengths), generator=generator)[:4]
        given.append(hidden)
        upstream.append(torch.randn(len(positions), runner.decoder.hidden_size, generator=generator))
        if weights is None:
            finals.append(runner.suffix(LAYER, hidden, rows, edits=edits, positions=positions))
        else:
            one, entered = runner.begin_suffix(LAYER, hidden, rows, edits=edits, positions=positions)
            passes.append(one)
            entering.append(entered)
    if weights is not None:
        beyond = range(LAYER + 1, runner.decoder.num_layers)
        finals = list(run_layer_major(passes, entering, beyond, weights, keep, offload))
    torch.autograd.backward(finals, upstream)
    return [each.detach() for each in finals], [each.grad for each in given], delta.grad


@runners
@pytest.mark.parametrize("edited", [False, True], ids=["no_edit", "edits"])
@pytest.mark.parametrize("name", [*CONFIGS])
def test_it_is_the_suffix(name: str, edited: bool, runner_type: Any, folders: dict[str, Path]) -> None:
    whole = inspect_decoder(tiny_model(name).requires_grad_(False))
    expected = results(runner_type(whole, PREFIX), None, KeepUpTo(0), edited=edited)
    model = streamed(folders[name])
    weights = layer_weights(model)
    assert weights is not None
    runner = runner_type(inspect_decoder(model), PREFIX)
    for budget, offload in ((0.0, False), (0.0, True), (float("inf"), False), (3e4, False)):
        found = results(runner, weights, KeepUpTo(budget), edited=edited, offload=offload)
        for got, wanted in zip(found[0], expected[0], strict=True):
            assert torch.equal(got, wanted)
        for got, wanted in zip(found[1], expected[1], strict=True):
            assert torch.equal(got, wanted)
        if edited:
            torch.testing.assert_close(found[2], expected[2], rtol=1e-5, atol=1e-7)


def test_each_streamed_layer_is_read_twice_a_step(folders: dict[str, Path]) -> None:
    model = streamed(folders["llama"], resident_layers=0)
    weights = layer_weights(model)
    assert weights is not None
    weights.slots = 2  # so that nothing is still there by chance but at the turn
    runner = PackedRunner(inspect_decoder(model), PREFIX)
    results(runner, weights, KeepUpTo(0), edited=False)
    before = weights.traffic.layers
    results(runner, weights, KeepUpTo(0), edited=False)
    assert weights.traffic.layers - before <= 2 * 3
    before = weights.traffic.layers
    results(runner, None, KeepUpTo(0), edited=False)
    assert weights.traffic.layers - before > 2 * 3, "micro-batch by micro-batch it is more"


def test_no_gradient_keeps_nothing(folders: dict[str, Path]) -> None:
    model = streamed(folders["llama"])
    weights = layer_weights(model)
    assert weights is not None
    runner = PackedRunner(inspect_decoder(model), PREFIX)
    hidden = torch.randn(13, 32)
    with torch.no_grad():
        one, entered = runner.begin_suffix(LAYER, hidden, Rows((9, 4), 3))
        (final,) = run_layer_major([one], [entered], range(LAYER + 1, 5), weights, KeepUpTo(float("inf")))
    assert not final.requires_grad
    assert torch.equal(final, runner.suffix(LAYER, hidden, Rows((9, 4), 3)))


def test_a_budget_keeps_the_last_layers() -> None:
    layers = range(3, 10)
    assert KeepUpTo(float("inf")).layers(layers, 5) == set(layers)
    assert not KeepUpTo(0.0, per_token=1.0).layers(layers, 5)
    assert not KeepUpTo(100.0).layers(layers, 5), "not measured yet"
    assert KeepUpTo(100.0, per_token=8.0).layers(layers, 5) == {8, 9}
    assert KeepUpTo(1e9, per_token=8.0).layers(layers, 5) == set(layers)


# Training: resident and streamed, and what is known to go wrong.


def trained(model: Any, **settings: Any) -> TrainingResult:
    config = tiny_config(micro_batch_tokens=64, **settings)
    return cdas_fast.train(model, tiny_tokenizer(), PAIRS, config, progress=False)


def agree(one: TrainingResult, other: TrainingResult) -> None:
    """Losses to 1e-5 relative at each step, and the same vector."""
    losses = [torch.tensor([record.loss for record in each.history]) for each in (one, other)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=0)
    cosine = torch.nn.functional.cosine_similarity(one.vector.direction, other.vector.direction)
    assert cosine.min() > 0.99999


@pytest.mark.parametrize("load_in_4bit", [False, True], ids=["plain", "4bit"])
@pytest.mark.parametrize("packing", ["packed", "padded"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"recompute": True}, {"activation_bytes": 20_000}, {"recompute": True, "offload_activations": True}],
    ids=["kept", "recomputed", "budget", "offloaded"],
)
def test_streamed_training_is_resident_training(
    settings: dict[str, Any], packing: str, load_in_4bit: bool, folders: dict[str, Path], tmp_path: Path
) -> None:
    if load_in_4bit:
        pytest.importorskip("bitsandbytes")
    options = {"load_in_4bit": load_in_4bit, "packed_dir": tmp_path}
    layers = {"layer": (1, 3), "packing": packing}
    resident = trained(streamed(folders["llama"], resident_layers=5, **options), **layers)
    for count in (0, 2):
        agree(trained(streamed(folders["llama"], resident_layers=count, **options), **layers, **settings), resident)
    if not load_in_4bit:
        agree(trained(tiny_model()), trained(streamed(folders["llama"], resident_layers=5)))


class _KeepsTheWeight(torch.autograd.Function):
    """What bitsandbytes' MatMul4Bit does: the bytes that were resident in the forward pass, kept for the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, handle: Any, bias: Tensor | None) -> Tensor:
        weights, layout = handle.weights, handle.weights.layout(handle.layer)
        ctx.matrix = layout.matrices[handle.name]
        ctx.tensors = layout.tensors(weights._flat(handle.layer), handle.name)
        return torch.nn.functional.linear(x, handle.dense(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        weight = torch.empty(ctx.matrix.shape, dtype=gradients[0].dtype)
        ctx.matrix.fill(weight, ctx.tensors)
        return gradients[0] @ weight, None, None


@pytest.mark.parametrize("load_in_4bit", [False, True], ids=["plain", "4bit"])
def test_a_weight_kept_by_autograd_is_another_layers(
    load_in_4bit: bool, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The known-bad way has the right losses at first, and wrong gradients: the test above fails it."""
    if load_in_4bit:
        pytest.importorskip("bitsandbytes")
    options = {"load_in_4bit": load_in_4bit, "packed_dir": tmp_path}
    resident = trained(streamed(folders["llama"], resident_layers=5, **options), layer=0)
    # On the way back, the slot used longest ago is by chance the one that the layer was in before.
    chance = random.Random(0)
    monkeypatch.setattr(LayerWeights, "_free_slot", lambda self, slots: chance.choice(slots))
    agree(trained(streamed(folders["llama"], resident_layers=0, **options), layer=0), resident)
    monkeypatch.setattr(handle_module, "handle_linear", _KeepsTheWeight.apply)
    agree(trained(streamed(folders["llama"], resident_layers=5, **options), layer=0), resident)  # while nothing moves
    bad = trained(streamed(folders["llama"], resident_layers=0, **options), layer=0)
    assert bad.history[0].loss == pytest.approx(resident.history[0].loss, rel=1e-5)
    with pytest.raises(AssertionError):
        agree(bad, resident)


def test_memory_that_runs_out_costs_time_and_nothing_else(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from cdas_fast.training import objective

    expected = trained(streamed(folders["llama"], resident_layers=5))
    own: Any = objective.__dict__["linear_jsd"]

    def scarce(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if len(hidden) > 20:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return own(hidden, *args, **kwargs)

    config = {"micro_batch_tokens": 4096}
    monkeypatch.setattr(objective, "linear_jsd", scarce)
    for resident in (5, 1):
        caplog.clear()
        found = cdas_fast.train(
            streamed(folders["llama"], resident_layers=resident), tiny_tokenizer(), PAIRS, tiny_config(**config)
        )
        agree(found, expected)
        assert "out of memory: from now on" in caplog.text
        assert ("all layers are run again" in caplog.text) == (resident == 1)
    monkeypatch.setattr(objective, "linear_jsd", lambda *_, **__: scarce(torch.empty(99, 1)))
    with pytest.raises(torch.OutOfMemoryError):
        trained(streamed(folders["llama"]))


def test_the_model_is_left_as_it_was(folders: dict[str, Path]) -> None:
    model = streamed(folders["llama"], resident_layers=2)
    weights = layer_weights(model)
    assert weights is not None
    ids = torch.arange(3, 30)[None]
    before, resident = model(ids).logits, weights.resident
    trained(model)
    assert weights.resident == resident
    assert torch.equal(model(ids).logits, before)
    assert not any("forward" in module.__dict__ for module in model.modules())
