"""Passes over rows of tokens that all begin with the same prefix, without computing the prefix in each of them.

Rows are given beyond the prefix, one behind the other: (N, D) for N tokens of B rows. Two runners do the same passes:

    PackedRunner  N tokens go through the model as one sequence; attention alone knows where rows begin, and reads the
                  keys and values of the prefix, which were kept when the prefix ran once
    PaddedRunner  rows of P + T tokens, padded on the right, for the models and devices that the former is not for

The model's own forward pass does the work in both, see suffix.py.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from cdas_fast.errors import InvalidInputError, UnsupportedError, expected_got
from cdas_fast.models.fused import MULTIPLE, find_fused
from cdas_fast.models.layer_major import LayerwisePass
from cdas_fast.models.skeleton import layer_weights
from cdas_fast.models.structure import Decoder, text_config
from cdas_fast.models.suffix import Capture, Edit, capture_activations, handing_on, rehearse, run_suffix
from cdas_fast.ops import cpu_library
from cdas_fast.ops.implementation import Implementation
from cdas_fast.ops.packed_attention import packed_attention

Packing = Literal["auto", "packed", "padded"]

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rows:
    """Lengths of packed rows beyond a prefix of P tokens."""

    lengths: tuple[int, ...]
    prefix_length: int

    @functools.cached_property
    def starts(self) -> Tensor:
        """Where each row begins, and the number of tokens N; (B + 1,)."""
        return torch.tensor([0, *itertools.accumulate(self.lengths)])

    @functools.cached_property
    def owners(self) -> Tensor:
        """The row of each token, (N,)."""
        return torch.repeat_interleave(torch.tensor(self.lengths, dtype=torch.int64))

    @functools.cached_property
    def positions(self) -> Tensor:
        """The position of each token in its row, the prefix counted; (N,)."""
        return torch.arange(int(self.starts[-1])) - self.starts[self.owners] + self.prefix_length

    @functools.cached_property
    def filled(self) -> Rows:
        """With one row more, if N is no multiple of 16, so that it is."""
        more = -sum(self.lengths) % MULTIPLE
        return Rows((*self.lengths, more), self.prefix_length) if more else self

    @property
    def padded_length(self) -> int:
        """P + T, T being the greatest length."""
        return self.prefix_length + max(self.lengths, default=0)


class Runner(Protocol):
    """Passes of one decoder over rows behind one prefix."""

    decoder: Decoder
    prefix_ids: tuple[int, ...]
    pads: bool  # whether short rows cost as much as the longest beside them

    def capture(
        self, sequences: Sequence[Sequence[int]], layers: Sequence[int], *, stop_after: int | None = None
    ) -> Capture:
        """Outputs of `layers` and final hidden states, (N, D) each, for tokens beyond the prefix.

        With `stop_after`, layers beyond it are not run and `Capture.final` is None.
        """

    def suffix(
        self,
        layer: int,
        hidden: Tensor,
        rows: Rows,
        *,
        edits: Mapping[int, Edit] | None = None,
        positions: Tensor | None = None,
        recompute: bool = False,
    ) -> Tensor:
        """Final hidden states (N, D), after the final norm, when layer `layer` puts out `hidden` (N, D).

        Layers 0 to `layer` are not run. `edits` change the output (N, D) of later layers. With `positions` (M,), those
        of these tokens alone, (M, D) in that order; what the others end as may not be computed. Differentiable with
        respect to `hidden` and to whatever the edits depend on; with `recompute`, see `run_suffix`.
        """

    def begin(self, sequences: Sequence[Sequence[int]]) -> LayerwisePass:
        """A pass like `capture`, to be run layer by layer: it begins with `rehearsal.entering`, and reads (N, D)."""

    def begin_prefix(self) -> LayerwisePass | None:
        """A pass over the prefix, to be run layer by layer, each before those of `begin`; None if there is none."""

    def keep_prefix(self, layer: int, hidden: Tensor) -> None:
        """Take up what a layer makes of the prefix, (1, P, D), after `begin_prefix` has run it."""

    def prefix_state(self, layer: int) -> dict[str, Tensor]:
        """What the runner knows of the prefix, as far as suffixes from `layer` need it; of -1, all of it."""

    def restore_prefix(self, state: Mapping[str, Tensor]) -> None:
        """Take up what `prefix_state` gave."""

    def begin_suffix(
        self,
        layer: int,
        hidden: Tensor,
        rows: Rows,
        *,
        edits: Mapping[int, Edit] | None = None,
        positions: Tensor | None = None,
    ) -> tuple[LayerwisePass, Tensor]:
        """A pass like `suffix`, to be run layer by layer, and what goes into its first layer."""


def make_runner(
    decoder: Decoder, prefix_ids: Sequence[int], packing: Packing = "auto", impl: Implementation = "auto"
) -> Runner:
    """The runner for a decoder and its device.

    `auto` packs on a CPU that has the compiled kernels, if a trial on this model gives what the model itself does, and
    says in the log why it does not. `impl` is the implementation of attention and of the norms and MLPs that the fused
    ops can run; those without a Triton kernel take `auto` for it. With `reference`, `auto` pads.

    Raises:
        InvalidInputError: another `packing`.
        UnsupportedError: `packed` is asked for and the model's attention cannot be.
    """
    impl = "auto" if impl == "triton" else impl
    match packing:
        case "padded":
            return PaddedRunner(decoder, prefix_ids, impl)
        case "packed":
            return _tried(PackedRunner(decoder, prefix_ids, impl))
        case "auto":
            if impl == "reference" or decoder.device.type != "cpu" or not cpu_library.available():
                return PaddedRunner(decoder, prefix_ids, impl)
            try:
                return _tried(PackedRunner(decoder, prefix_ids, impl))
            except UnsupportedError as error:
                _logger.warning("rows are padded, not packed: %s", error)
                return PaddedRunner(decoder, prefix_ids, impl)
    raise InvalidInputError(expected_got("packing", "auto, packed or padded", repr(packing)))


def shared_prefix(sequences: Sequence[Sequence[int]], longest: int) -> tuple[int, ...]:
    """The tokens that all sequences begin with, at most `longest` and fewer than the shortest has."""
    length = min([longest, *(len(sequence) - 1 for sequence in sequences)])
    first = sequences[0]
    for place in range(length):
        if any(sequence[place] != first[place] for sequence in sequences):
            return tuple(first[:place])
    return tuple(first[:length])


class PackedRunner:
    """N tokens as one sequence, whose attention knows the rows; filled up by a row of its own to a multiple of 16."""

    pads = False

    def __init__(self, decoder: Decoder, prefix_ids: Sequence[int], impl: Implementation = "auto") -> None:
        _register()
        self.decoder, self.prefix_ids, self._impl = decoder, tuple(prefix_ids), impl
        self._fused = find_fused(decoder, impl)
        self._configs = _attention_configs(decoder)
        self._prefix: dict[int, tuple[Tensor, Tensor]] = {}  # layer -> keys and values
        self._idle: frozenset[int] = frozenset()  # layers that hand on what they are given
        if self.prefix_ids and layer_weights(decoder.model) is None:  # else when it is needed, or by `begin_prefix`
            self._run_prefix(decoder.num_layers - 1)

    def capture(
        self, sequences: Sequence[Sequence[int]], layers: Sequence[int], *, stop_after: int | None = None
    ) -> Capture:
        """See `Runner`."""
        device = self.decoder.device
        rows = Rows(tuple(map(len, sequences)), len(self.prefix_ids))
        count, filled = int(rows.starts[-1]), rows.filled
        ids = [*itertools.chain.from_iterable(sequences), *[0] * (int(filled.starts[-1]) - count)]
        positions = filled.positions[None].to(device)
        last = self.decoder.num_layers - 1 if stop_after is None else stop_after
        with self._attention(filled.starts, range(last + 1)):
            captured = capture_activations(
                self.decoder,
                torch.tensor([ids], device=device),
                layers,
                position_ids=positions,
                stop_after=stop_after,
            )
        final = None if captured.final is None else captured.final[0, :count]
        return Capture({layer: hidden[0, :count] for layer, hidden in captured.hidden.items()}, final)

    def suffix(
        self,
        layer: int,
        hidden: Tensor,
        rows: Rows,
        *,
        edits: Mapping[int, Edit] | None = None,
        positions: Tensor | None = None,
        recompute: bool = False,
    ) -> Tensor:
        """See `Runner`."""
        count, filled = len(hidden), rows.filled
        more = int(filled.starts[-1]) - count

        def again(layer: int) -> AbstractContextManager[None]:
            return self._attention(filled.starts, range(layer, layer + 1), read=narrow)

        edits, last = edits or {}, self.decoder.num_layers - 1
        read = None if positions is None else positions.to(hidden.device)
        narrow = None if read is None or last in edits else read.unique()  # an edit is shown every token's output
        with self._attention(filled.starts, range(layer + 1, last + 1), read=narrow):
            final = run_suffix(
                self.decoder,
                layer,
                nn.functional.pad(hidden, (0, 0, 0, more))[None],
                position_ids=filled.positions[None].to(hidden.device),
                edits=_on_sequence(edits, count),
                recompute=again if recompute else None,
            )[0]
        return final[:count] if read is None else final.index_select(0, read)

    def begin(self, sequences: Sequence[Sequence[int]]) -> LayerwisePass:
        """See `Runner`."""
        rows = Rows(tuple(map(len, sequences)), len(self.prefix_ids))
        count, filled = int(rows.starts[-1]), rows.filled
        ids = [*itertools.chain.from_iterable(sequences), *[0] * (int(filled.starts[-1]) - count)]
        return self._begin(filled, lambda final: final[0, :count], input_ids=torch.tensor([ids]))

    def begin_prefix(self) -> LayerwisePass | None:
        """See `Runner`."""
        if not self.prefix_ids:
            return None
        ids = torch.tensor([self.prefix_ids])
        return self._begin(Rows((len(self.prefix_ids),), 0), lambda final: final[0], keeps=True, input_ids=ids)

    def keep_prefix(self, layer: int, hidden: Tensor) -> None:
        """See `Runner`. Its keys and values were kept when the layer ran."""

    def prefix_state(self, layer: int) -> dict[str, Tensor]:
        """See `Runner`."""
        kept = {each: pair for each, pair in self._prefix.items() if each > layer}
        return {f"{name}.{each}": pair[number] for each, pair in kept.items() for number, name in enumerate(_HEADS)}

    def restore_prefix(self, state: Mapping[str, Tensor]) -> None:
        """See `Runner`."""
        layers = {int(name.partition(".")[2]) for name in state}
        for layer in layers:
            keys, values = (state[f"{name}.{layer}"].to(self.decoder.device) for name in _HEADS)
            self._prefix[layer] = keys, values

    def begin_suffix(
        self,
        layer: int,
        hidden: Tensor,
        rows: Rows,
        *,
        edits: Mapping[int, Edit] | None = None,
        positions: Tensor | None = None,
    ) -> tuple[LayerwisePass, Tensor]:
        """See `Runner`."""
        count, filled = len(hidden), rows.filled
        entering = nn.functional.pad(hidden, (0, 0, 0, int(filled.starts[-1]) - count))[None]
        edits, last = _on_sequence(edits or {}, count), self.decoder.num_layers - 1
        read = None if positions is None else positions.to(hidden.device)

        def leave(final: Tensor) -> Tensor:
            return final[0, :count] if read is None else final[0].index_select(0, read)

        narrow = None if read is None or last in edits else read.unique()
        return self._begin(filled, leave, edits, narrow, inputs_embeds=entering.detach()), entering

    def _begin(
        self,
        filled: Rows,
        leave: Edit,
        edits: Mapping[int, Edit] | None = None,
        narrow: Tensor | None = None,
        keeps: bool = False,
        **inputs: Tensor,
    ) -> LayerwisePass:
        device = self.decoder.device

        def context(layer: int | None) -> AbstractContextManager[None]:
            layers = range(0) if layer is None else range(layer, layer + 1)
            return self._attention(filled.starts, layers, keeps=keeps, read=narrow)

        with context(None):
            given = {name: each.to(device) for name, each in inputs.items()}
            rehearsal = rehearse(self.decoder, position_ids=filled.positions[None].to(device), **given)
        return LayerwisePass(self.decoder, rehearsal, context, leave, edits or {})

    @contextmanager
    def _attention(
        self, starts: Tensor, layers: range, *, keeps: bool = False, read: Tensor | None = None
    ) -> Iterator[None]:
        wanted = set(layers) - self._idle
        if not keeps and self.prefix_ids and not self._prefix.keys() >= wanted:
            self._run_prefix(max(wanted))
        attention = _Attention(starts, {} if keeps else self._prefix, self._prefix if keeps else None, self._impl)
        with self._fused.applied(read), attention.of(self._configs, wanted):
            yield

    def _run_prefix(self, last: int) -> None:
        """Keep the prefix's keys and values up to layer `last`."""
        ids = torch.tensor([self.prefix_ids], device=self.decoder.device)
        with self._attention(Rows((len(self.prefix_ids),), 0).starts, range(last + 1), keeps=True):
            capture_activations(self.decoder, ids, [], stop_after=last)


