"""Seconds of a step, estimated from speeds that are assumed."""

from __future__ import annotations

import math
from dataclasses import dataclass

from cdas_fast.distributed.hardware import Machine
from cdas_fast.distributed.model_sizes import FOUR_BIT_BYTES
from cdas_fast.distributed.plan_workload import Strategy, Workload

GATHERS = 2  # of every layer a micro-batch: for the forward pass, and for the backward pass with what it runs again
FLOAT32_RATE = 0.25  # of the rate in bfloat16
WAITING = 0.1  # of the computation of a step that streams: the ring's events, and copies that compete for the memory
EXPOSED = 0.5  # of the shorter of computation and transfer is taken not to hide behind the longer


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step, estimated. Transfers run behind the computation, by half."""

    products: float  # of matrices
    weights: float  # traffic of weights in the device's memory: dequantisation, and reading them for the products
    transfer: float  # from host memory, disk or the other GPUs
    waiting: float  # of a step that streams, for slots of the ring

    @property
    def total(self) -> float:
        """The longer of computation, with its waiting, and transfer, and half of the shorter."""
        computation = self.products + self.weights + self.waiting
        return max(computation, self.transfer) + EXPOSED * min(computation, self.transfer)


def step_time(own: Workload, machine: Machine, strategy: Strategy) -> StepTime:
    """Seconds of a step on one process.

    Products: 2 FLOP a value and token, forward, again if recomputed, and for the input's gradient; 3 with the head.
    Weights: each is read once a pass and micro-batch, and dequantised once a pass (resident) or visit (streamed).
    """
    values = sum(layer.linear_values for layer in own.suffix)
    passes = 3 if strategy.recompute else 2
    batches = math.ceil(own.tokens / strategy.micro_batch_tokens)
    flop = passes * 2 * values * own.tokens + 3 * own.sizes.head_flop * own.response_tokens
    traffic: float = passes * batches * values * own.itemsize
    if strategy.four_bit:
        dequantised = 2 if strategy.streams else passes * batches
        traffic += dequantised * values * (FOUR_BIT_BYTES + own.itemsize)
    products = flop / (_tflops(own, machine) * 1e12)
    weights = traffic / (machine.card.bandwidth * 1e9)
    return StepTime(
        products=products,
        weights=weights,
        transfer=_transfer_seconds(own, machine, strategy, batches),
        waiting=WAITING * (products + weights) if strategy.streams else 0.0,
    )


def _transfer_seconds(own: Workload, machine: Machine, strategy: Strategy, batches: int) -> float:
    stored = [own.stored_bytes(layer, strategy.four_bit) for layer in own.suffix]
    if strategy.processes == "ZeRO-3":
        received = GATHERS * batches * sum(stored) * (1 - 1 / machine.ranks)
        return received / (min(machine.gather, machine.link) * 1e9)
    if not strategy.streams:
        return 0.0
    read = 2 * sum(stored[strategy.resident_layers :])
    states = 2 * len(own.suffix) * own.tokens * own.hidden_bytes if strategy.offload else 0
    if strategy.source == "disk":  # one disk for all processes
        return max(read * machine.ranks / (machine.disk * 1e9), (read + states) / (machine.link * 1e9))
    return (read + states) / (machine.link * 1e9)


def _tflops(own: Workload, machine: Machine) -> float:
    return machine.card.tflops * (FLOAT32_RATE if own.dtype == "float32" else 1)


def caching_seconds(own: Workload, machine: Machine) -> float:
    """Base sequences run to L, source sequences through all layers; the model is read once."""
    layers = own.sizes.layers
    values = sum(layer.linear_values for layer in (*layers, *layers[: own.layer + 1]))
    computed = 2 * values * own.sequences * own.sequence_tokens / (_tflops(own, machine) * 1e12)
    return max(computed, own.sizes.parameters * own.itemsize / (machine.disk * 1e9))
