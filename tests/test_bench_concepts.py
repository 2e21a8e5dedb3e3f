"""The benchmark of many concepts on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_concepts_together import pairs_of

from benchmarks.concepts import Workload, deal, main
from cdas_fast.errors import InvalidInputError


def test_pairs_are_dealt_out_evenly() -> None:
    pairs = pairs_of()
    dealt = deal(pairs, 5)
    assert [pair.concept_id for pair in dealt] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert [pair.positive_input for pair in dealt] == [pair.positive_input for pair in pairs[:10]]
    with pytest.raises(InvalidInputError, match="at most 12, the number of pairs, got 13"):
        deal(pairs, 13)


@pytest.mark.parametrize("text", ["500x72", "axbxc", "500x0x18", "1x2x3x4"])
def test_workload_has_three_numbers(text: str) -> None:
    with pytest.raises(InvalidInputError, match="500x72x18"):
        Workload.parse(text)


def test_report(model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = pairs_of().to_file(tmp_path / "pairs.jsonl")
    arguments = ["--model", str(model_folder), "--data", str(data), "--concepts", "4", "--layer", "1", "--epochs", "2"]
    arguments += ["--dtype", "float32", "--batch-size", "2", "--rounds", "1", "--workload", "10x5x3"]
    assert main([*arguments, "--output", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    for part in ("12 pairs dealt out to 4 concepts", "times that", "cosine of the directions: 1.0000", "9 steps of"):
        assert part in out
    values = json.loads((tmp_path / "out" / "concepts.json").read_text())
    assert min(values["cosines"].values()) > 0.9999
    plan = values["workload"]
    assert plan["steps_a_concept"] == 9
    assert plan["state_bytes_a_concept_at_work"] == 3 * 4 * 32
    assert plan["mapped_bytes_a_concept_at_work"] > 5 * 4 * 32 * 4 * 10, "ten tokens a pair at least"
    spent = values["seconds"]["together"][0]
    assert plan["training_hours"] == pytest.approx(spent * (10 * 5 * 3) / (12 * 2) / 3600)
    assert plan["caching_hours"] == pytest.approx(values["caching_seconds"] * (10 * 5) / 12 / 3600)
    assert main([*arguments, "--concepts", "13"]) != 0
    assert "expected at most 12" in capsys.readouterr().err