class PaddedRunner:
    """Rows of P + T tokens, padded on the right: causal attention never looks at what follows."""

    pads = True

    def __init__(self, decoder: Decoder, prefix_ids: Sequence[int], impl: Implementation = "auto") -> None:
        self.decoder, self.prefix_ids = decoder, tuple(prefix_ids)
        self._fused = find_fused(decoder, impl)
        self._prefix: dict[int, Tensor] = {}  # layer -> its output (P, D)

    def capture(
        self, sequences: Sequence[Sequence[int]], layers: Sequence[int], *, stop_after: int | None = None
    ) -> Capture:
        """See `Runner`."""
        rows = Rows(tuple(map(len, sequences)), len(self.prefix_ids))
        device = self.decoder.device
        ids = self._padded_ids(sequences, rows).to(device)
        with self._fused.applied():
            captured = capture_activations(self.decoder, ids, layers, stop_after=stop_after)
        places = _places(rows).to(device)

        def packed(hidden: Tensor) -> Tensor:
            return hidden.flatten(0, 1)[places]

        final = None if captured.final is None else packed(captured.final)
        return Capture({layer: packed(hidden) for layer, hidden in captured.hidden.items()}, final)

    def suffix(
        self,
        layer: int,
        hidden: Tensor,
        rows: Rows,
        *,
        edits: Mapping[int, Edit] | None = None,
        positions: Tensor | None = None,
        recompute: bool = False,
    ) -> Tensor:
        """See `Runner`."""
        places = _places(rows).to(hidden.device)
        with self._fused.applied():
            final = run_suffix(
                self.decoder,
                layer,
                self._padded(layer, hidden, rows, places),
                edits=_on_padded(edits or {}, rows, places),
                recompute=(lambda layer: self._fused.applied()) if recompute else None,
            )
        if positions is not None:
            places = places[positions.to(places.device)]
        return final.flatten(0, 1).index_select(0, places)

    def begin(self, sequences: Sequence[Sequence[int]]) -> LayerwisePass:
        """See `Runner`."""
        rows = Rows(tuple(map(len, sequences)), len(self.prefix_ids))
        ids = self._padded_ids(sequences, rows).to(self.decoder.device)
        return self._begin(_places(rows), {}, input_ids=ids)

    def begin_prefix(self) -> LayerwisePass | None:
        """See `Runner`."""
        if not self.prefix_ids:
            return None
        places = torch.arange(len(self.prefix_ids))
        return self._begin(places, {}, input_ids=torch.tensor([self.prefix_ids], device=self.decoder.device))

    def keep_prefix(self, layer: int, hidden: Tensor) -> None:
        """See `Runner`."""
        self._prefix[layer] = hidden[0]

    def prefix_state(self, layer: int) -> dict[str, Tensor]:
        """See `Runner`."""
        return {f"hidden.{each}": hidden for each, hidden in self._prefix.items() if layer in (-1, each)}

    def restore_prefix(self, state: Mapping[str, Tensor]) -> None:
        """See `Runner`."""
        for name, hidden in state.items():
            self._prefix[int(name.partition(".")[2])] = hidden.to(self.decoder.device)

    def begin_suffix(
        self,
        layer: int,
        hidden: Tensor,
        rows: Rows,
        *,
        edits: Mapping[int, Edit] | None = None,
        positions: Tensor | None = None,
    ) -> tuple[LayerwisePass, Tensor]:
        """See `Runner`."""
        places = _places(rows).to(hidden.device)
        entering = self._padded(layer, hidden, rows, places)
        read = places if positions is None else places[positions.to(places.device)]
        return self._begin(read, _on_padded(edits or {}, rows, places), inputs_embeds=entering.detach()), entering

    def _begin(self, read: Tensor, edits: Mapping[int, Edit], **inputs: Tensor) -> LayerwisePass:
        read = read.to(self.decoder.device)
        return LayerwisePass(
            self.decoder,
            rehearse(self.decoder, **inputs),
            lambda layer: self._fused.applied(),
            lambda final: final.flatten(0, 1).index_select(0, read),
            edits,
        )

    def _padded(self, layer: int, hidden: Tensor, rows: Rows, places: Tensor) -> Tensor:
        """(B, P + T, D) of packed (N, D), with the prefix's own output of `layer`; the pads are 0."""
        count = len(rows.lengths)
        around = hidden.new_zeros(count, rows.padded_length, hidden.shape[1])
        around[:, : rows.prefix_length] = self._prefix_hidden(layer).to(hidden)
        return around.flatten(0, 1).index_copy(0, places, hidden).unflatten(0, (count, rows.padded_length))

    def _padded_ids(self, sequences: Sequence[Sequence[int]], rows: Rows) -> Tensor:
        ids = torch.zeros(len(sequences), rows.padded_length, dtype=torch.int64)
        for row, sequence in zip(ids, sequences, strict=True):
            row[: len(self.prefix_ids) + len(sequence)] = torch.tensor([*self.prefix_ids, *sequence])
        return ids

    def _prefix_hidden(self, layer: int) -> Tensor:
        if layer not in self._prefix:
            ids = torch.tensor([self.prefix_ids], device=self.decoder.device, dtype=torch.int64)
            if not self.prefix_ids:
                return self.decoder.head.weight.new_empty(0, self.decoder.hidden_size)
            with self._fused.applied():
                captured = capture_activations(self.decoder, ids, [layer], stop_after=layer)
            self._prefix[layer] = captured.hidden[layer][0]
        return self._prefix[layer]


