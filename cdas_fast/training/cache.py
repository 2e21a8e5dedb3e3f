"""Everything about the frozen model that training needs, computed once.

For each row: the base sequence's activations at the lowest intervened layer beyond the prefix that all rows share, the
source activations at every intervened layer, and the target's final hidden states at the positions that predict the
response. The prefix runs once.
"""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import overload

import torch
from torch import Tensor
from tqdm.auto import tqdm

from cdas_fast.data.rows import TokenRows, TrainingRow
from cdas_fast.errors import InvalidInputError, NonFiniteError, StorageError, UnsupportedError, expected_got
from cdas_fast.models.packed import Packing, Rows, Runner, make_runner, pass_tolerance, shared_prefix
from cdas_fast.models.structure import Decoder
from cdas_fast.models.suffix import Capture, capture_activations
from cdas_fast.ops.implementation import Implementation


@dataclass(frozen=True)
class CachedRow:
    """What is cached of one row, in the model's dtype. The tensors are views: nothing may be written to them."""

    row: TrainingRow
    base_hidden: Tensor  # (T, D), output of the lowest intervened layer at the base tokens beyond the shared prefix
    target_final: Tensor  # (K, D), after the final norm, where the source's K response tokens are predicted
    source: Tensor  # (layers, D), at the source position


@dataclass(frozen=True)
class ActivationCache:
    """Cached activations of a set of rows, in the model's dtype, handed out row by row."""

    rows: TokenRows
    runner: Runner  # for passes behind the shared prefix
    layers: tuple[int, ...]  # ascending
    positive_sources: Tensor  # (pairs, layers, D)
    negative_sources: Tensor  # (pairs, layers, D)
    base_hidden: Sequence[Tensor] = field(repr=False)  # of each row, see CachedRow
    target_final: Sequence[Tensor] = field(repr=False)  # of each row, see CachedRow
    folder: tempfile.TemporaryDirectory[str] | None = field(default=None, repr=False)  # memory-mapped files, if any

    def __len__(self) -> int:
        return len(self.rows.rows)

    def row(self, number: int) -> CachedRow:
        """What is cached of row `number`, from 0."""
        entry = self.rows.rows[number]
        sources = self.positive_sources if entry.toward == "positive" else self.negative_sources
        return CachedRow(
            entry, self.base_hidden[number], self.target_final[number], sources[entry.pair - self.rows.rows[0].pair]
        )

    def base_length(self, number: int) -> int:
        """Tokens T of a row's base sequence beyond the shared prefix."""
        return len(self.rows.rows[number].base.ids) - self.shared_prefix_length

    @property
    def shared_prefix_length(self) -> int:
        """Tokens that all sequences begin with, of which nothing is cached but what the runner keeps."""
        return len(self.runner.prefix_ids)

    @property
    def nbytes(self) -> int:
        """Size of all cached activations."""
        tokens = sum(map(self.base_length, range(len(self)))) + self.rows.response_tokens
        sources = (self.positive_sources, self.negative_sources)
        width, itemsize = self.positive_sources.shape[2], self.positive_sources.dtype.itemsize
        return tokens * width * itemsize + sum(tensor.nbytes for tensor in sources)


