"""`cdas-fast bench train`: a training step of the published scheme, ours, and its bare matrix products."""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm.auto import tqdm

from cdas_fast.benchmark.memory import free_bytes, peak_on_gpu
from cdas_fast.benchmark.plain_training import PlainTraining, StepResult
from cdas_fast.benchmark.report import Comparison, Measurement, machine
from cdas_fast.benchmark.runner import check_settings, cpu_peaks, does_not_fit, on_device
from cdas_fast.benchmark.timing import Timer, interleave, timer_for
from cdas_fast.benchmark.training_floor import StepSize, fastest_floor
from cdas_fast.benchmark.training_parts import DATA, INTERCHANGE, OTHER, PARTS_DEFINED, Stopwatch
from cdas_fast.benchmark.training_report import (
    ENGINE,
    FLOOR,
    LABELS,
    PLAIN,
    Agreement,
    Caching,
    Estimate,
    TrainingComparison,
    TrainingReport,
    measurement,
)
from cdas_fast.data.pairs import ContrastivePairs
from cdas_fast.data.prompts import PromptFormat
from cdas_fast.data.rows import TokenRows, tokenize_pairs
from cdas_fast.errors import NonFiniteError
from cdas_fast.models.loading import EMBEDDED_MODEL, load_model
from cdas_fast.models.structure import Decoder, frozen, inspect_decoder
from cdas_fast.training.cache import build_cache
from cdas_fast.training.concept import ConceptTraining, step_together
from cdas_fast.training.config import Reduction, TrainingConfig
from cdas_fast.training.directions import random_direction
from cdas_fast.training.objective import DivergenceObjective

PROFILED_STEPS = 2
DEFINITIONS = [
    "A step: a batch of pairs, both directions of each, forward, backward, clipping, AdamW, w made unit again. In a "
    "round all variants do the step of the same pairs; rounds go through the batches in file order. Each has done one "
    "step before it is timed.",
    "published scheme: what the published code does, in plain torch (cdas_fast.benchmark.plain_training). Two "
    "minibatches, each with three whole padded forward passes of the Hugging Face model: source, target, intervened; "
    "logits at every position in the model's dtype, divergence in float32 at the response positions, autograd.",
    "cdas_fast: the step of cdas_fast.train, with its activations cached beforehand; caching is a line of its own.",
    "bare GEMMs: the matrix products that are left when nothing is computed in vain, in the model's dtype, into memory "
    "allocated beforehand. For every nn.Linear beyond the layer (N, in) @ W^T and (N, out) @ W, N being the base "
    "tokens beyond the prefix; for the head twice (R, D) @ W^T and once (R, V) @ W, R being the response tokens, in as "
    "many rows at a time as is fastest.",
    "Ratios are medians of those within a round. tokens/s: N over the time of the step, the median over the rounds.",
    "peak extra MB (1 MB = 1e6 bytes): most memory during a step beyond what lay there before: the model, and cached "
    "activations, are not counted; on a CPU resident memory in a process of its own, on a GPU what torch allocates.",
    PARTS_DEFINED,
]


class Steps(Protocol):
    """Something to time."""

    def step(self, number: int) -> object:
        """Do the step of that number, from 0."""


class Engine:
    """Our steps, from a cache that is built at once."""

    def __init__(self, decoder: Decoder, rows: TokenRows, config: TrainingConfig, initial: Tensor) -> None:
        started = time.perf_counter()
        cache = build_cache(
            decoder, rows, config.layers, micro_batch_tokens=config.micro_batch_tokens, memory_bytes=config.cache_bytes
        )
        self.caching = Caching(time.perf_counter() - started, cache.nbytes, len(rows.positive_prompts))
        self.training = ConceptTraining(0, cache, config, initial)
        self.objective = DivergenceObjective(
            decoder,
            cache.runner,
            config.layers,
            prefix_length=rows.prefix_length,
            micro_batch_tokens=config.micro_batch_tokens,
        )

    def step(self, number: int) -> StepResult:
        """Do the step of that number, from 0; after the last one of a run come its first ones again."""
        self.training.state = replace(self.training.state, step=number % self.training.total_steps)
        (info,) = step_together(self.objective, [self.training])
        if isinstance(info, NonFiniteError):
            raise info
        return StepResult(info.record.loss, info.record.minibatch_losses, info.gradient[0])


