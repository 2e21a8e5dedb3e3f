"""`bench train`: that its variants do the same step, what the floor multiplies, what is reported; not how fast."""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from head_cases import Operations
from tiny_models import tiny_model, tiny_tokenizer
from tiny_runs import PAIRS, tiny_config
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import cdas_fast
from cdas_fast.benchmark import bench_train, runner, timing, training
from cdas_fast.benchmark.memory import PeakUnknownError, peak_in_child
from cdas_fast.benchmark.plain_training import PlainTraining
from cdas_fast.benchmark.training import Engine, Problem, Task
from cdas_fast.benchmark.training_floor import Floor, StepSize, fastest_floor
from cdas_fast.benchmark.training_parts import ATTENTION, DATA, HEAD, INTERCHANGE, MLP, OTHER, PARTS, Stopwatch, part_of
from cdas_fast.benchmark.training_report import Caching, Estimate, TrainingComparison, TrainingReport
from cdas_fast.cli import build_parser, main
from cdas_fast.data.prompts import PromptFormat
from cdas_fast.data.rows import TokenRows, tokenize_pairs
from cdas_fast.errors import UnsupportedError
from cdas_fast.models.structure import Decoder, frozen, inspect_decoder
from cdas_fast.storage import write_json
from cdas_fast.training.directions import random_direction

CPU = torch.device("cpu")
LINUX = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux to count a peak")
GOLDEN = {"refusal_L15": "refusal_train", "axbench_L20": "axbench_contrast"}


