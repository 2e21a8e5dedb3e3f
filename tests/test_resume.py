"""An interrupted run that is resumed ends in the same bits as one that was not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file
from tiny_runs import PAIRS, tiny_run

from cdas_fast import SteeringVector
from cdas_fast.errors import InvalidInputError, StorageError

STEPS = 9  # of a tiny run: 5 pairs, 2 a step, 3 epochs
SETTINGS: dict[str, Any] = {"checkpoint_every": 2, "rank": 2}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was left in peace."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    tiny_run(output_dir=folder, **SETTINGS)
    return folder


def assert_same_run(folder: Path, uninterrupted: Path) -> None:
    assert SteeringVector.from_pretrained(folder) == SteeringVector.from_pretrained(uninterrupted)
    logs = [[json.loads(line) for line in (place / "training_log.jsonl").open()] for place in (folder, uninterrupted)]
    for log in logs:
        for record in log:
            del record["seconds"]
    assert logs[0] == logs[1]
    assert [record["step"] for record in logs[0]] == list(range(1, STEPS + 1))
    assert (folder / "report.html").exists()


KILLED = """
import os, signal, sys
sys.path.insert(0, "tests")
from pathlib import Path
from tiny_runs import tiny_run
from cdas_fast.training import concept_run

place, folder = sys.argv[1], Path(sys.argv[2])

def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

if place == "caching":
    concept_run.build_cache = die
elif place == "artifact":
    concept_run.SteeringVector.save_pretrained = die
elif place == "half an artifact":
    import cdas_fast.steering.vector
    cdas_fast.steering.vector.write_json = die
tiny_run(output_dir=folder, checkpoint_every=2, rank=2,
         callback=lambda info: die() if place == str(info.record.step) else None)
