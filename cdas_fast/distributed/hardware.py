"""Machines to plan for: `2x24` is two GPUs of 24 GB, `1xa100-80` one named card, `cpu` none.

Speeds of cards are assumptions. Those of matrix products were set beside what answer.ai measured when it fine-tuned
Llama-2-70B with FSDP and QLoRA (tokens a second times 6 x 68.45e9 FLOP; github.com/AnswerDotAI/fsdp_qlora,
benchmarks_03_2024.md), bandwidths of memory are those that the makers publish.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace

from cdas_fast.errors import InvalidInputError, expected_got

GIB = 2**30
USABLE = 29 / 30  # of a card's nominal memory: 23.2 GiB of 24


@dataclass(frozen=True)
class Card:
    """A GPU. Speeds are assumed."""

    memory_gib: float  # nominal
    tflops: float  # of bfloat16 matrix products
    bandwidth: float  # of its memory, GB/s
    source: str  # of `tflops`


def _card(memory: float, tflops: float, bandwidth: float, measured: str) -> Card:
    return Card(memory, tflops, bandwidth, f"answer.ai measured {measured}")


CARDS = {
    "3090": _card(24, 45, 936, "37 with two capped at 280 W"),
    "4090": _card(24, 105, 1008, "98"),
    "a100-40": _card(40, 190, 1555, "131 to 160"),
    "a6000-ada": _card(48, 150, 960, "73, held up by the bus"),
    "l40s": _card(48, 150, 864, "73 with the RTX 6000 Ada, held up by the bus"),
    "a100-80": _card(80, 190, 2039, "131 to 160 with the A100-40"),
    "h100": _card(80, 400, 3350, "323"),
}
ALIASES = {"a100": "a100-80", "h100-80": "h100", "rtx3090": "3090", "rtx4090": "4090"}
SMALL = Card(0, 20, 360, "a guess for cards smaller than any in the table")
CPU = Card(0, 0.4, 20, "what two cores with AVX-512-BF16 did")

_FORM = "COUNTxGIB or COUNTxCARD, such as 1x24, 2x4090 or 1xa100-80, or cpu"


@dataclass(frozen=True)
class Machine:
    """What a plan is for. `gpus` is 0 on a CPU, whose memory is that of the host."""

    text: str  # as it was asked for
    gpus: int
    card: Card
    host_gib: float | None = None  # memory of the node; None if not given
    link: float = 25.0  # GB/s from host memory to one GPU
    disk: float = 3.5  # GB/s, of all GPUs of the node together
    gather: float = 10.0  # GB/s that one GPU receives when all gather

    @property
    def is_cpu(self) -> bool:
        """Whether there is no GPU."""
        return self.gpus == 0

    @property
    def ranks(self) -> int:
        """Processes that use all of the machine."""
        return max(1, self.gpus)

    @property
    def usable(self) -> float:
        """Bytes of one GPU, or of the host on a CPU, that a process can have."""
        if self.is_cpu:
            assert self.host_gib is not None  # see `parse_machine`
            return self.host_gib * GIB
        return self.card.memory_gib * USABLE * GIB


def parse_machine(
    text: str,
    *,
    host_gib: float | None = None,
    tflops: float | None = None,
    link: float | None = None,
    disk: float | None = None,
) -> Machine:
    """The machine that `--gpus` names, with what is known better than the table.

    Raises:
        InvalidInputError: another form, an unknown card, or a number that is not positive.
    """
    numbers = {"--host-memory": host_gib, "--tflops": tflops, "--link": link, "--disk": disk}
    for name, value in numbers.items():
        if value is not None and not 0 < value < float("inf"):
            raise InvalidInputError(expected_got(name, "a positive number", value))
    gpus, card = _parse(text)
    if tflops is not None:
        card = replace(card, tflops=tflops, source="given")
    if gpus == 0 and host_gib is None:
        host_gib = _own_memory_gib()
    speeds = {name: value for name, value in (("link", link), ("disk", disk)) if value is not None}
    return Machine(text, gpus, card, host_gib, **speeds)


def _parse(text: str) -> tuple[int, Card]:
    name = text.strip().lower()
    if name == "cpu":
        return 0, CPU
    match = re.fullmatch(r"(\d+)x(.+)", name)
    if match is None or int(match[1]) < 1:
        raise InvalidInputError(expected_got("--gpus", _FORM, repr(text)))
    count, which = int(match[1]), match[2]
    which = ALIASES.get(which, which)
    if which in CARDS:
        return count, CARDS[which]
    memory = re.fullmatch(r"(\d+(?:\.\d+)?)(?:g|gb|gib)?", which)
    if memory is None:
        remedy = f"Cards: {', '.join(CARDS)}."
        raise InvalidInputError(expected_got("--gpus", _FORM, repr(text), remedy))
    gib = float(memory[1])
    if not 1 <= gib <= 1024:
        raise InvalidInputError(expected_got("--gpus", "1 to 1024 GB a GPU", repr(text)))
    return count, _of_memory(gib)


def _of_memory(gib: float) -> Card:
    """A card of `gib` with the speed of the slowest of those that have no less: more memory is never slower."""
    if gib < min(card.memory_gib for card in CARDS.values()):
        return replace(SMALL, memory_gib=gib)
    enough = min(gib, max(card.memory_gib for card in CARDS.values()))
    found = {name: card for name, card in CARDS.items() if card.memory_gib >= enough}
    name = min(found, key=lambda name: found[name].tflops)
    return replace(found[name], memory_gib=gib, source=f"as of a {name}; {found[name].source}")


def _own_memory_gib() -> float:
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB)
    except (AttributeError, ValueError, OSError) as error:  # not on Windows
        raise InvalidInputError(expected_got("--host-memory", "GiB of the machine's memory", "none")) from error