@pytest.fixture
def no_children(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process for each variant would take seconds."""
    monkeypatch.setattr(runner, "peak_in_child", lambda subject, settings: 12_345_678)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny pairs as a file, behind which another concept follows."""
    other = [replace(pair, concept_id=1, concept="ships") for pair in PAIRS]
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    cdas_fast.ContrastivePairs([*(replace(pair, concept_id=0) for pair in PAIRS), *other]).to_file(path)
    return path


@pytest.fixture
def command(model_folder: Path, data: Path) -> list[str]:
    """A run of a second or two."""
    return [
        *("bench", "train", "--model", str(model_folder), "--data", str(data), "--layer", "1", "--batch-size", "2"),
        *("--max-output-tokens", "12", "--repeats", "2", "--threads", "1", "--device", "cpu", "--dtype", "float32"),
    ]


def run(model_folder: Path, data: Path, **changes: Any) -> TrainingComparison:
    """The only comparison of a small run."""
    settings: dict[str, Any] = {"layer": 1, "batch_size": 2, "max_output_tokens": 12, "repeats": 2, "device": "cpu"}
    report = bench_train(str(model_folder), data=data, dtypes=["float32"], **{**settings, **changes})
    (comparison,) = report.comparisons
    assert isinstance(comparison, TrainingComparison)
    return comparison


def tiny_problem(architecture: str = "llama") -> tuple[Decoder, TokenRows]:
    decoder = inspect_decoder(tiny_model(architecture))
    decoder.model.requires_grad_(False)
    return decoder, tokenize_pairs(PAIRS, PromptFormat(tiny_tokenizer()), max_output_tokens=12)


# The published scheme


@pytest.mark.parametrize("reduction", ["token", "sequence"])
@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_the_published_scheme_and_ours_do_the_same_steps(architecture: str, reduction: Any) -> None:
    """Two epochs of two full batches and one of a single pair, in which sequences differ in length."""
    decoder, rows = tiny_problem(architecture)
    config = tiny_config(epochs=2, reduction=reduction, shuffle=False)
    initial = random_direction(1, decoder.hidden_size, 3)
    plain = PlainTraining(decoder, rows, config, initial)
    engine = Engine(decoder, rows, config, initial)
    assert len({len(row.base.ids) for row in rows.rows}) > 2
    for number in range(6):
        theirs, ours = plain.step(number), engine.step(number)
        assert theirs.loss == pytest.approx(ours.loss, rel=2e-4)
        assert theirs.minibatch_losses == pytest.approx(ours.minibatch_losses, rel=2e-4)
        assert len(theirs.minibatch_losses) == 2
        torch.testing.assert_close(theirs.gradient, ours.gradient, rtol=1e-2, atol=1e-3 * float(ours.gradient.norm()))
    torch.testing.assert_close(plain.direction.detach(), engine.training.direction[0], rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(plain.direction.norm(), torch.tensor(1.0))
    assert torch.cosine_similarity(plain.direction.detach(), initial[0], dim=0) < 0.999, "it has moved"
    assert engine.training.optimizer.param_groups[0]["lr"] != config.learning_rate
    assert plain.optimizer.param_groups[0]["lr"] == engine.training.optimizer.param_groups[0]["lr"]


def test_steps_go_through_the_batches_again_and_again() -> None:
    decoder, rows = tiny_problem()
    config = tiny_config(epochs=1, shuffle=False, reduction="token", learning_rate=0.0)
    initial = random_direction(1, decoder.hidden_size, 0)
    for kind in (PlainTraining, Engine):
        steps = kind(decoder, rows, config, initial)
        losses = [steps.step(number).loss for number in range(4)]
        assert losses[3] == pytest.approx(losses[0], rel=1e-4)
        assert len({round(loss, 6) for loss in losses}) == 3


class Passes:
    """What a model is called with, and the shapes of the logits it gives."""

    def __init__(self, model: Any) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self.graphs: list[bool] = []
        model.register_forward_hook(self._note)

    def _note(self, module: nn.Module, args: Any, output: Any) -> None:
        self.shapes.append(tuple(output.logits.shape))
        self.graphs.append(output.logits.requires_grad)


def test_the_published_scheme_makes_three_whole_passes_a_minibatch() -> None:
    decoder, rows = tiny_problem()
    plain = PlainTraining(decoder, rows, tiny_config(shuffle=False), random_direction(1, decoder.hidden_size, 0))
    passes = Passes(decoder.model)
    plain.step(0)
    assert passes.graphs == [False, False, True] * 2
    for first in (0, 2):
        minibatch = rows.rows[first : first + 2]
        source, base = (max(len(getattr(row, side).ids) for row in minibatch) for side in ("source", "base"))
        wanted = [(2, source, 320), (2, source, 320), (2, base, 320)]
        assert passes.shapes[3 * first // 2 :][:3] == wanted


def test_the_published_scheme_leaves_the_prefix_and_the_pads_alone() -> None:
    decoder, rows = tiny_problem()
    plain = PlainTraining(decoder, rows, tiny_config(), random_direction(1, decoder.hidden_size, 0))
    minibatch = rows.rows[:4]
    tokens = plain.tokens(minibatch)
    for slot, row in enumerate(minibatch):
        beyond = len(row.base.ids) - rows.prefix_length
        assert tokens.intervened[slot].tolist() == [
            rows.prefix_length <= place < rows.prefix_length + beyond for place in range(tokens.base_ids.shape[1])
        ]
    hidden, source = torch.randn(4, tokens.base_ids.shape[1], decoder.hidden_size), torch.randn(4, decoder.hidden_size)
    changed = plain.intervene(hidden, source, tokens.intervened)
    same = (changed == hidden).all(-1)
    assert torch.equal(same, ~tokens.intervened)
    w = plain.direction
    torch.testing.assert_close((changed @ w)[tokens.intervened], (source @ w)[:, None].expand(-1, same.shape[1])[~same])


def test_the_published_scheme_is_of_one_layer_and_direction() -> None:
    decoder, rows = tiny_problem()
    for changes in ({"rank": 2}, {"layer": [1, 2]}, {"directions": "positive"}):
        with pytest.raises(UnsupportedError, match="one layer, rank 1, both directions"):
            PlainTraining(decoder, rows, tiny_config(**changes), random_direction(1, decoder.hidden_size, 0))


@pytest.mark.slow
@pytest.mark.parametrize("name", GOLDEN)
def test_the_published_scheme_reproduces_the_published_values(
    name: str, shared: Path, embedded: tuple[Any, Any]
) -> None:
    """Losses and gradients of the first two steps; the second also tells the optimiser."""
    from safetensors.torch import load_file

    settings = json.loads((shared / "golden" / f"{name}.json").read_text())
    golden = load_file(shared / "golden" / f"{name}.safetensors")
    pairs = cdas_fast.ContrastivePairs.from_file(shared / "data" / f"{GOLDEN[name]}.parquet")
    pairs = pairs.select(concept_ids=[0], max_examples=settings["examples"])
    length = settings["max_output_tokens"]
    rows = tokenize_pairs(pairs, PromptFormat(embedded[1]), max_output_tokens=length)
    config = cdas_fast.TrainingConfig(
        layer=settings["layer"],
        epochs=settings["epochs"],
        batch_size=settings["batch_size"],
        learning_rate=settings["lr"],
        max_output_tokens=length,
        reduction="token",
        shuffle=False,
    )
    with frozen(embedded[0]):
        plain = PlainTraining(inspect_decoder(embedded[0]), rows, config, golden["w0"])
        for number in range(2):
            found = plain.step(number)
            wanted = golden["minibatch_losses"][2 * number : 2 * number + 2]
            torch.testing.assert_close(torch.tensor(found.minibatch_losses), wanted, rtol=1e-4, atol=0)
            gradient = golden["step_grads"][number]
            assert torch.cosine_similarity(found.gradient, gradient, dim=0) > 0.9999
            torch.testing.assert_close(found.gradient.norm(), gradient.norm(), rtol=1e-3, atol=0)


# The floor


class Multiplications(TorchDispatchMode):
    """Multiply-adds of the matrix products run."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket is torch.ops.aten.mm:
            self.count += args[0].shape[0] * args[0].shape[1] * args[1].shape[1]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("architecture", ["llama", "phi3"])
@pytest.mark.parametrize("chunk_rows", [None, 5])
def test_the_floor_multiplies_what_its_formula_says(architecture: str, chunk_rows: int | None) -> None:
    decoder = inspect_decoder(tiny_model(architecture))
    sizes = [StepSize(30, 12), StepSize(17, 13)]
    floor = Floor(decoder, 1, sizes, chunk_rows)
    width, inner, key_values = 32, 48, 16  # of tiny_models.SIZES
    layer = 2 * width * width + 2 * width * key_values + 3 * width * inner
    for number, size in enumerate([*sizes, sizes[0]]):
        with Multiplications() as multiplications:
            floor.step(number)
        wanted = 2 * size.tokens * 3 * layer + 3 * size.responses * width * 320
        assert multiplications.count == floor.multiply_adds(size) == wanted
    with Operations() as operations:
        floor.step(0)
    assert set(operations.names) <= {"aten.mm", "aten.slice", "aten.t", "aten.permute"}
    assert operations.peak == 0, "it allocates nothing"
    last = Floor(decoder, 4, sizes)
    assert last.multiply_adds(sizes[0]) == 3 * 12 * width * 320, "nothing is left but the head"


@pytest.mark.parametrize("best", [32, 8, 2])
def test_the_head_is_multiplied_in_as_many_rows_as_is_fastest(best: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr(Floor, "head_products", lambda self, responses: seen.append(self.chunk_rows))

    def timer(call: Callable[[], object]) -> float:
        call()
        return 1.0 if seen[-1] == best else 2.0

    floor = fastest_floor(inspect_decoder(tiny_model()), 1, [StepSize(40, 32)], timer)
    assert floor.chunk_rows == best
    assert set(seen) == {32, 8, 2}


def test_a_step_counts_tokens_beyond_the_prefix(model_folder: Path, data: Path) -> None:
    task = Task(str(model_folder), str(data), "float32", 1, 2, 12, None, 3, "token")
    problem = Problem(task, task.pairs(), CPU)
    assert len(problem.rows.rows) == 2 * len(PAIRS), "of the first concept"
    assert len(problem.sizes) == 3
    assert problem.sizes[2] == StepSize(
        sum(len(row.base.ids) - problem.rows.prefix_length for row in problem.rows.rows[8:]),
        sum(row.base.response_length for row in problem.rows.rows[8:]),
    )
    assert sum(size.responses for size in problem.sizes) == problem.rows.response_tokens


# Parts


def test_the_clock_runs_for_one_part_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every switch of the clock comes a second after the last one."""
    ticks = iter(range(100))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(ticks)))
    watch = Stopwatch(CPU)
    watch.start()
    tensor = torch.ones(3, requires_grad=True)
    inner = watch.cross(tensor * 2, OTHER, MLP)  # other 1
    outer = watch.cross(inner * 3, MLP, OTHER)  # MLP 1
    (outer * 5).sum().backward()  # other 1, then back through MLP 1
    watch.enter(OTHER)  # other 1
    assert tensor.grad is not None
    assert tensor.grad.tolist() == [30, 30, 30]
    assert watch.seconds == {**dict.fromkeys(PARTS, 0.0), OTHER: 3.0, MLP: 2.0}


def parts_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], Any, Decoder]:
    """The parts that a step enters, in order and without repetition."""
    decoder, rows = tiny_problem()
    config = tiny_config(shuffle=False, reduction="token")
    task = Task("", None, "float32", 1, 2, 12, None, 3, "token")
    variant = (PlainTraining if name == "plain" else Engine)(decoder, rows, config, random_direction(1, 32, 0))
    seen: list[str] = []
    enter = Stopwatch.enter

    def recorded(self: Stopwatch, part: str) -> None:
        enter(self, part)
        if not seen or seen[-1] != part:
            seen.append(part)

    monkeypatch.setattr(Stopwatch, "enter", recorded)
    problem: Any = object.__new__(Problem)
    problem.task, problem.decoder = task, decoder
    before = variant.step(0).loss
    found = training._parts(variant, problem, 1)
    assert set(found) == set(PARTS)
    assert all(seconds > 0 for seconds in found.values())
    assert variant.step(0).loss != before, "the direction has gone on"
    return seen, variant, decoder


