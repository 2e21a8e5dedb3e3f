"""A training step as the published code does it: whole forward passes, logits at every position, plain torch.

It is what `cdas-fast bench train` compares with, and reproduces the published losses and gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cdas_fast.benchmark.loss_variants import eager_divergence
from cdas_fast.data.rows import TokenRows, TrainingRow
from cdas_fast.errors import UnsupportedError, expected_got
from cdas_fast.models.structure import Decoder
from cdas_fast.models.suffix import edit_hook
from cdas_fast.training.config import TrainingConfig


@dataclass(frozen=True)
class StepResult:
    """What a step found before it changed the direction."""

    loss: float
    minibatch_losses: tuple[float, ...]
    gradient: Tensor  # (D,), before clipping, on the CPU


@dataclass(frozen=True)
class Tokens:
    """A minibatch of B rows on the device, padded on the right to T."""

    base_ids: Tensor  # (B, T)
    base_mask: Tensor  # (B, T), 1 where there is a token
    source_ids: Tensor  # (B, T_source)
    source_mask: Tensor  # (B, T_source)
    source_position: Tensor  # (B,)
    intervened: Tensor  # (B, T) bool
    row: Tensor  # (K,): of each response token
    base_position: Tensor  # (K,): the position that predicts it
    source_positions: Tensor  # (K,)
    weight: Tensor  # (K,): of each response token in the mean, float32


class PlainTraining:
    """Steps over the pairs in file order, a batch of b pairs as two minibatches of b sequences.

    Each minibatch takes three whole forward passes of the Hugging Face model: over the sources, whose activation is
    read; over the sources again, for the logits of the target; over the bases, with

        Phi(h) = h + (a - w.h) w,  a = w.h_source

    from the prefix on. Logits are those of every position in the model's dtype, distributions and divergence at the
    response positions are float32, autograd does the rest. AdamW, clipping and decay are those of `ConceptTraining`.

    Args:
        decoder: the model, frozen.
        rows: the rows of whole pairs in both directions.
        config: layer (one), rank (1), batch size, reduction, optimiser.
        initial: the initial direction (1, D) of unit length.

    Raises:
        UnsupportedError: several layers, another rank, or one direction alone.
    """

    def __init__(self, decoder: Decoder, rows: TokenRows, config: TrainingConfig, initial: Tensor) -> None:
        if len(config.layers) != 1 or config.rank != 1 or config.directions != "both":
            got = f"layers {config.layers}, rank {config.rank}, directions {config.directions}"
            raise UnsupportedError(expected_got("plain training", "one layer, rank 1, both directions", got))
        self.model: Any = decoder.model
        self.layer = decoder.layers[config.layers[0]]
        self.device, self.rows, self.config = decoder.device, rows, config
        self.pairs = len(rows.rows) // 2
        self.steps_per_epoch = -(-self.pairs // config.batch_size)
        self.total_steps = config.epochs * self.steps_per_epoch
        self.direction = initial[0].to(self.device).clone().requires_grad_(True)
        self.optimizer = torch.optim.AdamW(
            [self.direction], lr=config.learning_rate, betas=config.betas, weight_decay=0.0
        )

    def step(self, number: int) -> StepResult:
        """Do the step of that number, from 0; after the last one of a run come its first ones again."""
        number %= self.total_steps
        first = number % self.steps_per_epoch * self.config.batch_size
        rows = self.rows.rows[2 * first : 2 * min(first + self.config.batch_size, self.pairs)]
        count = len(rows) // 2
        self.optimizer.zero_grad(set_to_none=True)
        losses = []
        for minibatch in (rows[:count], rows[count:]):
            loss = self.loss(minibatch)
            (loss / 2).backward()
            losses.append(float(loss.detach()))
        assert self.direction.grad is not None
        gradient = self.direction.grad.detach().clone()
        torch.nn.utils.clip_grad_norm_([self.direction], self.config.max_grad_norm)
        self.optimizer.param_groups[0]["lr"] = self.config.learning_rate * (1 - number / self.total_steps)
        self.optimizer.step()
        with torch.no_grad():
            self.direction /= self.direction.norm()
        return StepResult(sum(losses) / 2, tuple(losses), gradient.cpu())

    def loss(self, minibatch: Sequence[TrainingRow]) -> Tensor:
        """Mean divergence of a minibatch, over its tokens or its sequences as the reduction says."""
        tokens = self.tokens(minibatch)
        found: list[Tensor] = []
        with torch.no_grad():
            with _hooked(self.layer, lambda module, args, output: found.append(_hidden(output))):
                self.logits(tokens.source_ids, tokens.source_mask)
            source = found[0][torch.arange(len(minibatch), device=self.device), tokens.source_position]
            target = self.logits(tokens.source_ids, tokens.source_mask)
        with _hooked(self.layer, edit_hook(lambda hidden: self.intervene(hidden, source, tokens.intervened))):
            logits = self.logits(tokens.base_ids, tokens.base_mask)
        log_p = logits[tokens.row, tokens.base_position].float().log_softmax(-1)
        log_q = target[tokens.row, tokens.source_positions].float().log_softmax(-1)
        return (eager_divergence(log_p, log_q, "jsd") * tokens.weight).sum()

    def logits(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The model's own, (B, T, V)."""
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits

    def intervene(self, hidden: Tensor, source: Tensor, intervened: Tensor) -> Tensor:
        """Phi of (B, T, D) with sources (B, D), where `intervened` (B, T)."""
        w = self.direction
        value = source.float() @ w
        change = (value[:, None] - hidden.float() @ w)[..., None] * w
        return hidden + (change * intervened[..., None]).to(hidden.dtype)

    def tokens(self, minibatch: Sequence[TrainingRow]) -> Tokens:
        """A minibatch as tensors."""
        base_ids, base_mask = self._padded([row.base.ids for row in minibatch])
        source_ids, source_mask = self._padded([row.source.ids for row in minibatch])
        lengths = [row.base.response_length for row in minibatch]
        total = sum(lengths)
        owner: list[int] = []
        base_position: list[int] = []
        source_positions: list[int] = []
        weight: list[float] = []
        for slot, (row, length) in enumerate(zip(minibatch, lengths, strict=True)):
            owner += [slot] * length
            base_position += range(row.base.prompt_length - 1, len(row.base.ids) - 1)
            source_positions += range(row.source.prompt_length - 1, len(row.source.ids) - 1)
            weight += [1 / total if self.config.reduction == "token" else 1 / (len(minibatch) * length)] * length
        place = torch.arange(base_ids.shape[1], device=self.device)
        return Tokens(
            base_ids,
            base_mask,
            source_ids,
            source_mask,
            self._tensor([row.source_position for row in minibatch]),
            base_mask.bool() & (place >= self.rows.prefix_length),
            self._tensor(owner),
            self._tensor(base_position),
            self._tensor(source_positions),
            self._tensor(weight),
        )

    def _padded(self, sequences: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        longest = max(map(len, sequences))
        ids = [[*sequence, *[0] * (longest - len(sequence))] for sequence in sequences]
        mask = [[1] * len(sequence) + [0] * (longest - len(sequence)) for sequence in sequences]
        return self._tensor(ids), self._tensor(mask)

    def _tensor(self, values: Sequence[Any]) -> Tensor:
        return torch.tensor(values, device=self.device)


def _hidden(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def _hooked(module: nn.Module, hook: Callable[[nn.Module, Any, Any], Any]) -> Iterator[None]:
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
