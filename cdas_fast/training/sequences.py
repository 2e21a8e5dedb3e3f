"""Which sequences the frozen model has to run for training rows, what is kept of each, and which are run together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cdas_fast.data.rows import TokenRows, TrainingRow
from cdas_fast.errors import NonFiniteError, expected_got
from cdas_fast.models.suffix import Capture
from cdas_fast.training.activation_store import base_key, check_key, prompt_key, source_key

FINAL = -1  # in the place of a layer: after the final norm


@dataclass(frozen=True)
class Piece:
    """Hidden states of successive tokens that are kept of a sequence."""

    tensor: str  # what they are kept in
    layer: int  # whose output, or FINAL
    begin: int  # the first token beyond the prefix
    length: int


@dataclass(frozen=True)
class CachedSequence:
    """A sequence that is run, and what is kept of it."""

    name: str  # how errors name it
    ids: tuple[int, ...]  # the prefix included
    key: str
    pieces: tuple[Piece, ...]  # those of a tensor one behind the other

    @property
    def lengths(self) -> Counter[str]:
        """Of each tensor that is kept, (length, D)."""
        lengths: Counter[str] = Counter()
        for piece in self.pieces:
            lengths[piece.tensor] += piece.length
        return lengths

    def joined(self, found: Sequence[Tensor]) -> dict[str, Tensor]:
        """The tensors that are kept, of what was found for each piece, (length, D)."""
        parts: dict[str, list[Tensor]] = {}
        for piece, tensor in zip(self.pieces, found, strict=True):
            parts.setdefault(piece.tensor, []).append(tensor)
        return {name: each[0] if len(each) == 1 else torch.cat(each) for name, each in parts.items()}

    def read(self, captured: Capture, begin: int) -> dict[str, Tensor]:
        """These tensors, from a pass in which it begins at a token."""
        sources = [captured.final if piece.layer == FINAL else captured.hidden[piece.layer] for piece in self.pieces]
        found = []
        for piece, source in zip(self.pieces, sources, strict=True):
            assert source is not None
            found.append(source[begin + piece.begin : begin + piece.begin + piece.length])
        return self.joined(found)


@dataclass(frozen=True)
class SequencePass:
    """Sequences that are run alike, see `Runner.capture`."""

    sequences: Sequence[CachedSequence]
    layers: Sequence[int]
    stop_after: int | None

    @classmethod
    def of(cls, sequences: Iterable[CachedSequence], layers: Sequence[int], stop_after: int | None) -> SequencePass:
        """A pass over each of the sequences once."""
        return cls(list({sequence.key: sequence for sequence in sequences}.values()), layers, stop_after)

    def batches(self, shared: int, max_tokens: int, pads: bool) -> list[list[CachedSequence]]:
        """The sequences by length, as many in a batch as `batches_by_tokens` says."""
        lengths = [len(sequence.ids) - shared for sequence in self.sequences]
        order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
        batches = batches_by_tokens(order, lengths, max_tokens, pads=pads)
        return [[self.sequences[index] for index in batch] for batch in batches]


@dataclass(frozen=True)
class CachedSequences:
    """All sequences of a set of rows."""

    base: Sequence[CachedSequence]  # of each row
    source: Sequence[CachedSequence]  # of each row
    positive: Sequence[CachedSequence]  # each pair's positive prompt, which may be a source
    negative: Sequence[CachedSequence]  # each pair's negative prompt, likewise
    layers: tuple[int, ...]

    @property
    def kinds(self) -> tuple[Sequence[CachedSequence], ...]:
        """All four."""
        return self.base, self.source, self.positive, self.negative

    @property
    def passes(self) -> list[SequencePass]:
        """What has to be run."""
        return merged_passes([self])


def merged_passes(sets: Sequence[CachedSequences]) -> list[SequencePass]:
    """What has to be run for several sets of rows with the same layers."""
    layers = sets[0].layers
    sources = {each.key: each for one in sets for each in one.source}
    prompts = [each for one in sets for side in (one.positive, one.negative) for each in side]
    return [
        SequencePass.of(sources.values(), layers, None),
        SequencePass.of((each for one in sets for each in one.base), layers[:1], layers[0]),
        SequencePass.of((each for each in prompts if each.key not in sources), layers, layers[-1]),
    ]


def cached_sequences(rows: TokenRows, layers: Sequence[int], shared: int) -> CachedSequences:
    """The sequences of rows that begin with a shared prefix of so many tokens; layers ascending."""
    base = [_base_sequence(row, layers[0], shared) for row in rows.rows]
    source = [_source_sequence(row, layers, shared) for row in rows.rows]
    first_pair = rows.rows[0].pair
    covered: dict[tuple[str, int], CachedSequence] = {}
    for row, one in zip(rows.rows, source, strict=True):
        covered[row.toward, row.pair - first_pair] = one

    def prompts(side: str, of_side: Sequence[tuple[int, ...]]) -> list[CachedSequence]:
        return [
            covered[side, pair]
            if (side, pair) in covered
            else _prompt_sequence(ids, f"{side} prompt of pair {pair + first_pair}", layers, shared)
            for pair, ids in enumerate(of_side)
        ]

    sides = prompts("positive", rows.positive_prompts), prompts("negative", rows.negative_prompts)
    return CachedSequences(base, source, *sides, tuple(layers))


def check_pass(one: CachedSequences, shared: int) -> SequencePass:
    """The first base sequence to the end, for comparison with what its suffix makes of the cached activations."""
    ids = one.base[0].ids
    piece = Piece("final", FINAL, 0, len(ids) - shared)
    return SequencePass([CachedSequence(one.base[0].name, ids, check_key(ids), (piece,))], one.layers, None)


def _base_sequence(row: TrainingRow, layer: int, shared: int) -> CachedSequence:
    ids = row.base.ids
    return CachedSequence(row.name, ids, base_key(ids, layer), (Piece("hidden", layer, 0, len(ids) - shared),))


def _source_sequence(row: TrainingRow, layers: Sequence[int], shared: int) -> CachedSequence:
    sequence, position = row.source, row.source_position
    pieces = [Piece("final", FINAL, sequence.prompt_length - 1 - shared, sequence.response_length)]
    pieces += [Piece("source", layer, position - shared, 1) for layer in layers]
    key = source_key(sequence.ids, sequence.prompt_length, position, layers)
    return CachedSequence(row.name, sequence.ids, key, tuple(pieces))


def _prompt_sequence(ids: tuple[int, ...], name: str, layers: Sequence[int], shared: int) -> CachedSequence:
    last = len(ids) - 1 - shared
    return CachedSequence(name, ids, prompt_key(ids, layers), tuple(Piece("source", each, last, 1) for each in layers))


def batches_by_tokens(
    order: Iterable[int], lengths: Sequence[int], max_tokens: int, *, pads: bool = True
) -> list[list[int]]:
    """Cut `order` into runs whose size is at most `max_tokens`: the sum of the lengths, or with `pads` count x longest.

    There are as few as that allows, and the largest is as small as their number allows. A sequence that is longer by
    itself makes a batch of one.
    """
    order = list(order)
    batches = _cut(order, lengths, max_tokens, pads)
    low, high = max((lengths[index] for index in order), default=0), max_tokens
    while low < high:  # the smallest size that needs no more batches
        middle = (low + high) // 2
        if len(_cut(order, lengths, middle, pads)) <= len(batches):
            high = middle
        else:
            low = middle + 1
    return _cut(order, lengths, low, pads) if low <= max_tokens else batches


def _cut(order: Sequence[int], lengths: Sequence[int], max_tokens: int, pads: bool) -> list[list[int]]:
    """Put each into the batch of the one before it while that has room."""
    batches: list[list[int]] = []
    longest = total = 0
    for index in order:
        length = lengths[index]
        size = (len(batches[-1]) + 1) * max(longest, length) if batches and pads else total + length
        if batches and size <= max_tokens:
            batches[-1].append(index)
            longest, total = max(longest, length), total + length
        else:
            batches.append([index])
            longest = total = length
    return batches


def require_finite(row: str, layer: int, tensors: Mapping[str, Tensor]) -> None:
    """Raise `NonFiniteError`, which names the row, if what is kept of it holds a NaN or an infinity."""
    meanings = {"source": "source activation", "final": "final hidden state", "hidden": f"activation at layer {layer}"}
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            remedy = "Load the model in float32 or bfloat16, or remove the pair."
            raise NonFiniteError(expected_got(f"{row}: {meanings[name]}", "finite numbers", "NaN or infinity", remedy))