def _on_sequence(edits: Mapping[int, Edit], count: int) -> dict[int, Edit]:
    """Edits (N, D) of the first `count` tokens of one sequence, as edits of (1, N, D)."""

    def of(edit: Edit) -> Edit:
        return lambda hidden: torch.cat([edit(hidden[0, :count]), hidden[0, count:]])[None]

    return {layer: of(edit) for layer, edit in edits.items()}


def _on_padded(edits: Mapping[int, Edit], rows: Rows, places: Tensor) -> dict[int, Edit]:
    """Edits (N, D) of the packed tokens, as edits of padded rows (B, P + T, D)."""

    def of(edit: Edit) -> Edit:
        def apply(hidden: Tensor) -> Tensor:
            flat = hidden.flatten(0, 1)
            return flat.index_copy(0, places, edit(flat[places])).view_as(hidden)

        return apply

    return {layer: of(edit) for layer, edit in edits.items()}


def _places(rows: Rows) -> Tensor:
    """Where each token lies among B x (P + T) padded ones, (N,)."""
    return rows.owners * rows.padded_length + rows.positions


@dataclass
class _Attention:
    """What the attention of a pass has to know, and what it found."""

    starts: Tensor
    prefix: Mapping[int, tuple[Tensor, Tensor]]  # layer -> keys (P, G, E) and values (P, G, F)
    kept: dict[int, tuple[Tensor, Tensor]] | None  # to be filled with the keys and values of the pass, if any
    impl: Implementation
    layers: set[int] = field(default_factory=set)  # those that came by

    @contextmanager
    def of(self, configs: Sequence[Any], layers: Set[int]) -> Iterator[None]:
        """Let the decoder of these configurations attend so; each of the layers has to come by.

        Raises:
            UnsupportedError: a layer has an attention of its own kind.
        """
        own = [config._attn_implementation for config in configs]
        token = _current.set(self)
        try:
            for config in configs:
                config._attn_implementation = _NAME
            yield
        finally:
            _current.reset(token)
            for config, name in zip(configs, own, strict=True):
                config._attn_implementation = name
        if missing := sorted(layers - self.layers):
            raise _unsupported("every layer to take its attention from transformers' AttentionInterface", missing)


