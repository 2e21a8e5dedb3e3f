"""`cdas-fast bench interchange`: the rank-1 intervention, forward and backward, against the eager expression."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from cdas_fast.benchmark.memory import free_bytes
from cdas_fast.benchmark.report import MEMORY_DEFINED, MODES_DEFINED, Comparison, Measurement, Report, machine
from cdas_fast.benchmark.runner import (
    COPIES,
    DTYPES,
    check_settings,
    cpu_peaks,
    does_not_fit,
    gpu_peaks,
    measurements,
    missing_implementation,
    on_device,
    parse_sizes,
    time_variants,
)
from cdas_fast.benchmark.timing import Timer, timer_for
from cdas_fast.ops.implementation import Implementation
from cdas_fast.ops.interchange import interchange

BASELINE = "eager"
LABELS = {
    "eager": "eager",
    "cpp": "cdas_fast cpp",
    "triton": "cdas_fast triton",
    "reference": "cdas_fast reference",
}
TURN = 0.02  # seconds
DEFINITIONS = [
    MODES_DEFINED,
    f"A variant's turn in a round lasts at least {1e3 * TURN:g} ms; what counts is the mean of the calls in it.",
    "eager: hidden + (source @ w - hidden @ w)[..., None] * w, in the dtype of the inputs, differentiated by autograd. "
    "Gradients reach hidden and w.",
    "GB/s: what has to be read and written at least: hidden and the result for fw; for fw+bw these, the incoming "
    "gradient, hidden once more, and its gradient.",
    MEMORY_DEFINED,
    "output error and gradient error (of w): norm of the error over the norm of what is right, which is the eager "
    "expression in float64 on the same inputs.",
    "Inputs are random, with a w of unit length; they rotate among copies.",
]


@dataclass(frozen=True)
class Shape:
    """B sequences of T positions of width D."""

    name: str
    batch: int
    positions: int
    width: int


SHAPES = {shape.name: shape for shape in (Shape("32x190x576", 32, 190, 576), Shape("8x256x8192", 8, 256, 8192))}


def parse_shape(text: str) -> Shape:
    """B x T x D, written as 32x190x576."""
    return Shape(text, *parse_sizes(text, "BATCHxPOSITIONSxWIDTH"))


@dataclass(frozen=True)
class Inputs:
    """One set of tensors; those that are `trained` are leaves that require a gradient."""

    hidden: Tensor  # (B, T, D)
    trained: Tensor  # (B, T, D)
    source: Tensor  # (B, D)
    direction: Tensor  # (D,)
    trained_direction: Tensor  # (D,)
    grad_out: Tensor  # (B, T, D)


class Variant:
    """A way to write the intervention: (hidden, source, w) -> (B, T, D)."""

    def __init__(self, function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        self.function = function

    def forward(self, inputs: Inputs) -> Tensor:
        """Without a gradient."""
        with torch.no_grad():
            return self.function(inputs.hidden, inputs.source, inputs.direction)

    def both(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """Gradients of hidden and w."""
        out = self.function(inputs.trained, inputs.source, inputs.trained_direction)
        return torch.autograd.grad(out, (inputs.trained, inputs.trained_direction), inputs.grad_out)


def eager(hidden: Tensor, source: Tensor, w: Tensor) -> Tensor:
    """The intervention as one writes it in torch."""
    return hidden + ((source @ w)[:, None] - hidden @ w)[..., None] * w


def build(name: str) -> Variant:
    """The variant `name`."""
    if name == BASELINE:
        return Variant(eager)
    impl: Implementation = name  # type: ignore[assignment]
    return Variant(lambda hidden, source, w: interchange(hidden, source, w[None], impl=impl))


def make_inputs(shape: Shape, dtype: torch.dtype, device: torch.device, copies: int) -> list[Inputs]:
    """Random activations, `copies` of them."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*sizes: int) -> Tensor:
        return torch.empty(sizes, dtype=dtype, device=device).normal_(generator=generator)

    hidden = normal(shape.batch, shape.positions, shape.width)
    source, grad_out = normal(shape.batch, shape.width), normal(*hidden.shape)
    direction = normal(shape.width)
    direction /= direction.norm()
    return [
        Inputs(each, each.detach().requires_grad_(), source, direction, direction.clone().requires_grad_(), other)
        for each, other in ((hidden.clone(), grad_out.clone()) for _ in range(copies))
    ]


