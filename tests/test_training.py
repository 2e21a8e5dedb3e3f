"""Training: the objective against a plain three-forward implementation, and what a run must keep to."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import CONFIGS, tiny_model, tiny_tokenizer
from tiny_runs import PAIRS, tiny_config, tiny_run
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import cdas_fast
from cdas_fast.data.prompts import PromptFormat
from cdas_fast.data.rows import TrainingRow, tokenize_pairs
from cdas_fast.errors import InvalidInputError, NonFiniteError, StorageError, UnsupportedError
from cdas_fast.models import inspect_decoder
from cdas_fast.models.packed import PackedRunner, PaddedRunner
from cdas_fast.training.directions import (
    difference_in_means,
    is_orthonormal,
    orthonormalize,
    principal_direction,
    random_direction,
)
from cdas_fast.training.sequences import batches_by_tokens

# The specification: whole forward passes, ordinary hooks, logits at all positions


def plain_row_loss(model: Any, row: TrainingRow, direction: Tensor, layers: tuple[int, ...], prefix: int) -> Tensor:
    """Summed JSD over the response of one row, by three whole forward passes."""
    decoder = inspect_decoder(model)
    sources: dict[int, Tensor] = {}

    def with_hooks(ids: tuple[int, ...], hooks: dict[int, Callable[[Tensor], Tensor | None]]) -> Tensor:
        def hook_of(edit: Callable[[Tensor], Tensor | None]) -> Any:
            def hook(module: Any, args: Any, output: Any) -> Any:
                edited = edit(output[0] if isinstance(output, tuple) else output)
                if edited is None:
                    return None
                return (edited, *output[1:]) if isinstance(output, tuple) else edited

            return hook

        handles = [decoder.layers[layer].register_forward_hook(hook_of(edit)) for layer, edit in hooks.items()]
        try:
            logits: Tensor = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
            return logits
        finally:
            for handle in handles:
                handle.remove()

    def remember(layer: int) -> Callable[[Tensor], None]:
        def edit(hidden: Tensor) -> None:
            sources[layer] = hidden[0, row.source_position].detach()

        return edit

    def intervene(layer: int) -> Callable[[Tensor], Tensor]:
        def edit(hidden: Tensor) -> Tensor:
            tail = hidden[:, prefix:]
            value = direction @ sources[layer]
            return torch.cat([hidden[:, :prefix], tail + (value - tail @ direction.T) @ direction], dim=1)

        return edit

    with torch.no_grad():
        with_hooks(row.source.ids[: row.source.prompt_length], {layer: remember(layer) for layer in layers})
        target = with_hooks(row.source.ids, {})[row.source.prompt_length - 1 : -1]
    logits = with_hooks(row.base.ids, {layer: intervene(layer) for layer in layers})[row.base.prompt_length - 1 : -1]
    p, q = logits.softmax(-1), target.softmax(-1)
    m = (p + q) / 2
    return (p * (p / m).log() + q * (q / m).log()).sum() / 2


def plain_step(
    model: Any, rows: tuple[TrainingRow, ...], direction: Tensor, layers: tuple[int, ...], prefix: int, reduction: str
) -> tuple[float, Tensor]:
    """Loss and gradient of one step over all rows as one batch of pairs."""
    w = direction.clone().requires_grad_(True)
    sums = [plain_row_loss(model, row, w, layers, prefix) for row in rows]
    lengths = [row.base.response_length for row in rows]
    if reduction == "sequence":
        loss = torch.stack([total / length for total, length in zip(sums, lengths, strict=True)]).mean()
    else:
        half = len(rows) // 2
        loss = sum(
            sum(sums[part], torch.tensor(0.0)) / sum(lengths[part]) / 2 for part in (slice(0, half), slice(half, None))
        )  # type: ignore[assignment]
    (gradient,) = torch.autograd.grad(loss, w)
    return float(loss.detach()), gradient


@pytest.mark.parametrize(
    ("name", "rank", "layer", "reduction"),
    [
        *((name, 1, 1, "sequence") for name in CONFIGS),
        ("llama", 1, 1, "token"),
        ("llama", 3, 1, "token"),
        ("gemma2", 2, [1, 3], "sequence"),
        ("llama", 1, [0, 2, 3], "sequence"),
        ("llama", 1, 0, "sequence"),
        ("llama", 1, 4, "sequence"),
    ],
    ids=str,
)
def test_step_equals_three_whole_forwards(name: str, rank: int, layer: int | list[int], reduction: str) -> None:
    model = tiny_model(name)
    gradients: list[Tensor] = []
    result = tiny_run(
        model=model,
        layer=layer,
        rank=rank,
        reduction=reduction,
        epochs=1,
        batch_size=len(PAIRS),
        shuffle=False,
        micro_batch_tokens=300,
        callback=lambda info: gradients.append(info.gradient),
    )
    prompt_format = PromptFormat(tiny_tokenizer())
    rows = tokenize_pairs(PAIRS, prompt_format, max_output_tokens=12)
    layers = (layer,) if isinstance(layer, int) else tuple(layer)
    assert result.only.initial_direction is not None
    loss, gradient = plain_step(model, rows.rows, result.only.initial_direction, layers, rows.prefix_length, reduction)
    assert result.history[0].loss == pytest.approx(loss, rel=1e-4)
    assert loss > 1e-4
    torch.testing.assert_close(gradients[0], gradient, rtol=2e-3, atol=1e-4 * float(gradient.abs().max()))


def test_optimiser_is_adamw_with_linear_decay_clipping_and_unit_length() -> None:
    steps: list[Any] = []
    result = tiny_run(callback=steps.append, epochs=2, learning_rate=0.03, max_grad_norm=0.05)
    assert result.only.initial_direction is not None
    w = result.only.initial_direction.clone().requires_grad_(True)
    optimizer = torch.optim.AdamW([w], lr=0.03, weight_decay=0.0)
    total = len(steps)
    for index, info in enumerate(steps):
        w.grad = info.gradient.clone()
        norm = torch.nn.utils.clip_grad_norm_([w], 0.05)
        optimizer.param_groups[0]["lr"] = 0.03 * (total - index) / total
        optimizer.step()
        with torch.no_grad():
            w /= w.norm()
        assert info.record.grad_norm == pytest.approx(float(norm))
        assert info.record.learning_rate == pytest.approx(0.03 * (total - index) / total)
        torch.testing.assert_close(info.direction, w.detach(), rtol=1e-5, atol=1e-6)
    assert total == 2 * math.ceil(len(PAIRS) / 2)
    torch.testing.assert_close(result.vector.direction, w.detach(), rtol=1e-5, atol=1e-6)


def test_training_lowers_loss_and_held_out_loss() -> None:
    result = tiny_run(PAIRS[:4], validation=PAIRS[4:], epochs=20, learning_rate=0.1)
    first, last = (sum(record.loss for record in part) for part in (result.history[:2], result.history[-2:]))
    assert last < 0.9 * first
    held_out = [record.held_out_loss for record in result.history if record.held_out_loss is not None]
    assert len(held_out) == 20
    assert all(0 < loss < math.log(2) for loss in held_out)


@pytest.mark.parametrize("rank", [1, 3])
def test_rows_stay_orthonormal(rank: int) -> None:
    directions: list[Tensor] = []
    tiny_run(rank=rank, callback=lambda info: directions.append(info.direction))
    assert all(is_orthonormal(direction) for direction in directions)


def test_same_seed_same_vector_and_other_seed_another() -> None:
    first, again, other = (tiny_run(seed=seed).vector for seed in (3, 3, 4))
    assert first == again
    assert first != other


def test_micro_batches_do_not_change_the_result() -> None:
    one, many = (tiny_run(micro_batch_tokens=tokens, epochs=1).vector for tokens in (100_000, 1))
    torch.testing.assert_close(one.direction, many.direction, rtol=1e-4, atol=1e-5)


def test_recomputed_layers_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    again = 0
    own = checkpoint

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal again
        again += 1
        return own(*args, **kwargs)

    plain = tiny_run(layer=[1, 3])
    monkeypatch.setattr("cdas_fast.models.suffix.checkpoint", counted)
    assert tiny_run(layer=[1, 3], recompute=True).vector == plain.vector
    assert again == 9 * 3, "steps times the layers beyond the first"


def test_where_activations_lie_changes_no_bit(tmp_path: Path) -> None:
    in_memory = tiny_run()
    in_files = tiny_run(cache_bytes=0)
    in_output = tiny_run(output_dir=tmp_path / "out")
    kept = tiny_run(output_dir=tmp_path / "other", activations_dir=tmp_path / "activations")
    for result in (in_memory, in_files, in_output, kept):
        assert result.only.cache is not None
        assert (result.only.cache.folder is not None) == (result is in_files)
        assert result.vector == in_memory.vector
    assert not list((tmp_path / "out").glob(".*"))
    assert not list((tmp_path / "other").glob(".*"))
    assert len(list((tmp_path / "activations").iterdir())) == 1


def test_kept_activations_are_found_again_with_other_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    captures = 0
    for kind in (PackedRunner, PaddedRunner):
        own = kind.capture

        def counted(*args: Any, own: Any = own, **kwargs: Any) -> Any:
            nonlocal captures
            captures += 1
            return own(*args, **kwargs)

        monkeypatch.setattr(kind, "capture", counted)

    def passes(**changes: Any) -> int:
        before = captures
        tiny_run(activations_dir=tmp_path / "activations", **changes)
        return captures - before

    without = passes(learning_rate=0.1, seed=3, rank=2, reduction="token", batch_size=3)
    assert passes() < without
    assert passes(pairs=PAIRS[:3]) == passes()
    assert passes(layer=2) == without
    assert passes(max_output_tokens=5) > passes()
    assert passes(pairs=PAIRS[:3], layer=2) == passes()


def test_cache_without_room_on_the_disk_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(10**6, 10**6, 10))
    with pytest.raises(StorageError, match=r"MiB free for cached activations, got 0 MiB\. Free some space"):
        tiny_run(cache_bytes=0)


def test_factors_are_means_over_prompts() -> None:
    result = tiny_run(layer=[1, 3], rank=2)
    vector = result.vector
    for side, text in (("positive", "positive_input"), ("negative", "negative_input")):
        factors = getattr(vector, side)
        ids = [PromptFormat(tiny_tokenizer()).prompt_ids(getattr(pair, text)) for pair in PAIRS]
        model = tiny_model()
        for slot, layer in enumerate((1, 3)):
            with torch.no_grad():
                hidden = [
                    model(input_ids=torch.tensor([row]), output_hidden_states=True).hidden_states[layer + 1][0, -1]
                    for row in ids
                ]
            projections = torch.stack(hidden) @ vector.direction.T
            torch.testing.assert_close(factors.mean[slot], projections.mean(0), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(factors.std[slot], projections.std(0, correction=0), rtol=1e-3, atol=1e-4)
        assert factors.prompts == len(PAIRS)


@pytest.mark.parametrize("side", ["positive", "negative"])
def test_one_direction_trains_its_rows_alone_and_keeps_both_factors(side: str) -> None:
    both = tiny_run(epochs=1, batch_size=5, learning_rate=0.0, shuffle=False)
    one = tiny_run(epochs=1, batch_size=5, learning_rate=0.0, shuffle=False, directions=side)
    assert both.only.cache is not None
    assert one.only.cache is not None
    rows = both.only.cache.rows.rows
    assert [row.toward for row in one.only.cache.rows.rows] == [side] * len(PAIRS)
    assert len(rows) == 2 * len(PAIRS)
    torch.testing.assert_close(one.only.positive_projections, both.only.positive_projections, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(one.only.negative_projections, both.only.negative_projections, rtol=1e-5, atol=1e-5)
    assert one.history[0].loss != pytest.approx(both.history[0].loss, rel=1e-6)


def test_source_tokens_choose_the_source_position() -> None:
    marked = tiny_run(source_tokens="<|im_end|>\n")
    end = tiny_run(source_tokens="assistant\n")
    assert end.vector == tiny_run().vector
    assert marked.vector != end.vector
    assert marked.only.cache is not None
    row = marked.only.cache.rows.rows[0]
    assert row.source.ids[row.source_position] == tiny_tokenizer()("\n", add_special_tokens=False)["input_ids"][0]


@pytest.mark.parametrize(("schedule", "warmup"), [("linear", 0), ("linear", 3), ("cosine", 0), ("cosine", 2)])
def test_learning_rates_of_a_schedule(schedule: Any, warmup: int) -> None:
    history = tiny_run(learning_rate=0.1, schedule=schedule, warmup_steps=warmup).history
    total = len(history)
    assert total == 9
    expected = [0.1 * (step + 1) / (warmup + 1) for step in range(warmup)]
    for step in range(warmup, total):
        done = (step - warmup) / (total - warmup)
        expected.append(0.1 * (1 - done if schedule == "linear" else 0.5 + 0.5 * math.cos(math.pi * done)))
    assert [record.learning_rate for record in history] == pytest.approx(expected)
    assert max(expected) == expected[warmup] == 0.1


def losses_in_turn(monkeypatch: pytest.MonkeyPatch, losses: Sequence[float]) -> None:
    """Let the held-out evaluations find these losses."""
    given = iter(losses)
    monkeypatch.setattr("cdas_fast.training.concept.mean_divergence", lambda *arguments: next(given))


@pytest.mark.parametrize(
    ("patience", "losses", "epochs", "best"),
    [
        (1, [0.5, 0.4, 0.45, 0.1], 3, 2),
        (2, [0.5, 0.4, 0.45, 0.3, 0.3, 0.31, 0.1], 6, 4),
        (2, [0.5, 0.6, 0.7, 0.1], 3, 1),
        (5, [0.5, 0.4, 0.3, 0.2, 0.1, 0.05, 0.04], 7, 7),
        (None, [0.1, 0.4, 0.45, 0.5, 0.5, 0.5, 0.5], 7, 7),
    ],
)
def test_training_stops_when_patience_ends_and_keeps_the_best(
    patience: int | None,
    losses: list[float],
    epochs: int,
    best: int,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    settings: dict[str, Any] = {
        "validation": PAIRS[:2],
        "epochs": 7,
        "patience": patience,
        "output_dir": tmp_path / "out",
    }
    directions: dict[int, Tensor] = {}
    losses_in_turn(monkeypatch, losses)

    def remember(info: Any) -> None:
        directions[info.record.epoch] = info.direction

    result = tiny_run(callback=remember, **settings)
    assert result.history[-1].epoch == max(directions) == epochs
    assert torch.equal(result.vector.direction, directions[best])

    def interrupt(info: Any) -> None:
        if info.record.step == 5:
            raise KeyboardInterrupt

    settings["output_dir"] = tmp_path / "again"
    losses_in_turn(monkeypatch, losses)
    with pytest.raises(KeyboardInterrupt):
        tiny_run(callback=interrupt, **settings)
    losses_in_turn(monkeypatch, losses[1:])
    assert tiny_run(resume=True, **settings).vector == result.vector


def test_patience_needs_held_out_pairs() -> None:
    with pytest.raises(InvalidInputError, match=r"expected held-out pairs of every concept.* got none of concept 0"):
        tiny_run(patience=2)


def test_principal_direction_is_the_axis_of_the_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    axes = orthonormalize(torch.randn(2, 16, generator=generator))
    amounts = torch.tensor([[3.0, 1.0], [2.5, -1.2], [3.5, 1.1], [2.8, 0.9]])
    negative = torch.randn(4, 1, 16, generator=generator)
    positive = negative + (amounts @ axes)[:, None]
    found = principal_direction(positive, negative, 2)
    assert is_orthonormal(found)
    _, _, expected = torch.linalg.svd(amounts.double(), full_matrices=False)
    expected = (expected * (amounts.double().sum(0) @ expected.T).sign()[:, None]).float() @ axes
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(InvalidInputError, match="at least 5 pairs"):
        principal_direction(positive, negative, 5)
    with pytest.raises(InvalidInputError, match="differences that span 3 directions"):
        principal_direction(positive, negative, 3)
    start = tiny_run(initial_direction="principal-direction", learning_rate=0.0, epochs=1).only
    assert start.cache is not None
    sources = start.cache.positive_sources, start.cache.negative_sources
    torch.testing.assert_close(start.vector.direction, principal_direction(*sources))


def test_several_concepts_have_vectors_of_their_own(tmp_path: Path) -> None:
    other = {"concept_id": 7, "concept": "ships", "positive_output": "A ship it is"}
    records = PAIRS.to_records()
    both = tiny_run([*records, *({**record, **other} for record in records)], output_dir=tmp_path / "out")
    assert set(both.concepts) == {0, 7}
    assert both.concepts[0].vector.cosine(tiny_run().vector) > 0.9999
    assert both.concepts[7].vector != both.concepts[0].vector
    for concept_id in (0, 7):
        folder = tmp_path / "out" / f"concept_{concept_id}"
        assert cdas_fast.SteeringVector.from_pretrained(folder) == both.concepts[concept_id].vector
    with pytest.raises(InvalidInputError, match=r"result: expected one concept, got \[0, 7\]"):
        _ = both.vector


def test_files_of_a_run(tmp_path: Path) -> None:
    result = tiny_run(output_dir=tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names >= {"steering_vector.safetensors", "config.json", "training_log.jsonl", "report.html", "README.md"}
    lines = (tmp_path / "out" / "training_log.jsonl").read_text().splitlines()
    assert len(lines) == len(result.history)
    keys = {"step", "epoch", "loss", "learning_rate", "grad_norm", "tokens", "seconds"}
    import json

    assert all(keys <= set(json.loads(line)) for line in lines)
    assert "the sea" in (tmp_path / "out" / "report.html").read_text()
    assert result.peak_memory_bytes > 10 * 2**20


def test_model_is_left_as_it_was() -> None:
    model = tiny_model()
    model.train()
    next(iter(model.parameters())).requires_grad_(False)
    before = {name: parameter.clone() for name, parameter in model.state_dict().items()}
    flags = [parameter.requires_grad for parameter in model.parameters()]
    tiny_run(model=model)
    assert model.training
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.state_dict().items())


def test_bfloat16_model_trains_to_about_the_same() -> None:
    full = tiny_run(epochs=1, learning_rate=0.0)
    half = tiny_run(model=tiny_model(dtype=torch.bfloat16), epochs=1, learning_rate=0.0)
    assert half.vector.direction.dtype == torch.float32
    assert half.history[0].loss == pytest.approx(full.history[0].loss, rel=0.2)


# Directions


def test_orthonormalize_is_the_nearest_orthonormal_matrix() -> None:
    matrix = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    nearest = orthonormalize(matrix)
    assert is_orthonormal(nearest)
    distance = (matrix - nearest).norm()
    for seed in range(20):
        assert (matrix - orthonormalize(nearest + 0.1 * random_direction(3, 8, seed))).norm() >= distance
    torch.testing.assert_close(orthonormalize(3 * nearest[:1]), nearest[:1])


def test_difference_in_means() -> None:
    positive, negative = torch.randn(6, 2, 8), torch.randn(6, 2, 8)
    direction = difference_in_means(positive, negative, rank=3)
    assert is_orthonormal(direction)
    mean = (positive - negative).mean((0, 1))
    torch.testing.assert_close(direction[0], mean / mean.norm())
    with pytest.raises(InvalidInputError, match="non-zero length, got all zeros"):
        difference_in_means(positive, positive)


def test_batches_by_tokens_keep_order_and_bound() -> None:
    lengths = [9, 7, 7, 3, 20, 1]
    assert batches_by_tokens([4, 0, 1, 2, 3, 5], lengths, 18) == [[4], [0, 1], [2, 3], [5]]
    assert batches_by_tokens([4, 0, 1, 2, 3, 5], lengths, 1000) == [[4, 0, 1, 2, 3, 5]]
    assert batches_by_tokens([], lengths, 18) == []


@pytest.mark.parametrize(
    ("lengths", "most", "pads", "expected"),
    [
        ([5, 5, 5, 5, 5], 20, False, [3, 2]),
        ([5, 5, 5, 5, 5], 20, True, [3, 2]),
        ([5, 5, 5, 5], 20, False, [4]),
        ([9, 5, 1, 1, 1], 12, True, [1, 1, 3]),
        ([9, 5, 1, 1, 1], 12, False, [1, 4]),
        ([30, 5, 5, 5], 12, False, [1, 2, 1]),
        ([1] * 100, 33, False, [25, 25, 25, 25]),
    ],
)
def test_batches_are_few_and_of_even_size(lengths: list[int], most: int, pads: bool, expected: list[int]) -> None:
    batches = batches_by_tokens(range(len(lengths)), lengths, most, pads=pads)
    assert [len(batch) for batch in batches] == expected
    assert [index for batch in batches for index in batch] == list(range(len(lengths)))


# Bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer": 5}, r"layer: expected an integer from 0 to 4 \(this model's layers\), got 5"),
        ({"layer": -1}, r"layer: expected an integer from 0 to 4 .*, got -1"),
        ({"layer": []}, "layer: expected one layer or several different ones"),
        ({"layer": [1, 1]}, "layer: expected one layer or several different ones"),
        ({"rank": 0}, "rank: expected an integer of at least 1, got 0"),
        ({"rank": 33}, "rank: expected at most the model's width 32, got 33"),
        ({"epochs": 0}, "epochs: expected an integer of at least 1"),
        ({"batch_size": 1.5}, "batch_size: expected an integer of at least 1, got 1.5"),
        ({"learning_rate": float("nan")}, "learning_rate: expected a finite number"),
        ({"reduction": "batch"}, "reduction: expected sequence or token, got 'batch'"),
        ({"directions": "up"}, "directions: expected both, positive or negative, got 'up'"),
        ({"beta": 1.0}, "beta: expected a number strictly between 0 and 1"),
        (
            {"initial_direction": "zeros"},
            "initial_direction: expected random, difference-in-means, principal-direction or a tensor",
        ),
        ({"initial_direction": torch.zeros(2, 32)}, r"initial_direction: expected shape \(1, 32\)"),
        ({"initial_direction": torch.zeros(1, 32)}, "direction: expected a vector of non-zero length, got all zeros"),
        ({"initial_direction": torch.full((1, 32), math.nan)}, "direction: expected finite numbers"),
        ({"schedule": "steps"}, "schedule: expected linear or cosine, got 'steps'"),
        ({"warmup_steps": -1}, "warmup_steps: expected an integer of at least 0, got -1"),
        ({"patience": 0}, "patience: expected an integer of at least 1, got 0"),
        ({"source_tokens": "[INST]"}, r"pair 0, positive prompt: source_tokens: expected '\[INST\]' in the prompt"),
        ({"prefix_length": -1}, "prefix_length: expected None or at least 0"),
        ({"impl": "cuda"}, "impl: expected auto, reference, cpp or triton, got 'cuda'"),
        ({"impl": "triton"}, "impl='triton': expected tensors on cuda"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_bad_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises((InvalidInputError, UnsupportedError), match=message):
        tiny_run(**changes)


def test_tokenizer_without_chat_template_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="tokenizer: expected one with a chat template"):
        cdas_fast.train(tiny_model(), tiny_tokenizer(chat_template=None), PAIRS, tiny_config())


def test_template_that_ignores_the_user_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="expected a prompt that contains the user's text"):
        cdas_fast.train(tiny_model(), tiny_tokenizer(chat_template="<|im_start|>hello"), PAIRS, tiny_config())


def test_template_that_refuses_a_system_message_says_so() -> None:
    template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{{ messages[0]['content'] }}"
    )
    with pytest.raises(UnsupportedError, match=r"expected a template that takes a system.*no system role"):
        cdas_fast.train(tiny_model(), tiny_tokenizer(template), PAIRS, tiny_config(system_prompt="Be brief."))


def test_prompt_longer_than_the_context_names_the_pair() -> None:
    long = {**PAIRS.to_records()[0], "positive_input": "x" * 200}
    message = r"pair 5 toward positive, source sequence: expected at most 128 tokens \(the context\), got \d+ prompt"
    with pytest.raises(InvalidInputError, match=message):
        tiny_run([*PAIRS.to_records(), long])


def test_activation_that_is_not_finite_names_the_row() -> None:
    model = tiny_model()
    token = tiny_tokenizer()("x", add_special_tokens=False)["input_ids"][0]
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = math.nan
    with pytest.raises(NonFiniteError, match=r"pair 4 toward \w+: \w.* expected finite numbers, got NaN or infinity"):
        tiny_run(model=model)


def test_loss_that_is_not_finite_names_the_step_and_keeps_the_last_good_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cdas_fast.training import objective

    steps = 0
    own = cdas_fast.linear_jsd

    def failing(*args: Any, **kwargs: Any) -> Tensor:
        loss = own(*args, **kwargs)
        return loss * math.nan if steps == 4 else loss

    def count(info: Any) -> None:
        nonlocal steps
        steps = info.record.step

    monkeypatch.setattr(objective, "linear_jsd", failing)
    with pytest.raises(NonFiniteError, match=r"step 5: expected a finite loss and gradient, got .* in pair \d"):
        tiny_run(output_dir=tmp_path / "out", callback=count, checkpoint_every=100)
    monkeypatch.setattr(objective, "linear_jsd", own)
    resumed = tiny_run(output_dir=tmp_path / "out", resume=True, checkpoint_every=100)
    assert resumed.vector == tiny_run().vector


def test_model_whose_later_layers_need_more_than_the_residual_stream_is_refused() -> None:
    model = tiny_model()
    first: list[Tensor] = []
    model.model.layers[0].register_forward_hook(lambda module, args, output: first.append(output))
    model.model.layers[3].register_forward_hook(lambda module, args, output: output + 0.1 * first[-1].sum())
    with pytest.raises(UnsupportedError, match="suffix from layer 1: expected the final hidden states of a whole"):
        tiny_run(model=model)
