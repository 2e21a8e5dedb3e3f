"""Rows packed behind a shared prefix end as the model's own pass over each of them, values and gradients."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from tiny_models import CONFIGS, WINDOW, tiny_model
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from cdas_fast.errors import InvalidInputError, UnsupportedError
from cdas_fast.models import capture_activations, inspect_decoder
from cdas_fast.models.packed import PackedRunner, PaddedRunner, Rows, make_runner, shared_prefix
from cdas_fast.models.structure import Decoder, frozen
from cdas_fast.models.suffix import edit_hook

LAYER = 2
PREFIX = [5, 9, 4, 11]
SEQUENCES = [[7, 3, 8, 20, 6, 14, 9, 9, 30, 12], [31], [40, 41, 42, 6, 7]]
ROWS = Rows(tuple(map(len, SEQUENCES)), len(PREFIX))
RUNNERS = [PackedRunner, PaddedRunner]
runners = pytest.mark.parametrize("runner_type", RUNNERS)
models = pytest.mark.parametrize("name", CONFIGS)


def whole_passes(decoder: Decoder, prefix: list[int], edits: dict[int, Any] | None = None) -> Tensor:
    """Final hidden states beyond the prefix of each sequence by itself, by the model with ordinary hooks."""
    handles = [decoder.layers[layer].register_forward_hook(edit_hook(edit)) for layer, edit in (edits or {}).items()]
    try:
        return torch.cat(
            [
                decoder.stack(input_ids=torch.tensor([prefix + ids]), use_cache=False)[0][0, len(prefix) :]
                for ids in SEQUENCES
            ]
        )
    finally:
        for handle in handles:
            handle.remove()


def test_rows() -> None:
    assert ROWS.starts.tolist() == [0, 10, 11, 16]
    assert ROWS.owners.tolist() == [0] * 10 + [1] + [2] * 5
    assert ROWS.positions.tolist() == [*range(4, 14), 4, *range(4, 9)]
    assert ROWS.padded_length == 14


@pytest.mark.parametrize(
    ("sequences", "longest", "expected"),
    [
        ([[1, 2, 3, 4], [1, 2, 3, 5]], 9, (1, 2, 3)),
        ([[1, 2, 3, 4], [1, 2, 3, 5]], 2, (1, 2)),
        ([[1, 2, 3], [1, 2, 3, 4]], 9, (1, 2)),  # the shortest keeps a token of its own
        ([[1, 2], [2, 2]], 9, ()),
        ([[1, 2], [1, 3]], 0, ()),
    ],
)
def test_shared_prefix(sequences: list[list[int]], longest: int, expected: tuple[int, ...]) -> None:
    assert shared_prefix(sequences, longest) == expected


@runners
@pytest.mark.parametrize("prefix", [PREFIX, []], ids=["prefix", "no_prefix"])
@models
def test_capture_is_the_models_own_pass(name: str, prefix: list[int], runner_type: Any) -> None:
    decoder = inspect_decoder(tiny_model(name))
    runner = runner_type(decoder, prefix)
    captured = runner.capture(SEQUENCES, [1, LAYER])
    early = runner.capture(SEQUENCES, [1], stop_after=LAYER)
    with torch.no_grad():
        torch.testing.assert_close(captured.final, whole_passes(decoder, prefix), rtol=1e-4, atol=1e-5)
    assert early.final is None
    for layer in (1, LAYER):
        alone = [
            capture_activations(decoder, torch.tensor([prefix + ids]), [layer]).hidden[layer][0, len(prefix) :]
            for ids in SEQUENCES
        ]
        torch.testing.assert_close(captured.hidden[layer], torch.cat(alone), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(early.hidden[1], captured.hidden[1])


@runners
@pytest.mark.parametrize("prefix", [PREFIX, []], ids=["prefix", "no_prefix"])
@models
def test_suffix_is_a_hooked_pass(name: str, prefix: list[int], runner_type: Any) -> None:
    """Edits at the layer and at a later one, on the tokens beyond the prefix; the gradient of both."""
    model = tiny_model(name)
    decoder = inspect_decoder(model)
    generator = torch.Generator().manual_seed(0)
    deltas = [(0.1 * torch.randn(decoder.hidden_size, generator=generator)).requires_grad_() for _ in range(2)]
    rows = Rows(ROWS.lengths, len(prefix))

    def beyond(delta: Tensor) -> Any:
        return lambda hidden: torch.cat([hidden[:, : len(prefix)], hidden[:, len(prefix) :] + delta], 1)

    with frozen(model):
        runner = runner_type(decoder, prefix)
        base = runner.capture(SEQUENCES, [LAYER], stop_after=LAYER).hidden[LAYER]
        ours = runner.suffix(LAYER, base + deltas[0], rows, edits={LAYER + 1: lambda hidden: hidden + deltas[1]})
        theirs = whole_passes(decoder, prefix, {LAYER: beyond(deltas[0]), LAYER + 1: beyond(deltas[1])})
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    weights = torch.randn(ours.shape, generator=generator)
    for mine, right in zip(
        *(torch.autograd.grad((each * weights).sum(), deltas) for each in (ours, theirs)), strict=True
    ):
        assert right.abs().max() > 1e-3
        torch.testing.assert_close(mine, right, rtol=1e-3, atol=1e-4)


@runners
@pytest.mark.parametrize("edited", [None, LAYER + 1, 4], ids=["no_edit", "edit", "edit_of_the_last_layer"])
@models
def test_positions_are_those_of_the_whole_suffix(name: str, edited: int | None, runner_type: Any) -> None:
    """In any order and more than once; the edit mixes tokens, so it has to be shown all of them."""
    model = tiny_model(name)
    decoder = inspect_decoder(model)
    generator = torch.Generator().manual_seed(0)
    delta = (0.1 * torch.randn(decoder.hidden_size, generator=generator)).requires_grad_()
    edits = {} if edited is None else {edited: lambda hidden: hidden + hidden.mean(0) * delta}
    positions = torch.tensor([12, 3, 10, 3, 0, 15])
    with frozen(model):
        runner = runner_type(decoder, PREFIX)
        base = runner.capture(SEQUENCES, [LAYER], stop_after=LAYER).hidden[LAYER].requires_grad_()
        whole = runner.suffix(LAYER, base + delta, ROWS, edits=edits)[positions]
        ours = runner.suffix(LAYER, base + delta, ROWS, edits=edits, positions=positions)
    torch.testing.assert_close(ours, whole, rtol=1e-5, atol=1e-6)
    weights = torch.randn(ours.shape, generator=generator)
    mine, right = (torch.autograd.grad((each * weights).sum(), (base, delta)) for each in (ours, whole))
    for got, wanted in zip(mine, right, strict=True):
        assert wanted.abs().max() > 1e-3
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


@runners
@pytest.mark.parametrize("edited", [None, LAYER + 1, 4], ids=["no_edit", "edit", "edit_of_the_last_layer"])
@models
def test_recomputed_layers_give_the_same_bits_and_keep_less(name: str, edited: int | None, runner_type: Any) -> None:
    decoder = inspect_decoder(tiny_model(name))
    decoder.model.requires_grad_(False)
    runner = runner_type(decoder, PREFIX)
    rows = Rows((9, 4, 6), len(PREFIX))
    generator = torch.Generator().manual_seed(5)
    given = torch.randn(19, decoder.hidden_size, generator=generator)
    upstream = torch.randn(5, decoder.hidden_size, generator=generator)
    results, kept, passes = [], [], []
    for recompute in (False, True):
        hidden, delta = given.clone().requires_grad_(), torch.full((decoder.hidden_size,), 0.1, requires_grad=True)
        edits = {} if edited is None else {edited: lambda x, delta=delta: x + delta}
        sizes: list[int] = []
        calls = 0

        def keep(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.nbytes)
            return tensor

        def count(module: Any, args: Any) -> None:
            nonlocal calls
            calls += 1

        handle = decoder.layers[LAYER + 2].get_submodule("self_attn").register_forward_pre_hook(count)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = runner.suffix(
                LAYER, hidden, rows, edits=edits, positions=torch.tensor([8, 12, 15, 3, 17]), recompute=recompute
            )
        out.backward(upstream)
        handle.remove()
        gradients = [hidden.grad, *([] if edited is None else [delta.grad])]
        results.append([out.detach(), *gradients])
        kept.append(sum(sizes))
        passes.append(calls)
    for plain, again in zip(*results, strict=True):
        assert plain is not None
        assert again is not None
        assert torch.equal(plain, again)
    assert passes == [1, 2]
    assert kept[1] < 0.5 * kept[0]
    assert not any("forward" in module.__dict__ for module in decoder.model.modules())


@pytest.mark.parametrize("count", [1, 15, 16, 17, 31, 48])
def test_what_fills_up_to_a_multiple_of_16_meets_nobody(count: int) -> None:
    decoder = inspect_decoder(tiny_model("gemma2").requires_grad_(False))
    runner = PackedRunner(decoder, PREFIX)
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(count, decoder.hidden_size, generator=generator)
    ids = [[int(each) for each in torch.randint(3, 300, (count,), generator=generator)]]
    rows = Rows((count,), len(PREFIX))
    assert int(rows.filled.starts[-1]) == -(-count // 16) * 16
    assert rows.filled.lengths[:1] == rows.lengths
    captured, suffix = runner.capture(ids, [LAYER]), runner.suffix(LAYER, hidden, rows)
    assert captured.final is not None
    assert [len(each) for each in (captured.final, captured.hidden[LAYER], suffix)] == [count] * 3
    padded = PaddedRunner(decoder, PREFIX)
    torch.testing.assert_close(captured.final, padded.capture(ids, []).final, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(suffix, padded.suffix(LAYER, hidden, rows), rtol=1e-4, atol=1e-5)


class RowsSeen(TorchFunctionMode):
    """Counts the rows that a linear map of a given weight is applied to."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.weights = weights
        self.rows: dict[str, int] = {}

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is nn.functional.linear:
            seen = [name for name, weight in self.weights.items() if args[1] is weight]
            self.rows |= {name: args[0].shape[:-1].numel() for name in seen}
        return function(*args, **(kwargs or {}))


