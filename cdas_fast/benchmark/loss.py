"""`cdas-fast bench loss`: a divergence of two linear heads, side by side with the alternatives."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from cdas_fast.benchmark.loss_variants import (
    CHUNKED,
    DIVERGENCES,
    LABELS,
    NOTES,
    Inputs,
    LossVariant,
    Task,
    build,
    eager_divergence,
    missing,
    names_for,
    working_bytes,
)
from cdas_fast.benchmark.memory import free_bytes
from cdas_fast.benchmark.report import MEMORY_DEFINED, MODES_DEFINED, Comparison, Measurement, Report, machine
from cdas_fast.benchmark.runner import (
    COPIES,
    DTYPES,
    Variant,
    check_settings,
    cpu_peaks,
    does_not_fit,
    gpu_peaks,
    measurements,
    on_device,
    parse_sizes,
    rotating,
    time_variants,
)
from cdas_fast.benchmark.timing import Timer, fastest, timer_for
from cdas_fast.errors import InvalidInputError, expected_got

BASELINE = "gemms"
DEFINITIONS = [
    MODES_DEFINED,
    "three GEMMs: hidden @ weight.T, target @ weight.T and (N, V) @ (V, D) in the dtype of the inputs into memory "
    "allocated beforehand, the rows in as many chunks as is fastest. The ratio of fw is to the first two of them.",
    "GFLOP/s: 4 N D V operations for fw, 6 N D V for fw+bw, whatever else a variant computes.",
    MEMORY_DEFINED,
    "loss error: relative error of the mean loss of sampled rows, against float64 on the same inputs; gradient error: "
    "norm of the error of their gradients over the norm of the gradients.",
    "Inputs are random, with logits of standard deviation 4.3 and a divergence of about 0.02 nats; they rotate among "
    "copies, of the head too unless it is larger than any cache.",
]
_CACHE_BYTES = 256 * 2**20  # more than the last level of any processor's cache, nearly
_SAMPLED_ROWS = 8
_BLOCK = 8192  # entries of the vocabulary that are cast to float64 at a time


@dataclass(frozen=True)
class Shape:
    """N rows of width D on a head of V entries."""

    name: str
    rows: int
    width: int
    vocabulary: int
    logit_softcap: float | None = None


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("smollm2", 512, 576, 49152),
        Shape("wide-2304", 256, 2304, 128256),
        Shape("llama-3.1-8b", 256, 4096, 128256),
        Shape("gemma-2-2b", 256, 2304, 256000, logit_softcap=30.0),
        Shape("llama-3.1-70b", 64, 8192, 128256),
    )
}


def parse_shape(text: str) -> Shape:
    """A shape by its name, or N x D x V written as 256x2304x128256."""
    return SHAPES.get(text) or Shape(text, *parse_sizes(text, f"{', '.join(SHAPES)}, or ROWSxWIDTHxVOCABULARY"))


def bench_loss(
    shapes: Sequence[Shape] = (SHAPES["smollm2"],),
    *,
    dtypes: Sequence[str] = ("bfloat16", "float32"),
    device: str | torch.device | None = None,
    divergence: str = "jsd",
    variants: Sequence[str] | None = None,
    repeats: int = 10,
    threads: int | None = None,
    watch: Callable[[Report], object] = lambda report: None,
    timer: Timer | None = None,
) -> Report:
    """Time, memory and error of the variants of a divergence.

    Args:
        shapes: problems, of `SHAPES` or others.
        dtypes: of hidden states and head: `float32`, `bfloat16`, `float16`.
        device: cpu, cuda or cuda:N; CUDA if there is any, if None.
        divergence: `jsd` (beta 1/2), `forward_kl` or `reverse_kl`.
        variants: names of `loss_variants.LABELS`; all that run on the device, if None. The three GEMMs always run.
        repeats: rounds; every variant runs forward and forward with backward in each.
        threads: of torch; as many as now, if None.
        watch: is given the report at the start, and after each problem.
        timer: what measures a call, instead of the clock for the device.

    Raises:
        InvalidInputError: names or numbers that do not fit.
    """
    place = check_settings(dtypes, device, repeats, threads, variants or (), LABELS)
    if divergence not in DIVERGENCES:
        raise InvalidInputError(expected_got("divergence", f"one of {', '.join(DIVERGENCES)}", repr(divergence)))
    names = names_for(place) if variants is None else list(dict.fromkeys([BASELINE, *variants]))
    with on_device(place, threads):
        settings = {"device": str(place), "divergence": divergence, "repeats": repeats}
        report = Report("loss", machine(place), settings, DEFINITIONS)
        watch(report)
        for shape in shapes:
            for dtype in dtypes:
                task = Task(shape.rows, shape.width, shape.vocabulary, DTYPES[dtype], divergence, shape.logit_softcap)
                cap = "" if shape.logit_softcap is None else f", softcap {shape.logit_softcap:g}"
                sizes = f"N = {shape.rows}, D = {shape.width}, V = {shape.vocabulary}{cap}"
                title = f"{shape.name}: {sizes}, {dtype}, {divergence}"
                problem = {**asdict(shape), "dtype": dtype, "divergence": divergence}
                found = _Bench(task, place, names, repeats, timer or timer_for(place), f"{shape.name} {dtype}").run()
                report.comparisons.append(Comparison(title, problem, LABELS[BASELINE], "GFLOP/s", "loss", found))
                watch(report)
    return report


class _Bench:
    """All variants of one task."""

    def __init__(
        self, task: Task, device: torch.device, names: Sequence[str], repeats: int, timer: Timer, title: str
    ) -> None:
        self.task, self.device, self.repeats, self.timer = task, device, repeats, timer
        self.reasons: dict[str, str | None] = {name: missing(name, task, device) for name in names}
        self.variants: dict[str, Variant] = {}
        self.fields: dict[str, dict[str, Any]] = {}  # of the measurements
        self.bar = tqdm(total=0, disable=None, leave=False, desc=title)

    def run(self) -> list[Measurement]:
        """Everything but the memory on a CPU is measured on one set of inputs, which is gone before that."""
        product = 2.0 * self.task.rows * self.task.width * self.task.vocabulary
        with self.bar:
            self._leave_out_what_does_not_fit()
            if self.reasons[BASELINE] is not None:
                return measurements(self.reasons, LABELS, BASELINE, {}, {})
            inputs = make_inputs(self.task, self.device, COPIES)
            rows = torch.linspace(0, self.task.rows - 1, min(_SAMPLED_ROWS, self.task.rows), device=self.device).long()
            self.bar.set_postfix_str("float64")
            exact = truth(self.task, inputs[0], rows)
            for name in self._running():
                self._prepare(name, inputs, rows, exact)
            seconds = time_variants(self.variants, inputs, self.repeats, self.timer, self.bar)
            del self.variants[BASELINE]  # what it takes was allocated beforehand
            peaks = gpu_peaks(self.variants, inputs[0]) if self.device.type == "cuda" else {}
            self.variants.clear()
            del inputs
            gc.collect()
            if self.device.type == "cpu":
                settings = {name: self._memory_settings(name) for name in self._running() if name != BASELINE}
                peaks = cpu_peaks("loss", settings, self.bar)
        work = {"forward": 2 * product, "both": 3 * product}
        return measurements(self.reasons, LABELS, BASELINE, seconds, work, self.fields, peaks)

    def _running(self) -> list[str]:
        return [name for name, reason in self.reasons.items() if reason is None]

    def _leave_out_what_does_not_fit(self) -> None:
        """Besides the inputs and the variant there is the memory that the floor keeps."""
        free, smallest = free_bytes(self.device), _chunk_candidates(self.task)[-1]
        kept = input_bytes(self.task) + working_bytes(BASELINE, self.task, self.task.rows)
        for name in self._running():
            rows = smallest if name in CHUNKED else None
            own = 0 if name == BASELINE else working_bytes(name, self.task, rows)
            self.reasons[name] = does_not_fit(kept + own, free)
        if self.reasons[BASELINE] is not None:
            self.reasons = {name: reason or self.reasons[BASELINE] for name, reason in self.reasons.items()}

    def _prepare(self, name: str, inputs: Sequence[Inputs], rows: Tensor, exact: tuple[Tensor, Tensor]) -> None:
        """Build a variant, with the number of rows at a time that is fastest; run it in each way; find its errors.

        One that is not ours fails for itself alone.
        """
        self.bar.set_postfix_str(f"preparing {LABELS[name]}")
        fields: dict[str, Any] = {"note": NOTES.get(name, "")}
        try:
            if name in CHUNKED:
                fields["chunk_rows"] = self._fastest_chunk(name, inputs)
            variant = build(name, self.task, self.device, fields.get("chunk_rows"))
            for each in inputs:
                variant.both(each)
                variant.forward(each)
            if isinstance(variant, LossVariant):
                loss, gradient = variant.of_rows(inputs[0], rows)
                fields["value_error"] = float((loss.double() / exact[0] - 1).abs())
                fields["gradient_error"] = float((gradient[rows].double() - exact[1]).norm() / exact[1].norm())
        except Exception as error:
            if name in ("cpp", "triton", "reference", BASELINE):
                raise
            first = (str(error).strip().splitlines() or ["no message"])[0]
            self.reasons[name] = f"failed: {type(error).__name__}: {first}"
        else:
            self.variants[name], self.fields[name] = variant, fields

    def _fastest_chunk(self, name: str, inputs: Sequence[Inputs]) -> int:
        free, candidates = free_bytes(self.device), _chunk_candidates(self.task)
        if name == "compile":
            candidates = candidates[:3]  # each takes seconds to compile, and torch gives up after eight
        fitting = [rows for rows in candidates if does_not_fit(working_bytes(name, self.task, rows), free) is None]
        calls = {
            rows: rotating(build(name, self.task, self.device, rows).both, inputs)
            for rows in fitting or candidates[-1:]
        }
        return fastest(calls, self.timer)

    def _memory_settings(self, name: str) -> dict[str, Any]:
        return {
            "task": asdict(self.task) | {"dtype": str(self.task.dtype).removeprefix("torch.")},
            "variant": name,
            "chunk_rows": self.fields[name].get("chunk_rows"),
            "threads": torch.get_num_threads(),
        }


def _chunk_candidates(task: Task) -> list[int]:
    """All rows, a half, a quarter, an eighth and a sixteenth of them."""
    return sorted({-(-task.rows // parts) for parts in (1, 2, 4, 8, 16)}, reverse=True)


def _weight_copies(task: Task, copies: int) -> int:
    return copies if task.vocabulary * task.width * task.dtype.itemsize <= _CACHE_BYTES else 1


def input_bytes(task: Task) -> int:
    """Bytes of all that `make_inputs` makes."""
    weights = _weight_copies(task, COPIES) * task.vocabulary * task.width
    return (weights + 2 * COPIES * task.rows * task.width) * task.dtype.itemsize


def make_inputs(task: Task, device: torch.device, copies: int) -> list[Inputs]:
    """Random hidden states and head whose logits are spread as those of a language model.

    The head is larger than any cache, and then one for all, or there are as many of it as of the rest.
    """
    generator = torch.Generator(device).manual_seed(0)

    def normal(rows: int, spread: float) -> Tensor:
        empty = torch.empty(rows, task.width, dtype=task.dtype, device=device)
        return empty.normal_(0, spread, generator=generator)

    weights = [normal(task.vocabulary, 3.6 / task.width**0.5)]
    weights += [weights[0].clone() for _ in range(_weight_copies(task, copies) - 1)]
    hidden = normal(task.rows, 1.2)
    target = hidden + normal(task.rows, 0.09)
    rows = [(hidden.clone(), target.clone()) for _ in range(copies)]
    return [
        Inputs(each, each.detach().requires_grad_(), other, weights[number % len(weights)])
        for number, (each, other) in enumerate(rows)
    ]


def truth(task: Task, inputs: Inputs, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The mean loss of `rows` in float64, and its gradient with respect to their hidden states."""
    both = torch.cat([inputs.hidden[rows], inputs.target[rows]]).double()
    blocks = inputs.weight.split(_BLOCK)
    logits = torch.cat([both @ block.double().T for block in blocks], dim=1).requires_grad_()
    bent = logits if task.logit_softcap is None else task.logit_softcap * torch.tanh(logits / task.logit_softcap)
    log_p, log_q = bent.log_softmax(-1).chunk(2)
    loss = eager_divergence(log_p, log_q, task.divergence).mean()
    (grad_logits,) = torch.autograd.grad(loss, logits)
    grad_logits = grad_logits[: rows.shape[0]]
    pieces = zip(grad_logits.split(_BLOCK, dim=1), blocks, strict=True)
    gradient = torch.zeros_like(both[: rows.shape[0]])
    for piece, block in pieces:
        gradient += piece @ block.double()
    return loss.detach(), gradient


def memory_call(settings: dict[str, Any]) -> Callable[[], object]:
    """The call that `memory.peak_in_child` measures."""
    torch.set_num_threads(settings["threads"])
    task = Task(**(settings["task"] | {"dtype": DTYPES[settings["task"]["dtype"]]}))
    cpu = torch.device("cpu")
    variant = build(settings["variant"], task, cpu, settings["chunk_rows"])
    (inputs,) = make_inputs(task, cpu, copies=1)
    return partial(variant.both, inputs)
