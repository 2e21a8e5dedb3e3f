"""The benchmarks: what they time and in which order, what they print and write, how they fail; not how fast it is."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from head_cases import Operations
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cdas_fast.benchmark import bench_interchange, bench_loss, intervention, loss, loss_variants, memory, report, runner
from cdas_fast.benchmark.loss import Shape, make_inputs, truth
from cdas_fast.benchmark.loss_variants import CHUNKED, DIVERGENCES, Gemms, LossVariant, Task, build, chunk_losses
from cdas_fast.benchmark.memory import PeakUnknownError, peak_in_child, peak_on_cpu
from cdas_fast.benchmark.report import Measurement, Output
from cdas_fast.benchmark.runner import import_problem
from cdas_fast.benchmark.timing import Distribution, fastest, interleave, median_ratio
from cdas_fast.cli import build_parser, main
from cdas_fast.errors import InvalidInputError, StorageError
from cdas_fast.ops import cpu_library, interchange, linear_jsd, linear_kl

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
TINY = Shape("tiny", 6, 8, 37)
OURS = ["reference", *["cpp"] * cpu_library.available()]
LOSS = ["bench", "loss", "--shape", "6x8x37", "--repeats", "2", "--threads", "1", "--device", "cpu"]
INTERCHANGE = ["bench", "interchange", "--shape", "2x3x16", "--repeats", "2", "--threads", "1", "--device", "cpu"]
LINUX = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux to count a peak")


@pytest.fixture
def no_children(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process for each variant would take seconds."""
    monkeypatch.setattr(runner, "peak_in_child", lambda subject, settings: 12_345_678)


def by_name(comparison: report.Comparison) -> dict[str, Measurement]:
    return {each.name: each for each in comparison.measurements}


# Timing


def test_percentiles_are_interpolated() -> None:
    found = Distribution.of([each / 1e3 for each in (11, 1, 3, 2, 5, 4, 7, 6, 9, 8, 10)])
    assert (found.p20, found.p50, found.p80, found.minimum) == pytest.approx((3, 6, 9, 1))
    assert found.samples[:2] == pytest.approx((11, 1)), "in the order of the rounds"
    two = Distribution.of([0.0, 0.01])
    assert (two.p20, two.p50, two.p80) == pytest.approx((2, 5, 8))


def test_every_round_runs_every_call_and_none_always_follows_the_same_other() -> None:
    order: list[tuple[int, str]] = []
    calls: dict[str, Callable[[int], object]] = {
        name: partial(lambda name, number: order.append((number, name)), name) for name in "abc"
    }
    ticks = iter(range(100))

    def timer(call: Callable[[], object]) -> float:
        call()
        return float(next(ticks))

    after: list[None] = []
    seconds = interleave(calls, 4, timer, lambda: after.append(None))
    rounds = [[name for number, name in order[3 * i : 3 * i + 3] if number == i] for i in range(4)]
    assert rounds == [["a", "b", "c"], ["a", "c", "b"], ["c", "a", "b"], ["c", "b", "a"]]
    assert seconds == {"a": [0, 3, 7, 11], "b": [1, 5, 8, 10], "c": [2, 4, 6, 9]}
    assert len(after) == 12


def test_short_calls_fill_their_turns() -> None:
    clock, seen = [0.0], {"short": list[int](), "long": list[int]()}

    def run(name: str, number: int) -> None:
        seen[name].append(number)
        clock[0] += {"short": 0.25, "long": 3.0}[name]

    def timer(call: Callable[[], object]) -> float:
        before = clock[0]
        call()
        return clock[0] - before

    seconds = interleave({name: partial(run, name) for name in seen}, 2, timer, fill=1.0)
    assert seconds == {"short": [0.25, 0.25], "long": [3.0, 3.0]}
    assert seen == {"short": [0, *range(8)], "long": [0, 0, 1]}


def test_fastest_is_by_minimum_and_does_not_count_the_first_call() -> None:
    costs = {"slow": iter([0.0, 3.0, 2.0]), "fast": iter([9.0, 5.0, 1.0])}
    spent = [0.0]
    calls: dict[str, Callable[[int], object]] = {
        name: partial(lambda name, number: spent.append(next(costs[name])), name) for name in costs
    }

    def timer(call: Callable[[], object]) -> float:
        call()
        return spent[-1]

    assert fastest(calls, timer) == "fast"


def test_ratios_are_taken_within_a_round() -> None:
    assert median_ratio([1, 10, 3], [1, 2, 10]) == 1


