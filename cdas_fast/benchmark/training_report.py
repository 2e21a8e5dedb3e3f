"""What `cdas-fast bench train` found: a table of steps, what follows from them, and a plot."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from cdas_fast.benchmark.report import Comparison, Measurement, Report, aligned, new_figure, save_figure
from cdas_fast.benchmark.timing import Distribution, median_ratio
from cdas_fast.benchmark.training_parts import PARTS

FLOOR, PLAIN, ENGINE = "floor", "plain", "engine"
LABELS = {PLAIN: "published scheme", ENGINE: "cdas_fast", FLOOR: "bare GEMMs"}
PRESET_PAIRS = 72  # of an AxBench concept


@dataclass(frozen=True)
class Agreement:
    """The same step by both, from the same direction."""

    plain_loss: float
    engine_loss: float
    loss_difference: float  # relative to the plain one
    gradient_cosine: float


@dataclass(frozen=True)
class Caching:
    """What the engine does before its first step; measured once."""

    seconds: float
    size_bytes: int
    pairs: int


@dataclass(frozen=True)
class Estimate:
    """Computed from the median step, not measured whole."""

    run_seconds: float  # all epochs over the pairs
    concepts_per_hour: float  # of PRESET_PAIRS each

    @classmethod
    def of(cls, step_seconds: float, caching: Caching | None, *, pairs: int, batch_size: int, epochs: int) -> Estimate:
        """Steps times the step, and caching in proportion to the pairs for what needs it."""
        caching_of_a_pair = 0.0 if caching is None else caching.seconds / caching.pairs

        def run(pairs: int) -> float:
            return caching_of_a_pair * pairs + epochs * -(-pairs // batch_size) * step_seconds

        return cls(run(pairs), 3600 / run(PRESET_PAIRS))


@dataclass(frozen=True)
class TrainingComparison(Comparison):
    """All variants of the step of one model in one dtype."""

    caching: Caching | None = None
    agreement: Agreement | None = None
    estimates: dict[str, Estimate] = field(default_factory=dict)  # by variant
    parts: dict[str, dict[str, float]] = field(default_factory=dict)  # seconds of a step by variant and part

    def table(self) -> str:
        """A line for each variant, and what follows."""
        heads = [
            *("variant", "p20 s", "p50 s", "p80 s", "min s", f"x {LABELS[FLOOR]}", f"x {LABELS[PLAIN]}", "tokens/s"),
            "peak extra MB",
        ]
        rows, notes = [], []
        for each in self.measurements:
            if each.reason is not None:
                notes.append(f"{each.label}: {each.reason}")
                continue
            times, plain = each.times["step"], each.ratios.get(PLAIN)
            peak = "" if each.peak_unknown is None else "n/a"
            rows.append(
                [
                    each.label,
                    *(_seconds(value / 1e3) for value in (times.p20, times.p50, times.p80, times.minimum)),
                    f"{each.ratios[FLOOR]:.2f}",
                    "" if plain is None else f"{plain:.3f}",
                    f"{each.rates['step']:,.0f}",
                    peak if each.peak_bytes is None else f"{each.peak_bytes / 1e6:,.1f}",
                ]
            )
            if each.chunk_rows is not None:
                notes.append(f"{each.label}: {each.chunk_rows} rows of the head at a time")
            if each.peak_unknown is not None:
                notes.append(f"{each.label}: peak n/a: {each.peak_unknown}")
        lines = aligned(heads, rows, 1) if rows else []
        return "\n".join([self.title, *lines, *(f"  {note}" for note in [*notes, *self._facts()])])

    def _facts(self) -> list[str]:
        facts = []
        if self.caching is not None:
            facts.append(
                f"caching before the first step of {LABELS[ENGINE]}: {_seconds(self.caching.seconds)} s, measured "
                f"once; {self.caching.size_bytes / 1e6:,.1f} MB kept for {self.caching.pairs} pairs"
            )
        if self.estimates:
            problem = self.problem
            epochs, batch_size = problem["epochs"], problem["batch_size"]
            steps = epochs * problem["steps_per_epoch"]
            runs = {name: estimate.run_seconds for name, estimate in self.estimates.items()}
            facts.append(
                f"whole run, computed from the medians, not measured whole: {problem['pairs']} pairs, {epochs} epochs, "
                f"{steps} steps: {_listed(runs, lambda value: f'{_seconds(value)} s')}"
            )
            if PLAIN in runs and ENGINE in runs:
                facts[-1] += f", a ratio of {runs[PLAIN] / runs[ENGINE]:.2f}"
            hourly = {name: estimate.concepts_per_hour for name, estimate in self.estimates.items()}
            facts.append(
                f"concepts an hour, computed likewise for {PRESET_PAIRS} pairs each, batch {batch_size}, {epochs} "
                "epochs: " + _listed(hourly, lambda value: f"{value:.3g}")
            )
        if self.agreement is not None:
            found = self.agreement
            facts.append(
                f"agreement on the first batch at the initial direction: losses {found.plain_loss:.6f} and "
                f"{found.engine_loss:.6f}, relative difference {found.loss_difference:.1e}; cosine of the gradients "
                f"{found.gradient_cosine:.6f}"
            )
        for name, seconds in self.parts.items():
            total = sum(seconds.values())
            shares = ", ".join(f"{part} {100 * value / total:.1f} %" for part, value in seconds.items())
            facts.append(f"parts of a step of {LABELS[name]} ({_seconds(total)} s): {shares}")
        return facts


@dataclass
class TrainingReport(Report):
    """A run of `cdas-fast bench train`."""

    def plot(self, path: Path) -> None:
        """Step time relative to the floor, peak memory and parts. Raises `MissingDependencyError`."""
        plot(self.comparisons, path)


def measurement(
    name: str,
    seconds: Mapping[str, Sequence[float]],  # by variant, one for each round
    tokens: Sequence[int],  # of each round
    **fields: object,
) -> Measurement:
    """The steps of a variant, and their ratios to floor and published scheme within a round."""
    own = seconds[name]
    return Measurement(
        name,
        LABELS[name],
        times={"step": Distribution.of(own)},
        ratios={other: median_ratio(own, seconds[other]) for other in (FLOOR, PLAIN) if other in seconds},
        rates={"step": float(np.median([count / each for count, each in zip(tokens, own, strict=True)]))},
        **fields,  # type: ignore[arg-type]
    )


def plot(comparisons: Sequence[Comparison], path: Path) -> None:
    """Grouped bars of the step relative to the floor and of peak memory, and stacked shares of the parts."""
    figure = new_figure(max(7.0, 2.5 * len(comparisons) + 2), 9.0)
    upper, middle, lower = figure.subplots(3, 1)
    names = [name for name in LABELS if name != FLOOR]
    width = 0.8 / len(names)
    ticks: list[tuple[float, str]] = []
    for index, name in enumerate(names):
        for place, comparison in enumerate(comparisons):
            x = place + (index - (len(names) - 1) / 2) * width
            for each in comparison.measurements:
                if each.name == name and each.times:
                    upper.bar(x, each.ratios[FLOOR], width, color=f"C{index}", label=LABELS[name])
                    middle.bar(x, (each.peak_bytes or 0) / 1e6, width, color=f"C{index}")
            seconds = comparison.parts.get(name) if isinstance(comparison, TrainingComparison) else None
            if seconds is not None:
                bottom, total = 0.0, sum(seconds.values())
                for number, part in enumerate(PARTS):
                    share = 100 * seconds[part] / total
                    lower.bar(x, share, 0.9 * width, bottom=bottom, color=f"C{number + 2}", label=part)
                    bottom += share
                ticks.append((x, LABELS[name]))
    upper.axhline(1.0, color="0.4", linewidth=0.8, linestyle="--")
    upper.set_ylabel(f"step, times {LABELS[FLOOR]}")
    middle.set_ylabel("peak extra MB")
    lower.set_ylabel("% of the step")
    lower.set_xticks([x for x, _ in ticks], [label for _, label in ticks], fontsize="small")
    titles = [f"{each.problem['name']}\n{each.problem['dtype']}" for each in comparisons]
    for axes in (upper, middle):
        axes.set_xticks(range(len(comparisons)), titles, fontsize="small")
    for axes in (upper, lower):
        handles, labels = axes.get_legend_handles_labels()
        once = dict(zip(labels, handles, strict=True))
        if once:
            axes.legend(once.values(), once.keys(), fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    save_figure(figure, path)


def _seconds(value: float) -> str:
    return f"{value:,.{0 if value >= 1000 else 1 if value >= 100 else 3 if value >= 0.1 else 5}f}"


def _listed(values: Mapping[str, float], text: Callable[[float], str]) -> str:
    return ", ".join(f"{LABELS[name]} {text(value)}" for name, value in values.items())
