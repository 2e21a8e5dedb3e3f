"""What a benchmark found: the figures, and the same as a text table, JSON and a plot."""

from __future__ import annotations

import datetime
import importlib.metadata
import math
import os
import platform
import shutil
import subprocess
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

import cdas_fast
from cdas_fast.benchmark.timing import Distribution, median_ratio
from cdas_fast.errors import InvalidInputError, MissingDependencyError, expected_got
from cdas_fast.ops import cpu_library
from cdas_fast.storage import make_output_folder, write_atomically, write_json, write_text

MODES = {"forward": "fw", "backward": "bw", "both": "fw+bw"}
TABLE, RESULTS, PLOT = "table.txt", "results.json", "plot.png"
MODES_DEFINED = (
    "fw: the forward pass without a gradient. fw+bw: forward and backward. bw: the difference of the two within a "
    "round, which is what the gradient costs wherever it is made."
)
MEMORY_DEFINED = (
    "peak extra MB (1 MB = 1e6 bytes): most memory during fw+bw beyond what lay there before, inputs not counted; on a "
    "CPU resident memory in a process of its own, on a GPU what torch allocates."
)


@dataclass(frozen=True)
class Measurement:
    """One variant of one problem; of one that did not run only `reason`, why."""

    name: str
    label: str
    reason: str | None = None
    note: str = ""
    chunk_rows: int | None = None
    times: dict[str, Distribution] = field(default_factory=dict)  # milliseconds, by mode
    ratios: dict[str, float] = field(default_factory=dict)  # to the baseline within a round, by mode
    rates: dict[str, float] = field(default_factory=dict)  # work per second at the median time, by mode
    peak_bytes: int | None = None
    peak_unknown: str | None = None
    value_error: float | None = None
    gradient_error: float | None = None

    @classmethod
    def timed(
        cls,
        seconds: Mapping[str, Sequence[float]],
        baseline: Mapping[str, Sequence[float]],
        work: Mapping[str, float],
        **fields: Any,
    ) -> Measurement:
        """From the seconds of `forward` and `both` in each round, and those of the baseline in the same rounds."""
        backward = [both - forward for both, forward in zip(seconds["both"], seconds["forward"], strict=True)]
        times = {mode: Distribution.of({**seconds, "backward": backward}[mode]) for mode in MODES}
        return cls(
            times=times,
            ratios={mode: median_ratio(seconds[mode], baseline[mode]) for mode in ("forward", "both")},
            rates={mode: work[mode] / times[mode].p50 / 1e6 for mode in ("forward", "both")},
            **fields,
        )


@dataclass(frozen=True)
class Comparison:
    """All variants of one problem."""

    title: str
    problem: dict[str, Any]
    baseline: str  # the label of the variant that ratios are taken to
    rate_unit: str  # of `Measurement.rates`
    value: str  # what `Measurement.value_error` is the error of
    measurements: list[Measurement]

    @property
    def is_empty(self) -> bool:
        """Whether nothing but the baseline ran, if that."""
        return not any(each.times and each.label != self.baseline for each in self.measurements)

    def table(self) -> str:
        """As text."""
        return table(self)