def against_published_scheme(
    model: Any, tokenizer: Any, pairs: ContrastivePairs, config: TrainingConfig, rounds: int = 2
) -> float:
    """How many times as long a training step of the published scheme takes as ours takes, activations cached.

    Both do steps of rank 1 on the first batch, in turn; the median of the rounds. Neither's first step is timed.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        pairs: pairs of one concept.
        config: layer, batch size and length of the responses.
        rounds: how often both are timed.
    """
    decoder = inspect_decoder(model)
    rows = tokenize_pairs(
        pairs[: config.batch_size], PromptFormat(tokenizer), max_output_tokens=config.max_output_tokens
    )
    config = replace(config, rank=1, initial_direction="random", patience=None)
    initial = random_direction(1, decoder.hidden_size, config.seed)
    with frozen(model):
        variants: dict[str, Steps] = {
            PLAIN: PlainTraining(decoder, rows, config, initial),
            ENGINE: Engine(decoder, rows, config, initial),
        }
        for variant in variants.values():
            variant.step(0)
        seconds = interleave({name: each.step for name, each in variants.items()}, rounds, timer_for(decoder.device))
    return statistics.median(plain / ours for plain, ours in zip(seconds[PLAIN], seconds[ENGINE], strict=True))


@dataclass(frozen=True)
class Task:
    """What is trained, in JSON values."""

    model: str
    data: str | None  # a file; the demo's pairs if None
    dtype: str
    layer: int
    batch_size: int
    max_output_tokens: int
    max_examples: int | None
    epochs: int
    reduction: Reduction

    def config(self) -> TrainingConfig:
        """The settings of the run, pairs in file order."""
        return TrainingConfig(
            layer=self.layer,
            batch_size=self.batch_size,
            max_output_tokens=self.max_output_tokens,
            max_examples=self.max_examples,
            epochs=self.epochs,
            reduction=self.reduction,
            shuffle=False,
        )

    def pairs(self) -> ContrastivePairs:
        """Those of the first concept in the file."""
        if self.data is None:
            from cdas_fast.demo import demo_pairs

            pairs = demo_pairs()[0]
        else:
            pairs = ContrastivePairs.from_file(self.data)
        return pairs.of_concept(pairs.concept_ids[0]).select(max_examples=self.max_examples)