"""


@pytest.mark.parametrize("place", ["caching", "1", "4", "7", "9", "artifact", "half an artifact"])
def test_sigkill_and_resume(place: str, uninterrupted: Path, tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, "-c", KILLED, place, str(tmp_path / "out")], cwd=root, capture_output=True, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert not (tmp_path / "out" / "config.json").exists()
    tiny_run(output_dir=tmp_path / "out", resume=True, **SETTINGS)
    assert_same_run(tmp_path / "out", uninterrupted)


def interrupted_run(folder: Path, step: int, **settings: Any) -> None:
    """Run up to and with `step`, then stop as an interrupt does."""

    def interrupt(info: Any) -> None:
        if info.record.step == step:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tiny_run(output_dir=folder, callback=interrupt, **{**SETTINGS, **settings})


def test_exception_keeps_the_last_step_and_resumes(uninterrupted: Path, tmp_path: Path) -> None:
    interrupted_run(tmp_path / "out", 5, checkpoint_every=1000)
    steps: list[int] = []
    tiny_run(
        output_dir=tmp_path / "out",
        resume=True,
        callback=lambda info: steps.append(info.record.step),
        **{**SETTINGS, "checkpoint_every": 1000},
    )
    assert steps == [6, 7, 8, 9]
    assert_same_run(tmp_path / "out", uninterrupted)


def test_run_over_several_concepts_resumes_at_the_one_it_had_reached(tmp_path: Path) -> None:
    records = [
        {**record, "concept_id": concept, "concept": f"the sea, {concept}"}
        for concept in (0, 1, 2)
        for record in PAIRS.to_records()
    ]
    whole = tiny_run(records, concepts_together=1, **SETTINGS)
    seen: list[int] = []

    def interrupt(info: Any) -> None:
        seen.append(info.record.step)
        if len(seen) == STEPS + 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tiny_run(records, output_dir=tmp_path / "out", callback=interrupt, concepts_together=1, **SETTINGS)
    seen.clear()
    resumed = tiny_run(
        records,
        output_dir=tmp_path / "out",
        resume=True,
        callback=lambda info: seen.append(info.record.step),
        concepts_together=1,
        **SETTINGS,
    )
    assert seen == [*range(5, STEPS + 1), *range(1, STEPS + 1)]
    for concept, result in whole.concepts.items():
        assert resumed.concepts[concept].vector == result.vector
        assert SteeringVector.from_pretrained(tmp_path / "out" / f"concept_{concept}") == result.vector


def test_torn_log_line_is_done_again(uninterrupted: Path, tmp_path: Path) -> None:
    interrupted_run(tmp_path / "out", 5)
    log = tmp_path / "out" / "training_log.jsonl"
    log.write_text(log.read_text() + '{"step": 6, "epo')
    tiny_run(output_dir=tmp_path / "out", resume=True, **SETTINGS)
    assert_same_run(tmp_path / "out", uninterrupted)


def test_scraps_of_a_killed_run_are_cleared_away(uninterrupted: Path, tmp_path: Path) -> None:
    interrupted_run(tmp_path / "out", 3)
    (tmp_path / "out" / ".config.json.xyz.partial").write_text("{")
    tiny_run(output_dir=tmp_path / "out", resume=True, **SETTINGS)
    assert_same_run(tmp_path / "out", uninterrupted)
    assert not [path.name for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]


def test_resuming_a_finished_run_changes_nothing(uninterrupted: Path) -> None:
    before = {path.name: path.read_bytes() for path in uninterrupted.iterdir()}
    result = tiny_run(output_dir=uninterrupted, resume=True, **SETTINGS)
    assert result.vector == SteeringVector.from_pretrained(uninterrupted)
    assert len(result.history) == STEPS
    assert {path.name: path.read_bytes() for path in uninterrupted.iterdir()} == before


def test_resume_in_an_empty_folder_starts(uninterrupted: Path, tmp_path: Path) -> None:
    tiny_run(output_dir=tmp_path / "out", resume=True, **SETTINGS)
    assert_same_run(tmp_path / "out", uninterrupted)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 0.5}, r"learning_rate 0\.04 -> 0\.5"),
        ({"rank": 1}, "rank 2 -> 1"),
        ({"pairs": PAIRS[:4]}, "data '"),
        ({"layer": 2}, "layer 1 -> 2"),
        ({"system_prompt": "Be brief."}, "system_prompt None -> 'Be brief.'"),
    ],
    ids=["learning rate", "rank", "data", "layer", "system prompt"],
)
def test_resuming_with_other_settings_is_refused(changes: dict[str, Any], message: str, uninterrupted: Path) -> None:
    before = {path.name: path.read_bytes() for path in uninterrupted.iterdir()}
    with pytest.raises(InvalidInputError, match=rf"resuming .*: expected the same run, got .*{message}.*Resume with"):
        tiny_run(output_dir=uninterrupted, resume=True, **{**SETTINGS, **changes})
    assert {path.name: path.read_bytes() for path in uninterrupted.iterdir()} == before


def test_resuming_with_another_model_is_refused(uninterrupted: Path) -> None:
    from tiny_models import tiny_model

    with pytest.raises(InvalidInputError, match=r"expected the same run, got model '\w+' -> '\w+'"):
        tiny_run(output_dir=uninterrupted, resume=True, model=tiny_model(seed=1), **SETTINGS)


def test_used_folder_is_refused_and_left_alone(uninterrupted: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in uninterrupted.iterdir()}
    with pytest.raises(InvalidInputError, match=r"expected a new or empty folder, got .*, or resume the run there\."):
        tiny_run(output_dir=uninterrupted, **SETTINGS)
    assert {path.name: path.read_bytes() for path in uninterrupted.iterdir()} == before
    (tmp_path / "thesis.tex").write_text("mine")
    for resume in (False, True):
        with pytest.raises(InvalidInputError, match=r"thesis\.tex"):
            tiny_run(output_dir=tmp_path, resume=resume, **SETTINGS)
    assert (tmp_path / "thesis.tex").read_text() == "mine"


def test_truncated_checkpoint_says_so(tmp_path: Path) -> None:
    interrupted_run(tmp_path / "out", 3)
    checkpoint = tmp_path / "out" / "checkpoint.safetensors"
    checkpoint.write_bytes(checkpoint.read_bytes()[:-7])
    with pytest.raises(StorageError, match=r"checkpoint\.safetensors: expected .*corrupt or truncated"):
        tiny_run(output_dir=tmp_path / "out", resume=True, **SETTINGS)


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")
def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StorageError, match="writable"):
        tiny_run(output_dir=tmp_path / "out")


def test_file_in_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises((InvalidInputError, StorageError), match="expected"):
        tiny_run(output_dir=tmp_path / "out")
    assert (tmp_path / "out").read_text() == "a file"


def test_full_disk_loses_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, uninterrupted: Path) -> None:
    import errno

    from cdas_fast import storage

    own = save_file
    saves = 0

    def full(tensors: Any, name: str, metadata: Any = None) -> None:
        nonlocal saves
        saves += 1
        if saves > 2:
            Path(name).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        own(tensors, name, metadata=metadata)

    monkeypatch.setattr(storage, "save_file", full)
    with pytest.raises(StorageError, match=r"no space left on the disk; nothing was overwritten\. Free some space"):
        tiny_run(output_dir=tmp_path / "out", **SETTINGS)
    monkeypatch.setattr(storage, "save_file", own)
    tiny_run(output_dir=tmp_path / "out", resume=True, **SETTINGS)
    assert_same_run(tmp_path / "out", uninterrupted)


KILLED_WHILE_CACHING = """
import os, signal, sys
sys.path.insert(0, "tests")
from pathlib import Path
from tiny_runs import tiny_run
from cdas_fast.models import packed
from cdas_fast.training import cache

cache.COMMIT_SECONDS = 0
calls = 0
for kind in (packed.PackedRunner, packed.PaddedRunner):
    def counted(*args, own=kind.capture, **kwargs):
        global calls
        calls += 1
        if calls == int(sys.argv[1]):
            os.kill(os.getpid(), signal.SIGKILL)
        return own(*args, **kwargs)
    kind.capture = counted
try:
    tiny_run(output_dir=Path(sys.argv[2]), resume=True, micro_batch_tokens=60, checkpoint_every=2, rank=2)
finally:
    print(calls)
"""


def test_caching_goes_on_where_it_was_killed(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[1]

    def run(kill_at: int, folder: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", KILLED_WHILE_CACHING, str(kill_at), str(tmp_path / folder)]
        return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)

    whole = run(10**6, "whole")
    assert whole.returncode == 0, whole.stderr
    kill_at = int(whole.stdout) - 3
    assert kill_at > 8
    assert run(kill_at, "out").returncode == -signal.SIGKILL
    assert (tmp_path / "out" / ".activations").is_dir()
    resumed = run(10**6, "out")
    assert resumed.returncode == 0, resumed.stderr
    assert int(resumed.stdout) <= int(whole.stdout) - kill_at + 4, "the trial of packing takes a few passes"
    assert SteeringVector.from_pretrained(tmp_path / "out") == SteeringVector.from_pretrained(tmp_path / "whole")
    assert not (tmp_path / "out" / ".activations").exists()
