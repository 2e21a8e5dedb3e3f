"""The training of one concept: which rows a step takes, and what their gradient does to the direction.

The gradient itself is made by `step_together`, for the rows of several concepts at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cdas_fast.distributed.process_group import ProcessGroup, share_of_rows
from cdas_fast.errors import NonFiniteError, expected_got
from cdas_fast.training.cache import ActivationCache, CachedRow
from cdas_fast.training.config import TrainingConfig
from cdas_fast.training.directions import orthonormalize
from cdas_fast.training.objective import DivergenceObjective, Interchange, mean_divergence
from cdas_fast.training.run_folder import Checkpoint, StepRecord

Evaluate = Callable[[ActivationCache, Tensor], float]  # rows, direction (R, D) -> their mean divergence in nats


@dataclass(frozen=True)
class StepInfo:
    """What a callback is given after each step of a concept."""

    concept_id: int
    record: StepRecord
    gradient: Tensor  # (R, D), before clipping
    direction: Tensor  # (R, D), after the step


@dataclass(frozen=True)
class Batch:
    """The rows of a concept's step."""

    minibatches: tuple[tuple[CachedRow, ...], ...]
    weights: tuple[float, ...]  # of each row's summed divergence in the loss of the step

    @property
    def rows(self) -> tuple[CachedRow, ...]:
        """Those of all minibatches."""
        return tuple(row for minibatch in self.minibatches for row in minibatch)

    @property
    def tokens(self) -> int:
        """Base tokens beyond the shared prefix."""
        return sum(len(row.base_hidden) for row in self.rows)