PROJECTIONS = ["self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"]


def rows_seen(runner: PackedRunner, **arguments: Any) -> list[int]:
    """How many tokens the projections of the last two layers see in a suffix read at three of 44, both filled up."""
    layers: Any = runner.decoder.layers
    weights = {f"{layer}.{name}": layers[layer].get_submodule(name).weight for layer in (3, 4) for name in PROJECTIONS}
    hidden = torch.randn(44, runner.decoder.hidden_size, dtype=runner.decoder.dtype)
    with RowsSeen(weights) as seen:
        runner.suffix(LAYER, hidden, Rows((30, 14), len(PREFIX)), positions=torch.tensor([1, 9, 41]), **arguments)
    return [seen.rows[name] for name in weights]


@pytest.mark.parametrize("name", ["llama", "gemma2", "olmo2"])
def test_what_is_not_read_is_not_computed(name: str) -> None:
    decoder = inspect_decoder(tiny_model(name, dtype=torch.float64).requires_grad_(False))
    runner = PackedRunner(decoder, PREFIX)
    assert rows_seen(runner) == [48] * 4 + [48, 16, 16, 16]
    assert rows_seen(runner, edits={3: lambda hidden: hidden}) == [48] * 4 + [48, 16, 16, 16]
    assert rows_seen(runner, edits={4: lambda hidden: hidden}) == [48] * 8
    everywhere: Any = decoder.layers
    assert not [each for each in everywhere.modules() if "forward" in vars(each)]


