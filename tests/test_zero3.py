"""ZeRO-3 on processes of a CPU: the same results as by one of them, and no more of the weights than their share."""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_model, tiny_tokenizer
from tiny_runs import PAIRS, tiny_config
from zero3_worker import finish, free_port, launch, result_of, start, started, train_on

import cdas_fast
from cdas_fast.cli import main
from cdas_fast.distributed.process_group import ProcessGroup
from cdas_fast.distributed.processes import Processes
from cdas_fast.errors import InvalidInputError, MissingDependencyError

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed: pip install 'cdas_fast[deepspeed]'"
)
BEYOND = 3  # layers of the tiny model beyond the intervened one

RUNS: dict[str, dict[str, Any]] = {
    "4 bits": {},
    "plain": {"load_in_4bit": False},
    "padded": {"packing": "padded"},
    "layers run twice": {"recompute": True, "micro_batch_tokens": 60},
    "plain, padded, layers run twice": {"load_in_4bit": False, "packing": "padded", "recompute": True},
    "two layers": {"layer": (1, 3), "rank": 2},
    "small micro-batches": {"micro_batch_tokens": 30},
    "two concepts": {"concepts": 2, "batch_size": 1, "epochs": 1},
    "two concepts, one after another": {"concepts": 2, "batch_size": 1, "epochs": 1, "concepts_together": 1},
    "held-out pairs": {"held_out": True, "pairs": 3, "epochs": 2},
    "bfloat16": {"dtype": torch.bfloat16, "epochs": 1},
    "fewer rows than processes": {"directions": "positive", "batch_size": 1, "pairs": 2},
}


FOUR = ("4 bits", "small micro-batches", "fewer rows than processes")  # what four processes run
WIDE: dict[str, Any] = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 9}
KINDS = [{"load_in_4bit": four, "packing": packing} for four in (True, False) for packing in ("packed", "padded")]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder for packed copies."""
    return str(tmp_path_factory.mktemp("packed"))


@pytest.fixture(scope="module")
def alone(model_folder: Path, packed: str) -> dict[str, dict[str, Any]]:
    """All runs in this process, which holds the whole model."""
    return {name: train_on(None, str(model_folder), packed, **settings) for name, settings in RUNS.items()}


@pytest.fixture(scope="module")
def two(model_folder: Path, packed: str, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes finds: all runs, and what else is asked of two. To start them is what takes time."""
    folder = tmp_path_factory.mktemp("two")
    tiny_model(**WIDE).save_pretrained(folder / "wide")
    tiny_tokenizer().save_pretrained(folder / "wide")
    common = {"folder": str(model_folder), "packed": packed}
    jobs = {name: ("trained", {**common, "output": str(folder / name), **RUNS[name]}) for name in RUNS}
    keeping = {"load_in_4bit": False, "epochs": 1, "keeping": True}
    jobs["keeping"] = ("trained", {**common, "output": str(folder / "keeping"), **keeping})
    jobs["peak"] = ("peak", {"folder": str(folder / "wide")})
    jobs |= {str(kind): ("taken_apart", {**common, **kind}) for kind in KINDS}
    results = launch(folder / "results", 2, [*jobs.values()])
    return [dict(zip(jobs, each, strict=True)) for each in results]


