"""Which way to run a training fits where, and which of those that fit to take.

A plan fits if it leaves a margin of 1 GiB for the allocator's fragmentation. Of the ways that fit, the one with the
shortest estimated step is taken, ZeRO-3 only where nothing else fits. So more memory, which only lets more ways fit,
never gives a slower one of the same kind.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from cdas_fast.distributed.hardware import GIB, Machine
from cdas_fast.distributed.plan_memory import (
    RING_SLOTS,
    Parts,
    caching_parts,
    disk_parts,
    host_base,
    host_training_parts,
    training_parts,
)
from cdas_fast.distributed.plan_time import StepTime, caching_seconds, step_time
from cdas_fast.distributed.plan_workload import Processes, Source, Strategy, Workload

MARGIN = GIB
SMALLEST_MICRO_BATCH = 256
LARGEST_GPU = 1024  # GB, where the search for one that would do ends


@dataclass(frozen=True)
class Plan:
    """A strategy and what it takes, planned and not measured."""

    machine: Machine
    workload: Workload
    strategy: Strategy
    training: Parts  # bytes of one GPU, or of the process on a CPU
    caching: Parts
    host_training: Parts  # bytes of the node; empty on a CPU
    host_caching: Parts
    disk: Parts
    step: StepTime
    caching_seconds: float

    @property
    def peak(self) -> float:
        """Bytes of the greater of both phases."""
        return max(sum(self.training.values()), sum(self.caching.values()))

    @property
    def host_peak(self) -> float:
        """Bytes of the node's memory."""
        return max(sum(self.host_training.values()), sum(self.host_caching.values()))

    @property
    def shortfall(self) -> float:
        """Bytes by which it does not fit with the margin; not positive if it fits."""
        device = self.peak + MARGIN - self.machine.usable
        if self.machine.is_cpu or self.machine.host_gib is None:
            return device
        return max(device, self.host_peak + MARGIN - self.machine.host_gib * GIB)

    @property
    def fits(self) -> bool:
        """Whether all phases leave the margin."""
        return self.shortfall <= 0


def plan_of(workload: Workload, machine: Machine, strategy: Strategy) -> Plan:
    """The memory and time of one strategy, whether it fits or not."""
    own = workload.of_rank(1 if strategy.processes == "one process" else machine.ranks)
    return Plan(
        machine=machine,
        workload=workload,
        strategy=strategy,
        training=training_parts(own, machine, strategy),
        caching=caching_parts(own, machine, strategy),
        host_training={} if machine.is_cpu else host_training_parts(own, machine, strategy),
        host_caching={} if machine.is_cpu else host_base(own, machine),
        disk=disk_parts(workload),
        step=step_time(own, machine, strategy),
        caching_seconds=caching_seconds(own, machine),
    )


@dataclass(frozen=True)
class Decision:
    """The plan that is taken, if any fits, and the others."""

    chosen: Plan | None
    considered: Sequence[Plan]  # the best of each kind, the chosen one among them
    remedies: Sequence[str] = ()  # if nothing fits


def decide(workload: Workload, machine: Machine, *, four_bit: bool | None = None) -> Decision:
    """Plan every strategy, and take the one with the shortest step of those that fit.

    It takes ZeRO-3 only if no other way fits, and of equal ones dense weights before 4-bit, and no offloading. Dense
    weights are streamed only if that is asked for.

    Args:
        workload: what is trained.
        machine: on what.
        four_bit: whether the frozen weights are quantised; whichever does better if None.
    """
    best: dict[object, Plan] = {}
    for plan in _plans(workload, machine, four_bit):
        strategy = plan.strategy
        kind = (strategy.four_bit, strategy.processes, strategy.streams, strategy.recompute, strategy.offload)
        if kind not in best or _order(plan) < _order(best[kind]):
            best[kind] = plan
    plans = [plan for plan in best.values() if not _streams_needlessly(plan, best.values())]
    considered = sorted(plans, key=lambda plan: (_last_resort(plan, four_bit), _order(plan)))
    chosen = considered[0] if considered[0].fits else None
    return Decision(chosen, considered, () if chosen else remedies(workload, machine, four_bit, considered[0]))


def _streams_needlessly(plan: Plan, others: Iterable[Plan]) -> bool:
    """Whether it fits with all layers resident as well, at no more time."""
    strategy = plan.strategy
    alike = (other for other in others if other.fits and not other.strategy.streams and strategy.streams)
    return any(
        (other.strategy.four_bit, other.strategy.recompute, other.strategy.processes)
        == (strategy.four_bit, strategy.recompute, strategy.processes)
        and other.step.total <= plan.step.total
        for other in alike
    )


def _last_resort(plan: Plan, four_bit: bool | None) -> int:
    """2 for what does not fit, 1 for dense weights that are streamed unasked: four times the traffic of 4-bit ones."""
    if not plan.fits:
        return 2
    return int(four_bit is None and plan.strategy.streams and not plan.strategy.four_bit)


