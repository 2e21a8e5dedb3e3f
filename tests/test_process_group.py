"""Several processes with shares of the rows: the same vector, and no hang when one comes to grief."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_tokenizer
from tiny_runs import PAIRS, tiny_config

import cdas_fast
from cdas_fast.distributed.process_group import ProcessGroup, share_of_rows
from cdas_fast.distributed.processes import Processes
from cdas_fast.errors import InvalidInputError

WORKER = Path(__file__).with_name("data_parallel_worker.py")
TIMEOUT = 60.0  # seconds, of a group; and nothing here may take much longer


def group_of(count: int, given: dict[str, Any]) -> list[subprocess.CompletedProcess[str]]:
    """Run the worker in `count` processes and wait for all of them."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    paths = [str(WORKER.parents[1]), str(WORKER.parent)]
    running = []
    for rank in range(count):
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(count),
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, str(WORKER), json.dumps({"timeout": TIMEOUT, "load": {}, **given})]
        running.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    ended = []
    for process in running:
        out, errors = process.communicate(timeout=TIMEOUT + 60)
        ended.append(subprocess.CompletedProcess(process.args, process.returncode, out, errors))
    return ended


def results_of(ended: list[subprocess.CompletedProcess[str]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Direction and losses, which have to be the same bits in all processes."""
    for process in ended:
        assert process.returncode == 0, process.stderr[-3000:]
    direction, losses = json.loads(ended[0].stdout.splitlines()[-1])
    for process in ended[1:]:
        assert json.loads(process.stdout.splitlines()[-1]) == [direction, losses]
    return torch.tensor(direction), torch.tensor(losses)


def alone(model: Path, load: dict[str, Any], **settings: Any) -> cdas_fast.TrainingResult:
    loaded, tokenizer = cdas_fast.load_model(model, tiny_tokenizer(), dtype="float32", device="cpu", **load)
    return cdas_fast.train(loaded, tokenizer, PAIRS, tiny_config(**settings), progress=False)


def agrees(found: tuple[torch.Tensor, torch.Tensor], expected: cdas_fast.TrainingResult) -> None:
    direction, losses = found
    wanted = torch.tensor([record.loss for record in expected.history])
    torch.testing.assert_close(losses, wanted, rtol=1e-5, atol=0)
    assert torch.nn.functional.cosine_similarity(direction, expected.vector.direction).min() > 0.99999


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_shares_of_rows_are_disjoint_whole_and_balanced(count: int) -> None:
    chance = random.Random(count)
    lengths = [chance.randrange(1, 60) for _ in range(29)]
    shares = [share_of_rows(lengths, Processes(rank, count)) for rank in range(count)]
    assert sorted(place for share in shares for place in share) == list(range(29))
    loads = [sum(lengths[place] for place in share) for share in shares]
    assert max(loads) - min(loads) <= max(lengths)
    assert share_of_rows([3], Processes(1, 2)) == []


@pytest.mark.parametrize(
    ("count", "load"),
    [(2, {}), (2, {"load_in_4bit": True, "resident_layers": 1}), (4, {"resident_layers": 5})],
    ids=["2", "2_4bit_streamed", "4_piecemeal"],
)
def test_a_group_finds_the_vector_of_one_process(
    count: int, load: dict[str, Any], model_folder: Path, tmp_path: Path
) -> None:
    if "load_in_4bit" in load:
        pytest.importorskip("bitsandbytes")
        load = {**load, "packed_dir": str(tmp_path / "packed")}
    given = {"model": str(model_folder), "load": load, "output": str(tmp_path / "out")}
    found = results_of(group_of(count, given))
    agrees(found, alone(model_folder, load))
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"steering_vector.safetensors", "config.json", "training_log.jsonl", "report.html"} <= names
    assert not any(name.startswith(".") for name in names)
    lines = (tmp_path / "out" / "training_log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 1 + len(found[1])))


def test_a_run_of_two_goes_on_with_one_and_with_three(model_folder: Path, tmp_path: Path) -> None:
    settings = {"epochs": 4, "checkpoint_every": 1}
    given = {"model": str(model_folder), "output": str(tmp_path / "out"), "settings": settings}
    group_of(2, {**given, "kill": {"0": 3, "1": 3}})
    group_of(3, {**given, "resume": True, "kill": {"0": 6, "1": 6, "2": 6}})
    loaded, tokenizer = cdas_fast.load_model(model_folder, tiny_tokenizer(), dtype="float32", device="cpu")
    result = cdas_fast.train(
        loaded, tokenizer, PAIRS, tiny_config(**settings), output_dir=tmp_path / "out", resume=True, progress=False
    )
    losses = torch.tensor([record.loss for record in result.history])
    agrees((result.vector.direction, losses), alone(model_folder, {}, **settings))


def test_other_settings_are_told_apart(model_folder: Path, tmp_path: Path) -> None:
    given = {
        "model": str(model_folder),
        "output": str(tmp_path / "out"),
        "settings_of": {"1": {"learning_rate": 0.5}},
    }
    for process in group_of(2, given):
        assert process.returncode == 8
        assert "run: process 1: expected" in process.stderr
        assert "take the same settings" in process.stderr


def test_a_used_folder_is_refused_by_all(model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("mine")
    ended = group_of(2, {"model": str(model_folder), "output": str(tmp_path / "out")})
    assert [process.returncode for process in ended] == [2, 8]
    assert all("precious.txt" in process.stderr for process in ended)


def test_who_does_not_come_is_waited_for_no_longer_than_said(model_folder: Path, tmp_path: Path) -> None:
    code = (
        "import sys, time\n"
        "from cdas_fast.distributed.process_group import ProcessGroup\n"
        "from cdas_fast.distributed.processes import Processes\n"
        "from cdas_fast.errors import ProcessGroupError\n"
        "try:\n"
        "    with ProcessGroup.join(Processes(0, 2), 3.0): pass\n"
        "except ProcessGroupError as error: sys.exit(str(error))\n"
    )
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "PYTHONPATH": str(WORKER.parents[1])}
    started = time.monotonic()
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert time.monotonic() - started < 60
    assert ended.returncode == 1
    assert "process 0 of 2: joining the group" in ended.stderr


def test_a_group_needs_a_meeting_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(InvalidInputError, match="torchrun"), ProcessGroup.join(Processes(0, 2)):
        pass