def _attention_configs(decoder: Decoder) -> list[Any]:
    """The configurations that say which attention the decoder's modules take."""
    found: Iterator[Any] = (getattr(module, "config", None) for module in decoder.stack.modules())
    return list({id(config): config for config in found if hasattr(config, "_attn_implementation")}.values())


_HEADS = ("keys", "values")
_NAME = "cdas_fast_packed"
_current: ContextVar[_Attention] = ContextVar(_NAME)


@functools.cache
def _register() -> None:
    from transformers import AttentionInterface

    AttentionInterface.register(_NAME, _attend)


def _attend(
    module: nn.Module,
    query: Tensor,  # (1, H, N, E)
    key: Tensor,  # (1, G, N, E)
    value: Tensor,  # (1, G, N, F)
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in each layer: (1, N, H, F)."""
    attention, layer = _current.get(), int(module.layer_idx)  # type: ignore[arg-type]
    _check_arguments(module, layer, attention_mask, dropout, sliding_window, others)
    attention.layers.add(layer)
    queries, keys, values = (heads[0].transpose(0, 1) for heads in (query, key, value))
    if attention.kept is not None:
        attention.kept[layer] = keys.detach().contiguous(), values.detach().contiguous()
    none = keys[:0].detach(), values[:0].detach()
    out = packed_attention(
        queries,
        keys,
        values,
        attention.starts,
        *attention.prefix.get(layer, none),
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        softcap=softcap,
        window=sliding_window,
        impl=attention.impl,
    )
    return out[None], None


def _check_arguments(
    module: nn.Module,
    layer: int,
    attention_mask: Tensor | None,
    dropout: float,
    sliding_window: int | None,
    others: Mapping[str, Any],
) -> None:
    if attention_mask is not None:
        raise _unsupported("no attention mask", tuple(attention_mask.shape))
    if dropout:
        raise _unsupported("no dropout of attention", dropout)
    for name in ("s_aux", "position_bias", "head_mask"):
        if others.get(name) is not None:
            raise _unsupported("attention without sinks, biases and head masks", name)
    if not (others.get("is_causal", True) in (True, None) and getattr(module, "is_causal", True)):
        raise _unsupported("causal attention", f"another one in layer {layer}")
    kinds = getattr(getattr(module, "config", None), "layer_types", None)
    kind = kinds[layer] if kinds else None
    if kind not in (None, "full_attention", "sliding_attention"):
        raise _unsupported("full or sliding attention", kind)
    if kind == "sliding_attention" and sliding_window is None:
        raise _unsupported("the window of a layer with sliding attention", "none")


def _unsupported(wanted: str, got: object) -> UnsupportedError:
    return UnsupportedError(expected_got("packed attention", wanted, got))


def _tried(runner: PackedRunner) -> PackedRunner:
    """The runner, if two short rows give what the model itself makes of each.

    Of a model whose linear weights are read when they are needed, only the last layer of each kind takes part.
    """
    decoder = runner.decoder
    if layer_weights(decoder.model) is None:
        _try_out(runner)
        return runner
    kinds = getattr(text_config(decoder.model), "layer_types", None) or [None] * decoder.num_layers
    last_of_kind = {kind: layer for layer, kind in enumerate(kinds)}
    runner._idle = frozenset(range(decoder.num_layers)) - set(last_of_kind.values())
    try:
        with handing_on(decoder, runner._idle):
            _try_out(runner)
    finally:
        runner._idle = frozenset()
        runner._prefix.clear()  # it was not that of all layers
    return runner


@torch.no_grad()
def _try_out(runner: PackedRunner) -> None:
    decoder, prefix = runner.decoder, runner.prefix_ids
    vocabulary = decoder.head.weight.shape[0]
    sequences = [[(7 * place + 3 * row + 1) % vocabulary for place in range(5 + 4 * row)] for row in range(2)]
    middle = decoder.num_layers // 2
    captured = runner.capture(sequences, [middle])
    rows = Rows(tuple(map(len, sequences)), len(prefix))
    assert captured.final is not None
    given, some = captured.hidden[middle], torch.arange(0, int(rows.starts[-1]), 2, device=decoder.device)
    wholes = []
    for sequence in sequences:
        ids = torch.tensor([[*prefix, *sequence]], device=decoder.device)
        whole = capture_activations(decoder, ids, []).final
        assert whole is not None
        wholes.append(whole[0, len(prefix) :])
    right = torch.cat(wholes)
    for name, found, expected in (
        ("a whole pass", captured.final, right),
        ("a suffix", runner.suffix(middle, given, rows), right),
        ("a suffix read at some tokens", runner.suffix(middle, given, rows, positions=some), right[some]),
    ):
        error = float((found.float() - expected.float()).norm() / expected.float().norm())
        if not error <= pass_tolerance(decoder.dtype):
            raise _unsupported(f"{name} to end as the model's own", f"a relative difference of {error:.2g}")


def pass_tolerance(dtype: torch.dtype) -> float:
    """Relative difference by which two ways to run the same layers may end apart: rounding in other places."""
    return 1e-3 if dtype in (torch.float32, torch.float64) else 0.1
