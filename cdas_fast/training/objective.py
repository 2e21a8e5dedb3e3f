"""The divergence between intervened and counterfactual pass, from cached activations: values and gradients.

For each row, with h the base activations, h_src the source activation and q the target's distribution:

    loss = mean_k JSD( softmax(head(suffix(Phi(h)))) at response position k || q_k )
"""

from __future__ import annotations

import gc
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from cdas_fast.errors import InvalidInputError, expected_got
from cdas_fast.models.layer_major import KeepUpTo, run_layer_major
from cdas_fast.models.packed import Rows, Runner
from cdas_fast.models.skeleton import layer_weights
from cdas_fast.models.structure import Decoder, Head
from cdas_fast.models.suffix import Edit
from cdas_fast.ops import clamp, linear_jsd
from cdas_fast.ops.implementation import Implementation
from cdas_fast.ops.interchange import project
from cdas_fast.training.cache import CachedRow
from cdas_fast.training.config import Reduction
from cdas_fast.training.sequences import batches_by_tokens

SMALLEST_MICRO_BATCH = 64  # tokens; of less, running out of memory has another reason

T = TypeVar("T")

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MicroBatch:
    """Rows that go through the suffix together, packed one behind the other: N tokens of B rows."""

    places: tuple[int, ...]  # where the rows stand in the list that was asked for
    rows: Rows
    owners: Tensor  # (N,) the row of each token
    source: Tensor  # (B, layers, D)
    toward_positive: Tensor  # (B,) bool
    concepts: Tensor | None  # (B,) the concept of each row, where there are several
    mask: Tensor | None  # (N,) bool, True where an intervention is made; everywhere if None


# (hidden (N, D), slot of the layer among the intervened ones, micro-batch) -> hidden (N, D)
Intervention = Callable[[Tensor, int, MicroBatch], Tensor]


@dataclass(frozen=True)
class _Prepared:
    """A micro-batch with what goes into its suffix, and what is asked of it."""

    batch: MicroBatch
    hidden: Tensor  # (N, D), edited
    edits: Mapping[int, Edit]  # of later layers
    owners: Tensor  # (M,) of each response token its row's place in the batch
    predicting: Tensor  # (M,) the packed token that predicts it
    target: Tensor  # (M, D)


class Engine(Protocol):
    """Who brings the weights of the suffix and of the head where they are needed, for all processes at a time.

    Every process has to run the same number of micro-batches.
    """

    def run(
        self, hidden: Tensor, finals: Callable[[Tensor], Tensor], losses: Callable[[Tensor, Head], Tensor]
    ) -> Tensor:
        """`losses(finals(hidden), head)`; `finals` runs all layers of the suffix, once and in their order."""

    def backward(self, loss: Tensor) -> None:
        """Add to the gradients of what `run` depended on, by a loss made of what it gave."""

    def rounds(self, count: int) -> int:
        """How many micro-batches each process has to run, if this one needs `count`."""

    def rest(self) -> None:
        """Let go what was brought: no micro-batch follows for now."""


@dataclass(frozen=True)
class Interchange:
    """Give every position the source's coordinates along `direction`."""

    direction: Tensor  # (R, D), or (K, R, D) of K concepts
    impl: Implementation = "auto"

    def __call__(self, hidden: Tensor, slot: int, batch: MicroBatch) -> Tensor:
        """See `Intervention`."""
        concepts = batch.concepts
        value = project(batch.source[:, slot], self.direction, direction_index=concepts, impl=self.impl)
        return clamp(
            hidden,
            value[batch.owners],
            self.direction,
            mask=batch.mask,
            direction_index=None if concepts is None else concepts[batch.owners],
            impl=self.impl,
        )


def clamp_to(direction: Tensor, positive: Tensor, negative: Tensor, impl: Implementation = "auto") -> Intervention:
    """Set the coordinates along `direction` (R, D) to the factor of the side a row goes toward, (layers, R) each."""

    def intervene(hidden: Tensor, slot: int, batch: MicroBatch) -> Tensor:
        value = torch.where(batch.toward_positive[:, None], positive[slot], negative[slot])
        return clamp(hidden, value[batch.owners], direction, mask=batch.mask, impl=impl)

    return intervene


