"""What of a training run lies in memory, part by part.

Parts are added up also where they do not overlap in time. Nothing here was measured on a GPU.
"""

from __future__ import annotations

import math

from cdas_fast.distributed.hardware import GIB, Machine
from cdas_fast.distributed.model_sizes import FOUR_BIT_BYTES, LayerSizes
from cdas_fast.distributed.plan_workload import Strategy, Workload

CUDA_CONTEXT = 0.7 * GIB
CPU_PROCESS = 0.5 * GIB  # Python and torch
GPU_PROCESS = 2.0 * GIB  # the same in host memory, with CUDA's libraries
LOSS_CHUNK = {"cuda": 0.25 * GIB, "cpu": 1.7 * 64 * 2**20}  # on a CPU with the gradients of parts of the vocabulary
QUANTISING = "quantising, in the first run"  # name of what a packed copy that is there spares
QUANTISING_BYTES = 14 * 2**22 + 64 * 2**20  # on a CPU for a part of a matrix, and bitsandbytes itself
RING_SLOTS = 3
GATHERED_LAYERS = 2

Parts = dict[str, float]  # name -> bytes


def training_parts(own: Workload, machine: Machine, strategy: Strategy) -> Parts:
    """Bytes of each part in the memory of one process while it trains; `own` is its share of the work."""
    visited = min(strategy.micro_batch_tokens, own.tokens)
    kept_tokens = own.tokens if strategy.streams else visited
    parts = (
        _base_parts(machine)
        | _weight_parts(own, machine, strategy)
        | _activation_parts(own, machine, strategy, kept_tokens, visited)
        | _loss_parts(own, machine, kept_tokens)
        | {"cached micro-batch": visited * own.hidden_bytes}
        | {"direction and optimiser": 4 * own.rank * own.sizes.hidden_size * 4}
    )
    return {name: size for name, size in parts.items() if size > 0}


def _weight_parts(own: Workload, machine: Machine, strategy: Strategy) -> Parts:
    """The layers as they are stored, those that are dense for a while, norms, and the head."""
    item, suffix, sizes = own.itemsize, own.suffix, own.sizes
    stored = [own.stored_bytes(layer, strategy.four_bit) for layer in suffix]
    ranks = machine.ranks if strategy.processes == "ZeRO-3" else 1
    head = sizes.head_values * item
    parts: Parts = {
        "resident layers" if ranks == 1 else "share of the layers": sum(stored[: strategy.resident_layers]) / ranks,
        "norms and biases": (sum(layer.dense_values for layer in sizes.layers) + sizes.final_values) * item,
        "output head": head,
    }
    if strategy.streams:
        parts[f"ring of {RING_SLOTS} layers"] = RING_SLOTS * max(stored)
    if strategy.processes == "ZeRO-3":
        parts[f"{GATHERED_LAYERS} gathered layers"] = GATHERED_LAYERS * max(stored, default=0)
        parts["share of the head"] = head / ranks
    if strategy.four_bit and strategy.streams:
        parts["dequantised layer"] = max(layer.linear_values for layer in suffix) * item
    elif strategy.four_bit:
        parts["dequantised matrix"] = max((layer.largest_linear for layer in suffix), default=0) * item
    return parts


def _loss_parts(own: Workload, machine: Machine, kept_tokens: int) -> Parts:
    """Three buffers of a chunk of logits; per response token a float32 gradient row, and both final hidden states."""
    responses = math.ceil(own.response_tokens * kept_tokens / own.tokens)
    row = 3 * own.sizes.vocabulary * 4
    chunk = max(LOSS_CHUNK["cpu" if machine.is_cpu else "cuda"], row)  # one row at least
    return {
        "loss: chunk of logits": min(chunk, responses * row),
        "loss: gradient rows, final states": responses * (own.sizes.hidden_size * 4 + 2 * own.hidden_bytes),
    }


def kept_bytes(layer: LayerSizes, own: Workload, machine: Machine, *, frozen_aware: bool = True) -> float:
    """Bytes a token that a layer keeps for its backward pass.

    Norms and MLPs are ops that keep no more than frozen weights need: `frozen_aware` asks what it would be otherwise,
    as on a GPU without triton. So is attention on a CPU; on GPUs, capped logits of it are whole.
    """
    score_keys = 0 if machine.is_cpu else own.sequence_tokens
    return layer.kept_bytes(own.itemsize, frozen_aware=frozen_aware, score_keys=score_keys)