def test_parts_of_the_published_scheme(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, plain, decoder = parts_seen("plain", monkeypatch)
    layer, suffix = [ATTENTION, OTHER, MLP, OTHER], [ATTENTION, OTHER, MLP, OTHER] * 3
    whole = layer * 5
    minibatch = [DATA, OTHER, *whole, HEAD, OTHER, *whole, HEAD, OTHER]  # source and target
    minibatch += [*layer * 2, INTERCHANGE, OTHER, *suffix, HEAD]
    minibatch += [OTHER, *[MLP, OTHER, ATTENTION, OTHER] * 3, INTERCHANGE, OTHER]  # back
    assert seen == minibatch * 2
    assert not any(name in vars(plain) for name in ("tokens", "intervene"))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in decoder.model.modules())


def test_parts_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, engine, decoder = parts_seen("engine", monkeypatch)
    assert [part for part in seen if part not in (ATTENTION, MLP, OTHER)] == [
        DATA,
        INTERCHANGE,
        HEAD,
        INTERCHANGE,
        DATA,
    ]
    forward, back = (seen[: seen.index(HEAD)], seen[seen.index(HEAD) + 1 :])
    for half in (forward, back):
        assert half.count(ATTENTION) == half.count(MLP) == 3, "layers beyond the intervened one"
    assert "accumulate_gradient" not in vars(engine.objective)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in decoder.model.modules())