@pytest.mark.parametrize("watched", ["model.layers.4", "model.layers.4.mlp.down_proj", "model.norm"])
def test_hooks_are_shown_every_token(watched: str) -> None:
    model = tiny_model(dtype=torch.float64).requires_grad_(False)
    runner = PackedRunner(inspect_decoder(model), PREFIX)
    handle = model.get_submodule(watched).register_forward_hook(lambda *_: None)
    assert rows_seen(runner) == [48] * 8
    handle.remove()
    assert rows_seen(runner)[-1] == 16


class Doubling(nn.Linear):
    """Perhaps one that looks at all tokens, as some of 8 bits do."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize(("path", "expected"), [("mlp.up_proj", [16, 48, 48]), ("self_attn.o_proj", [48, 16, 16])])
def test_linear_maps_of_another_kind_see_every_token(path: str, expected: list[int]) -> None:
    model = tiny_model(dtype=torch.float64).requires_grad_(False)
    model.model.layers[4].get_submodule(path).__class__ = Doubling
    assert rows_seen(PackedRunner(inspect_decoder(model), PREFIX))[-3:] == expected


@models
def test_auto_packs_and_leaves_the_model_as_it_was(name: str) -> None:
    model = tiny_model(name)
    decoder = inspect_decoder(model)
    before = model.config._attn_implementation
    runner = make_runner(decoder, PREFIX)
    assert isinstance(runner, PackedRunner)
    runner.capture(SEQUENCES, [LAYER])
    assert model.config._attn_implementation == before
    model(input_ids=torch.tensor([PREFIX]))


def test_windows_matter() -> None:
    """The cases above reach beyond the window of the models that have one."""
    assert max(ROWS.lengths) > WINDOW
    with torch.no_grad():
        narrow, wide = (
            PackedRunner(inspect_decoder(tiny_model("mistral", sliding_window=window)), PREFIX).capture(SEQUENCES, [])
            for window in (WINDOW, 100)
        )
    assert narrow.final is not None
    assert wide.final is not None
    assert (narrow.final - wide.final).abs().max() > 1e-3


class OwnAttention(nn.Module):
    """An attention that does not ask transformers for its implementation."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
        return hidden_states.cumsum(1) / hidden_states.shape[1], None