def build_cache(
    decoder: Decoder,
    rows: TokenRows,
    layers: Sequence[int],
    *,
    prefix_length: int | None = None,
    packing: Packing = "auto",
    impl: Implementation = "auto",
    runner: Runner | None = None,
    micro_batch_tokens: int = 4096,
    memory_bytes: int = 4 * 2**30,
    folder: str | os.PathLike[str] | None = None,
    description: str = "Caching activations",
    progress: bool = True,
) -> ActivationCache:
    """Run the frozen model over every row once and keep what training needs.

    Args:
        decoder: the model.
        rows: the token rows of consecutive pairs.
        layers: the intervened layers.
        prefix_length: positions that are never intervened on; those of the chat template if None. Of these, the tokens
            that all sequences have in common are run once.
        packing: how rows go through the model, see `make_runner`.
        impl: implementation of the ops within it.
        runner: one made beforehand, which several caches may share, for a prefix that all sequences begin with (see
            `rows_prefix`); `packing` and `impl` then say nothing.
        micro_batch_tokens: tokens per forward pass, pads counted.
        memory_bytes: beyond this size the activations are memory-mapped files.
        folder: where those files lie, in a temporary sub-folder; the system's folder for temporary files if None.
        description: text of the progress bar.
        progress: whether to show it (never if the standard error is no terminal).

    Raises:
        InvalidInputError: a runner of another model, or for a prefix that does not fit the rows.
        NonFiniteError: an activation is NaN or infinite; the row is named.
        StorageError: no room for the memory-mapped files.
        UnsupportedError: the model's suffix does not reproduce its own forward pass.
    """
    layers = tuple(sorted(layers))
    width, dtype = decoder.hidden_size, decoder.dtype
    entries = rows.rows
    pairs = len(rows.positive_prompts)
    first_pair = entries[0].pair
    base_sequences = [row.base.ids for row in entries]
    source_sequences = [row.source.ids for row in entries]
    covered = {(row.toward, row.pair - first_pair) for row in entries}
    remaining = [
        (side, pair) for side in ("positive", "negative") for pair in range(pairs) if (side, pair) not in covered
    ]
    prompts = {"positive": rows.positive_prompts, "negative": rows.negative_prompts}
    remaining_prompts = [prompts[side][pair] for side, pair in remaining]
    longest = rows.prefix_length if prefix_length is None else prefix_length
    if runner is None:
        runner = make_runner(decoder, rows_prefix([rows], longest), packing, impl)
    else:
        _check_runner(runner, decoder, rows, longest)
    shared = len(runner.prefix_ids)

    base_starts = _starts(len(ids) - shared for ids in base_sequences)
    target_starts = _starts(row.base.response_length for row in entries)
    sizes = (base_starts[-1] * width, target_starts[-1] * width)
    total = (sum(sizes) + 2 * pairs * len(layers) * width) * dtype.itemsize
    store = _Store(total > memory_bytes, total, folder)
    base_hidden, target_final = (
        _Pieces(store.allocate(size, dtype).view(-1, width), starts)
        for size, starts in zip(sizes, (base_starts, target_starts), strict=True)
    )
    positive, negative = (torch.empty(pairs, len(layers), width, dtype=dtype) for _ in range(2))

    def in_batches(
        sequences: Sequence[Sequence[int]], layers: Sequence[int], stop_after: int | None
    ) -> Iterator[tuple[int, int, Capture]]:
        """For each sequence, its number, where it begins in the pass that it was in, and that pass."""
        lengths = [len(sequence) - shared for sequence in sequences]
        order = sorted(range(len(sequences)), key=lambda index: -lengths[index])
        for indices in batches_by_tokens(order, lengths, micro_batch_tokens, pads=runner.pads):
            batch = [sequences[index][shared:] for index in indices]
            captured = runner.capture(batch, layers, stop_after=stop_after)
            for index, begin in zip(indices, _starts(map(len, batch)), strict=False):
                yield index, begin, captured
            bar.update(sum(map(len, batch)))

    tokens = sum(len(ids) - shared for ids in (*base_sequences, *source_sequences, *remaining_prompts))
    bar = tqdm(total=tokens, desc=description, unit="token", disable=None if progress else True, leave=False)
    with bar:
        for index, begin, captured in in_batches(source_sequences, layers, None):
            assert captured.final is not None
            row = entries[index]
            read = begin + row.source_position - shared
            sources = torch.stack([captured.hidden[layer][read] for layer in layers])
            start = begin + row.source.prompt_length - 1 - shared
            final = captured.final[start : start + row.source.response_length]
            _require_finite(row.name, {"source activation": sources, "final hidden state": final})
            (positive if row.toward == "positive" else negative)[row.pair - first_pair] = sources.cpu()
            target_final[index][:] = final.cpu()
        for index, begin, captured in in_batches(base_sequences, layers[:1], layers[0]):
            length = len(base_sequences[index]) - shared
            activations = captured.hidden[layers[0]][begin : begin + length]
            _require_finite(entries[index].name, {f"activation at layer {layers[0]}": activations})
            base_hidden[index][:] = activations.cpu()
        for index, begin, captured in in_batches(remaining_prompts, layers, layers[-1]):
            side, pair = remaining[index]
            last = begin + len(remaining_prompts[index]) - 1 - shared
            sources = torch.stack([captured.hidden[layer][last] for layer in layers])
            _require_finite(f"{side} prompt of pair {pair + first_pair}", {"source activation": sources})
            (positive if side == "positive" else negative)[pair] = sources.cpu()
    cache = ActivationCache(rows, runner, layers, positive, negative, base_hidden, target_final, store.folder)
    _check_suffix(decoder, cache)
    return cache


def rows_prefix(row_sets: Iterable[TokenRows], longest: int) -> tuple[int, ...]:
    """The tokens that all sequences of all sets of rows begin with, at most `longest` and none at a source position."""
    return shared_prefix([ids for rows in row_sets for ids in _sequences(rows)], longest)


def batches_by_tokens(
    order: Iterable[int], lengths: Sequence[int], max_tokens: int, *, pads: bool = True
) -> list[list[int]]:
    """Cut `order` into runs whose size is at most `max_tokens`: the sum of the lengths, or with `pads` count x longest.

    A sequence that is longer by itself makes a batch of one.
    """
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