def _base_parts(machine: Machine) -> Parts:
    return {"Python and torch": CPU_PROCESS} if machine.is_cpu else {"CUDA context": CUDA_CONTEXT}


def _activation_parts(own: Workload, machine: Machine, strategy: Strategy, kept_tokens: int, visited: int) -> Parts:
    """Hidden states and what lies within layers, for `kept_tokens` between forward and backward, `visited` at work."""
    kept = [kept_bytes(layer, own, machine) for layer in own.suffix]
    at_work = [layer.backward_bytes(own.itemsize) for layer in own.suffix]
    parts: Parts = {}
    if not strategy.recompute:
        parts["activations within layers"] = sum(kept) * kept_tokens
    elif strategy.offload:
        parts["hidden states on their way"] = 2 * visited * own.hidden_bytes
    else:
        parts["hidden states between layers"] = len(own.suffix) * kept_tokens * own.hidden_bytes
    if strategy.recompute:
        at_work = [sum(both) for both in zip(kept, at_work, strict=True)]
    parts["layer at work"] = max(at_work, default=0.0) * visited
    if strategy.streams:
        parts["states and gradients of the step"] = 2 * kept_tokens * own.hidden_bytes
    return parts


def caching_parts(own: Workload, machine: Machine, strategy: Strategy) -> Parts:
    """Bytes of each part while activations are cached: all layers pass through the ring, none is resident."""
    item, layers, sizes = own.itemsize, own.sizes.layers, own.sizes
    tokens = max(strategy.micro_batch_tokens, own.sequence_tokens)
    parts: Parts = {
        "embedding and head": (sizes.head_values + (0 if sizes.tied else sizes.embedding_values)) * item,
        f"ring of {RING_SLOTS} layers": RING_SLOTS * max(own.stored_bytes(each, strategy.four_bit) for each in layers),
        "norms and biases": sum(layer.dense_values for layer in layers) * item + sizes.final_values * item,
    }
    if strategy.four_bit:
        parts["dequantised layer"] = max(layer.linear_values for layer in layers) * item
        parts[QUANTISING] = _quantising_bytes(own, machine)
    scores = 0 if machine.is_cpu else own.sequence_tokens
    at_work = (each.forward_bytes(item) + each.score_bytes(item, scores) for each in layers)
    parts["layer at work"] = max(at_work) * tokens
    return _base_parts(machine) | parts


def _quantising_bytes(own: Workload, machine: Machine) -> float:
    """A matrix and what is made of it; on a CPU also the rest of its layer, until that is written."""
    matrix = max(layer.largest_linear for layer in own.sizes.layers)
    if machine.is_cpu:
        return matrix * own.itemsize + max(own.stored_bytes(each, True) for each in own.sizes.layers) + QUANTISING_BYTES
    return matrix * (own.itemsize + FOUR_BIT_BYTES)


def host_training_parts(own: Workload, machine: Machine, strategy: Strategy) -> Parts:
    """Bytes of each part in the node's memory while it trains, and while the suffix is loaded for it."""
    stored = [own.stored_bytes(layer, strategy.four_bit) for layer in own.suffix]
    parts: Parts = host_base(own, machine)
    if strategy.processes == "ZeRO-3":
        parts["suffix before it is divided"] = sum(stored)
    if strategy.streams and strategy.source == "host memory":
        parts["streamed layers, pinned by each"] = machine.ranks * sum(stored[strategy.resident_layers :])
    if strategy.offload:
        parts["hidden states, pinned"] = machine.ranks * len(own.suffix) * own.tokens * own.hidden_bytes
    return parts


def host_base(own: Workload, machine: Machine) -> Parts:
    """Bytes of each part in the node's memory in both phases."""
    processes = f"{machine.ranks} process{'es' if machine.ranks > 1 else ''}"
    largest = max(layer.linear_values for layer in own.sizes.layers) * own.itemsize
    return {processes: machine.ranks * GPU_PROCESS, "a layer while it is loaded": machine.ranks * largest}


def disk_parts(workload: Workload) -> Parts:
    """Bytes of files: what stays for training, and what caching needs besides, for all sequences."""
    tokens = workload.sequences * workload.sequence_tokens
    share = workload.response_tokens / workload.tokens
    return {
        "cached hidden states at layer L": tokens * workload.hidden_bytes,
        "cached final states of the target": tokens * share * workload.hidden_bytes,
        "hidden states while caching": 2 * tokens * workload.hidden_bytes,  # of base and of source sequences
    }