def test_backward_is_the_difference_within_a_round() -> None:
    seconds = {"forward": [1.0, 2.0, 4.0], "both": [3.0, 3.0, 8.0]}
    baseline = {"forward": [1.0, 1.0, 1.0], "both": [2.0, 3.0, 2.0]}
    found = Measurement.timed(seconds, baseline, {"forward": 4e9, "both": 6e9}, name="a", label="A")
    assert found.times["backward"].samples == (2000, 1000, 4000)
    assert found.ratios == {"forward": 2, "both": 1.5}
    assert found.rates == {"forward": 2.0, "both": 2.0}, "1e9 a second at the median"


def test_threads_are_set_and_set_back(no_children: None) -> None:
    seen: list[int] = []
    settings: dict[str, Any] = {"dtypes": ["float32"], "device": "cpu", "variants": [], "repeats": 1}
    bench_loss([TINY], **settings, threads=2, watch=lambda report: seen.append(torch.get_num_threads()))
    assert seen == [2, 2]
    assert torch.get_num_threads() == 1, "what the tests run with"


# The variants


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("name", [*OURS, "eager", "chunked", pytest.param("liger", marks=pytest.mark.slow)])
def test_every_variant_computes_the_same(name: str, divergence: str, softcap: float | None) -> None:
    task = Task(7, 8, 37, torch.float32, divergence, softcap)
    if (reason := loss_variants.missing(name, task, CPU)) is not None:
        pytest.skip(reason)
    if name == "liger" and shutil.which("g++") is None:
        pytest.skip("needs a C++ compiler for torch.compile")
    assert_right(name, task, chunk_rows=3)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler for torch.compile")
def test_the_compiled_variant_computes_the_same() -> None:
    assert_right("compile", Task(7, 8, 37, torch.float32, "jsd", 3.0), chunk_rows=3)