def bench_interchange(
    shapes: Sequence[Shape] = tuple(SHAPES.values()),
    *,
    dtypes: Sequence[str] = ("bfloat16", "float32"),
    device: str | torch.device | None = None,
    variants: Sequence[str] | None = None,
    repeats: int = 30,
    threads: int | None = None,
    watch: Callable[[Report], object] = lambda report: None,
    timer: Timer | None = None,
) -> Report:
    """Time, memory and error of the intervention; see `bench_loss` for the arguments."""
    place = check_settings(dtypes, device, repeats, threads, variants or (), LABELS)
    barred = "cpp" if place.type == "cuda" else "triton"
    names = [name for name in LABELS if name != barred] if variants is None else [BASELINE, *variants]
    with on_device(place, threads):
        report = Report("interchange", machine(place), {"device": str(place), "repeats": repeats}, DEFINITIONS)
        watch(report)
        for shape in shapes:
            for dtype in dtypes:
                title = f"{shape.name}: B = {shape.batch}, T = {shape.positions}, D = {shape.width}, {dtype}"
                problem = {**asdict(shape), "dtype": dtype}
                reasons = {name: missing_implementation(name, place) for name in names}
                found = _measure(shape, dtype, place, reasons, repeats, timer or timer_for(place))
                report.comparisons.append(Comparison(title, problem, LABELS[BASELINE], "GB/s", "output", found))
                watch(report)
    return report


def _measure(
    shape: Shape, dtype: str, device: torch.device, reasons: dict[str, str | None], repeats: int, timer: Timer
) -> list[Measurement]:
    size = shape.batch * shape.positions * shape.width
    tensor = size * DTYPES[dtype].itemsize
    needed = 2 * COPIES * tensor + 10 * 8 * size  # the inputs, and the formula in float64
    reasons = {name: reason or does_not_fit(needed, free_bytes(device)) for name, reason in reasons.items()}
    if reasons[BASELINE] is not None:
        return measurements(reasons, LABELS, BASELINE, {}, {})
    variants = {name: build(name) for name, reason in reasons.items() if reason is None}
    inputs = make_inputs(shape, DTYPES[dtype], device, COPIES)
    for variant in variants.values():
        for each in inputs:
            variant.both(each)
            variant.forward(each)
    with tqdm(total=0, disable=None, leave=False, desc=f"{shape.name} {dtype}") as bar:
        errors = _errors(variants, inputs[0])
        seconds = time_variants(variants, inputs, repeats, timer, bar, TURN)
        if device.type == "cuda":
            peaks = gpu_peaks(variants, inputs[0])
        else:
            common = {"shape": asdict(shape), "dtype": dtype, "threads": torch.get_num_threads()}
            peaks = cpu_peaks("interchange", {name: {"variant": name, **common} for name in variants}, bar)
    return measurements(
        reasons, LABELS, BASELINE, seconds, {"forward": 2.0 * tensor, "both": 5.0 * tensor}, errors, peaks
    )


def _errors(variants: dict[str, Variant], inputs: Inputs) -> dict[str, dict[str, Any]]:
    exact = Inputs(
        **{
            each.name: getattr(inputs, each.name).detach().double().requires_grad_(each.name.startswith("trained"))
            for each in fields(inputs)
        }
    )
    out, (_, gradient) = build(BASELINE).forward(exact), build(BASELINE).both(exact)

    def off(ours: Tensor, right: Tensor) -> float:
        return float((ours.double() - right).norm() / right.norm())

    return {
        name: {
            "value_error": off(variant.forward(inputs), out),
            "gradient_error": off(variant.both(inputs)[1], gradient),
        }
        for name, variant in variants.items()
    }


def memory_call(settings: dict[str, Any]) -> Callable[[], object]:
    """The call that `memory.peak_in_child` measures."""
    torch.set_num_threads(settings["threads"])
    shape, cpu = Shape(**settings["shape"]), torch.device("cpu")
    (inputs,) = make_inputs(shape, DTYPES[settings["dtype"]], cpu, copies=1)
    return partial(build(settings["variant"]).both, inputs)
