"""SIGKILL at random moments of caching and training, of one process or all: resumed, runs end in the same vectors."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_layer_order import RECORDS

from cdas_fast import ContrastivePairs, SteeringVector

SCRIPT = Path(__file__).with_name("killed_runs.py")
KILLS = {1: 10, 2: 10}  # by processes
LEAST_COSINE = 0.99999

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform == "win32", reason="forks")]


@pytest.fixture(scope="module", params=KILLS, ids=["one process", "two processes"])
def series(
    request: pytest.FixtureRequest, model_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, int, list[dict[str, Any]]]:
    """The folder of the runs, how many processes each has, and what became of each attempt."""
    count = request.param
    folder = tmp_path_factory.mktemp("killed")
    ContrastivePairs.from_any(RECORDS).to_file(folder / "pairs.jsonl")
    command = [sys.executable, str(SCRIPT), str(model_folder), str(folder), str(count), str(KILLS[count]), "0"]
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[1]), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-5000:]
    return folder, count, [json.loads(line) for line in done.stdout.splitlines()]


def vectors(folder: Path) -> list[SteeringVector]:
    return [SteeringVector.from_pretrained(folder / f"concept_{number}") for number in (0, 1)]


def test_as_many_were_killed_in_caching_and_in_training(series: Any) -> None:
    _, count, attempts = series
    killed = [attempt for attempt in attempts if attempt["killed"]]
    assert len(killed) == KILLS[count]
    in_training = [any("step" in moments for moments in attempt["moments"].values()) for attempt in killed]
    assert 2 <= sum(in_training) <= len(killed) - 2
    assert count == 1 or {len(attempt["killed"]) for attempt in killed} == {1, 2}


def test_runs_end_in_the_same_vectors(series: Any) -> None:
    folder, count, attempts = series
    expected = vectors(folder / "whole")
    for name in {attempt["folder"] for attempt in attempts}:
        found = vectors(folder / name)
        if count == 1:
            assert found == expected, "not a bit differs"
        for one, other in zip(found, expected, strict=True):
            assert torch.nn.functional.cosine_similarity(one.direction, other.direction).min() > LEAST_COSINE
        assert {path.name for path in (folder / name).iterdir()} == {"concept_0", "concept_1"}


def test_nothing_that_was_done_is_done_again(series: Any) -> None:
    _, _, attempts = series
    for before, after in itertools.pairwise(attempts):
        assert not any("alone" in moments for moments in after["moments"].values())
        if after["folder"] != before["folder"]:
            continue
        assert before["killed"], "or nothing would have been resumed"
        for rank, moments in before["moments"].items():
            reached = [int(moment.removeprefix("layer ")) for moment in moments if moment.startswith("layer")]
            layers = [int(each.removeprefix("layer ")) for each in after["moments"][rank] if each.startswith("layer")]
            if "step" in moments:
                assert layers == [], "all activations were stored"
            elif reached and layers:
                assert min(layers) >= max(reached), "the layers before were written down"


def test_the_others_end_soon_and_say_why(series: Any) -> None:
    _, count, attempts = series
    left = 0
    for attempt in attempts:
        assert attempt["seconds"] < 100, "the time-out of the group is 120"
        for rank, code in attempt["exits"].items():
            if not attempt["killed"]:
                assert code == 0
            if code == 0:
                continue  # nobody else was needed any more
            left += 1
            assert code == 8
            (error,) = [each for each in attempt["moments"][rank] if each.startswith("error")]
            assert error.startswith(f"error process {rank} of 2: ")
            assert "another process has ended" in error
            assert "--resume" in error
    assert left >= 2 * (count - 1)