def assert_right(name: str, task: Task, chunk_rows: int) -> None:
    """On all rows and on some of them; the rows that are not asked for do not matter."""
    inputs = make_inputs(task, CPU, 1)[0]
    variant = build(name, task, CPU, chunk_rows)
    assert isinstance(variant, LossVariant)
    for rows in (torch.arange(task.rows), torch.tensor([0, 5])):
        wanted, wanted_gradient = truth(task, inputs, rows)
        value, gradient = variant.of_rows(inputs, None if len(rows) == task.rows else rows)
        torch.testing.assert_close(value.double(), wanted, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(gradient[rows].double(), wanted_gradient, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(variant.both(inputs), variant.of_rows(inputs, None)[1])
    everything = truth(task, inputs, torch.arange(task.rows))[0]
    forward = variant.forward(inputs)
    torch.testing.assert_close(forward.double(), everything, rtol=1e-4, atol=1e-7)
    assert not forward.requires_grad


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_truth_is_that_of_the_ops_in_float64(divergence: str, softcap: float | None) -> None:
    task = Task(5, 8, loss._BLOCK + 7, torch.float32, divergence, softcap)  # two blocks of the vocabulary
    inputs = make_inputs(task, CPU, 1)[0]
    hidden = inputs.hidden.double().requires_grad_()
    tensors = hidden, inputs.target.double(), inputs.weight.double()
    options: dict[str, Any] = {"logit_softcap": softcap, "impl": "reference", "reduction": "none"}
    if divergence == "jsd":
        losses = linear_jsd(*tensors, **options)
    else:
        losses = linear_kl(*tensors, direction="forward" if divergence == "forward_kl" else "reverse", **options)
    rows = torch.tensor([1, 4])
    wanted = losses[rows].mean()
    (wanted_gradient,) = torch.autograd.grad(wanted, hidden)
    value, gradient = truth(task, inputs, rows)
    torch.testing.assert_close(value, wanted.detach())
    torch.testing.assert_close(gradient, wanted_gradient[rows])


class Products(TorchDispatchMode):
    """The dtypes of the matrix products run."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: list[torch.dtype] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket is torch.ops.aten.mm:
            self.dtypes.append(args[0].dtype)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_logits_of_chunks_are_in_the_dtype_of_the_inputs(dtype: torch.dtype) -> None:
    inputs = make_inputs(Task(6, 8, 37, dtype), CPU, 1)[0]
    with Products() as products:
        value, gradient = chunk_losses(inputs.hidden, inputs.target, inputs.weight, "jsd", None, True)
    assert products.dtypes == [dtype, dtype], "one product for both sides, and one back"
    assert gradient is not None
    assert (value.dtype, gradient.dtype) == (torch.float32, dtype)


def test_the_floor_is_three_products_and_no_more() -> None:
    task = Task(6, 8, 37, torch.float32)
    inputs = make_inputs(task, CPU, 1)[0]
    floor = Gemms(task, 6, CPU)
    with Operations() as operations:
        floor.forward(inputs)
    assert operations.names.count("aten.mm") == 2
    assert not floor.gradient.any()
    with Operations() as operations:
        floor.both(inputs)
    assert operations.names.count("aten.mm") == 3
    assert set(operations.names) <= {"aten.mm", "aten.slice", "aten.t", "aten.permute"}
    assert operations.peak == 0, "it allocates nothing"
    gradient = (inputs.hidden @ inputs.weight.T) @ inputs.weight
    torch.testing.assert_close(floor.gradient, gradient)
    ragged = Gemms(task, 4, CPU)
    ragged.both(inputs)
    torch.testing.assert_close(ragged.gradient, gradient)


def test_inputs_are_alike_and_lie_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    task = Task(6, 64, 4000, torch.bfloat16)
    inputs = make_inputs(task, CPU, 3)
    for name in ("hidden", "target", "weight"):
        tensors: list[Tensor] = [getattr(each, name) for each in inputs]
        assert len({each.data_ptr() for each in tensors}) == 3
        assert torch.equal(tensors[0], tensors[2])
    assert all(each.trained.data_ptr() == each.hidden.data_ptr() for each in inputs)
    logits = inputs[0].hidden.float() @ inputs[0].weight.float().T
    assert 3.5 < logits.std() < 5
    assert 0.005 < truth(task, inputs[0], torch.arange(6))[0] < 0.03
    held = 3 * (4000 * 64 + 2 * 6 * 64) * 2
    assert loss.input_bytes(task) == held
    monkeypatch.setattr(loss, "_CACHE_BYTES", 1000)
    assert len({each.weight.data_ptr() for each in make_inputs(task, CPU, 3)}) == 1
    assert loss.input_bytes(task) == held - 2 * 4000 * 64 * 2


def test_rounds_rotate_the_inputs() -> None:
    assert [runner.rotating(lambda each: each * 10, [1, 2, 3])(number) for number in range(5)] == [10, 20, 30, 10, 20]


def test_interchange_variants_compute_the_same() -> None:
    shape = intervention.Shape("tiny", 3, 5, 16)
    inputs = intervention.make_inputs(shape, torch.float64, CPU, 1)[0]
    w = inputs.direction
    torch.testing.assert_close(w.norm(), torch.tensor(1.0, dtype=torch.float64))
    wanted = interchange(inputs.hidden, inputs.source, w[None], impl="reference")
    found = {name: intervention.build(name) for name in ["eager", *OURS]}
    gradients = {name: variant.both(inputs) for name, variant in found.items()}
    for name, variant in found.items():
        torch.testing.assert_close(variant.forward(inputs), wanted)
        assert [each.shape for each in gradients[name]] == [inputs.hidden.shape, w.shape]
        torch.testing.assert_close(gradients[name], gradients["eager"])
    assert not torch.allclose(gradients["eager"][0], inputs.grad_out)


# Memory


@LINUX
def test_peak_is_what_a_call_adds() -> None:
    def call() -> None:
        kept = torch.ones(2**24), torch.ones(2**23)
        del kept

    def larger() -> None:
        torch.ones(2**25)

    peak_on_cpu(larger)  # an earlier peak must not count
    assert peak_on_cpu(call) == pytest.approx(2**26 + 2**25, rel=0.05)
    assert peak_on_cpu(lambda: None) < 2**21


def test_peak_is_unknown_where_the_system_does_not_tell_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "_PROC", tmp_path / "nowhere")
    with pytest.raises(PeakUnknownError, match="cannot be set back"):
        peak_on_cpu(lambda: None)
    with pytest.raises(PeakUnknownError, match="only Linux"):
        peak_in_child("loss", {})


@LINUX
def test_a_child_measures_whole_logits_and_says_why_it_fails() -> None:
    task = {"rows": 64, "width": 8, "vocabulary": 32768, "dtype": "float32"}
    settings = {"task": task, "variant": "eager", "chunk_rows": None, "threads": 1}
    logits = 64 * 32768 * 4
    assert 6 * logits < peak_in_child("loss", settings) < 10 * logits
    with pytest.raises(PeakUnknownError, match=r"failed with code 1: .*no-such"):
        peak_in_child("loss", {**settings, "task": {**task, "dtype": "no-such"}})


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="needs Linux to know the free memory")
def test_free_memory_is_less_than_the_machines() -> None:
    import psutil

    free = memory.free_bytes(CPU)
    assert free is not None
    assert 0 < free <= psutil.virtual_memory().total


def test_what_does_not_fit_is_left_out(no_children: None, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = Shape("wide", 256, 8, 4000)  # logits of all rows take 4.1 MB, everything else 0.4 MB
    settings: dict[str, Any] = {"dtypes": ["float32"], "device": "cpu", "repeats": 1}
    monkeypatch.setattr(loss, "free_bytes", lambda device: 30 * 10**6)
    results = by_name(bench_loss([shape], variants=["eager", "chunked"], **settings).comparisons[0])
    assert results["eager"].reason == "needs about 0.0455 GB of memory, 0.03 GB are free"
    assert not results["eager"].times
    assert results["chunked"].reason is None
    assert results["chunked"].chunk_rows in (128, 64, 32, 16), "256 rows do not fit"
    monkeypatch.setattr(loss, "free_bytes", lambda device: 10**6)
    (comparison,) = bench_loss([shape], variants=["eager", "chunked"], **settings).comparisons
    assert comparison.is_empty
    assert all("0.001 GB are free" in str(each.reason) for each in comparison.measurements)


# Runs


def test_loss_through_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the child processes, of which there is one for each variant but the floor."""
    output = tmp_path / "out"
    assert main([*LOSS, "--variants", OURS[-1], "--dtype", "float32", "--output", str(output)]) == 0
    out, error = capsys.readouterr()
    assert "%|" not in error, "no progress bar where there is no terminal"
    written = (output / "table.txt").read_text()
    assert "".join(written.split()) == "".join(out.partition("\nWritten to")[0].split())
    for part in ("processor:", "threads: 1 of", "torch:", "cpu kernels:", "three GEMMs", f"cdas_fast {OURS[-1]}"):
        assert part in written, part
    assert ("plot.png" in out) == (output / "plot.png").exists() == (importlib.util.find_spec("matplotlib") is not None)
    found = json.loads((output / "results.json").read_text())
    assert set(found) == {"version", "benchmark", "machine", "settings", "definitions", "comparisons"}
    assert (found["benchmark"], found["version"]) == ("loss", 1)
    assert found["settings"] == {"device": "cpu", "divergence": "jsd", "repeats": 2}
    (comparison,) = found["comparisons"]
    problem = {"name": "6x8x37", "rows": 6, "width": 8, "vocabulary": 37, "logit_softcap": None}
    assert comparison["problem"] == problem | {"dtype": "float32", "divergence": "jsd"}
    assert [each["name"] for each in comparison["measurements"]] == ["gemms", OURS[-1]]
    for each in comparison["measurements"]:
        assert each["reason"] is None
        assert set(each["times"]) == {"forward", "backward", "both"}
        for times in each["times"].values():
            assert set(times) == {"p20", "p50", "p80", "minimum", "samples"}
            assert len(times["samples"]) == 2
        assert set(each["ratios"]) == set(each["rates"]) == {"forward", "both"}
    floor, ours = comparison["measurements"]
    assert floor["ratios"] == {"forward": 1, "both": 1}
    assert floor["chunk_rows"] in range(1, 7)
    assert floor["value_error"] is floor["peak_bytes"] is None
    assert ours["value_error"] < 1e-4
    assert ours["gradient_error"] < 1e-4
    if Path("/proc/self/clear_refs").exists():
        assert ours["peak_bytes"] is not None or ours["peak_unknown"]


@pytest.mark.usefixtures("no_children")
def test_every_problem_has_its_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*LOSS, "--shape", "6x8x37", "5x8x29", "--rows", "4", "--divergence", "reverse_kl"]
    assert main([*arguments, "--variants", "eager", "chunked", "--output", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    titles = [line for line in out.splitlines() if "N = " in line]
    assert titles == [
        f"{name}x8x{v}: N = 4, D = 8, V = {v}, {dtype}, reverse_kl"
        for name, v in ((6, 37), (5, 29))
        for dtype in ("bfloat16", "float32")
    ]
    found = json.loads((tmp_path / "results.json").read_text())
    assert len(found["comparisons"]) == 4
    for comparison in found["comparisons"]:
        assert all(each["peak_bytes"] == 12_345_678 for each in comparison["measurements"][1:])
        tolerance = 1e-4 if comparison["problem"]["dtype"] == "float32" else 0.2
        assert all(each["value_error"] < tolerance for each in comparison["measurements"][1:])
    assert out.count("12.3") == 8


@pytest.mark.usefixtures("no_children")
def test_interchange_through_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*INTERCHANGE, "--dtype", "float32", "bfloat16", "--output", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "2x3x16: B = 2, T = 3, D = 16, bfloat16" in out
    assert "x eager" in out
    found = json.loads((tmp_path / "results.json").read_text())
    assert (found["benchmark"], len(found["comparisons"])) == ("interchange", 2)
    for comparison, tolerance in zip(found["comparisons"], (1e-6, 1e-2), strict=True):
        names = [each["name"] for each in comparison["measurements"] if each["reason"] is None]
        assert names == ["eager", *reversed(OURS)]
        for each in comparison["measurements"]:
            if each["reason"] is None:
                assert 0 < each["value_error"] < tolerance
                assert 0 < each["gradient_error"] < 5 * tolerance
    eager = found["comparisons"][0]["measurements"][0]
    assert eager["rates"]["both"] == pytest.approx(5 * 2 * 3 * 16 * 4 / eager["times"]["both"]["p50"] / 1e6)


@pytest.mark.usefixtures("no_children")
def test_gflops_are_by_the_stated_count() -> None:
    """A timer by which every call takes a millisecond."""

    def timer(call: Callable[[], object]) -> float:
        call()
        return 1e-3

    found = bench_loss([TINY], dtypes=["float32"], device="cpu", variants=["eager"], repeats=3, timer=timer)
    eager = by_name(found.comparisons[0])["eager"]
    assert eager.rates == {"forward": 4 * 6 * 8 * 37 / 1e6, "both": 6 * 6 * 8 * 37 / 1e6}
    assert eager.ratios == {"forward": 1, "both": 1}
    assert (eager.times["both"].p50, eager.times["backward"].p50) == (1, 0)


@pytest.mark.usefixtures("no_children")
@pytest.mark.parametrize("best", [16, 4, 1])
def test_rows_at_a_time_are_those_that_are_fastest(best: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under a timer that finds `best` fast, by what is built for it."""
    sizes: list[int] = []

    class Recorded:
        def __init__(self, rows: int) -> None:
            self.rows = rows

        def forward(self, inputs: Any) -> None:
            sizes.append(self.rows)

        both = forward

    def build_recorded(name: str, task: Task, device: torch.device, chunk_rows: int | None) -> Any:
        return Recorded(chunk_rows or 0) if name in CHUNKED else build(name, task, device, chunk_rows)

    def timer(call: Callable[[], object]) -> float:
        call()
        return 1.0 if sizes[-1] == best else 2.0

    monkeypatch.setattr(loss, "build", build_recorded)
    found = bench_loss(
        [Shape("tiny", 16, 8, 37)], dtypes=["float32"], device="cpu", variants=["chunked"], repeats=1, timer=timer
    )
    assert [each.chunk_rows for each in found.comparisons[0].measurements] == [best, best]
    assert set(sizes) == {16, 8, 4, 2, 1}


@pytest.mark.usefixtures("no_children")
def test_a_rival_fails_for_itself_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(task: Task) -> Any:
        raise RuntimeError("no luck\nand more")

    monkeypatch.setattr(loss_variants, "_eager", fail)
    found = bench_loss([TINY], dtypes=["float32"], device="cpu", variants=["eager", "chunked"], repeats=1)
    results = by_name(found.comparisons[0])
    assert results["eager"].reason == "failed: RuntimeError: no luck"
    assert results["chunked"].times
    monkeypatch.setattr(loss_variants, "_ours", lambda name, task: fail(task))
    with pytest.raises(RuntimeError, match="no luck"):
        bench_loss([TINY], dtypes=["float32"], device="cpu", variants=["reference"], repeats=1)


@pytest.mark.usefixtures("no_children")
def test_what_is_not_installed_is_a_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    assert main([*LOSS, "--variants", "liger", "liger-triton", "triton", "reference", "--dtype", "float32"]) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert "Liger: not installed: pip install liger-kernel" in lines
    assert "Liger Triton: runs on a GPU alone" in lines
    assert "cdas_fast triton: runs on a GPU alone" in lines
    assert loss_variants.missing("liger", Task(1, 1, 1, torch.float32, logit_softcap=3.0), CPU) == "knows no softcap"
    monkeypatch.setattr(cpu_library, "available", lambda: False)
    assert main([*LOSS, "--variants", "cpp", "reference", "--dtype", "float32"]) == 0
    assert "cdas_fast cpp: the C++ kernels were not built" in capsys.readouterr().out


def test_a_package_that_is_there_but_broken_is_told_from_one_that_is_not(tmp_path: Path) -> None:
    (tmp_path / "broken_rival.py").write_text("import no_such_dependency")
    sys.path.insert(0, str(tmp_path))
    try:
        assert import_problem("broken_rival", "fix") == "cannot be imported: No module named 'no_such_dependency'"
    finally:
        sys.path.remove(str(tmp_path))
    assert import_problem("no_such_rival", "get it") == "not installed: get it"


def test_rivals_and_matplotlib_are_imported_when_needed() -> None:
    code = "import sys, cdas_fast.cli, cdas_fast.benchmark\n"
    code += "print(sorted(set(sys.modules) & {'triton', 'liger_kernel', 'matplotlib', 'transformers'}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# Output


@pytest.mark.usefixtures("no_children")
def test_an_earlier_report_is_kept_unless_told_otherwise(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "results.json").write_text("mine")
    (tmp_path / "plot.png").write_text("mine")
    command = [*LOSS, "--variants", "eager", "--dtype", "float32", "--output", str(tmp_path)]
    with monkeypatch.context() as patched:
        patched.setattr(loss, "bench_loss", lambda *_, **__: pytest.fail("measured before it refused"))
        assert main(command) == 2
    assert "got one that holds results.json, plot.png. Choose another folder" in capsys.readouterr().err
    assert (tmp_path / "results.json").read_text() == "mine"
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main([*command, "--overwrite"]) == 0
    assert json.loads((tmp_path / "results.json").read_text())["benchmark"] == "loss"
    assert not (tmp_path / "plot.png").exists(), "one of another run"
    assert "No plot: a plot needs matplotlib: pip install 'cdas_fast[plot]'" in capsys.readouterr().out


@pytest.mark.usefixtures("no_children")
def test_the_plot_has_a_bar_for_each_measured_variant(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = bench_loss(
        [TINY, Shape("other", 4, 8, 29)],
        dtypes=["float32"],
        device="cpu",
        variants=["eager", "liger-triton"],
        repeats=1,
    )
    assert Output(tmp_path / "new").write(found).endswith("plot.png")
    assert (tmp_path / "new" / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("no_children")
def test_unknown_peaks_are_said_to_be_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(subject: str, settings: Any) -> int:
        raise PeakUnknownError("only Linux tells")

    monkeypatch.setattr(runner, "peak_in_child", unknown)
    found = bench_loss([TINY], dtypes=["float32"], device="cpu", variants=["eager"], repeats=1)
    eager = by_name(found.comparisons[0])["eager"]
    assert (eager.peak_bytes, eager.peak_unknown) == (None, "only Linux tells")
    assert " n/a " in found.table()
    assert "eager: peak n/a: only Linux tells" in found.table()


@pytest.mark.usefixtures("no_children")
def test_a_rival_that_gives_nan_is_shown_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_variants, "_eager", lambda task: lambda hidden, *_: (hidden * float("nan")).sum())
    found = bench_loss([TINY], dtypes=["float32"], device="cpu", variants=["eager"], repeats=1)
    assert found.table().count(" nan") == 2
    Output(tmp_path).write(found)
    (comparison,) = json.loads((tmp_path / "results.json").read_text())["comparisons"]
    assert comparison["measurements"][1]["value_error"] == "nan"


@pytest.mark.usefixtures("no_children")
def test_an_interrupted_run_leaves_what_it_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, runs = loss._Bench.run, []

    def interrupted(self: Any) -> Any:
        runs.append(self)
        if len(runs) == 2:
            raise KeyboardInterrupt
        return run(self)

    monkeypatch.setattr(loss._Bench, "run", interrupted)
    assert main([*LOSS, "--variants", "eager", "--output", str(tmp_path)]) == 130
    assert len(json.loads((tmp_path / "results.json").read_text())["comparisons"]) == 1


@pytest.mark.parametrize(
    ("command", "code", "message"),
    [
        ([*LOSS, "--shape", "huge"], 2, "shape: expected smollm2, wide-2304, llama-3.1-8b, gemma-2-2b"),
        ([*LOSS, "--shape", "3x0x5"], 2, "or ROWSxWIDTHxVOCABULARY, got '3x0x5'"),
        ([*LOSS, "--rows", "0"], 2, "--rows: expected a whole number of at least 1, got 0"),
        ([*LOSS, "--dtype", "int8"], 2, "dtype: expected one of bfloat16, float32, float16, got 'int8'"),
        ([*LOSS, "--divergence", "tv"], 2, "divergence: expected one of jsd, forward_kl, reverse_kl, got 'tv'"),
        ([*LOSS, "--variants", "fast"], 2, "variant: expected one of gemms, cpp, triton, reference, eager"),
        ([*LOSS, "--repeats", "0"], 2, "repeats: expected a whole number of at least 1, got 0"),
        ([*LOSS, "--threads", "0"], 2, "threads: expected a whole number of at least 1, got 0"),
        ([*LOSS, "--device", "tpu"], 2, "device: expected cpu, cuda or cuda:N, got 'tpu'"),
        ([*LOSS, "--device", "meta"], 2, "device: expected cpu, cuda or cuda:N, got 'meta'"),
        ([*LOSS, "--variants", "triton"], 1, "nothing was measured; the table says why"),
        ([*INTERCHANGE, "--shape", "3x5"], 2, "shape: expected BATCHxPOSITIONSxWIDTH, got '3x5'"),
        ([*INTERCHANGE, "--variants", "liger"], 2, "variant: expected one of eager, cpp, triton, reference"),
    ],
    ids=lambda value: " ".join(value[-2:]) if isinstance(value, list) else "",
)
@pytest.mark.usefixtures("no_children")
def test_mistakes_are_one_line(command: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command) == code
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("cdas-fast: error:")]
    assert len(lines) == 1
    assert message in lines[0]
    assert "Traceback" not in error


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    named = {"loss": [*loss.SHAPES, *loss_variants.LABELS], "interchange": [*intervention.SHAPES, *intervention.LABELS]}
    for subject, names in named.items():
        with pytest.raises(SystemExit) as ended:
            build_parser().parse_args(["bench", subject, "--help"])
        assert ended.value.code == 0
        out = " ".join(capsys.readouterr().out.split())
        assert all(part in out for part in ("examples:", *names))


# benchmarks/gpu.py


@pytest.fixture(scope="module")
def gpu() -> Any:
    """The script, which is not part of the package."""
    spec = importlib.util.spec_from_file_location("benchmarks_gpu", ROOT / "benchmarks" / "gpu.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def few_cases(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "HEADS", {name: gpu.HEADS[name] for name in ("one row", "ragged")})
    monkeypatch.setattr(gpu, "DTYPES", (torch.float32, torch.bfloat16))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_runs(gpu: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([]) == 1
    assert "torch finds no GPU" in capsys.readouterr().err


@pytest.mark.usefixtures("few_cases")
@pytest.mark.parametrize("impl", OURS)
def test_checks_pass_what_is_right(gpu: Any, impl: str) -> None:
    checks = gpu.run_checks(CPU, impl)
    assert [check.name for check in checks if not check.passed] == []
    names = {check.name for check in checks}
    assert len(names) == len(checks) == 2 * 4 * 2 * 2 * 2 + 2 * 3 * 2 * 2 * 4 + 2 * (3 * (2 + 2 * 3) + 2 * 2)
    ops = ("interchange", "clamp", "rms_norm", "gated_activation", "rotary_embedding")
    for part in ("jsd", "forward_kl", "reverse_kl", "logprob", *ops, "bfloat16", "all options"):
        assert any(part in name for name in names), part


def changed(function: Callable[..., Any], change: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    def wrong(*tensors: Tensor, **options: Any) -> Any:
        result = function(*tensors, **options)
        return tuple(map(change, result)) if isinstance(result, tuple) else change(result)

    return wrong


def off_by_a_hundredth(function: Callable[..., Any]) -> Callable[..., Any]:
    return changed(function, lambda result: result + result.detach() / 100)  # the gradient is right


class Bent(torch.autograd.Function):
    """The identity, with a gradient that is not."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 1.05


def with_a_bent_gradient(function: Callable[..., Any]) -> Callable[..., Any]:
    return changed(function, Bent.apply)


@pytest.mark.usefixtures("few_cases")
@pytest.mark.parametrize("wrong", [off_by_a_hundredth, with_a_bent_gradient])
@pytest.mark.parametrize(
    "op",
    [
        *("linear_jsd", "linear_kl", "linear_logprob", "interchange", "clamp"),
        *("rms_norm", "gated_activation", "rotary_embedding"),
    ],
)
def test_checks_fail_what_is_wrong(
    op: str, wrong: Any, gpu: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, op, wrong(getattr(gpu, op)))
    failed = [check.name for check in gpu.run_checks(CPU, "reference") if not check.passed]
    error = capsys.readouterr().err
    assert failed
    assert all(f"WRONG {name}: error " in error for name in failed)
    part = {"linear_jsd": "jsd", "linear_kl": "_kl", "linear_logprob": "logprob"}.get(op, op)
    kind = "grad" if wrong is with_a_bent_gradient else "loss" if op.startswith("linear") else "result"
    assert all(part in name and kind in name.split(": ")[-1] for name in failed)
    if kind == "loss":
        assert any("bfloat16" in name for name in failed), "losses are held to float32 whatever the inputs"


def test_nan_is_wrong(gpu: Any) -> None:
    nan, one = torch.tensor([float("nan")]), torch.tensor([1.0])
    assert not gpu.compare("nan", nan, one, one.double()).passed
    assert gpu.compare("one", one, one, one.double()).passed


@pytest.fixture
def pretended(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU that passes for a GPU, and benchmarks of tiny shapes."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB (test)")

    def tiny_loss(shapes: Any, *, device: Any, repeats: int, watch: Any) -> Any:
        assert [shape.name for shape in shapes] == [*loss.SHAPES]
        return bench_loss([TINY], dtypes=["float32"], device="cpu", variants=["eager"], repeats=repeats, watch=watch)

    def tiny_interchange(*, device: Any, repeats: int, watch: Any) -> Any:
        shape = intervention.Shape("tiny", 2, 3, 16)
        return bench_interchange(
            [shape], dtypes=["float32"], device="cpu", variants=["reference"], repeats=repeats, watch=watch
        )

    monkeypatch.setattr(gpu, "bench_loss", tiny_loss)
    monkeypatch.setattr(gpu, "bench_interchange", tiny_interchange)


@pytest.mark.usefixtures("no_children", "pretended")
def test_right_kernels_are_timed_and_written(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "run_checks", lambda device, impl: [gpu.Check("a", 0.0, 0.0, 0.0)])
    arguments = ["--output", str(tmp_path), "--repeats", "2"]
    assert gpu.main(arguments) == 0
    assert "1 of 1 results are right" in capsys.readouterr().out
    found = json.loads((tmp_path / "nvidia-h100-80gb-test.json").read_text())
    assert set(found) == {"device", "checks", "loss", "interchange"}
    assert found["loss"]["benchmark"] == "loss"
    text = (tmp_path / "nvidia-h100-80gb-test.txt").read_text()
    assert "tiny: N = 6" in text
    assert "tiny: B = 2" in text
    assert gpu.main(arguments) == 2
    assert "expected no earlier result, got one. Pass --overwrite." in capsys.readouterr().err
    assert gpu.main([*arguments, "--overwrite"]) == 0


@pytest.mark.usefixtures("pretended")
@pytest.mark.parametrize(
    ("device", "message"), [("cpu", "expected cuda or cuda:N, got 'cpu'"), ("cuda:3", "expected one of 1 GPUs")]
)
def test_another_device_is_refused(device: str, message: str, gpu: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--device", device]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.usefixtures("pretended")
def test_wrong_kernels_are_not_timed(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checks = [gpu.Check("a", 0.0, 0.0, 0.0), gpu.Check("b", 1.0, 0.0, 0.0)]
    monkeypatch.setattr(gpu, "run_checks", lambda device, impl: checks)
    assert gpu.main(["--output", str(tmp_path)]) == 1
    out, error = capsys.readouterr()
    assert "1 of 2 results are right" in out
    assert "their speed is not measured" in error
    assert "p50" not in out
    assert not any(tmp_path.iterdir())


def test_shapes_are_those_that_the_documentation_names() -> None:
    sizes = {name: (each.rows, each.width, each.vocabulary, each.logit_softcap) for name, each in loss.SHAPES.items()}
    assert sizes == {
        "smollm2": (512, 576, 49152, None),
        "wide-2304": (256, 2304, 128256, None),
        "llama-3.1-8b": (256, 4096, 128256, None),
        "gemma-2-2b": (256, 2304, 256000, 30.0),
        "llama-3.1-70b": (64, 8192, 128256, None),
    }
    assert loss.parse_shape("3x4x5") == Shape("3x4x5", 3, 4, 5)
    with pytest.raises(InvalidInputError):
        loss.parse_shape("3x4")


def test_a_folder_that_cannot_be_made_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"output folder: expected .* to be a folder"):
        Output(tmp_path / "file" / "report")