def test_parts_are_told_by_name() -> None:
    assert [part_of(name) for name in ("self_attn", "attention", "mlp", "block_sparse_moe")] == [ATTENTION] * 2 + [
        MLP
    ] * 2
    assert [part_of(name) for name in ("post_attention_layernorm", "pre_feedforward_layernorm", "x")] == [None] * 3


# Runs and reports


@LINUX
def test_the_command_with_its_child_processes(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--output", str(tmp_path / "out")]) == 0
    out, error = capsys.readouterr()
    assert "%|" not in error, "no progress bar where there is no terminal"
    written = (tmp_path / "out" / "table.txt").read_text()
    assert "".join(written.split()) == "".join(out.partition("\nWritten to")[0].split())
    for part in ("p20 s", "p50 s", "p80 s", "min s", "x bare GEMMs", "x published scheme", "tokens/s", "peak extra MB"):
        assert part in written, part
    assert ("plot.png" in out) == (importlib.util.find_spec("matplotlib") is not None)
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (found["benchmark"], found["version"], found["settings"]) == ("train", 1, {"device": "cpu", "repeats": 2})
    (comparison,) = found["comparisons"]
    assert [each["name"] for each in comparison["measurements"]] == ["plain", "engine", "floor"]
    for each in comparison["measurements"]:
        assert set(each["times"]) == {"step"}
        assert len(each["times"]["step"]["samples"]) == 2
        assert set(each["ratios"]) == {"floor", "plain"}
        assert (each["peak_bytes"] is None) == (each["name"] == "floor")
    assert comparison["agreement"]["loss_difference"] < 1e-4
    assert comparison["agreement"]["gradient_cosine"] > 0.9999
    assert comparison["caching"]["pairs"] == 5
    assert set(comparison["parts"]) == set(comparison["estimates"]) == {"plain", "engine"}
    assert comparison["problem"]["steps_per_epoch"] == 3
    assert len(comparison["problem"]["tokens_by_batch"]) == 3
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".pkl", ".pt", ".bin", ".pth")]