def _order(plan: Plan) -> tuple[object, ...]:
    """The better plan is smaller: fits, is not ZeRO-3, is fast, is simple; of those that do not fit, lacks the least.

    ZeRO-3 comes behind data parallel whatever its time: in it a process that is late or dead holds up every layer.
    """
    if not plan.fits:
        return True, plan.shortfall
    strategy, step = plan.strategy, plan.step
    simple = (strategy.four_bit, strategy.offload)
    return False, strategy.processes == "ZeRO-3", step.total, *simple, step.transfer, plan.peak


def _plans(workload: Workload, machine: Machine, four_bit: bool | None) -> Iterator[Plan]:
    several: Processes = "data parallel" if machine.gpus > 1 else "one process"
    own = workload.of_rank(machine.ranks)
    for quantised in (False, True) if four_bit is None else (four_bit,):
        for tokens in _micro_batches(own):
            for recompute in (False, True):
                base = Strategy(several, quantised, tokens, recompute)
                yield plan_of(workload, machine, base)
                yield from _streamed(workload, machine, base)
            if machine.gpus > 1:
                yield plan_of(workload, machine, Strategy("ZeRO-3", quantised, tokens, recompute=True))


def _micro_batches(own: Workload) -> list[int]:
    """All tokens of a step, and halves of them, down to one sequence or 256 tokens."""
    least = min(own.tokens, max(own.sequence_tokens, SMALLEST_MICRO_BATCH))
    tokens = [own.tokens]
    while tokens[-1] > least:
        tokens.append(max(least, math.ceil(tokens[-1] / 2)))
    return tokens


def _streamed(workload: Workload, machine: Machine, base: Strategy) -> Iterator[Plan]:
    """Streaming with as many resident layers as fit; with none if that does not fit either."""
    most = len(workload.suffix) - RING_SLOTS - 1  # with more, the ring would hold all the rest
    if most < 0:
        return
    sources: tuple[Source, ...] = ("disk",) if machine.is_cpu else ("host memory", "disk")
    for offload in (False, True) if base.recompute and not machine.is_cpu else (False,):
        for source in sources:
            strategy = replace(base, offload=offload, source=source)
            yield _with_most_resident(workload, machine, strategy, most)


def _with_most_resident(workload: Workload, machine: Machine, strategy: Strategy, most: int) -> Plan:
    """By bisection: a further resident layer takes more of the device, and no more of the host."""
    plan = plan_of(workload, machine, replace(strategy, resident_layers=most))
    if _device_fits(plan):
        return plan
    fits, fails = -1, most
    while fails - fits > 1:
        middle = (fits + fails) // 2
        found = plan_of(workload, machine, replace(strategy, resident_layers=middle))
        if _device_fits(found):
            fits = middle
        else:
            fails = middle
    return plan_of(workload, machine, replace(strategy, resident_layers=max(fits, 0)))


def _device_fits(plan: Plan) -> bool:
    return plan.peak + MARGIN <= plan.machine.usable


def remedies(workload: Workload, machine: Machine, four_bit: bool | None, best: Plan) -> list[str]:
    """What would make it fit; each was planned and does.

    Args:
        workload: what does not fit.
        machine: where.
        four_bit: what was asked for.
        best: the plan that lacks the least.
    """
    found = []
    if four_bit is False and _fits(workload, machine, None):
        found.append("with 4-bit weights (--load-in-4bit)")
    if workload.dtype == "float32" and _fits(replace(workload, dtype="bfloat16"), machine, four_bit):
        found.append("in bfloat16 (--dtype bfloat16)")
    fewer = _most_tokens(workload, machine, four_bit)
    if fewer:
        found.append(f"with {fewer} tokens a step (--tokens {fewer})")
    if machine.is_cpu:
        enough = _least(lambda gib: _fits(workload, replace(machine, host_gib=gib), four_bit))
        return [*found, f"with {enough} GiB of memory"] if enough else found
    if machine.host_gib is not None and _fits(workload, replace(machine, host_gib=None), four_bit):
        enough = _least(lambda gib: _fits(workload, replace(machine, host_gib=gib), four_bit))
        found.append(f"with {enough} GiB of host memory")
    enough = _least(lambda gib: _fits(workload, replace(machine, card=replace(machine.card, memory_gib=gib)), four_bit))
    return [*found, f"on GPUs of {enough} GB"] if enough else found


def _fits(workload: Workload, machine: Machine, four_bit: bool | None) -> bool:
    return any(plan.fits for plan in _plans(workload, machine, four_bit))


def _most_tokens(workload: Workload, machine: Machine, four_bit: bool | None) -> int:
    """The most tokens a step that fit, to a hundredth, sequences as long as they are; 0 if not even one sequence."""

    def fits(tokens: int) -> bool:
        responses = workload.response_tokens * tokens // workload.tokens
        return _fits(replace(workload, tokens=tokens, response_tokens=responses), machine, four_bit)

    low, high = workload.sequence_tokens, workload.tokens
    if low == high or not fits(low):
        return 0
    while high - low > max(1, high // 100):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _least(fits: Callable[[int], bool]) -> int:
    """The least whole number of GB up to 1024 that does; 0 if none."""
    if not fits(LARGEST_GPU):
        return 0
    low, high = 0, LARGEST_GPU
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high
