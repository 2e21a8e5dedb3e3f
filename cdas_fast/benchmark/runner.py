"""What the benchmarks share: settings, a shape by its text, timing and memory of the variants of one problem."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, Protocol

import torch
from tqdm.auto import tqdm

from cdas_fast.benchmark.memory import PeakUnknownError, peak_in_child, peak_on_gpu
from cdas_fast.benchmark.report import Measurement
from cdas_fast.benchmark.timing import Timer, interleave
from cdas_fast.benchmark.timing import threads as set_threads
from cdas_fast.errors import InvalidInputError, expected_got
from cdas_fast.models.loading import resolve_device
from cdas_fast.ops import cpu_library

COPIES = 3  # of the inputs, so that none lies in a cache since its last use
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}
TIMED = ("forward", "both")
Seconds = Mapping[tuple[str, str], Sequence[float]]  # by variant and mode


class Variant(Protocol):
    """Something to time."""

    def forward(self, inputs: Any) -> object:
        """The result without a gradient."""

    def both(self, inputs: Any) -> object:
        """The result and its gradients."""


def check_settings(
    dtypes: Sequence[str],
    device: str | torch.device | None,
    repeats: int,
    threads: int | None,
    variants: Sequence[str],
    known: Mapping[str, str],
) -> torch.device:
    """The device to run on. Raises `InvalidInputError` for settings that do not fit."""
    for what, names, wanted in (("dtype", dtypes, DTYPES), ("variant", variants, known)):
        for name in names:
            if name not in wanted:
                raise InvalidInputError(expected_got(what, f"one of {', '.join(wanted)}", repr(name)))
    for what, number in (("repeats", repeats), ("threads", 1 if threads is None else threads)):
        if number < 1:
            raise InvalidInputError(expected_got(what, "a whole number of at least 1", number))
    resolved = resolve_device(device)
    if resolved.type not in ("cpu", "cuda"):
        raise InvalidInputError(expected_got("device", "cpu, cuda or cuda:N", repr(str(device))))
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise InvalidInputError(expected_got("device", f"one of {torch.cuda.device_count()} GPUs", repr(str(device))))
    return resolved


def parse_sizes(text: str, otherwise: str) -> list[int]:
    """Three sizes written as 32x190x576."""
    parts = text.split("x")
    if len(parts) != 3 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise InvalidInputError(expected_got("shape", otherwise, repr(text)))
    return [int(part) for part in parts]


def missing_implementation(name: str, device: torch.device) -> str | None:
    """Why an implementation of ours cannot run on `device`, None if it can."""
    if name == "cpp":
        if device.type != "cpu":
            return "runs on a CPU alone"
        return None if cpu_library.available() else cpu_library.why_not()
    if name == "triton":
        if device.type != "cuda":
            return "runs on a GPU alone"
        return import_problem("triton", "pip install 'cdas_fast[triton]'")
    return None


def import_problem(module: str, remedy: str) -> str | None:
    """Why a module cannot be imported, None if it can."""
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        return f"not installed: {remedy}" if error.name == module else f"cannot be imported: {error}"
    except ImportError as error:
        return f"cannot be imported: {error}"
    return None


def does_not_fit(needed: int, free: int | None) -> str | None:
    """Why a variant that takes so many bytes is left out, None if it fits or nobody knows."""
    if free is None or needed <= 0.9 * free:
        return None
    return f"needs about {needed / 1e9:.3g} GB of memory, {free / 1e9:.3g} GB are free"


@contextmanager
def on_device(device: torch.device, threads: int | None) -> Iterator[None]:
    """A context in which `device` is the current one and torch has that many threads."""
    with set_threads(threads), torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        yield


def rotating(function: Callable[[Any], object], inputs: Sequence[Any]) -> Callable[[int], object]:
    """`function` of the inputs whose turn it is."""
    return lambda number: function(inputs[number % len(inputs)])


def time_variants(
    variants: Mapping[str, Variant],
    inputs: Sequence[Any],
    repeats: int,
    timer: Timer,
    bar: tqdm[Any],
    fill: float = 0.0,
) -> Seconds:
    """Seconds of each variant in each round, forward and forward with backward; for `fill` see `interleave`."""
    calls = {
        (name, mode): rotating(getattr(variant, mode), inputs) for name, variant in variants.items() for mode in TIMED
    }
    bar.set_postfix_str("timing", refresh=False)
    bar.reset(total=len(calls) * repeats)
    return interleave(calls, repeats, timer, bar.update, fill)


def gpu_peaks(variants: Mapping[str, Variant], inputs: Any) -> dict[str, dict[str, Any]]:
    """Fields of each variant's measurement: its peak of memory."""
    return {name: {"peak_bytes": peak_on_gpu(partial(variant.both, inputs))} for name, variant in variants.items()}


def cpu_peaks(subject: str, settings: Mapping[str, Mapping[str, Any]], bar: tqdm[Any]) -> dict[str, dict[str, Any]]:
    """The same on a CPU, by a process for each variant, from the settings of each (see `peak_in_child`)."""
    bar.set_postfix_str("measuring memory", refresh=False)
    bar.reset(total=len(settings))
    fields: dict[str, dict[str, Any]] = {}
    for name, each in settings.items():
        try:
            fields[name] = {"peak_bytes": peak_in_child(subject, each)}
        except PeakUnknownError as error:
            fields[name] = {"peak_unknown": str(error)}
        bar.update()
    return fields


def measurements(
    reasons: Mapping[str, str | None],
    labels: Mapping[str, str],
    baseline: str,
    seconds: Seconds,
    work: Mapping[str, float],
    *fields: Mapping[str, Mapping[str, Any]],
) -> list[Measurement]:
    """One for each variant: that it did not run for a reason, or its times and further fields."""

    def of(name: str) -> dict[str, Sequence[float]]:
        return {mode: seconds[name, mode] for mode in TIMED}

    found = []
    for name, reason in reasons.items():
        if reason is not None:
            found.append(Measurement(name, labels[name], reason))
            continue
        further = {key: value for each in fields for key, value in each.get(name, {}).items()}
        found.append(Measurement.timed(of(name), of(baseline), work, name=name, label=labels[name], **further))
    return found
