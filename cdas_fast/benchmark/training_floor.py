"""The floor of a training step: its matrix products alone, in memory allocated beforehand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cdas_fast.benchmark.memory import free_bytes
from cdas_fast.benchmark.runner import does_not_fit
from cdas_fast.benchmark.timing import Timer, fastest
from cdas_fast.models.structure import Decoder


@dataclass(frozen=True)
class StepSize:
    """What one step has to do at least."""

    tokens: int  # N, base tokens beyond the prefix
    responses: int  # R, response tokens


class Floor:
    """For every nn.Linear (out, in) beyond the layer, and the head (V, D):

        (N, in) @ W^T and (N, out) @ W;    twice (R, D) @ W_head^T, and (R, V) @ W_head

    Args:
        decoder: the model, whose own weights are multiplied.
        layer: the intervened layer.
        sizes: of the steps, in turn.
        chunk_rows: rows of the head's products at a time; all if None.
    """

    def __init__(self, decoder: Decoder, layer: int, sizes: Sequence[StepSize], chunk_rows: int | None = None) -> None:
        self.head, self.sizes = decoder.head.weight, tuple(sizes)
        self.weights = [
            module.weight.detach()
            for each in decoder.layers[layer + 1 :]
            for module in each.modules()
            if isinstance(module, nn.Linear)
        ]
        tokens, self.responses = max(size.tokens for size in sizes), max(size.responses for size in sizes)
        self.chunk_rows = min(chunk_rows or self.responses, self.responses)
        generator = torch.Generator(self.head.device).manual_seed(0)

        def random(rows: int, width: int) -> Tensor:
            empty = torch.empty(rows, width, dtype=self.head.dtype, device=self.head.device)
            return empty.normal_(generator=generator)

        widths = {size for weight in self.weights for size in weight.shape}
        self.given, self.made = ({width: random(tokens, width) for width in widths} for _ in range(2))
        self.hidden = random(self.responses, self.head.shape[1])
        self.gradient = random(self.responses, self.head.shape[1])
        self.logits = random(self.chunk_rows, self.head.shape[0])

    def step(self, number: int) -> None:
        """The products of the step of that number, from 0."""
        size = self.sizes[number % len(self.sizes)]
        for weight in self.weights:
            torch.mm(
                self.given[weight.shape[1]][: size.tokens], weight.T, out=self.made[weight.shape[0]][: size.tokens]
            )
        self.head_products(size.responses)
        for weight in reversed(self.weights):
            torch.mm(self.given[weight.shape[0]][: size.tokens], weight, out=self.made[weight.shape[1]][: size.tokens])

    def head_products(self, responses: int) -> None:
        """Those of the head."""
        for start in range(0, responses, self.chunk_rows):
            rows = slice(start, min(start + self.chunk_rows, responses))
            logits = self.logits[: rows.stop - start]
            for _ in range(2):
                torch.mm(self.hidden[rows], self.head.T, out=logits)
            torch.mm(logits, self.head, out=self.gradient[rows])

    def multiply_adds(self, size: StepSize) -> int:
        """2 N sum(in out) + 3 R D V."""
        return 2 * size.tokens * sum(weight.numel() for weight in self.weights) + 3 * size.responses * self.head.numel()


def fastest_floor(decoder: Decoder, layer: int, sizes: Sequence[StepSize], timer: Timer) -> Floor:
    """The floor whose number of rows at a time, of those that fit, does the head's products of a step fastest."""
    responses, vocabulary = max(size.responses for size in sizes), decoder.head.weight.shape[0]
    candidates = sorted({-(-responses // parts) for parts in (1, 4, 16)}, reverse=True)
    free = free_bytes(decoder.device)
    itemsize = decoder.head.weight.element_size()
    fitting = [rows for rows in candidates if does_not_fit(rows * vocabulary * itemsize, free) is None]
    best = candidates[-1]
    if len(fitting) > 1:
        floors = {rows: Floor(decoder, layer, sizes, rows) for rows in fitting}
        calls = {rows: lambda number, floor=floor: floor.head_products(responses) for rows, floor in floors.items()}
        best = fastest(calls, timer)
        return floors[best]
    return Floor(decoder, layer, sizes, best)
