"""A plan as text, as JSON, and as the command that runs it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from cdas_fast.distributed.hardware import GIB
from cdas_fast.distributed.plan_memory import kept_bytes
from cdas_fast.distributed.plan_time import EXPOSED, FLOAT32_RATE, WAITING
from cdas_fast.distributed.plan_workload import Strategy
from cdas_fast.distributed.planner import MARGIN, Decision, Plan
from cdas_fast.errors import DoesNotFitError

LABEL = "planned, not measured"
_SHOWN = 0.005 * GIB  # smaller parts share one line of the table


def describe(decision: Decision) -> str:
    """All that is to be said about a decision."""
    plan = decision.considered[0]
    machine, work = plan.machine, plan.workload
    lines = [
        f"{work.sizes.name}, layer {work.layer} of 0 to {work.sizes.num_layers - 1}, on {machine.text} ({LABEL})",
        f"{work.sizes.parameters / 1e9:.2f}e9 parameters; training runs {len(work.suffix)} layers and the head",
        f"a step: {work.tokens} tokens beyond the shared prefix, {work.response_tokens} of them of responses, the "
        f"longest sequence {work.sequence_tokens}; {work.dtype}, rank {work.rank}",
        "",
    ]
    if decision.chosen is None:
        lines += [f"nothing fits; what lacks the least ({LABEL}): {name_of(plan)}"]
    else:
        lines += [f"plan: {name_of(plan)}", *_where(plan), *_why(decision)]
    lines += ["", *_memory_tables(plan), "", *_considered(decision), "", *_time(plan), "", *_assumptions(plan)]
    if decision.chosen is not None:
        lines += ["", "run it:", f"  {command(plan)}"]
    return "\n".join(lines)


def as_json(decision: Decision) -> dict[str, Any]:
    """The same for a program: bytes, seconds, and null for a plan that does not exist."""
    plan = decision.considered[0]
    return {
        "label": LABEL,
        "model": plan.workload.sizes.name,
        "parameters": plan.workload.sizes.parameters,
        "layer": plan.workload.layer,
        "suffix_layers": len(plan.workload.suffix),
        "machine": plan.machine.text,
        "tokens": plan.workload.tokens,
        "response_tokens": plan.workload.response_tokens,
        "sequence_tokens": plan.workload.sequence_tokens,
        "sequences": plan.workload.sequences,
        "rank": plan.workload.rank,
        "dtype": plan.workload.dtype,
        "margin_bytes": MARGIN,
        "fits": decision.chosen is not None,
        "plan": None if decision.chosen is None else _plan_json(decision.chosen),
        "considered": [_plan_json(each) for each in decision.considered],
        "remedies": list(decision.remedies),
        "assumptions": [line.strip("- ") for line in _assumptions(plan)[1:]],
    }


def refusal(decision: Decision) -> DoesNotFitError:
    """The error of a decision without a plan."""
    plan = decision.considered[0]
    unless = f", unless {'; or '.join(decision.remedies)}" if decision.remedies else ""
    what = f"{plan.workload.sizes.name}, layer {plan.workload.layer}, {plan.workload.tokens} tokens a step"
    lacks = f"{plan.shortfall / GIB:.2f} GiB ({LABEL}; a margin of {MARGIN / GIB:.0f} GiB counted)"
    return DoesNotFitError(f"{what}: does not fit {plan.machine.text}, by {lacks}{unless}")


def command(plan: Plan) -> str:
    """The command line that trains as planned."""
    strategy, work, machine = plan.strategy, plan.workload, plan.machine
    program = "cdas-fast"
    if strategy.processes != "one process":
        program = f"torchrun --nproc-per-node {machine.gpus} -m cdas_fast.cli"
    words = [f"{program} train --model {work.sizes.name} --data pairs.jsonl --layer {work.layer} --output out"]
    words += {"one process": [], "data parallel": ["--data-parallel"], "ZeRO-3": ["--deepspeed"]}[strategy.processes]
    words += ["--load-in-4bit"] if strategy.four_bit else []
    words += [] if strategy.resident_layers is None else [f"--resident-layers {strategy.resident_layers}"]
    words += ["--recompute"] if strategy.recompute else []
    words += ["--offload-activations"] if strategy.offload else []
    words += [f"--micro-batch-tokens {strategy.micro_batch_tokens}", f"--dtype {work.dtype}"]
    words += [] if work.rank == 1 else [f"--rank {work.rank}"]
    words += ["--device cpu"] if machine.is_cpu else []
    return " ".join(words)


def name_of(plan: Plan) -> str:
    """A strategy in a line."""
    strategy = plan.strategy
    weights = "4-bit" if strategy.four_bit else plan.workload.dtype
    words = [weights, "recomputed" if strategy.recompute else "nothing recomputed"]
    if strategy.streams:
        words.insert(
            1, f"{strategy.resident_layers} layers resident, {_streamed(plan)} streamed from {strategy.source}"
        )
    elif strategy.processes != "ZeRO-3":
        words.insert(1, "all layers resident")
    if strategy.offload:
        words.append("hidden states offloaded")
    if strategy.processes != "one process":
        words.insert(0, f"{strategy.processes} over {plan.machine.gpus} GPUs")
    return ", ".join([*words, f"micro-batches of {strategy.micro_batch_tokens}"])


def _streamed(plan: Plan) -> int:
    resident = plan.strategy.resident_layers
    return 0 if resident is None else len(plan.workload.suffix) - resident


def _where(plan: Plan) -> list[str]:
    """What is resident, streamed and offloaded."""
    strategy, count = plan.strategy, len(plan.workload.suffix)
    first = plan.workload.layer + 1
    suffix, number = _layers(first, count), strategy.resident_layers
    resident = suffix if number is None else f"{number} of {suffix}, evenly spread"
    divided = f", divided among {plan.machine.gpus} GPUs" if strategy.processes == "ZeRO-3" else ""
    streamed = "nothing"
    if number is not None:
        streamed = f"the other {count - number} from {strategy.source}, each read twice a step"
    offloaded = "hidden states between layers, to host memory" if strategy.offload else "nothing"
    not_loaded = f"in training the embedding and {_layers(0, first)}"
    return [
        f"  resident: {resident}{divided}, norms, head",
        f"  streamed: {streamed}",
        f"  offloaded: {offloaded}",
        f"  not loaded: {not_loaded}",
    ]


def _layers(first: int, count: int) -> str:
    if count == 0:
        return "no layer"
    return f"layer {first}" if count == 1 else f"layers {first} to {first + count - 1}"


def _why(decision: Decision) -> list[str]:
    """What speaks for the chosen plan, and what to know about it."""
    chosen = decision.chosen
    assert chosen is not None
    lines = ["  why: the shortest estimated step of what fits"]
    simpler = [
        plan
        for plan in decision.considered
        if not plan.fits and not plan.strategy.streams and plan.strategy.processes == chosen.strategy.processes
    ]
    if chosen.strategy.streams and simpler:
        lack = min(plan.shortfall for plan in simpler)
        lines.append(f"  {lack / GIB:.2f} GiB more would hold all layers, with small micro-batches")
    dense = [plan for plan in decision.considered if plan.fits and not plan.strategy.four_bit]
    if chosen.strategy.four_bit and dense:
        seconds = min(plan.step.total for plan in dense)
        lines.append(f"  unquantised weights fit as well, at {_seconds(seconds)} a step: --no-4bit")
    return lines


def _memory_tables(plan: Plan) -> list[str]:
    device = "memory of the process" if plan.machine.is_cpu else "memory of a GPU"
    lines = list(_table(f"{device}, GiB ({LABEL})", plan.caching, plan.training))
    limit = plan.machine.usable
    kind = "given" if plan.machine.is_cpu else f"usable of {plan.machine.card.memory_gib:g}"
    state = (
        f"{(limit - plan.peak) / GIB:.2f} left" if plan.peak <= limit else f"{(plan.peak - limit) / GIB:.2f} too much"
    )
    lines.append(f"  {kind}: {limit / GIB:.2f}; {state} at the peak; a plan leaves {MARGIN / GIB:.2f} at least")
    if plan.host_training:
        lines += ["", *_table(f"memory of the host, GiB ({LABEL})", plan.host_caching, plan.host_training)]
        host = plan.machine.host_gib
        taken = "not given, taken to be enough (--host-memory GIB)"
        lines.append(f"  {taken}" if host is None else f"  given: {host:.2f}")
    lines += ["", f"files of {plan.workload.sequences} sequences, GiB ({LABEL})"]
    return [*lines, *(f"  {name:<42}{size / GIB:>10.2f}" for name, size in plan.disk.items())]


def _table(title: str, caching: Mapping[str, float], training: Mapping[str, float]) -> Iterator[str]:
    yield f"{title:<44}{'caching':>10}{'training':>10}"
    names = list(dict.fromkeys([*training, *caching]))
    large = [name for name in names if max(caching.get(name, 0), training.get(name, 0)) >= _SHOWN]
    rows = [(name, caching.get(name), training.get(name)) for name in large]
    rest = [sum(size for name, size in parts.items() if name not in large) for parts in (caching, training)]
    if max(rest) >= _SHOWN:
        rows.append(("other", rest[0] or None, rest[1] or None))
    for name, *sizes in [*rows, ("sum", sum(caching.values()), sum(training.values()))]:
        cells = "".join(f"{'-' if size is None else f'{size / GIB:.2f}':>10}" for size in sizes)
        yield f"  {name:<42}{cells}"


def _considered(decision: Decision) -> Iterator[str]:
    yield f"considered, the best of each kind ({LABEL}): GiB at the peak, seconds a step"
    for plan in decision.considered:
        if plan is decision.chosen:
            verdict = "taken"
        elif plan.fits:
            verdict = "fits"
        else:
            verdict = f"does not fit, by {plan.shortfall / GIB:.2f}"
        yield f"  {plan.peak / GIB:6.2f}  {_seconds(plan.step.total):>8}  {verdict:<25} {name_of(plan)}"


def _time(plan: Plan) -> list[str]:
    step, machine = plan.step, plan.machine
    return [
        f"time ({LABEL}): {_seconds(step.total)} a step; {_seconds(plan.caching_seconds)} to cache "
        f"{plan.workload.sequences} sequences",
        f"  matrix products {_seconds(step.products)} at {machine.card.tflops:g} TFLOPS, weights in memory "
        f"{_seconds(step.weights)} at {machine.card.bandwidth:g} GB/s, transfers {_seconds(step.transfer)}"
        + (f", waiting {_seconds(step.waiting)}" if step.waiting else ""),
    ]


def _seconds(seconds: float) -> str:
    if seconds >= 100:
        return f"{seconds:.0f} s"
    return f"{seconds:.1f} s" if seconds >= 10 else f"{seconds:.2f} s"


def _assumptions(plan: Plan) -> list[str]:
    machine, work = plan.machine, plan.workload
    rate = f", times {FLOAT32_RATE:g} in float32" if work.dtype == "float32" else ""
    lines = [
        "assumptions:",
        f"- {machine.card.tflops:g} TFLOPS in matrix products{rate}: {machine.card.source}",
        f"- {machine.card.bandwidth:g} GB/s of device memory; disk {machine.disk:g} GB/s",
        f"- of transfer and computation {EXPOSED:.0%} of the shorter does not hide behind the longer",
        "- tokens count pads; the work of attention beyond its linear maps is left out of the time",
    ]
    if plan.strategy.streams:
        lines.append(f"- streaming costs {WAITING:.0%} of the computation besides, in waiting for layers")
    if not machine.is_cpu:
        lines[2] += f"; host to GPU {machine.link:g} GB/s"
    if work.suffix:
        kept = max(kept_bytes(layer, work, machine) for layer in work.suffix)
        plain = max(kept_bytes(layer, work, machine, frozen_aware=False) for layer in work.suffix)
        rest = "" if machine.is_cpu else f"; without triton, {plain / 1000:.1f}"
        lines.append(f"- a layer keeps {kept / 1000:.1f} kB a token for its backward pass{rest}")
    if machine.is_cpu:
        lines.append("- Python and torch take 0.5 GiB")
    else:
        lines.append("- a CUDA context takes 0.7 GiB of the GPU, Python with torch 2 GiB of the host")
    if plan.strategy.processes == "ZeRO-3":
        lines.append(f"- a GPU receives {min(machine.gather, machine.link):g} GB/s when all gather")
    lines.append("- cached activations are memory-mapped files, whose page cache is not counted")
    return lines


def _plan_json(plan: Plan) -> dict[str, Any]:
    strategy = plan.strategy
    return {
        "label": LABEL,
        "strategy": _strategy_json(strategy, len(plan.workload.suffix)),
        "description": name_of(plan),
        "fits": plan.fits,
        "peak_bytes": plan.peak,
        "usable_bytes": plan.machine.usable,
        "shortfall_bytes": max(0.0, plan.shortfall),
        "training_bytes": plan.training,
        "caching_bytes": plan.caching,
        "host_training_bytes": plan.host_training,
        "host_caching_bytes": plan.host_caching,
        "disk_bytes": plan.disk,
        "step_seconds": plan.step.total,
        "step_seconds_parts": {
            "products": plan.step.products,
            "weights": plan.step.weights,
            "transfer": plan.step.transfer,
            "waiting": plan.step.waiting,
        },
        "caching_seconds": plan.caching_seconds,
        "command": command(plan),
    }


def _strategy_json(strategy: Strategy, layers: int) -> dict[str, Any]:
    resident = layers if strategy.resident_layers is None else strategy.resident_layers
    return {
        "processes": strategy.processes,
        "four_bit": strategy.four_bit,
        "micro_batch_tokens": strategy.micro_batch_tokens,
        "recompute": strategy.recompute,
        "resident_layers": resident,
        "streamed_layers": layers - resident,
        "source": strategy.source,
        "offload_activations": strategy.offload,
    }