class ConceptTraining:
    """Steps of AdamW on a concept's direction, with the state that a checkpoint holds. All of it is on the CPU.

    Args:
        concept_id: names it in what callbacks are given.
        cache: the activations of the rows to train on.
        config: the settings.
        initial: the initial direction (R, D), orthonormal.
        held_out: the activations of held-out rows, if their loss is to be measured.
        checkpoint: the state to go on from, instead of the initial direction.
        records: the log of the steps before it.
    """

    def __init__(
        self,
        concept_id: int,
        cache: ActivationCache,
        config: TrainingConfig,
        initial: Tensor,
        *,
        held_out: ActivationCache | None = None,
        checkpoint: Checkpoint | None = None,
        records: Sequence[StepRecord] = (),
    ) -> None:
        self.concept_id, self.cache, self.held_out, self.config = concept_id, cache, held_out, config
        self.records = list(records)
        self.rows_per_pair = 2 if config.directions == "both" else 1
        self.pairs = len(cache) // self.rows_per_pair
        self.steps_per_epoch = -(-self.pairs // config.batch_size)
        self.total_steps = config.epochs * self.steps_per_epoch
        self.state = checkpoint or Checkpoint(0, initial, torch.zeros_like(initial), torch.zeros_like(initial))
        self.direction = self.state.direction.clone()
        self.optimizer = torch.optim.AdamW(
            [self.direction], lr=config.learning_rate, betas=config.betas, weight_decay=0.0, foreach=False
        )
        self.optimizer.state[self.direction] = {
            "step": torch.tensor(float(self.state.step)),
            "exp_avg": self.state.exp_avg.clone(),
            "exp_avg_sq": self.state.exp_avg_sq.clone(),
        }

    @property
    def is_finished(self) -> bool:
        """Whether all steps are done, or the held-out loss has not fallen for too long."""
        return self.state.step >= self.total_steps or self._is_out_of_patience

    @property
    def result(self) -> Tensor:
        """The direction that the training has led to, (R, D): the last one, or with `patience` the best one."""
        return self.state.direction if self.state.best is None else self.state.best

    @property
    def _held_out_losses(self) -> list[float]:
        return [record.held_out_loss for record in self.records if record.held_out_loss is not None]

    @property
    def _is_out_of_patience(self) -> bool:
        losses = self._held_out_losses
        if self.config.patience is None or not losses:
            return False
        return len(losses) - 1 - losses.index(min(losses)) >= self.config.patience

    def _is_best(self, held_out_loss: float | None) -> bool:
        """Whether the direction is to be kept for having a lower loss than all before."""
        if self.config.patience is None or held_out_loss is None:
            return False
        return held_out_loss < min(self._held_out_losses, default=float("inf"))

    def batch(self) -> Batch:
        """The rows of the step after `state.step` others."""
        epoch, place = divmod(self.state.step, self.steps_per_epoch)
        size = self.config.batch_size
        pairs = self._order(epoch)[place * size : (place + 1) * size]
        rows = [
            self.cache.row(pair * self.rows_per_pair + offset) for pair in pairs for offset in range(self.rows_per_pair)
        ]
        # b pairs are minibatches of b sequences, in both directions two of them
        minibatches = tuple(tuple(rows[start : start + len(pairs)]) for start in range(0, len(rows), len(pairs)))
        weights: list[float] = []
        for minibatch in minibatches:
            lengths = [row.response_length for row in minibatch]
            if self.config.reduction == "sequence":
                weights += [1 / (len(rows) * length) for length in lengths]
            else:
                weights += [1 / (len(minibatches) * sum(lengths))] * len(minibatch)
        return Batch(minibatches, tuple(weights))

    def update(self, batch: Batch, sums: Tensor, gradient: Tensor, *, seconds: float, evaluate: Evaluate) -> StepInfo:
        """Do the step: clipping, AdamW, and the rows made orthonormal again.

        Args:
            batch: what `batch()` gave.
            sums: of the divergence over the response of each of its rows, (rows,), on the CPU.
            gradient: of the step's loss, (R, D), on the CPU.
            seconds: that it took to find them.
            evaluate: measures held-out rows.

        Raises:
            NonFiniteError: a NaN or an infinity; the state is as it was.
        """
        started = time.perf_counter()
        step, config = self.state.step, self.config
        self._require_finite(step, batch, sums, gradient)
        self.direction.grad = gradient.clone()
        grad_norm = float(torch.nn.utils.clip_grad_norm_([self.direction], config.max_grad_norm))
        learning_rate = config.rate(step, self.total_steps)
        self.optimizer.param_groups[0]["lr"] = learning_rate
        self.optimizer.step()
        self.direction.copy_(orthonormalize(self.direction))
        moments = self.optimizer.state[self.direction]
        losses = self._minibatch_losses(batch, sums)
        epoch, place = divmod(step, self.steps_per_epoch)
        last = place == self.steps_per_epoch - 1
        due = (epoch + 1) % config.evaluate_every == 0 or epoch + 1 == config.epochs
        seconds += time.perf_counter() - started
        held_out = evaluate(self.held_out, self.direction) if self.held_out and last and due else None
        record = StepRecord(
            step=step + 1,
            epoch=epoch + 1,
            loss=sum(losses) / len(losses),
            learning_rate=learning_rate,
            grad_norm=grad_norm,
            tokens=batch.tokens,
            seconds=seconds,
            minibatch_losses=losses,
            held_out_loss=held_out,
        )
        state = (self.direction, moments["exp_avg"], moments["exp_avg_sq"])
        direction, exp_avg, exp_avg_sq = (each.clone() for each in state)
        best = direction.clone() if self._is_best(held_out) else self.state.best
        self.state = Checkpoint(step + 1, direction, exp_avg, exp_avg_sq, best=best)
        self.records.append(record)
        return StepInfo(self.concept_id, record, gradient.clone(), self.state.direction)

    def _order(self, epoch: int) -> list[int]:
        """Pairs in the order of an epoch. It depends on seed and epoch alone, so that a resumed run goes on with it."""
        if not self.config.shuffle:
            return list(range(self.pairs))
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + epoch)
        order: list[int] = torch.randperm(self.pairs, generator=generator).tolist()
        return order

    def _minibatch_losses(self, batch: Batch, sums: Tensor) -> tuple[float, ...]:
        losses = []
        remaining = sums.tolist()
        for minibatch in batch.minibatches:
            own, remaining = remaining[: len(minibatch)], remaining[len(minibatch) :]
            lengths = [row.response_length for row in minibatch]
            if self.config.reduction == "token":
                losses.append(sum(own) / sum(lengths))
            else:
                losses.append(sum(total / length for total, length in zip(own, lengths, strict=True)) / len(own))
        return tuple(losses)

    def _require_finite(self, step: int, batch: Batch, sums: Tensor, gradient: Tensor) -> None:
        bad = [row.name for row, total in zip(batch.rows, sums.tolist(), strict=True) if not abs(total) < float("inf")]
        if bad or not torch.isfinite(gradient).all():
            where = ", ".join(bad[:4]) if bad else "the gradient"
            remedy = "The state before this step is kept. Lower the learning rate or load the model in float32."
            raise NonFiniteError(
                expected_got(f"step {step + 1}", "a finite loss and gradient", f"NaN or infinity in {where}", remedy)
            )


