"""4-bit weights on real weights, and layers of bitsandbytes that users bring along."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import tiny_model, tiny_tokenizer
from tiny_runs import PAIRS, tiny_config
from zero3_worker import free_port

import cdas_fast
from cdas_fast.cli import main
from cdas_fast.demo import demo_pairs
from cdas_fast.errors import UnsupportedError
from cdas_fast.models import structure
from cdas_fast.models.skeleton import layer_weights
from cdas_fast.training import TrainingResult

functional = pytest.importorskip("bitsandbytes.functional")
transformers = pytest.importorskip("transformers")

LOSS_TOLERANCE, LEAST_COSINE = 1e-5, 0.99999


def agree(losses: list[list[float]], directions: list[torch.Tensor]) -> None:
    """Losses at each step, and the vector."""
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=LOSS_TOLERANCE, atol=0)
    assert torch.nn.functional.cosine_similarity(directions[0], directions[1]).min() > LEAST_COSINE


def results_agree(one: TrainingResult, other: TrainingResult) -> None:
    losses = [[record.loss for record in each.history] for each in (one, other)]
    agree(losses, [one.vector.direction, other.vector.direction])


# SmolLM2 in 4 bits and float32: one process that holds it all, streamed, and several processes.


@pytest.fixture(scope="module")
def smollm2_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    cdas_fast.ContrastivePairs(list(demo_pairs()[0])[:8]).to_file(path)
    return path


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("packed")


@pytest.fixture(scope="module")
def smollm2_arguments(embedded: Any, smollm2_data: Path, packed: Path) -> list[str]:
    return [
        *("train", "--model", "smollm2-135m", "--data", str(smollm2_data), "--layer", "20", "--epochs", "2"),
        *("--batch-size", "4", "--max-output-tokens", "8", "--dtype", "float32", "--micro-batch-tokens", "128"),
        *("--device", "cpu", "--load-in-4bit", "--packed", str(packed)),
    ]


def read(folder: Path) -> tuple[list[float], torch.Tensor]:
    lines = (folder / "training_log.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines], load_file(folder / "steering_vector.safetensors")["direction"]


@pytest.fixture(scope="module")
def resident(
    smollm2_arguments: list[str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[float], torch.Tensor]:
    folder = tmp_path_factory.mktemp("resident") / "out"
    assert main([*smollm2_arguments, "--output", str(folder)]) == 0
    return read(folder)


def assert_as_resident(folder: Path, resident: tuple[list[float], torch.Tensor]) -> None:
    losses, direction = read(folder)
    assert len(losses) == 4
    agree([resident[0], losses], [resident[1], direction])


def test_smollm2_streamed(smollm2_arguments: list[str], resident: Any, tmp_path: Path) -> None:
    assert main([*smollm2_arguments, "--resident-layers", "2", "--output", str(tmp_path / "out")]) == 0
    assert_as_resident(tmp_path / "out", resident)


@pytest.mark.parametrize(
    ("way", "launcher", "processes"),
    [("--data-parallel", "torchrun", 2), ("--deepspeed", "deepspeed", 2), ("--deepspeed", "torchrun", 4)],
)
def test_smollm2_divided(
    way: str, launcher: str, processes: int, smollm2_arguments: list[str], resident: Any, tmp_path: Path
) -> None:
    if way == "--deepspeed" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("needs deepspeed: pip install 'cdas_fast[deepspeed]'")
    port = str(free_port())
    start = ["torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", port, "-m"]
    if launcher == "deepspeed":
        start = ["deepspeed.launcher.runner", "--num_gpus", str(processes), "--master_port", port, "--module"]
    command = [sys.executable, "-m", *start, "cdas_fast.cli", *smollm2_arguments, way]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    ran = subprocess.run(
        [*command, "--output", str(tmp_path / "out")], env=environment, capture_output=True, text=True, timeout=600
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert_as_resident(tmp_path / "out", resident)


# Models with bitsandbytes' own layers.


@pytest.fixture
def theirs(tmp_path: Path) -> Any:
    """A function that makes a tiny model with `Linear4bit` layers, as transformers loads it, and the same by handle."""
    tiny_model(hidden_size=64, intermediate_size=128, head_dim=32).save_pretrained(tmp_path / "model")
    settings: dict[str, Any] = {"dtype": "float32", "device": "cpu", "packed_dir": tmp_path / "packed"}
    ours, _ = cdas_fast.load_model(tmp_path / "model", tiny_tokenizer(), load_in_4bit=True, **settings)
    ours(torch.arange(3, 9)[None])  # every layer is quantised now
    copy = next((tmp_path / "packed").iterdir())

    def make() -> tuple[Any, Any]:
        model = transformers.AutoModelForCausalLM.from_pretrained(copy, dtype=torch.float32)
        kinds = {type(module).__name__ for module in model.modules()}
        assert "Linear4bit" in kinds
        return model.eval(), ours

    return make


def trained(model: Any) -> TrainingResult:
    return cdas_fast.train(model, tiny_tokenizer(), PAIRS, tiny_config(), progress=False)


def repacks() -> bool:
    """Whether this processor is one on which bitsandbytes changes its weights in evaluation."""
    return bool(functional.has_avx512bf16())


def test_layers_of_bitsandbytes_train_as_ours(theirs: Any) -> None:
    model, ours = theirs()
    results_agree(trained(model), trained(ours))
    assert layer_weights(ours) is not None
    assert layer_weights(model) is None


def test_an_evaluation_before_training_loses_the_gradients(theirs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without what keeps bitsandbytes from it, the test above fails: the losses of the first step are still right."""
    if not repacks():
        pytest.skip("needs a CPU with AVX-512-BF16")
    model, ours = theirs()
    expected = trained(ours)
    with torch.no_grad():
        model(torch.arange(3, 9)[None])
    with pytest.raises(UnsupportedError, match=r"lets gradients through, got one that has run in evaluation mode"):
        trained(model)
    monkeypatch.setattr(structure, "_refuse_repacked", lambda model: None)
    bad = trained(model)
    assert bad.history[0].loss == pytest.approx(expected.history[0].loss, rel=0.2)
    with pytest.raises(AssertionError):
        results_agree(bad, expected)


def test_training_leaves_layers_of_bitsandbytes_as_they_were(theirs: Any) -> None:
    model, _ = theirs()
    before = {name: module.support_avx512bf16_for_cpu for name, module in model.named_modules() if "proj" in name}
    trained(model)
    after = {name: module.support_avx512bf16_for_cpu for name, module in model.named_modules() if "proj" in name}
    assert before == after
    assert not any(
        getattr(module.weight.quant_state, "packing_format_for_cpu", False)
        for name, module in model.named_modules()
        if "proj" in name
    )
