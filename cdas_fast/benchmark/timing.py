"""Interleaved timing: each variant runs once a round, so that a slow spell of a shared machine meets all of them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
import torch

Timer = Callable[[Callable[[], object]], float]  # seconds that a call takes
Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Distribution:
    """Times of one call over all rounds, in milliseconds."""

    p20: float
    p50: float
    p80: float
    minimum: float
    samples: tuple[float, ...]

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Distribution:
        """Percentiles with linear interpolation between neighbours."""
        samples = tuple(1e3 * each for each in seconds)
        p20, p50, p80 = np.percentile(samples, [20, 50, 80]).tolist()
        return cls(p20, p50, p80, min(samples), samples)


def timer_for(device: torch.device) -> Timer:
    """The wall clock for a CPU; for a GPU the events of its stream, which leave out the way to the device and back."""
    return _gpu_seconds if device.type == "cuda" else _seconds


def _seconds(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def _gpu_seconds(call: Callable[[], object]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


def interleave(
    calls: Mapping[Key, Callable[[int], object]],
    rounds: int,
    timer: Timer,
    after_turn: Callable[[], object] = lambda: None,
    fill: float = 0.0,
) -> dict[Key, list[float]]:
    """Seconds of each call in each round. A call is given a number that grows, by which it chooses its inputs.

    Each round begins with another call, and every second one runs backwards: none always follows the same other. A
    call that takes less than `fill` seconds is repeated in its turn until they are filled, and its mean counts: what
    the call before it left in the caches, and in the allocator, would be much of a short one.
    """
    keys = list(calls)
    counts = {key: math.ceil(fill / max(timer(partial(calls[key], 0)), 1e-6)) if fill else 1 for key in keys}
    seconds: dict[Key, list[float]] = {key: [] for key in keys}
    for number in range(rounds):
        first = number % len(keys)
        order = keys[first:] + keys[:first]
        for key in order if number % 2 == 0 else reversed(order):
            count = counts[key]
            turn = partial(_repeat, calls[key], range(number * count, (number + 1) * count))
            seconds[key].append(timer(turn) / count)
            after_turn()
    return seconds


def _repeat(call: Callable[[int], object], numbers: range) -> None:
    for number in numbers:
        call(number)


def fastest(calls: Mapping[Key, Callable[[int], object]], timer: Timer, rounds: int = 2) -> Key:
    """The key of the call of least time, each having run once before it is timed."""
    for call in calls.values():
        call(0)
    seconds = interleave(calls, rounds, timer)
    return min(calls, key=lambda key: min(seconds[key]))


def median_ratio(seconds: Sequence[float], baseline: Sequence[float]) -> float:
    """Median of the ratios within each round."""
    return float(np.median([ours / theirs for ours, theirs in zip(seconds, baseline, strict=True)]))


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Let torch compute on `count` threads, on as many as before if None."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