def step_together(
    objective: DivergenceObjective, concepts: Sequence[ConceptTraining], group: ProcessGroup | None = None
) -> list[StepInfo | NonFiniteError]:
    """Do one step of each concept, their rows in the same micro-batches. One that meets a NaN does not take its step.

    Each concept has its own direction, so the gradients are those that it has alone; only the rounding of matrix
    products may depend on what else is in a batch. A step moves the directions to the device once, and gradients and
    losses back once, at its end.

    With a group of processes, each does a share of the rows, and all of them the same updates of the sums.
    """
    started = time.perf_counter()
    batches = [concept.batch() for concept in concepts]
    alone, device = len(concepts) == 1, objective.decoder.device
    directions = torch.stack([concept.direction for concept in concepts])
    owners = [number for number, batch in enumerate(batches) for _ in batch.rows]
    rows = [row for batch in batches for row in batch.rows]
    weights = [weight for batch in batches for weight in batch.weights]
    own = [*range(len(rows))] if group is None else share_of_rows(_lengths(rows), group.processes)

    def accumulate() -> tuple[Tensor, Tensor]:
        direction = (directions[0] if alone else directions).to(device).requires_grad_(True)
        sums = torch.zeros(len(rows))
        if own or objective.engine is not None:  # then the others need this process, even if it has no row
            sums[own] = objective.accumulate_gradient(
                [rows[place] for place in own],
                [weights[place] for place in own],
                Interchange(direction, objective.impl),
                concepts=None if alone else [owners[place] for place in own],
            )
        gradient = torch.zeros_like(directions) if direction.grad is None else direction.grad.cpu()
        return gradient.view_as(directions), sums

    gradients, sums = objective.within_memory(accumulate)
    if group is not None:
        gradients, sums = group.total(gradients, sums)
    seconds, tokens = time.perf_counter() - started, sum(batch.tokens for batch in batches)

    def evaluate(cache: ActivationCache, direction: Tensor) -> float:
        rows = [cache.row(row) for row in range(len(cache))]
        own = [*range(len(rows))] if group is None else share_of_rows(_lengths(rows), group.processes)
        intervention = Interchange(direction.to(device), objective.impl)
        losses = torch.zeros(len(rows))
        if own or objective.engine is not None:
            asked = [rows[place] for place in own]
            losses[own] = objective.within_memory(lambda: objective.evaluate(asked, intervention))
        if group is not None:
            (losses,) = group.total(losses)
        return mean_divergence(rows, losses, concepts[0].config.reduction)

    results: list[StepInfo | NonFiniteError] = []
    parts = sums.split([len(batch.rows) for batch in batches])
    for concept, batch, its_sums, gradient in zip(concepts, batches, parts, gradients, strict=True):
        share = seconds * batch.tokens / tokens
        try:
            results.append(concept.update(batch, its_sums, gradient, seconds=share, evaluate=evaluate))
        except NonFiniteError as error:
            results.append(error)
    return results


def _lengths(rows: Sequence[CachedRow]) -> list[int]:
    return [len(row.base_hidden) for row in rows]