@LINUX
def test_a_child_that_fails_says_why(model_folder: Path, data: Path) -> None:
    task = vars(Task(str(model_folder), str(data), "float32", 9, 2, 12, None, 3, "token"))
    with pytest.raises(PeakUnknownError, match=r"failed with code 1: .*layer: expected an integer from 0 to 4"):
        peak_in_child("train", {"task": task, "variant": "plain", "threads": 1})


@pytest.mark.usefixtures("no_children")
def test_figures_follow_from_the_samples(model_folder: Path, data: Path) -> None:
    """By a timer whose calls take 8, 2 and 1 seconds, and twice that in the second round."""
    seconds = {PlainTraining: 8.0, Engine: 2.0, Floor: 1.0}
    calls: list[str] = []

    def timer(call: Any) -> float:
        variant = call.args[0].__self__ if hasattr(call, "args") and hasattr(call.args[0], "__self__") else None
        call()
        if variant is None or call.func is not timing._repeat:
            return 1.0
        calls.append(type(variant).__name__)
        return seconds[type(variant)] * (1 if len(calls) <= 3 else 2)

    found = run(model_folder, data, epochs=4, timer=timer)
    assert sorted(calls) == sorted(["PlainTraining", "Engine", "Floor"] * 2)
    plain, engine, floor = found.measurements
    assert plain.times["step"].samples == (8000, 16000)
    assert engine.times["step"].samples == (2000, 4000)
    assert (plain.ratios["floor"], engine.ratios["floor"], floor.ratios["floor"]) == (8, 2, 1)
    assert engine.ratios["plain"] == 0.25
    first, second = found.problem["tokens_by_batch"][:2]
    assert engine.rates["step"] == pytest.approx((first / 2 + second / 4) / 2)
    assert found.caching is not None
    assert found.estimates["plain"].run_seconds == 4 * 3 * 12
    assert found.estimates["engine"].run_seconds == pytest.approx(4 * 3 * 3 + found.caching.seconds)
    caching = found.caching.seconds * 72 / 5
    assert found.estimates["engine"].concepts_per_hour == pytest.approx(3600 / (4 * 36 * 3 + caching))
    assert found.estimates["plain"].concepts_per_hour == pytest.approx(3600 / (4 * 36 * 12))
    text = found.table()
    assert (
        "computed from the medians, not measured whole: 5 pairs, 4 epochs, 12 steps: published scheme 144.0 s" in text
    )
    assert "concepts an hour, computed likewise for 72 pairs each, batch 2, 4 epochs: published scheme 2.08" in text
    assert "agreement on the first batch at the initial direction" in text
    assert text.count("parts of a step of ") == 2


def test_an_estimate_is_caching_and_steps() -> None:
    found = Estimate.of(2.0, Caching(10.0, 0, 20), pairs=20, batch_size=8, epochs=3)
    assert found.run_seconds == 10 + 3 * 3 * 2
    assert found.concepts_per_hour == pytest.approx(3600 / (36 + 3 * 9 * 2))