class Problem:
    """A loaded model and the rows of a task."""

    def __init__(self, task: Task, pairs: ContrastivePairs, device: torch.device) -> None:
        self.task, self.config = task, task.config()
        model, tokenizer = load_model(task.model, dtype=task.dtype, device=device)
        self.decoder = inspect_decoder(model)
        self.decoder.layer_index(task.layer)
        self.rows = tokenize_pairs(
            pairs,
            PromptFormat(tokenizer),
            max_output_tokens=task.max_output_tokens,
            context_length=self.decoder.context_length,
        )
        self.initial = random_direction(1, self.decoder.hidden_size, self.config.seed)
        batches = range(0, len(self.rows.rows), 2 * task.batch_size)
        self.batches = [self.rows.rows[start : start + 2 * task.batch_size] for start in batches]
        self.sizes = [
            StepSize(
                sum(len(row.base.ids) - self.rows.prefix_length for row in batch),
                sum(row.base.response_length for row in batch),
            )
            for batch in self.batches
        ]

    def build(self, name: str) -> PlainTraining | Engine:
        """The published scheme or ours."""
        kind = PlainTraining if name == PLAIN else Engine
        return kind(self.decoder, self.rows, self.config, self.initial)

    def plain_bytes(self) -> int:
        """About what a step of the published scheme allocates, by what was measured with SmolLM2, rounded up."""
        positions, responses = 0, 0
        for batch in self.batches:
            for minibatch in (batch[: len(batch) // 2], batch[len(batch) // 2 :]):
                longest = max(max(len(row.base.ids), len(row.source.ids)) for row in minibatch)
                positions = max(positions, longest * len(minibatch))
                responses = max(responses, sum(row.base.response_length for row in minibatch))
        size = self.decoder.head.weight.element_size()
        return self.decoder.head.weight.shape[0] * (3 * size * positions + 12 * 4 * responses)

    def description(self, dtype: str) -> tuple[str, dict[str, Any]]:
        """Title, and the problem in JSON values."""
        task, pairs, count = self.task, len(self.rows.positive_prompts), len(self.sizes)
        data = "the demo" if task.data is None else Path(task.data).name
        tokens, responses = (sum(getattr(size, name) for size in self.sizes) for name in ("tokens", "responses"))
        title = (
            f"{task.model}, layer {task.layer}, {dtype}: {pairs} pairs of {data}, batch {task.batch_size}, "
            f"{task.reduction} reduction; a step has {tokens / count:.0f} tokens beyond the prefix "
            f"and {responses / count:.0f} response tokens"
        )
        problem = {
            "name": task.model,
            "data": data,
            "dtype": dtype,
            "layer": task.layer,
            "pairs": pairs,
            "batch_size": task.batch_size,
            "max_output_tokens": task.max_output_tokens,
            "epochs": task.epochs,
            "steps_per_epoch": count,
            "reduction": task.reduction,
            "prefix_length": self.rows.prefix_length,
            "tokens_by_batch": [size.tokens for size in self.sizes],
            "responses_by_batch": [size.responses for size in self.sizes],
        }
        return title, problem


def bench_train(
    model: str = EMBEDDED_MODEL,
    *,
    data: str | os.PathLike[str] | None = None,
    layer: int = 15,
    batch_size: int = 8,
    max_output_tokens: int = 128,
    max_examples: int | None = None,
    epochs: int = 18,
    reduction: Reduction = "token",
    dtypes: Sequence[str] = ("bfloat16", "float32"),
    device: str | torch.device | None = None,
    variants: Sequence[str] | None = None,
    repeats: int = 5,
    threads: int | None = None,
    watch: Callable[[TrainingReport], object] = lambda report: None,
    timer: Timer | None = None,
) -> TrainingReport:
    """Time, memory, agreement and parts of a training step.

    Args:
        model: a name that `load_model` takes.
        data: pairs; those of the demo if None. Of several concepts the first is taken.
        layer: the intervened layer.
        batch_size: pairs a step.
        max_output_tokens: responses are cut to so many tokens.
        max_examples: the first so many pairs.
        epochs: of the whole run that is estimated.
        reduction: `token`, as the published code, or `sequence`.
        dtypes: of the model: `float32`, `bfloat16`, `float16`.
        device: cpu, cuda or cuda:N; CUDA if there is any, if None.
        variants: of `plain` and `engine`; both if None. The floor always runs.
        repeats: rounds; every variant does a step in each.
        threads: of torch; as many as now, if None.
        watch: is given the report at the start, and after each dtype.
        timer: what measures a call, instead of the clock for the device.

    Raises:
        InvalidInputError: names, numbers or pairs that do not fit.
        UnsupportedError: a model that is not a plain decoder.
    """
    place = check_settings(dtypes, device, repeats, threads, variants or (), LABELS)
    names = [name for name in LABELS if variants is None or name in (*variants, FLOOR)]
    path = None if data is None else os.path.abspath(data)
    task = Task(str(model), path, "", layer, batch_size, max_output_tokens, max_examples, epochs, reduction)
    task.config()
    pairs = task.pairs()
    with on_device(place, threads):
        report = TrainingReport("train", machine(place), {"device": str(place), "repeats": repeats}, DEFINITIONS)
        watch(report)
        for dtype in dtypes:
            own = replace(task, dtype=dtype)
            report.comparisons.append(_measure(own, pairs, place, names, repeats, timer or timer_for(place)))
            watch(report)
    return report


def _measure(
    task: Task, pairs: ContrastivePairs, device: torch.device, names: Sequence[str], repeats: int, timer: Timer
) -> Comparison:
    problem = Problem(task, pairs, device)
    title, described = problem.description(task.dtype)
    reasons: dict[str, str | None] = dict.fromkeys(names)
    if PLAIN in reasons:
        reasons[PLAIN] = does_not_fit(problem.plain_bytes(), free_bytes(device))
    running = [name for name, reason in reasons.items() if reason is None]
    with frozen(problem.decoder.model), tqdm(total=0, disable=None, leave=False, desc=task.dtype) as bar:
        bar.set_postfix_str("preparing")
        built = {name: problem.build(name) for name in running if name != FLOOR}
        floor = fastest_floor(problem.decoder, task.layer, problem.sizes, timer)
        variants: dict[str, Steps] = {name: floor if name == FLOOR else built[name] for name in running}
        firsts = {name: each.step(0) for name, each in built.items()}  # the first one is not timed
        floor.step(0)
        bar.set_postfix_str("timing", refresh=False)
        bar.reset(total=len(variants) * repeats)
        seconds = interleave({name: each.step for name, each in variants.items()}, repeats, timer, bar.update)
        bar.set_postfix_str("timing the parts")
        parts = {name: _parts(each, problem, min(PROFILED_STEPS, repeats)) for name, each in built.items()}
        engine = built.get(ENGINE)
        caching = engine.caching if isinstance(engine, Engine) else None
        if device.type == "cuda":
            peaks = {name: {"peak_bytes": peak_on_gpu(partial(each.step, 0))} for name, each in built.items()}
        chunk_rows = floor.chunk_rows
        sizes = problem.sizes
        variants.clear()
        built.clear()
        del problem, floor, engine
        gc.collect()
        if device.type == "cpu":
            is_folder = task.model != EMBEDDED_MODEL and Path(task.model).expanduser().exists()
            place = os.path.abspath(Path(task.model).expanduser()) if is_folder else task.model
            common = {"task": {**vars(task), "model": place}, "threads": torch.get_num_threads()}
            others = [name for name in running if name != FLOOR]
            peaks = cpu_peaks("train", {name: {"variant": name, **common} for name in others}, bar)
    tokens = [sizes[number % len(sizes)].tokens for number in range(repeats)]
    found = []
    for name, reason in reasons.items():
        if reason is not None:
            found.append(Measurement(name, LABELS[name], reason))
            continue
        fields = {"chunk_rows": chunk_rows} if name == FLOOR else peaks[name]
        found.append(measurement(name, seconds, tokens, **fields))
    estimates = {
        each.name: Estimate.of(
            each.times["step"].p50 / 1e3,
            caching if each.name == ENGINE else None,
            pairs=described["pairs"],
            batch_size=task.batch_size,
            epochs=task.epochs,
        )
        for each in found
        if each.times and each.name != FLOOR
    }
    return TrainingComparison(
        title, described, LABELS[FLOOR], "tokens/s", "", found, caching, _agreement(firsts), estimates, parts
    )


def _agreement(firsts: dict[str, StepResult]) -> Agreement | None:
    if PLAIN not in firsts or ENGINE not in firsts:
        return None
    plain, engine = firsts[PLAIN], firsts[ENGINE]
    return Agreement(
        plain.loss,
        engine.loss,
        abs(engine.loss - plain.loss) / abs(plain.loss),
        float(torch.cosine_similarity(plain.gradient.double(), engine.gradient.double(), dim=0)),
    )


def _parts(variant: PlainTraining | Engine, problem: Problem, steps: int) -> dict[str, float]:
    """Seconds of a step by part, the mean of some steps."""
    watch = Stopwatch(problem.decoder.device)
    watched = _watched_plain if isinstance(variant, PlainTraining) else _watched_engine
    with watched(variant, watch, problem.decoder):  # type: ignore[arg-type]
        for number in range(steps):
            watch.start()
            variant.step(number)
            watch.enter(OTHER)
    return {part: total / steps for part, total in watch.seconds.items()}


@contextmanager
def _watched_plain(plain: PlainTraining, watch: Stopwatch, decoder: Decoder) -> Iterator[None]:
    handle = watch.ends_with(plain.direction, OTHER)
    with (
        watch.hooked(decoder),
        _set(plain, "tokens", watch.during(DATA, plain.tokens)),
        _set(plain, "intervene", watch.around(INTERCHANGE, plain.intervene)),
    ):
        yield
    handle.remove()


@contextmanager
def _watched_engine(engine: Engine, watch: Stopwatch, decoder: Decoder) -> Iterator[None]:
    objective = engine.objective
    accumulate = objective.accumulate_gradient

    def accumulate_gradient(rows: Any, weights: Any, intervention: Any, concepts: Any) -> Tensor:
        watch.ends_with(intervention.direction, DATA)
        return watch.during(DATA, accumulate)(rows, weights, watch.around(INTERCHANGE, intervention), concepts)

    with (
        watch.hooked(decoder),
        _set(objective, "accumulate_gradient", accumulate_gradient),
    ):
        yield


@contextmanager
def _set(thing: object, name: str, method: Callable[..., Any]) -> Iterator[None]:
    """Let `thing` have another method for a while."""
    vars(thing)[name] = method
    try:
        yield
    finally:
        del vars(thing)[name]


def memory_call(settings: dict[str, Any]) -> Callable[[], object]:
    """The call that `memory.peak_in_child` measures: the first step of a variant."""
    torch.set_num_threads(settings["threads"])
    task = Task(**settings["task"])
    problem = Problem(task, task.pairs()[: task.batch_size], torch.device("cpu"))
    problem.decoder.model.requires_grad_(False)
    return partial(problem.build(settings["variant"]).step, 0)
