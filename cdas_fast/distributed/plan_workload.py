"""What is to be trained, and the ways to run it.

Tokens are counted beyond the prefix that all sequences share. L is the intervened layer, the suffix layers L+1 to the
last.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from cdas_fast.distributed.model_sizes import FOUR_BIT_BYTES, LayerSizes, ModelSizes
from cdas_fast.errors import InvalidInputError, expected_got

ITEMSIZES = {"bfloat16": 2, "float16": 2, "float32": 4}

Processes = Literal["one process", "data parallel", "ZeRO-3"]
Source = Literal["host memory", "disk"]


@dataclass(frozen=True)
class Workload:
    """What is to be trained."""

    sizes: ModelSizes
    layer: int
    tokens: int  # of a step, on all GPUs together
    response_tokens: int  # of these
    sequence_tokens: int  # of the longest sequence: a micro-batch has no fewer
    sequences: int = 256
    rank: int = 1
    dtype: str = "bfloat16"

    @property
    def itemsize(self) -> int:
        """Bytes of an activation."""
        return ITEMSIZES[self.dtype]

    @cached_property
    def suffix(self) -> tuple[LayerSizes, ...]:
        """The layers that training runs."""
        return self.sizes.layers[self.layer + 1 :]

    @property
    def hidden_bytes(self) -> int:
        """Of one token's hidden state."""
        return self.sizes.hidden_size * self.itemsize

    def stored_bytes(self, layer: LayerSizes, four_bit: bool) -> float:
        """Of the linear maps of a layer, quantised or not."""
        return layer.linear_values * (FOUR_BIT_BYTES if four_bit else self.itemsize)

    def of_rank(self, ranks: int) -> Workload:
        """The share of one of several processes: a sequence at least."""
        tokens = max(self.sequence_tokens, math.ceil(self.tokens / ranks))
        responses = math.ceil(self.response_tokens * tokens / self.tokens)
        return replace(self, tokens=tokens, response_tokens=responses, sequences=math.ceil(self.sequences / ranks))


def make_workload(
    sizes: ModelSizes,
    layer: int | None,
    *,
    tokens: int = 4096,
    response_tokens: int | None = None,
    sequence_tokens: int | None = None,
    sequences: int = 256,
    rank: int = 1,
    dtype: str = "bfloat16",
) -> Workload:
    """A checked workload; responses take half of the tokens and a sequence 256 unless it is said.

    Raises:
        InvalidInputError: a number out of range, another dtype, or no layer.
    """
    last = sizes.num_layers - 1
    if layer is None or not 0 <= layer <= last:
        paper = sizes.suggested_layer
        advice = "" if paper is None else f" The paper takes {paper} for this model."
        remedy = f"Layers above L are what training holds: a later one takes less memory.{advice}"
        wanted = f"a decoder layer from 0 to {last}"
        raise InvalidInputError(expected_got("--layer", wanted, "none" if layer is None else layer, remedy))
    if dtype not in ITEMSIZES:
        raise InvalidInputError(expected_got("--dtype", ", ".join(ITEMSIZES), repr(dtype)))
    response_tokens = tokens // 2 if response_tokens is None else response_tokens
    sequence_tokens = min(256, tokens) if sequence_tokens is None else sequence_tokens
    bounds = {
        "--tokens": (tokens, 1, None),
        "--response-tokens": (response_tokens, 0, tokens),
        "--sequence-tokens": (sequence_tokens, 1, tokens),
        "--sequences": (sequences, 1, None),
        "--rank": (rank, 1, sizes.hidden_size),
    }
    for name, (value, least, most) in bounds.items():
        if value < least or (most is not None and value > most):
            wanted = f"at least {least}" if most is None else f"{least} to {most}"
            raise InvalidInputError(expected_got(name, f"a whole number, {wanted}", value))
    return Workload(sizes, layer, tokens, response_tokens, sequence_tokens, sequences, rank, dtype)


@dataclass(frozen=True)
class Strategy:
    """One way to run the suffix."""

    processes: Processes
    four_bit: bool
    micro_batch_tokens: int
    recompute: bool = False
    resident_layers: int | None = None  # of the suffix, the others are streamed; None: all, nothing is streamed
    source: Source | None = None  # of streamed layers
    offload: bool = False  # hidden states between layers go to host memory

    @property
    def streams(self) -> bool:
        """Whether layers pass through a ring: then all micro-batches of the step visit a layer before the next."""
        return self.resident_layers is not None
