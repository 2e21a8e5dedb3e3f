"""The comparison of presets on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_runs import PAIRS, tiny_run

from benchmarks.presets import main


def test_table(model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = PAIRS.to_file(tmp_path / "pairs.jsonl")
    arguments = ["--model", str(model_folder), "--train", str(data), "--held-out", "2", "--layers", "1", "2"]
    arguments += ["--seeds", "0", "1", "--dtype", "float32", "--batch-size", "2", "--max-output-tokens", "12"]
    arguments += ["--epochs", "3", "--learning-rate", "0.05", "--epochs-of", "fast", "1"]
    assert main([*arguments, "--output", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "3 pairs of pairs.jsonl, 2 held out, batch 2, token reduction" in out
    values = json.loads((tmp_path / "out" / "presets.json").read_text())
    runs = {(run["layer"], run["seed"], run["preset"]): run for run in values["runs"]}
    assert len(runs) == 8
    assert {run["steps"] for run in values["runs"] if run["preset"] == "published"} == {6}
    assert {run["steps"] for run in values["runs"] if run["preset"] == "fast"} == {2}
    own = tiny_run(PAIRS[:3], validation=PAIRS[3:], layer=2, seed=1, epochs=3, learning_rate=0.05, reduction="token")
    assert runs[2, 1, "published"]["held_out"] == pytest.approx(own.history[-1].held_out_loss, rel=1e-4)
    assert values["not_steered"]["1"] == pytest.approx(values["not_steered"]["2"], rel=1e-4), "layers do not matter"
    assert f"{values['not_steered']['2']:.4f}" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--presets", "quick"], "published or fast, got quick"), (["--held-out", "5"], "expected 1 to 4, got 5")],
)
def test_what_does_not_fit_is_refused(
    arguments: list[str], message: str, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = PAIRS.to_file(tmp_path / "pairs.jsonl")
    assert main(["--model", str(model_folder), "--train", str(data), *arguments]) != 0
    assert message in capsys.readouterr().err
