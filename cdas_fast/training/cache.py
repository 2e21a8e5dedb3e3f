"""Everything about the frozen model that training needs, computed once.

For each row: the base sequence's activations at the lowest intervened layer beyond the prefix that all rows share, the
source activations at every intervened layer, and the target's final hidden states at the positions that predict the
response. The prefix runs once. With a store (see activation_store.py) later runs find all of it again.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm.auto import tqdm

from cdas_fast.data.rows import TokenRows, TrainingRow
from cdas_fast.distributed.processes import Processes
from cdas_fast.errors import InvalidInputError, StorageError, UnsupportedError, expected_got
from cdas_fast.models.packed import Packing, Rows, Runner, make_runner, pass_tolerance, shared_prefix
from cdas_fast.models.skeleton import layer_weights
from cdas_fast.models.structure import Decoder, model_fingerprint
from cdas_fast.models.suffix import capture_activations
from cdas_fast.ops.implementation import Implementation, choose_implementation
from cdas_fast.storage import sha256_of
from cdas_fast.training.activation_store import ActivationStore, check_key
from cdas_fast.training.sequences import CachedSequences, SequencePass, cached_sequences, require_finite

COMMIT_SECONDS = 2.0  # a store is brought to the disk so often: what a kill can lose


@dataclass(frozen=True)
class CachedRow:
    """What is cached of one row, in the model's dtype. The tensors are views: nothing may be written to them."""

    row: TrainingRow
    base_hidden: Tensor  # (T, D), output of the lowest intervened layer at the base tokens beyond the shared prefix
    target_final: Tensor  # (K, D), after the final norm, where the source's K response tokens are predicted
    source: Tensor  # (layers, D), at the source position

    @property
    def name(self) -> str:
        """How errors name the row."""
        return self.row.name

    @property
    def response_length(self) -> int:
        """K."""
        return self.row.base.response_length