@dataclass
class Report:
    """A run of a benchmark."""

    benchmark: str
    machine: dict[str, str]
    settings: dict[str, Any]
    definitions: list[str]
    comparisons: list[Comparison] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Everything, in JSON values: times with their samples, numbers that are not finite as text."""
        return {"version": 1, **_json_values(asdict(self))}

    def table(self) -> str:
        """Machine, a table for each problem, and what the columns mean."""
        return "\n\n".join([self.header(), *(each.table() for each in self.comparisons), self.footer()]) + "\n"

    def plot(self, path: Path) -> None:
        """Write the plot."""
        plot(self.comparisons, path)

    def header(self) -> str:
        """Benchmark and machine."""
        lines = [f"{name}: {value}" for name, value in self.machine.items()]
        return "\n".join([f"cdas-fast bench {self.benchmark}", *lines])

    def footer(self) -> str:
        """What the columns mean."""
        return "\n".join(textwrap.fill(each, 120, subsequent_indent="  ") for each in self.definitions)


def _json_values(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _json_values(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_values(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def machine(device: torch.device) -> dict[str, str]:
    """Where, when and with what a benchmark runs."""
    facts = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "processor": _processor(),
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} processors",
        "cpu kernels": cpu_library.instruction_set() if cpu_library.available() else "not built",
    }
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
        facts["gpu runtime"] = f"HIP {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    facts["python"] = platform.python_version()
    facts["torch"] = torch.__version__
    for package in ("triton", "liger_kernel"):
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            facts[package] = "not installed"
    return facts | {"cdas_fast": cdas_fast.__version__ + _commit()}


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _commit() -> str:
    """The commit of a checkout, and whether files differ from it; nothing if installed otherwise."""
    root, git = Path(cdas_fast.__file__).parents[1], shutil.which("git")
    if git is None or not (root / ".git").exists():
        return ""
    command = [git, "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return f", commit {done.stdout.strip()}" if done.returncode == 0 else ""


def table(comparison: Comparison) -> str:
    """One problem: a line for each variant and mode, and one for each variant that did not run."""
    heads = [
        *("variant", "mode", "p20 ms", "p50 ms", "p80 ms", "min ms", f"x {comparison.baseline}", comparison.rate_unit),
        *("peak extra MB", f"{comparison.value} error", "gradient error"),
    ]
    rows, notes = [], []
    for each in comparison.measurements:
        if each.reason is not None:
            notes.append(f"{each.label}: {each.reason}")
            continue
        remarks = [each.note] if each.note else []
        if each.chunk_rows is not None:
            remarks.insert(0, f"{each.chunk_rows} rows at a time")
        if each.peak_unknown is not None:
            remarks.append(f"peak n/a: {each.peak_unknown}")
        notes += [f"{each.label}: {'; '.join(remarks)}"] if remarks else []
        for mode, short in MODES.items():
            times, last = each.times[mode], mode == "both"
            ratio, rate = each.ratios.get(mode), each.rates.get(mode)
            peak = "" if each.peak_unknown is None else "n/a"
            peak = peak if each.peak_bytes is None else f"{each.peak_bytes / 1e6:,.1f}"
            rows.append(
                [
                    each.label if mode == "forward" else "",
                    short,
                    *(_number(milliseconds) for milliseconds in (times.p20, times.p50, times.p80, times.minimum)),
                    "" if ratio is None else f"{ratio:.2f}",
                    "" if rate is None else f"{rate:,.{0 if rate >= 100 else 1}f}",
                    peak if last else "",
                    _error(each.value_error) if last else "",
                    _error(each.gradient_error) if last else "",
                ]
            )
    lines = aligned(heads, rows, 2) if rows else []
    return "\n".join([comparison.title, *lines, *(f"  {note}" for note in notes)])


def aligned(heads: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> list[str]:
    """Lines of a table whose first `left` columns are aligned on the left, the others on the right."""
    widths = [max(len(row[column]) for row in [heads, *rows]) for column in range(len(heads))]
    return [
        "  ".join(
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in [heads, *rows]
    ]


def _number(milliseconds: float) -> str:
    return f"{milliseconds:,.{0 if abs(milliseconds) >= 1000 else 1 if abs(milliseconds) >= 100 else 3}f}"


def _error(error: float | None) -> str:
    return "" if error is None else f"{error:.1e}"


def plot(comparisons: Sequence[Comparison], path: Path) -> None:
    """Grouped bars of fw+bw relative to the baseline and of peak memory, a group for each problem.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    figure = new_figure(max(7.0, 2.0 * len(comparisons) + 2), 7.5)
    measured = [[each for each in comparison.measurements if each.times] for comparison in comparisons]
    variants = list(dict.fromkeys(each.label for group in measured for each in group))
    upper, lower = figure.subplots(2, 1, sharex=True)
    width = 0.8 / max(1, len(variants))
    for index, variant in enumerate(variants):
        shift = (index - (len(variants) - 1) / 2) * width
        here = [
            (place + shift, each) for place, group in enumerate(measured) for each in group if each.label == variant
        ]
        colour = f"C{index % 10}"
        upper.bar([x for x, _ in here], [each.ratios["both"] for _, each in here], width, label=variant, color=colour)
        known = [(x, each.peak_bytes / 1e6) for x, each in here if each.peak_bytes]
        lower.bar([x for x, _ in known], [megabytes for _, megabytes in known], width, color=colour)
    baselines = " or ".join(dict.fromkeys(each.baseline for each in comparisons))
    upper.axhline(1.0, color="0.4", linewidth=0.8, linestyle="--")
    upper.set_ylabel(f"fw+bw, times {baselines}")
    lower.set_ylabel("peak extra MB")
    names = [f"{each.problem['name']}\n{each.problem['dtype']}" for each in comparisons]
    lower.set_xticks(range(len(comparisons)), names, fontsize="small")
    figure.legend(ncols=4, fontsize="small", loc="outside upper center", frameon=False)
    save_figure(figure, path)


def new_figure(width: float, height: float) -> Any:
    """An empty figure of so many inches.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError("a plot needs matplotlib: pip install 'cdas_fast[plot]'") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure as PNG, whole or not at all."""
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=150))


class Output:
    """The folder that a report is written to, again after every problem, so that an interrupted run leaves the rest."""

    def __init__(self, folder: Path, overwrite: bool = False) -> None:
        self.folder = folder
        make_output_folder(folder)
        existing = [name for name in (TABLE, RESULTS, PLOT) if (folder / name).exists()]
        if existing and not overwrite:
            remedy = "Choose another folder or pass --overwrite."
            got = f"one that holds {', '.join(existing)}"
            raise InvalidInputError(expected_got(str(folder), "a folder without an earlier report", got, remedy))

    def write(self, report: Report) -> str:
        """Write table, JSON and, if matplotlib is there, the plot; say what was written."""
        write_text(self.folder / TABLE, report.table())
        write_json(self.folder / RESULTS, report.as_json())
        (self.folder / PLOT).unlink(missing_ok=True)  # one of an earlier report
        try:
            report.plot(self.folder / PLOT)
        except MissingDependencyError as error:
            return f"Written to {self.folder}: {TABLE}, {RESULTS}. No plot: {error}"
        return f"Written to {self.folder}: {TABLE}, {RESULTS}, {PLOT}"


def shown(output: Output | None) -> Callable[[Report], None]:
    """What prints a report as it grows, and writes it to `output`."""

    def show(report: Report) -> None:
        if not report.comparisons:
            print(report.header(), flush=True)
            return
        print(f"\n{report.comparisons[-1].table()}", flush=True)
        if output is not None:
            output.write(report)

    return show