def test_another_kind_of_attention_is_padded_and_said_so(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model()
    model.model.layers[3].self_attn = OwnAttention(model.model.layers[3].self_attn)
    decoder = inspect_decoder(model)
    with pytest.raises(UnsupportedError, match=r"packed attention: expected every layer .* got \[3\]"):
        make_runner(decoder, PREFIX, "packed")
    with caplog.at_level(logging.WARNING):
        assert isinstance(make_runner(decoder, PREFIX), PaddedRunner)
    assert "rows are padded, not packed: packed attention: expected every layer" in caplog.text


class Mixing(nn.Module):
    """A layer part that looks at its neighbours, which packed rows must not."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden: Tensor) -> Tensor:
        result: Tensor = self.inner(hidden + hidden.roll(1, 1))
        return result


def test_a_trial_finds_layers_that_mix_tokens() -> None:
    model = tiny_model()
    model.model.layers[4].mlp = Mixing(model.model.layers[4].mlp)
    with pytest.raises(UnsupportedError, match="expected a whole pass to end as the model's own"):
        make_runner(inspect_decoder(model), PREFIX, "packed")


class LoopedDecoderLayer(LlamaDecoderLayer):
    """One that runs twice, so that tokens meet again after the MLP."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward(super().forward(hidden_states, *args, **kwargs), *args, **kwargs)


def test_a_trial_finds_tokens_that_meet_again_in_the_last_layer() -> None:
    model = tiny_model()
    model.model.layers[4].__class__ = LoopedDecoderLayer
    with pytest.raises(UnsupportedError, match="expected a suffix read at some tokens to end as the model's own"):
        make_runner(inspect_decoder(model), [], "packed")


def test_other_packings_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="packing: expected auto, packed or padded, got 'dense'"):
        make_runner(inspect_decoder(tiny_model()), PREFIX, "dense")  # type: ignore[arg-type]