class EntryWriter(Protocol):
    """What computed entries are given to."""

    def add(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep the tensors, unless there are some under the key."""

    def commit(self) -> None:
        """Let nothing that was added so far be lost."""


class Entries(Protocol):
    """Tensors by key: an `ActivationStore`, or what is kept for a while."""

    def find(self, keys: Iterable[str]) -> set[str]:
        """Those of the keys that there are entries of."""

    def get(self, key: str) -> Mapping[str, Tensor] | None:
        """The tensors of an entry; None if there is none."""

    def writer(self, expected_bytes: int = 0) -> AbstractContextManager[EntryWriter]:
        """What to add entries by."""


@dataclass(frozen=True)
class ActivationCache:
    """Cached activations of a set of rows, in the model's dtype, handed out row by row."""

    rows: TokenRows
    runner: Runner  # for passes behind the shared prefix
    layers: tuple[int, ...]  # ascending
    entries: Entries = field(repr=False)
    base_keys: tuple[str, ...] = field(repr=False)  # of each row
    source_keys: tuple[str, ...] = field(repr=False)  # of each row
    positive_keys: tuple[str, ...] = field(repr=False)  # of each pair's positive prompt
    negative_keys: tuple[str, ...] = field(repr=False)  # of each pair's negative prompt
    folder: tempfile.TemporaryDirectory[str] | None = field(default=None, repr=False)  # of temporary files, if any

    def __len__(self) -> int:
        return len(self.rows.rows)

    def row(self, number: int) -> CachedRow:
        """What is cached of row `number`, from 0."""
        return CachedRow(
            row=self.rows.rows[number],
            base_hidden=_tensor(self.entries, self.base_keys[number], "hidden"),
            target_final=_tensor(self.entries, self.source_keys[number], "final"),
            source=_tensor(self.entries, self.source_keys[number], "source"),
        )

    @property
    def positive_sources(self) -> Tensor:
        """Source activations of the positive prompts, (pairs, layers, D); a copy."""
        return torch.stack([_tensor(self.entries, key, "source") for key in self.positive_keys])

    @property
    def negative_sources(self) -> Tensor:
        """Those of the negative prompts, (pairs, layers, D); a copy."""
        return torch.stack([_tensor(self.entries, key, "source") for key in self.negative_keys])

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
        sources = len(self.layers) * (len(self.positive_keys) + len(self.negative_keys))
        decoder = self.runner.decoder
        return (tokens + sources) * decoder.hidden_size * decoder.dtype.itemsize


def build_cache(
    decoder: Decoder,
    rows: TokenRows,
    layers: Sequence[int],
    *,
    prefix_length: int | None = None,
    packing: Packing = "auto",
    impl: Implementation = "auto",
    runner: Runner | None = None,
    store: ActivationStore | None = None,
    micro_batch_tokens: int = 4096,
    memory_bytes: int = 4 * 2**30,
    folder: str | os.PathLike[str] | None = None,
    description: str = "Caching activations",
    progress: bool = True,
) -> ActivationCache:
    """Run the frozen model over every row once and keep what training needs.

    With a store, nothing is computed that is there, and what is computed stays there, also after an interruption; a
    kill loses two seconds of work and the batch in progress. Which sequences are run together depends on the rows and
    `micro_batch_tokens` alone: a batch of which anything is missing is run whole. So a pass that is resumed ends with
    the bits of one that was not interrupted.

    Args:
        decoder: the model.
        rows: the token rows of consecutive pairs.
        layers: the intervened layers.
        prefix_length: positions that are never intervened on; those of the chat template if None. Of these, the tokens
            that all sequences have in common are run once.
        packing: how rows go through the model, see `make_runner`.
        impl: implementation of the ops within it.
        runner: one made beforehand, which several caches may share, for a prefix that all sequences begin with (see
            `rows_prefix`); `packing` then says nothing, and `impl` is what it was made with.
        store: where activations are kept for good, opened with the `cache_identity` of this runner.
        micro_batch_tokens: tokens per forward pass, pads counted.
        memory_bytes: beyond this size the activations are memory-mapped temporary files, unless there is a store.
        folder: where those files lie, in a temporary sub-folder; the system's folder for temporary files if None.
        description: text of the progress bar.
        progress: whether to show it (never if the standard error is no terminal).

    Raises:
        InvalidInputError: a runner of another model, or for a prefix that does not fit the rows; a store of activations
            that are computed otherwise.
        NonFiniteError: an activation is NaN or infinite; the row is named.
        StorageError: no room on the disk. What was stored before is kept.
        UnsupportedError: the model's suffix does not reproduce its own forward pass.
    """
    layers = tuple(sorted(layers))
    longest = rows.prefix_length if prefix_length is None else prefix_length
    if runner is None:
        runner = make_runner(decoder, rows_prefix([rows], longest), packing, impl)
    else:
        _check_runner(runner, decoder, rows, longest)
    if store is not None:
        _check_store(store, cache_identity(runner, layers, impl))
    shared = len(runner.prefix_ids)
    sequences = cached_sequences(rows, layers, shared)
    kept: _Kept | None = None
    entries: Entries
    if store is None:
        entries = kept = _Kept(sequences.passes, decoder.hidden_size, decoder.dtype, memory_bytes, folder)
    else:
        entries = store
    _run(sequences.passes, runner, entries, micro_batch_tokens, description, progress)
    keys = [tuple(each.key for each in of_kind) for of_kind in sequences.kinds]
    folder_of_files = None if kept is None else kept.folder
    cache = ActivationCache(rows, runner, layers, entries, keys[0], keys[1], keys[2], keys[3], folder_of_files)
    _check_suffix(decoder, cache)
    return cache


def fill_store(
    sequences: CachedSequences,
    runner: Runner,
    store: ActivationStore,
    micro_batch_tokens: int,
    processes: Processes,
    progress: bool = True,
) -> None:
    """Compute what is missing in a store of one process's share of the batches that `build_cache` would run."""
    _run(sequences.passes, runner, store, micro_batch_tokens, "Caching activations", progress, processes)


def cache_identity(
    runner: Runner,
    layers: Sequence[int],
    impl: Implementation = "auto",
    *,
    name: str | None = None,
    revision: str | None = None,
) -> dict[str, Any]:
    """What cached activations depend on beside the sequences: the identity for their `ActivationStore`.

    Args:
        runner: what runs the sequences.
        layers: the intervened layers.
        impl: what the runner was made with.
        name: of the model, if it is known.
        revision: of the model, if it is known.
    """
    decoder = runner.decoder
    wanted = "auto" if impl == "triton" else impl  # as `make_runner` does
    chosen: str = choose_implementation("cached activations", wanted, decoder.device)
    if wanted == "auto" and chosen == "reference":
        chosen = "the model's own"
    return {
        "model": model_fingerprint(decoder.model),
        "name": name,
        "revision": revision,
        "dtype": str(decoder.dtype).removeprefix("torch."),
        "device": decoder.device.type,
        "hidden_size": decoder.hidden_size,
        "layers": sorted(layers),
        "prefix_length": len(runner.prefix_ids),
        "prefix": sha256_of(json.dumps(runner.prefix_ids)),
        "packing": "padded" if runner.pads else "packed",
        "impl": chosen,
        "torch": str(torch.__version__),
        "transformers": importlib.metadata.version("transformers"),
    }


def rows_prefix(row_sets: Iterable[TokenRows], longest: int) -> tuple[int, ...]:
    """The tokens that all sequences of all sets of rows begin with, at most `longest` and none at a source position."""
    return shared_prefix([ids for rows in row_sets for ids in _sequences(rows)], longest)


def _run(
    passes: Sequence[SequencePass],
    runner: Runner,
    entries: Entries,
    micro_batch_tokens: int,
    description: str,
    progress: bool,
    processes: Processes | None = None,
) -> None:
    """Run the batches of which anything is missing, and add what is; of several processes, each does some of them."""
    decoder, shared = runner.decoder, len(runner.prefix_ids)
    found = entries.find(sequence.key for one in passes for sequence in one.sequences)
    batches = [(one, batch) for one in passes for batch in one.batches(shared, micro_batch_tokens, runner.pads)]
    if processes is not None:
        batches = batches[processes.rank :: processes.count]
    tokens = [sum(len(sequence.ids) - shared for sequence in batch) for _, batch in batches]
    missing = [{sequence.key for sequence in batch} - found for _, batch in batches]
    if not any(missing):
        return
    lengths = {sequence.key: sum(sequence.lengths.values()) for one in passes for sequence in one.sequences}
    expected_bytes = sum(lengths[key] for key in set().union(*missing)) * decoder.hidden_size * decoder.dtype.itemsize
    bar = tqdm(
        total=sum(tokens),
        initial=sum(count for count, keys in zip(tokens, missing, strict=True) if not keys),
        desc=description,
        unit="token",
        disable=None if progress else True,
        leave=False,
    )
    with bar, entries.writer(expected_bytes) as writer:
        committed = time.monotonic()
        for (one, batch), count, keys in zip(batches, tokens, missing, strict=True):
            if not keys:
                continue
            if keys != entries.find(keys):  # another process may have been here meanwhile
                ids = [sequence.ids[shared:] for sequence in batch]
                captured = runner.capture(ids, one.layers, stop_after=one.stop_after)
                for sequence, begin in zip(batch, _starts(map(len, ids)), strict=False):
                    tensors = sequence.read(captured, begin)
                    require_finite(sequence.name, one.layers[0], tensors)
                    writer.add(sequence.key, tensors)
            bar.update(count)
            if time.monotonic() - committed >= COMMIT_SECONDS:
                writer.commit()
                committed = time.monotonic()


class _Kept:
    """Entries as long as the program runs: in flat tensors in memory, or memory-mapped from a temporary folder."""

    def __init__(
        self,
        passes: Sequence[SequencePass],
        width: int,
        dtype: torch.dtype,
        memory_bytes: int,
        parent: str | os.PathLike[str] | None,
    ) -> None:
        totals: Counter[str] = Counter()
        for one in passes:
            for sequence in one.sequences:
                totals.update(sequence.lengths)
        total_bytes = totals.total() * width * dtype.itemsize
        self.folder: tempfile.TemporaryDirectory[str] | None = None
        if total_bytes > memory_bytes:
            place = Path(parent if parent is not None else tempfile.gettempdir())
            free = shutil.disk_usage(place).free
            if total_bytes > free:
                remedy = "Free some space, raise cache_bytes to keep them in memory, or choose another output folder."
                wanted = f"{total_bytes / 2**20:.0f} MiB free for cached activations"
                raise StorageError(expected_got(str(place), wanted, f"{free / 2**20:.0f} MiB", remedy))
            self.folder = tempfile.TemporaryDirectory(dir=place, prefix=".activations-")
        self.flat = {name: self._allocate(name, total * width, dtype).view(-1, width) for name, total in totals.items()}
        self.used = dict.fromkeys(self.flat, 0)
        self.places: dict[str, dict[str, slice]] = {}  # key -> tensor -> its rows in the flat one

    def find(self, keys: Iterable[str]) -> set[str]:
        """See `Entries`."""
        return self.places.keys() & set(keys)

    def get(self, key: str) -> Mapping[str, Tensor] | None:
        """See `Entries`."""
        if key not in self.places:
            return None
        return {name: self.flat[name][place] for name, place in self.places[key].items() if name in self.flat}

    def writer(self, expected_bytes: int = 0) -> AbstractContextManager[EntryWriter]:
        """See `Entries`."""
        return nullcontext(self)

    def add(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """See `EntryWriter`."""
        if key in self.places:
            return
        self.places[key] = {}
        for name, tensor in tensors.items():
            place = slice(self.used[name], self.used[name] + len(tensor))
            self.flat[name][place] = tensor.cpu()
            self.used[name] = place.stop
            self.places[key][name] = place

    def commit(self) -> None:
        """See `EntryWriter`."""

    def _allocate(self, name: str, numel: int, dtype: torch.dtype) -> Tensor:
        if self.folder is None:
            return torch.empty(numel, dtype=dtype)
        path = Path(self.folder.name) / f"{name}.bin"
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


def _tensor(entries: Entries, key: str, name: str) -> Tensor:
    entry = entries.get(key)
    if entry is None:
        remedy = "Run again: what is missing is computed again."
        raise StorageError(expected_got("cached activations", f"an entry {key}", "none any more", remedy))
    return entry[name]


def _check_store(store: ActivationStore, identity: Mapping[str, Any]) -> None:
    """Raise `InvalidInputError` unless the store's identity is this one; name and revision are the caller's to know."""
    for name, value in identity.items():
        if name not in ("name", "revision") and store.identity.get(name) != value:
            remedy = "Open the store with the `cache_identity` of the runner."
            raise InvalidInputError(
                expected_got(f"store of activations: {name}", repr(value), repr(store.identity.get(name)), remedy)
            )


def _check_suffix(decoder: Decoder, cache: ActivationCache) -> None:
    """Compare the suffix from the cache with a whole forward pass, so that no unusual model is trained wrongly."""
    row = cache.row(0)
    if layer_weights(decoder.model) is None:
        ids = torch.tensor([row.row.base.ids], device=decoder.device)
        whole = capture_activations(decoder, ids, []).final
        assert whole is not None
        right = whole[0, cache.shared_prefix_length :].float()
    else:  # a whole pass of its own would read all weights again
        stored = cache.entries.get(check_key(row.row.base.ids))
        if stored is None:
            return  # it is that of the first concept alone
        right = stored["final"].to(decoder.device).float()
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


def _starts(lengths: Iterable[int]) -> tuple[int, ...]:
    return (0, *itertools.accumulate(lengths))
