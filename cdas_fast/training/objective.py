"""The divergence between intervened and counterfactual pass, from cached activations: values and gradients.

For each row, with h the base activations, h_src the source activation and q the target's distribution:

    loss = mean_k JSD( softmax(head(suffix(Phi(h)))) at response position k || q_k )
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from cdas_fast.errors import InvalidInputError, expected_got
from cdas_fast.models.packed import Rows
from cdas_fast.models.structure import Decoder
from cdas_fast.ops import clamp, linear_jsd
from cdas_fast.ops.implementation import Implementation
from cdas_fast.ops.interchange import project
from cdas_fast.training.cache import ActivationCache, CachedRow, batches_by_tokens
from cdas_fast.training.config import Reduction


@dataclass(frozen=True)
class MicroBatch:
    """Rows that go through the suffix together, packed one behind the other: N tokens of B rows."""

    places: tuple[int, ...]  # where the rows stand in the list that was asked for
    rows: Rows
    owners: Tensor  # (N,) the row of each token
    source: Tensor  # (B, layers, D)
    toward_positive: Tensor  # (B,) bool
    mask: Tensor | None  # (N,) bool, True where an intervention is made; everywhere if None


# (hidden (N, D), slot of the layer among the intervened ones, micro-batch) -> hidden (N, D)
Intervention = Callable[[Tensor, int, MicroBatch], Tensor]


def interchange_with(direction: Tensor, impl: Implementation = "auto") -> Intervention:
    """Give every position the source's coordinates along `direction` (R, D)."""

    def intervene(hidden: Tensor, slot: int, batch: MicroBatch) -> Tensor:
        value = project(batch.source[:, slot], direction, impl=impl)
        return clamp(hidden, value[batch.owners], direction, mask=batch.mask, impl=impl)

    return intervene


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


class DivergenceObjective:
    """The loss over the rows of a cache."""

    def __init__(
        self,
        decoder: Decoder,
        cache: ActivationCache,
        *,
        prefix_length: int,
        beta: float = 0.5,
        micro_batch_tokens: int = 4096,
        impl: Implementation = "auto",
    ) -> None:
        if prefix_length < cache.shared_prefix_length:
            wanted = f"at least {cache.shared_prefix_length}, which the cache was built for"
            raise InvalidInputError(expected_got("prefix_length", wanted, prefix_length))
        self.decoder = decoder
        self.cache = cache
        self.prefix_length = prefix_length
        self.beta = beta
        self.micro_batch_tokens = micro_batch_tokens
        self.impl: Implementation = impl

    def response_length(self, row: int) -> int:
        """Number of response tokens of a row."""
        return self.cache.rows.rows[row].base.response_length

    @torch.no_grad()
    def evaluate(self, rows: Sequence[int], intervention: Intervention) -> Tensor:
        """Mean divergence over the response of each row, (rows,) float32, in nats."""
        losses = torch.zeros(len(rows))
        for batch, owner, token_losses in self._token_losses(rows, intervention):
            sums = torch.zeros(len(batch.places), device=owner.device).index_add_(0, owner, token_losses.float())
            for place, total in zip(batch.places, sums.tolist(), strict=True):
                losses[place] = total / self.response_length(rows[place])
        return losses

    def average(self, rows: Sequence[int], losses: Tensor, reduction: Reduction) -> float:
        """Mean of the rows' mean divergences (rows,): over sequences, or over all their response tokens."""
        if reduction == "sequence":
            return float(losses.mean())
        lengths = torch.tensor([float(self.response_length(row)) for row in rows])
        return float((losses * lengths).sum() / lengths.sum())

    def accumulate_gradient(
        self, rows: Sequence[int], row_weights: Sequence[float], intervention: Intervention
    ) -> Tensor:
        """Add to the direction's gradient that of sum_r row_weights[r] sum_k JSD_rk.

        Returns:
            Sums of the divergence over the response of each row, (rows,) float32.
        """
        sums = torch.zeros(len(rows))
        for batch, owner, token_losses in self._token_losses(rows, intervention):
            weights = torch.tensor([row_weights[place] for place in batch.places], device=owner.device)
            torch.autograd.backward((token_losses * weights[owner].to(token_losses.dtype)).sum())
            detached = token_losses.detach().float()
            batch_sums = torch.zeros(len(batch.places), device=owner.device).index_add_(0, owner, detached)
            sums[list(batch.places)] = batch_sums.cpu()
        return sums

    def _token_losses(
        self, rows: Sequence[int], intervention: Intervention
    ) -> Iterator[tuple[MicroBatch, Tensor, Tensor]]:
        """For each micro-batch: places in `rows`, and per response token its place in the batch and its loss."""
        cache, head = self.cache, self.decoder.head
        lengths = [cache.base_length(row) for row in rows]
        order = sorted(range(len(rows)), key=lambda place: -lengths[place])
        for places in batches_by_tokens(order, lengths, self.micro_batch_tokens, pads=cache.runner.pads):
            asked = [cache.row(rows[place]) for place in places]
            batch, hidden = self._assemble(asked, tuple(places))
            edited = intervention(hidden, 0, batch)
            edits = {
                layer: partial(_edit, intervention, slot, batch) for slot, layer in enumerate(cache.layers) if slot > 0
            }
            final = cache.runner.suffix(cache.layers[0], edited, batch.rows, edits=edits)
            owners, predicting, target = self._responses(asked, batch)
            losses = linear_jsd(
                final[predicting],
                target,
                head.weight,
                bias=head.bias,
                logit_softcap=head.logit_softcap,
                logit_scale=head.logit_scale,
                beta=self.beta,
                reduction="none",
                impl=self.impl,
            )
            yield batch, owners, losses

    def _responses(self, rows: Sequence[CachedRow], batch: MicroBatch) -> tuple[Tensor, Tensor, Tensor]:
        """For each response token: its row in the batch, the packed token that predicts it, its target (D,)."""
        device = self.decoder.device
        lengths = torch.tensor([len(cached.target_final) for cached in rows])
        owners = torch.repeat_interleave(lengths)
        ends = batch.rows.starts[1:] - 1  # the last token of a row predicts nothing
        firsts = lengths.cumsum(0) - lengths
        predicting = ends[owners] - lengths[owners] + torch.arange(len(owners)) - firsts[owners]
        target = torch.cat([cached.target_final for cached in rows])
        return owners.to(device), predicting.to(device), target.to(device)

    def _assemble(self, rows: Sequence[CachedRow], places: tuple[int, ...]) -> tuple[MicroBatch, Tensor]:
        cache, device = self.cache, self.decoder.device
        packed = Rows(tuple(len(cached.base_hidden) for cached in rows), cache.shared_prefix_length)
        hidden = torch.cat([cached.base_hidden for cached in rows])
        everywhere = self.prefix_length == cache.shared_prefix_length
        batch = MicroBatch(
            places=places,
            rows=packed,
            owners=packed.owners.to(device),
            source=torch.stack([cached.source for cached in rows]).to(device),
            toward_positive=torch.tensor([cached.row.toward == "positive" for cached in rows], device=device),
            mask=None if everywhere else (packed.positions >= self.prefix_length).to(device),
        )
        return batch, hidden.to(device)
