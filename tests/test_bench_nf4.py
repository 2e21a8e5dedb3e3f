"""The benchmark of NF4 weights on tiny ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.nf4 import main


def test_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("bitsandbytes", reason="needs cdas_fast[bnb]")
    arguments = ["--shapes", "4x128", "3x64", "--dtypes", "bfloat16", "--rounds", "2", "--output", str(tmp_path)]
    assert main(arguments) == 0
    results = json.loads((tmp_path / "nf4.json").read_text())["results"]
    assert [(each["variant"], each["shape"]) for each in results] == [
        (variant, shape)
        for shape in ([4, 128], [3, 64])
        for variant in ("auto", "auto, out=", "reference", "bitsandbytes")
    ]
    assert all(each["ratio"] == 1.0 for each in results if each["variant"] == "bitsandbytes")
    moved = 4 * 128 / 2 + 8 + 4 * (1 + 256 + 1) + 4 * 128 * 2
    assert results[0]["bytes_per_second"] / results[0]["elements_per_second"] == pytest.approx(moved / 512)
    assert "G elements/s" in capsys.readouterr().out


@pytest.mark.parametrize("shape", ["4", "0x4", "axb"])
def test_what_is_no_shape_is_refused(shape: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("bitsandbytes", reason="needs cdas_fast[bnb]")
    assert main(["--shapes", shape]) == 2
    assert "expected OxI" in capsys.readouterr().err