def leave_alone(hidden: Tensor, slot: int, batch: MicroBatch) -> Tensor:
    """No intervention."""
    return hidden


def _edit(intervention: Intervention, slot: int, batch: MicroBatch, hidden: Tensor) -> Tensor:
    return intervention(hidden, slot, batch)


def mean_divergence(rows: Sequence[CachedRow], losses: Tensor, reduction: Reduction) -> float:
    """Mean of the rows' mean divergences (rows,): over sequences, or over all their response tokens."""
    if reduction == "sequence":
        return float(losses.mean())
    lengths = torch.tensor([float(row.response_length) for row in rows])
    return float((losses * lengths).sum() / lengths.sum())


class DivergenceObjective:
    """The loss of cached rows.

    Args:
        decoder: the model.
        runner: that the rows were cached with.
        layers: the intervened ones, ascending.
        prefix_length: positions that are never intervened on.
        beta: weight of the target, see `linear_jsd`.
        micro_batch_tokens: tokens that go through the suffix at once, pads counted.
        recompute: keep no activations for the backward pass, see `run_suffix`.
        activation_bytes: memory for those that are kept, where micro-batches go through the layers together; None for
            no limit.
        offload: there, hidden states between layers that run twice wait off the device, see `run_layer_major`.
        impl: implementation of the ops.
        engine: what micro-batches go through, if several processes hold the weights together.

    Raises:
        InvalidInputError: a prefix shorter than the one that the runner leaves out.
    """

    def __init__(
        self,
        decoder: Decoder,
        runner: Runner,
        layers: Sequence[int],
        *,
        prefix_length: int,
        beta: float = 0.5,
        micro_batch_tokens: int = 4096,
        recompute: bool = False,
        activation_bytes: int | None = None,
        offload: bool = False,
        impl: Implementation = "auto",
        engine: Engine | None = None,
    ) -> None:
        if prefix_length < len(runner.prefix_ids):
            wanted = f"at least {len(runner.prefix_ids)}, which the activations were cached for"
            raise InvalidInputError(expected_got("prefix_length", wanted, prefix_length))
        self.decoder = decoder
        self.runner = runner
        self.layers = tuple(layers)
        self.prefix_length = prefix_length
        self.beta = beta
        self.micro_batch_tokens = micro_batch_tokens
        self.recompute = recompute
        self.offload = offload
        self._weights = layer_weights(decoder.model)
        budget = float("inf") if activation_bytes is None else float(activation_bytes)
        self._keep = KeepUpTo(0.0 if recompute else budget)
        self.impl: Implementation = impl
        self.engine = engine

    @torch.no_grad()
    def evaluate(self, rows: Sequence[CachedRow], intervention: Intervention) -> Tensor:
        """Mean divergence over the response of each row, (rows,) float32, in nats."""
        lengths = torch.tensor([float(row.response_length) for row in rows])
        sums = [(batch, _row_sums(batch, *found)) for batch, *found in self._token_losses(rows, intervention)]
        return _in_order(sums, len(rows)) / lengths

    def accumulate_gradient(
        self,
        rows: Sequence[CachedRow],
        row_weights: Sequence[float],
        intervention: Intervention,
        concepts: Sequence[int] | None = None,
    ) -> Tensor:
        """Add to the direction's gradient that of sum_r row_weights[r] sum_k JSD_rk.

        Args:
            rows: the rows.
            row_weights: theirs.
            intervention: what depends on the direction.
            concepts: the concept of each row, for an intervention that has several.

        Returns:
            Sums of the divergence over the response of each row, (rows,) float32.
        """
        sums, pending = [], []
        for batch, owner, token_losses in self._token_losses(rows, intervention, concepts):
            weights = torch.tensor([row_weights[place] for place in batch.places], device=owner.device)
            loss = (token_losses * weights[owner].to(token_losses.dtype)).sum()
            if self.is_layer_major:
                pending.append(loss)
            elif self.engine is not None:
                self.engine.backward(loss)
            else:
                torch.autograd.backward(loss)
            sums.append((batch, _row_sums(batch, owner, token_losses.detach())))
        if pending:
            torch.autograd.backward(pending)
        return _in_order(sums, len(rows))

    def within_memory(self, work: Callable[[], T]) -> T:
        """Do what uses the methods above, and if memory runs out again with half the tokens in a micro-batch.

        Where layers keep their activations by choice, they stop that first. What was changed stays so for what is done
        later, and does not bear on the result but by rounding.

        Raises:
            OutOfMemoryError: of torch, if a micro-batch of a single row does not fit.
        """
        while True:
            try:
                return work()
            except RuntimeError as error:
                if not _is_out_of_memory(error) or not self._can_do_with_less:
                    raise
            self._free_memory()
            if self.is_layer_major and self._keep.budget:
                self._keep.budget = 0.0
                _logger.warning("out of memory: from now on all layers are run again for the backward pass")
            else:
                self.micro_batch_tokens //= 2
                _logger.warning("out of memory: from now on %d tokens a micro-batch", self.micro_batch_tokens)

    @property
    def _can_do_with_less(self) -> bool:
        if self.engine is not None:  # a process cannot begin anew by itself: the others wait within a micro-batch
            return False
        return self.micro_batch_tokens > SMALLEST_MICRO_BATCH or bool(self.is_layer_major and self._keep.budget)

    def _free_memory(self) -> None:
        """Give back what a failed attempt left."""
        gc.collect()
        if self.decoder.device.type == "cuda":
            torch.cuda.empty_cache()

    @property
    def is_layer_major(self) -> bool:
        """Whether all micro-batches go through a layer before any goes through the next: see layer_major.py."""
        beyond = range(self.layers[0] + 1, self.decoder.num_layers)
        streamed = self._weights is not None and not self._weights.resident.issuperset(beyond)
        return streamed and self.engine is None

    def _token_losses(
        self, rows: Sequence[CachedRow], intervention: Intervention, concepts: Sequence[int] | None = None
    ) -> Iterator[tuple[MicroBatch, Tensor, Tensor]]:
        """For each micro-batch: per response token its row's place in the batch, and its loss."""
        lengths = [len(row.base_hidden) for row in rows]
        order = sorted(range(len(rows)), key=lambda place: -lengths[place])
        divided = [*batches_by_tokens(order, lengths, self.micro_batch_tokens, pads=self.runner.pads)]
        prepared = (self._prepared(rows, places, intervention, concepts) for places in divided)
        if self.engine is not None:
            yield from self._through_engine(self.engine, prepared, len(divided))
            return
        for one, final in self._finals(prepared):
            yield one.batch, one.owners, self._losses(one, final, self.decoder.head)

    def _losses(self, one: _Prepared, final: Tensor, head: Head) -> Tensor:
        """Of the response tokens of a micro-batch, by their final hidden states."""
        return linear_jsd(
            final,
            one.target,
            head.weight,
            bias=head.bias,
            logit_softcap=head.logit_softcap,
            logit_scale=head.logit_scale,
            beta=self.beta,
            reduction="none",
            impl=self.impl,
        )

    def _prepared(
        self,
        rows: Sequence[CachedRow],
        places: Sequence[int],
        intervention: Intervention,
        concepts: Sequence[int] | None,
    ) -> _Prepared:
        """The micro-batch of the rows at some places."""
        asked = [rows[place] for place in places]
        batch, hidden = self._assemble(asked, tuple(places), concepts)
        edits = {layer: partial(_edit, intervention, slot, batch) for slot, layer in enumerate(self.layers) if slot > 0}
        return _Prepared(batch, intervention(hidden, 0, batch), edits, *self._responses(asked, batch))

    def _empty(self) -> _Prepared:
        """A micro-batch without a response token, of one token that no direction bears on."""
        decoder, device = self.decoder, self.decoder.device
        rows, number = Rows((1,), len(self.runner.prefix_ids)), torch.zeros(1, dtype=torch.int64, device=device)
        hidden = torch.ones(1, decoder.hidden_size, dtype=decoder.dtype, device=device)
        batch = MicroBatch((), rows, number, hidden[:0], number[:0] == 0, None, None)
        # it has a gradient, although nobody reads it: the others' backward passes wait for this one's
        return _Prepared(batch, hidden.clone().requires_grad_(), {}, number[:0], number, hidden)

    def _finals(self, prepared: Iterator[_Prepared]) -> Iterator[tuple[_Prepared, Tensor]]:
        """For each micro-batch: the final hidden states of its response tokens."""
        first = self.layers[0]
        if not self.is_layer_major:
            for one in prepared:
                yield one, self._suffix(one, one.hidden)
            return
        waiting = [*prepared]
        begun = [
            self.runner.begin_suffix(first, one.hidden, one.batch.rows, edits=one.edits, positions=one.predicting)
            for one in waiting
        ]
        if not begun:
            return
        assert self._weights is not None
        passes, hidden_states = zip(*begun, strict=True)
        beyond = range(first + 1, self.decoder.num_layers)
        finals = run_layer_major(passes, hidden_states, beyond, self._weights, self._keep, self.offload)
        yield from zip(waiting, finals, strict=True)

    def _suffix(self, one: _Prepared, hidden: Tensor) -> Tensor:
        """Final hidden states of a micro-batch's response tokens."""
        return self.runner.suffix(
            self.layers[0],
            hidden,
            one.batch.rows,
            edits=one.edits,
            positions=one.predicting,
            recompute=self.recompute,
        )

    def _through_engine(
        self, engine: Engine, prepared: Iterator[_Prepared], count: int
    ) -> Iterator[tuple[MicroBatch, Tensor, Tensor]]:
        """As `_token_losses`; of fewer micro-batches than another process has, empty ones follow."""
        missing = engine.rounds(count) - count
        for one in itertools.chain(prepared, (self._empty() for _ in range(missing))):
            losses = engine.run(one.hidden, partial(self._suffix, one), partial(self._losses, one))
            yield one.batch, one.owners, losses[: len(one.owners)]
        engine.rest()

    def _responses(self, rows: Sequence[CachedRow], batch: MicroBatch) -> tuple[Tensor, Tensor, Tensor]:
        """For each response token: its row in the batch, the packed token that predicts it, its target (D,)."""
        device = self.decoder.device
        lengths = torch.tensor([row.response_length for row in rows])
        owners = torch.repeat_interleave(lengths)
        ends = batch.rows.starts[1:] - 1  # the last token of a row predicts nothing
        firsts = lengths.cumsum(0) - lengths
        predicting = ends[owners] - lengths[owners] + torch.arange(len(owners)) - firsts[owners]
        target = torch.cat([row.target_final for row in rows])
        return owners.to(device), predicting.to(device), target.to(device)

    def _assemble(
        self, rows: Sequence[CachedRow], places: tuple[int, ...], concepts: Sequence[int] | None
    ) -> tuple[MicroBatch, Tensor]:
        shared, device = len(self.runner.prefix_ids), self.decoder.device
        packed = Rows(tuple(len(row.base_hidden) for row in rows), shared)
        hidden = torch.cat([row.base_hidden for row in rows])
        batch = MicroBatch(
            places=places,
            rows=packed,
            owners=packed.owners.to(device),
            source=torch.stack([row.source for row in rows]).to(device),
            toward_positive=torch.tensor([row.row.toward == "positive" for row in rows], device=device),
            concepts=None if concepts is None else torch.tensor([concepts[place] for place in places], device=device),
            mask=None if self.prefix_length == shared else (packed.positions >= self.prefix_length).to(device),
        )
        return batch, hidden.to(device)


def _is_out_of_memory(error: RuntimeError) -> bool:
    """On a CPU torch raises no kind of its own."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error)


def _row_sums(batch: MicroBatch, owner: Tensor, token_losses: Tensor) -> Tensor:
    """Sums over the response of each row of the batch, float32, left on the device."""
    return torch.zeros(len(batch.places), device=owner.device).index_add_(0, owner, token_losses.float())


def _in_order(sums: Sequence[tuple[MicroBatch, Tensor]], count: int) -> Tensor:
    """The sums of all batches at the places of their rows, on the CPU."""
    result = torch.zeros(count)
    if sums:
        places = [place for batch, _ in sums for place in batch.places]
        result[places] = torch.cat([each for _, each in sums]).cpu()
    return result