@pytest.mark.usefixtures("no_children")
def test_variants_are_chosen_and_the_floor_always_runs(model_folder: Path, data: Path) -> None:
    found = run(model_folder, data, variants=["engine"], repeats=1, reduction="sequence", max_examples=3)
    assert [each.name for each in found.measurements] == ["engine", "floor"]
    assert found.agreement is None
    assert set(found.measurements[0].ratios) == {"floor"}
    assert found.problem["pairs"] == 3
    assert "sequence reduction" in found.title
    text = found.table()
    assert "a ratio of" not in text
    assert "agreement" not in text
    alone = run(model_folder, data, variants=["plain"], repeats=1)
    assert alone.caching is None
    assert "caching" not in alone.table()


@pytest.mark.usefixtures("no_children")
def test_what_does_not_fit_is_left_out(model_folder: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "free_bytes", lambda device: 10**5)
    found = run(model_folder, data, repeats=1)
    assert found.measurements[0].reason is not None
    assert "0.0001 GB are free" in found.measurements[0].reason
    assert not found.measurements[0].times
    assert found.measurements[1].times
    assert "published scheme: needs about" in found.table()


@pytest.mark.usefixtures("no_children")
def test_the_report_is_json_and_a_plot(model_folder: Path, data: Path, tmp_path: Path) -> None:
    watched: list[int] = []
    settings: dict[str, Any] = {"layer": 1, "batch_size": 2, "max_output_tokens": 12, "repeats": 1, "device": "cpu"}
    report = bench_train(
        str(model_folder),
        data=data,
        dtypes=["float32", "bfloat16"],
        watch=lambda report: watched.append(len(report.comparisons)),
        **settings,
    )
    assert watched == [0, 1, 2]
    assert isinstance(report, TrainingReport)
    assert [each.problem["dtype"] for each in report.comparisons] == ["float32", "bfloat16"]
    write_json(tmp_path / "results.json", report.as_json())
    assert json.loads((tmp_path / "results.json").read_text()) == report.as_json()
    assert str(data.parent) not in (tmp_path / "results.json").read_text(), "files by their names alone"
    pytest.importorskip("matplotlib")
    report.plot(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("no_children")
def test_the_pairs_of_the_demo_are_the_default(model_folder: Path) -> None:
    task = Task(str(model_folder), None, "float32", 1, 8, 12, 4, 1, "token")
    assert len(task.pairs()) == 4
    assert task.pairs()[0].concept == "the ocean, ships and the sea"


@pytest.mark.usefixtures("no_children")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--layer", "9"], "layer: expected an integer from 0 to 4 (this model's layers), got 9"),
        (["--batch-size", "0"], "batch_size: expected an integer of at least 1, got 0"),
        (["--epochs", "0"], "epochs: expected an integer of at least 1, got 0"),
        (["--max-examples", "0"], "max_examples: expected an integer of at least 1, got 0"),
        (["--max-output-tokens", "0"], "max_output_tokens: expected an integer of at least 1, got 0"),
        (["--repeats", "0"], "repeats: expected a whole number of at least 1, got 0"),
        (["--threads", "0"], "threads: expected a whole number of at least 1, got 0"),
        (["--dtype", "int8"], "dtype: expected one of bfloat16, float32, float16, got 'int8'"),
        (["--variants", "fast"], "variant: expected one of plain, engine, floor, got 'fast'"),
        (["--device", "tpu"], "device: expected cpu, cuda or cuda:N, got 'tpu'"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--model", "./nowhere"], "model ./nowhere: expected a folder with a config.json"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_one_line(
    changes: list[str], message: str, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, *changes]) == 2
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("cdas-fast: error:")]
    assert len(lines) == 1
    assert message in lines[0]
    assert "Traceback" not in error


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        build_parser().parse_args(["bench", "train", "--help"])
    assert ended.value.code == 0
    out = " ".join(capsys.readouterr().out.split())
    for part in ("examples:", "cdas-fast bench train", "plain", "engine", "floor", "smollm2-135m", "demo"):
        assert part in out, part
