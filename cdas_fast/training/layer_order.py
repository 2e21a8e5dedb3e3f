"""Caching activations layer by layer: all sequences through one layer, then all through the next.

Each layer's weights are read once, however many sequences there are, so that a model need not fit in memory. Between
layers nothing is kept but one hidden state a token, in memory or in a memory-mapped file, and what was asked for of
the layers that are done. From time to time all of it is written down, so that a killed pass goes on near the layer that
it had reached; what it ends with is the same to the bit.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm.auto import tqdm

from cdas_fast.distributed.processes import Processes
from cdas_fast.errors import NonFiniteError, StorageError, expected_got
from cdas_fast.models.layer_major import LayerwisePass
from cdas_fast.models.layer_weights import LayerWeights
from cdas_fast.models.packed import Runner
from cdas_fast.storage import make_output_folder, read_tensors, sha256_of, write_tensors
from cdas_fast.training.activation_store import ActivationStore, StoreWriter, prefix_key
from cdas_fast.training.sequences import FINAL, CachedSequence, SequencePass, require_finite

PROGRESS = "layer-order.safetensors"  # in the store's folder of scratch files, until the pass is complete
CHECKPOINT_SECONDS = 60.0  # between two of them, and ten times as long as the last one took

_logger = logging.getLogger(__name__)


@dataclass
class _Batch:
    """Sequences that are run together."""

    sequences: Sequence[CachedSequence]
    stop_after: int  # the last layer that they need
    is_final: bool  # whether they need the final norm, too
    one: LayerwisePass
    shape: torch.Size  # of their hidden states, as the model takes them
    begin: int = 0  # of their hidden states in the flat tensor of all
    starts: Sequence[int] = ()  # of the sequences among the tokens that are read
    found: dict[tuple[int, int], Tensor] = field(default_factory=dict)  # by sequence and piece

    @property
    def numel(self) -> int:
        """Elements of their hidden states."""
        return self.shape.numel()


class LayerOrderPass:
    """What is missing in a store, computed layer by layer.

    Args:
        runner: runs the batches; it takes up the prefix on the way.
        weights: of the model's layers.
        passes: sequences, and up to where they are run.
        store: where the activations are kept.
        scratch: a folder for what is kept between layers; made if there is none.
        micro_batch_tokens: tokens of a batch, pads counted.
        memory_bytes: beyond this size hidden states are in a memory-mapped file.
        processes: of several that share the store, which one this is; each does some of the batches.
        checkpoint_seconds: least time between two checkpoints; None for a minute.
        progress: whether to show it (never if the standard error is no terminal).
    """

    def __init__(
        self,
        runner: Runner,
        weights: LayerWeights,
        passes: Sequence[SequencePass],
        store: ActivationStore,
        scratch: Path,
        *,
        micro_batch_tokens: int = 4096,
        memory_bytes: int = 4 * 2**30,
        processes: Processes | None = None,
        checkpoint_seconds: float | None = None,
        progress: bool = True,
    ) -> None:
        self.runner, self.weights, self.store = runner, weights, store
        self.processes = processes or Processes()
        # Processes that train other concepts, and know nothing of this one, may be at work in the same place.
        own = sha256_of(*sorted(sequence.key for one in passes for sequence in one.sequences))[:16]
        self.scratch = scratch / f"{own}-{self.processes.rank}-of-{self.processes.count}"
        self.layers = passes[0].layers
        self._tokens, self._memory_bytes, self._progress = micro_batch_tokens, memory_bytes, progress
        self._seconds = CHECKPOINT_SECONDS if checkpoint_seconds is None else checkpoint_seconds
        self._wanted = self._batches_to_run(passes)
        self._prefix_key = prefix_key(runner.prefix_ids, self.layers[0])

    def run(self) -> None:
        """Compute what is missing, and let the runner know the prefix.

        Sequences whose activations are NaN or infinite are not stored; the log names them.

        Raises:
            StorageError: no room on the disk. What was stored before is kept.
        """
        known = self.store.get(self._prefix_key)
        if not self._wanted and (known is not None or not self.runner.prefix_ids):
            if known is not None:
                self.runner.restore_prefix({name: each.clone() for name, each in known.items()})
            self._clear()
            return
        make_output_folder(self.scratch, "folder of cached activations")
        with torch.no_grad(), self.store.writer(self._expected_bytes()) as writer:
            self._run(writer)
        self._clear()

    def _clear(self) -> None:
        """Delete the folder for what is kept between layers, and the one around it unless other processes need it."""
        shutil.rmtree(self.scratch, ignore_errors=True)  # Windows keeps what is open
        with contextlib.suppress(OSError):
            self.scratch.parent.rmdir()

    def _batches_to_run(self, passes: Sequence[SequencePass]) -> list[tuple[SequencePass, list[CachedSequence]]]:
        """Batches of which anything is missing, or those of a pass that was interrupted, if it was to do them all."""
        found = self.store.find(sequence.key for one in passes for sequence in one.sequences)
        shared, pads = len(self.runner.prefix_ids), self.runner.pads
        batches = [(one, batch) for one in passes for batch in one.batches(shared, self._tokens, pads)]
        batches = batches[self.processes.rank :: self.processes.count]
        missing = [(one, batch) for one, batch in batches if any(sequence.key not in found for sequence in batch)]
        begun = json.loads(self._metadata().get("batches", "[]"))
        if {_name(batch) for _, batch in missing} <= set(begun) <= {_name(batch) for _, batch in batches}:
            return [(one, batch) for one, batch in batches if _name(batch) in begun]
        return missing

    def _metadata(self) -> Mapping[str, str]:
        """That of the checkpoint of an interrupted pass; empty if there is none, or another store's."""
        path = self.scratch / PROGRESS
        if not path.is_file():
            return {}
        try:
            with safe_open(str(path), framework="pt") as file:
                metadata: Mapping[str, str] = file.metadata() or {}
        except (SafetensorError, OSError) as error:  # what it held is computed again
            _logger.warning("%s: not used (%s); the pass begins anew", path, error)
            return {}
        return metadata if metadata.get("identity") == self._identity() else {}

    def _expected_bytes(self) -> int:
        decoder = self.runner.decoder
        rows = {each.key: each.lengths.total() for _, batch in self._wanted for each in batch}
        return sum(rows.values()) * decoder.hidden_size * decoder.dtype.itemsize

    def _run(self, writer: StoreWriter) -> None:
        decoder = self.runner.decoder
        batches = [self._begin(one, sequences) for one, sequences in self._wanted]
        total = 0
        for batch in batches:
            batch.begin, total = total, total + batch.numel
        prefix = self.runner.begin_prefix()
        flat = _Flat(total, decoder.dtype, self._memory_bytes, self.scratch)
        entering = [] if prefix is None else [prefix.rehearsal.entering]
        first = self._resume(batches, flat, entering)
        if first == 0:
            for batch in batches:
                flat.data[batch.begin : batch.begin + batch.numel] = batch.one.rehearsal.entering.view(-1).cpu()
        for batch in batches:
            batch.one = _without_entering(batch.one)
        last = max([batch.stop_after for batch in batches] + ([] if prefix is None else [decoder.num_layers - 1]))
        sizes = [batch.numel // decoder.hidden_size for batch in batches]
        bar = tqdm(
            total=sum(size * (batch.stop_after + 1) for batch, size in zip(batches, sizes, strict=True)),
            initial=sum(size * min(first, batch.stop_after + 1) for batch, size in zip(batches, sizes, strict=True)),
            desc="Caching activations, layer by layer",
            unit="token",
            unit_scale=True,
            disable=None if self._progress else True,
            leave=False,
        )
        saved, took = time.monotonic(), 0.0
        with bar:
            for layer in range(first, last + 1):
                with self.weights.visit(layer, layer + 1 if layer < last else None):
                    if prefix is not None:
                        entering[0] = prefix.run(layer, entering[0])
                        self.runner.keep_prefix(layer, entering[0])
                    for batch, size in zip(batches, sizes, strict=True):
                        if layer <= batch.stop_after:
                            self._through(layer, batch, flat, writer)
                            bar.update(size)
                now = time.monotonic()
                if layer < last and now - saved >= max(self._seconds, 10 * took):
                    writer.commit()
                    self._save(layer + 1, batches, flat, entering)
                    saved = time.monotonic()
                    took = saved - now
        if prefix is not None and (state := self.runner.prefix_state(self.layers[0])):
            writer.add(self._prefix_key, state)

    def _begin(self, one: SequencePass, sequences: Sequence[CachedSequence]) -> _Batch:
        shared = len(self.runner.prefix_ids)
        lengths = [len(sequence.ids) - shared for sequence in sequences]
        begun = self.runner.begin([sequence.ids[shared:] for sequence in sequences])
        last = self.runner.decoder.num_layers - 1
        return _Batch(
            sequences,
            last if one.stop_after is None else one.stop_after,
            one.stop_after is None,
            begun,
            begun.rehearsal.entering.shape,
            starts=[sum(lengths[:place]) for place in range(len(lengths))],
        )

    def _through(self, layer: int, batch: _Batch, flat: _Flat, writer: StoreWriter) -> None:
        """Run a batch through a layer, and take what is kept of its output."""
        place = flat.data[batch.begin : batch.begin + batch.numel]
        hidden = batch.one.run(layer, place.view(batch.shape).to(self.runner.decoder.device))
        place.copy_(hidden.view(-1))
        ends = layer == batch.stop_after
        self._take(batch, layer, hidden, batch.one.read)
        if ends and batch.is_final:
            self._take(batch, FINAL, hidden, batch.one.final)
        if not ends:
            return
        for number, sequence in enumerate(batch.sequences):
            tensors = sequence.joined([batch.found[number, piece] for piece in range(len(sequence.pieces))])
            try:
                require_finite(sequence.name, self.layers[0], tensors)
            except NonFiniteError as error:  # whose it is, the concept it belongs to will say
                _logger.warning("%s", error)
                continue
            writer.add(sequence.key, tensors)
        batch.found.clear()

    def _take(self, batch: _Batch, layer: int, hidden: Tensor, read: object) -> None:
        wanted = [
            (number, place)
            for number, sequence in enumerate(batch.sequences)
            for place, piece in enumerate(sequence.pieces)
            if piece.layer == layer
        ]
        if not wanted:
            return
        tokens = read(hidden)  # type: ignore[operator]
        for number, place in wanted:
            piece = batch.sequences[number].pieces[place]
            begin = batch.starts[number] + piece.begin
            batch.found[number, place] = tokens[begin : begin + piece.length].to("cpu", copy=True)

    def _identity(self) -> str:
        return sha256_of(json.dumps(self.store.identity, sort_keys=True))

    def _save(self, layer: int, batches: Sequence[_Batch], flat: _Flat, entering: Sequence[Tensor]) -> None:
        tensors = {"hidden": flat.data}
        if entering:
            tensors["prefix"] = entering[0].clone()  # the runner may keep it, and no file holds one twice
        tensors |= {f"runner.{name}": each for name, each in self.runner.prefix_state(-1).items()}
        for number, batch in enumerate(batches):
            tensors |= {f"found.{number}.{place[0]}.{place[1]}": each for place, each in batch.found.items()}
        names = [_name(batch) for _, batch in self._wanted]
        metadata = {"layer": str(layer), "identity": self._identity(), "batches": json.dumps(names)}
        write_tensors(self.scratch / PROGRESS, tensors, metadata)

    def _resume(self, batches: Sequence[_Batch], flat: _Flat, entering: list[Tensor]) -> int:
        """Take up the checkpoint of this very pass, if there is one: the layer to go on with, else 0."""
        metadata = self._metadata()
        names = [_name(batch) for _, batch in self._wanted]
        if not metadata or json.loads(metadata["batches"]) != names:
            return 0
        tensors = read_tensors(self.scratch / PROGRESS)
        flat.data.copy_(tensors.pop("hidden"))
        device = self.runner.decoder.device
        if entering:
            entering[0] = tensors.pop("prefix").to(device)
        state = {name.removeprefix("runner."): each for name, each in tensors.items() if name.startswith("runner.")}
        self.runner.restore_prefix(state)
        for name, each in tensors.items():
            if name.startswith("found."):
                number, sequence, piece = map(int, name.split(".")[1:])
                batches[number].found[sequence, piece] = each
        return int(metadata["layer"])


class _Flat:
    """Hidden states of all batches, in memory, or in a file without a name if they are many."""

    def __init__(self, numel: int, dtype: torch.dtype, memory_bytes: int, folder: Path) -> None:
        nbytes = numel * dtype.itemsize
        if nbytes <= memory_bytes:
            self.data = torch.empty(numel, dtype=dtype)
            return
        free = shutil.disk_usage(folder).free
        if nbytes > free:
            remedy = "Free some space, or choose another folder for activations."
            wanted = f"{nbytes / 2**20:.0f} MiB free for hidden states"
            raise StorageError(expected_got(str(folder), wanted, f"{free / 2**20:.0f} MiB", remedy))
        descriptor, name = tempfile.mkstemp(dir=folder, prefix=".hidden-")
        try:
            if hasattr(os, "posix_fallocate"):  # finds a full disk now, not at a later page fault
                os.posix_fallocate(descriptor, 0, nbytes)
            else:
                os.truncate(descriptor, nbytes)
            self.data = torch.from_file(name, shared=True, size=numel, dtype=dtype)
        except OSError as error:
            raise StorageError(expected_got(name, f"{nbytes / 2**20:.0f} MiB of disk", error.strerror)) from error
        finally:
            os.close(descriptor)
            os.unlink(name)


def _name(batch: Sequence[CachedSequence]) -> str:
    """What tells a batch from others: the sequences that it consists of, in their order."""
    return sha256_of(*(sequence.key for sequence in batch))


def _without_entering(one: LayerwisePass) -> LayerwisePass:
    empty = one.rehearsal.entering.new_empty(0)
    return replace(one, rehearsal=replace(one.rehearsal, entering=empty))