@pytest.fixture(scope="module")
def four(model_folder: Path, packed: str, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of four processes finds."""
    folder = tmp_path_factory.mktemp("four")
    common = {"folder": str(model_folder), "packed": packed}
    jobs = [("trained", {**common, "output": str(folder / name), **RUNS[name]}) for name in FOUR]
    return [dict(zip(FOUR, each, strict=True)) for each in launch(folder / "results", 4, jobs)]


@needs_deepspeed
@pytest.mark.parametrize("name", RUNS)
def test_two_processes_train_as_one(name: str, alone: dict[str, dict[str, Any]], two: list[dict[str, Any]]) -> None:
    for found in two:
        _assert_same_run(found[name], alone[name], tolerance=0.05 if name == "bfloat16" else 1e-5)
        _assert_let_go(found[name])


@needs_deepspeed
@pytest.mark.parametrize("name", FOUR)
def test_four_processes_train_as_one(name: str, alone: dict[str, dict[str, Any]], four: list[dict[str, Any]]) -> None:
    for found in four:
        _assert_same_run(found[name], alone[name])
        _assert_let_go(found[name])


def _assert_same_run(found: dict[str, Any], expected: dict[str, Any], tolerance: float = 1e-5) -> None:
    for given, right in zip(found["losses"], expected["losses"], strict=True):
        assert [value is None for value in given] == [value is None for value in right]
        for one, other in zip(given, right, strict=True):
            assert other is None or one == pytest.approx(other, rel=tolerance)
    assert torch.cosine_similarity(found["direction"], expected["direction"], dim=-1).min() > 1 - tolerance


def _assert_let_go(found: dict[str, Any]) -> None:
    assert found["live"]
    assert max(found["live"]) <= 2
    assert not any(found["left"])
    assert set(found["gathered"]) == {0}


@needs_deepspeed
def test_each_process_keeps_its_share(
    alone: dict[str, dict[str, Any]], two: list[dict[str, Any]], four: list[dict[str, Any]]
) -> None:
    (whole,) = {*alone["4 bits"]["bytes"]}
    for processes in (two, four):
        for found in processes:
            assert max(found["4 bits"]["bytes"]) <= (1 / len(processes) + 0.05) * whole


@needs_deepspeed
def test_linear_maps_that_keep_their_weights_are_seen(two: list[dict[str, Any]]) -> None:
    for found in two:
        assert max(found["keeping"]["live"]) == BEYOND
        with pytest.raises(AssertionError):
            _assert_let_go(found["keeping"])


@needs_deepspeed
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_inside_and_afterwards(kind: dict[str, Any], two: list[dict[str, Any]]) -> None:
    for found in (each[str(kind)] for each in two):
        assert found["dtypes"] == {torch.bfloat16}, "DeepSpeed converts the values of any other"
        assert found["trainable"] == []
        assert found["bytes"].kept == pytest.approx(found["bytes"].whole / 2, abs=8)
        assert found["bytes"].gathered == 0
        assert found["error"].startswith("weights of layer 2: expected to be gathered, got 0 of ")
        assert found["same bytes"] == [True] * BEYOND
        assert found["same results"] == found["same head"] == (True, True)
        assert found["same names"]
        assert found["left behind"] == set()


@needs_deepspeed
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux to measure peak memory")
def test_dividing_takes_a_layer_beside_the_shares(two: list[dict[str, Any]]) -> None:
    for found in (each["peak"] for each in two):
        assert found["bytes"].whole > 8 * found["layer"] > 8 * 8 * 2**20
        assert found["peak"] < found["bytes"].kept + 2 * found["layer"]


@needs_deepspeed
@pytest.mark.parametrize("load_in_4bit", [True, False], ids=["4_bits", "plain"])
def test_the_embedded_model(load_in_4bit: bool, embedded: Any, packed: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"folder": "smollm2-135m", "packed": packed, "layer": 15, "epochs": 1, "pairs": 4}
    settings["load_in_4bit"] = load_in_4bit
    expected = train_on(None, **settings)
    for (found,) in launch(tmp_path / "results", 2, [("trained", {**settings, "output": str(tmp_path / "out")})]):
        assert len(found["losses"]) == 2
        _assert_same_run(found, expected)
        _assert_let_go(found)
        assert max(found["bytes"]) <= 0.55 * max(expected["bytes"]), "the head is the embedding, and is divided too"


@needs_deepspeed
def test_a_process_that_ends_is_no_hang_and_the_run_goes_on(
    model_folder: Path, packed: str, alone: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    arguments = {"folder": str(model_folder), "packed": packed, "output": str(tmp_path / "out"), "checkpoint_every": 1}
    processes = started(tmp_path / "results", 2, [("deserted", arguments)])
    written = [finish(process, 120.0) for process in processes]
    assert processes[1].returncode == 9
    assert processes[0].returncode == 0, written[0]
    (message,) = result_of(tmp_path / "results", 0)
    assert message.startswith("process 0 of 2: ")
    assert message.endswith("start all of them again with --resume.")
    for count in (2, 4):  # the second finds that nothing is left to do
        jobs = [("train_on", {**arguments, "resume": True})]
        for (found,) in launch(tmp_path / f"resumed by {count}", count, jobs):
            assert len(found["losses"]) == (4 if count == 2 else 0)
            expected = {**alone["4 bits"], "losses": alone["4 bits"]["losses"][2 if count == 2 else 6 :]}
            _assert_same_run(found, expected)


@needs_deepspeed
def test_processes_that_do_not_come_are_no_hang(model_folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "pairs.jsonl"
    PAIRS.to_file(data)
    arguments = ["--model", str(model_folder), "--data", str(data), "--layer", "1", "--output", str(tmp_path / "out")]
    command = ["-m", "cdas_fast.cli", "train", *arguments, "--deepspeed", "--timeout", "2"]
    began = time.monotonic()
    process = start(0, 2, free_port(), command)
    written = finish(process, 120.0)
    assert process.returncode == 8, written
    assert "process 0 of 2: joining the group: another process has ended, or did not answer within 2 seconds" in written
    assert time.monotonic() - began < 100


def test_without_deepspeed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], model_folder: Path
) -> None:
    own: Any = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "deepspeed" else own(name, *rest)
    )
    with pytest.raises(MissingDependencyError, match=r"cdas_fast\[deepspeed\]"):
        cdas_fast.train(tiny_model(), tiny_tokenizer(), PAIRS, tiny_config(), deepspeed=True)
    PAIRS.to_file(tmp_path / "pairs.jsonl")
    arguments = ["--model", str(model_folder), "--data", str(tmp_path / "pairs.jsonl"), "--layer", "1"]
    assert main(["train", *arguments, "--output", str(tmp_path / "out"), "--deepspeed"]) == 3
    assert "pip install 'cdas_fast[deepspeed]'" in capsys.readouterr().err


@needs_deepspeed
def test_what_cannot_be_divided_is_refused(tmp_path: Path) -> None:
    model, tokenizer, config = tiny_model(), tiny_tokenizer(), tiny_config()
    with pytest.raises(InvalidInputError, match="group: expected processes"):
        cdas_fast.train(model, tokenizer, PAIRS, config, deepspeed=True, output_dir=tmp_path)
    group = ProcessGroup(Processes())
    with pytest.raises(InvalidInputError, match="resident_layers: expected none, with deepspeed"):
        cdas_fast.train(
            model, tokenizer, PAIRS, config, deepspeed=True, group=group, output_dir=tmp_path, resident_layers=2
        )
    with pytest.raises(InvalidInputError, match="one whose layers are read when they are needed"):
        cdas_fast.train(model, tokenizer, PAIRS, config, deepspeed=True, group=group, output_dir=tmp_path, resume=True)