class _Pieces(Sequence[Tensor]):
    """Views (T, D) of a tensor in which they lie one behind the other."""

    def __init__(self, flat: Tensor, starts: tuple[int, ...]) -> None:
        self.flat, self.starts = flat, starts  # (all T, D); one more than pieces

    def __len__(self) -> int:
        return len(self.starts) - 1

    @overload
    def __getitem__(self, place: int) -> Tensor: ...

    @overload
    def __getitem__(self, place: slice) -> list[Tensor]: ...

    def __getitem__(self, place: int | slice) -> Tensor | list[Tensor]:
        if isinstance(place, slice):
            return [self[each] for each in range(*place.indices(len(self)))]
        place = range(len(self))[place]
        return self.flat[self.starts[place] : self.starts[place + 1]]


class _Store:
    """Flat tensors in memory, or memory-mapped files in a temporary folder that goes with them."""

    def __init__(self, on_disk: bool, total_bytes: int, parent: str | os.PathLike[str] | None) -> None:
        self.folder: tempfile.TemporaryDirectory[str] | None = None
        self.count = 0
        if not on_disk:
            return
        place = Path(parent if parent is not None else tempfile.gettempdir())
        free = shutil.disk_usage(place).free
        if total_bytes > free:
            remedy = "Free some space, raise cache_bytes to keep them in memory, or choose another output folder."
            wanted = f"{total_bytes / 2**20:.0f} MiB free for cached activations"
            raise StorageError(expected_got(str(place), wanted, f"{free / 2**20:.0f} MiB", remedy))
        self.folder = tempfile.TemporaryDirectory(dir=place, prefix=".activations-")

    def allocate(self, numel: int, dtype: torch.dtype) -> Tensor:
        """A tensor of `numel` elements."""
        if self.folder is None:
            return torch.empty(numel, dtype=dtype)
        path = Path(self.folder.name) / f"{self.count}.bin"
        self.count += 1
        try:
            with path.open("wb") as file:
                if hasattr(os, "posix_fallocate"):  # finds a full disk now, not at a later page fault
                    os.posix_fallocate(file.fileno(), 0, max(1, numel * dtype.itemsize))
                else:
                    file.truncate(numel * dtype.itemsize)
        except OSError as error:
            raise StorageError(
                expected_got(str(path), f"{numel * dtype.itemsize / 2**20:.0f} MiB of disk", error.strerror)
            ) from error
        return torch.from_file(str(path), shared=True, size=numel, dtype=dtype)


def _check_suffix(decoder: Decoder, cache: ActivationCache) -> None:
    """Compare the suffix from the cache with a whole forward pass, so that no unusual model is trained wrongly."""
    row = cache.row(0)
    ids = torch.tensor([row.row.base.ids], device=decoder.device)
    whole = capture_activations(decoder, ids, []).final
    assert whole is not None
    right = whole[0, cache.shared_prefix_length :].float()
    hidden = row.base_hidden.to(decoder.device)
    with torch.no_grad():
        found = cache.runner.suffix(cache.layers[0], hidden, Rows((len(hidden),), cache.shared_prefix_length)).float()
    error = (found - right).norm() / right.norm()
    tolerance = pass_tolerance(decoder.dtype)
    if not error <= tolerance:
        raise UnsupportedError(
            expected_got(
                f"{type(decoder.model).__name__}: suffix from layer {cache.layers[0]}",
                "the final hidden states of a whole forward pass",
                f"ones that differ by {error:.2g} relative",
                "The model's later layers depend on more than the residual stream.",
            )
        )


def _sequences(rows: TokenRows) -> list[tuple[int, ...]]:
    """Every sequence that is run; prompts end at the source position."""
    sequences = [sequence.ids for row in rows.rows for sequence in (row.base, row.source)]
    return [*sequences, *rows.positive_prompts, *rows.negative_prompts]


def _check_runner(runner: Runner, decoder: Decoder, rows: TokenRows, longest: int) -> None:
    """Raise `InvalidInputError` unless the runner is this model's and every sequence goes on behind its prefix."""
    if runner.decoder.model is not decoder.model:
        raise InvalidInputError(expected_got("runner", "one of the same model", "one of another model"))
    prefix = runner.prefix_ids
    if len(prefix) > longest:
        raise InvalidInputError(expected_got("runner", f"a prefix of at most {longest} tokens", len(prefix)))
    for ids in _sequences(rows):
        if len(ids) <= len(prefix) or tuple(ids[: len(prefix)]) != prefix:
            wanted = f"every sequence to begin with the runner's prefix of {len(prefix)} tokens and to go on"
            got = f"one of {len(ids)} tokens, {list(ids[: len(prefix) + 1])}"
            raise InvalidInputError(expected_got("runner", wanted, got, "Make it for `rows_prefix` of all rows."))


def _require_finite(row: str, tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            remedy = "Load the model in float32 or bfloat16, or remove the pair."
            raise NonFiniteError(expected_got(f"{row}: {name}", "finite numbers", "NaN or infinity", remedy))


def _starts(lengths: Iterable[int]) -> tuple[int, ...]:
    return (0, *itertools.accumulate(lengths))
