"""The published implementation's losses, gradients and vectors, reproduced through the public paths."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from triton_worker import worker

import cdas_fast
from cdas_fast.cli import main
from cdas_fast.data.prompts import PromptFormat
from cdas_fast.data.rows import tokenize_pairs
from cdas_fast.ops import cpu_library

CASES = {"refusal_L15": "refusal_train", "axbench_L20": "axbench_contrast"}


class Golden:
    """One golden file and the pairs that it was made from."""

    def __init__(self, shared: Path, name: str) -> None:
        self.settings = json.loads((shared / "golden" / f"{name}.json").read_text())
        self.tensors = load_file(shared / "golden" / f"{name}.safetensors")
        self.data = shared / "data" / f"{CASES[name]}.parquet"
        pairs = cdas_fast.ContrastivePairs.from_file(self.data)
        self.pairs = pairs.select(concept_ids=[0], max_examples=self.settings["examples"])

    def config(self, **changes: Any) -> cdas_fast.TrainingConfig:
        """The run's settings."""
        values: dict[str, Any] = {
            "layer": self.settings["layer"],
            "epochs": self.settings["epochs"],
            "batch_size": self.settings["batch_size"],
            "learning_rate": self.settings["lr"],
            "max_output_tokens": self.settings["max_output_tokens"],
            "initial_direction": self.tensors["w0"],
            "reduction": "token",
            "shuffle": False,
        }
        return cdas_fast.TrainingConfig(**{**values, **changes})


@pytest.fixture(scope="module", params=CASES)
def golden(request: pytest.FixtureRequest, shared: Path) -> Golden:
    """Each golden file in turn."""
    return Golden(shared, request.param)


def assert_same_losses(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    error = ((ours - theirs) / theirs).abs().max()
    assert error <= 1e-4, f"relative error {error:.2g}"


def assert_same_vectors(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    cosine = torch.cosine_similarity(ours, theirs, dim=-1).min()
    assert cosine > 0.9999, f"cosine {cosine:.6f}"
    length = (ours.norm(dim=-1) / theirs.norm(dim=-1) - 1).abs().max()
    assert length < 1e-3, f"lengths differ by {length:.2g}"


def test_token_ids(golden: Golden, embedded: tuple[Any, Any]) -> None:
    prompt_format = PromptFormat(embedded[1])
    assert prompt_format.prefix_length == golden.settings["prefix_length"]
    rows = tokenize_pairs(golden.pairs, prompt_format, max_output_tokens=golden.settings["max_output_tokens"]).rows
    assert len(rows) == 2 * len(golden.settings["rows"])
    for row in rows:
        expected = golden.settings["rows"][row.pair]["neg+pos" if row.toward == "positive" else "pos+neg"]
        assert list(row.base.ids) == expected["base"], row.name
        assert list(row.source.ids) == expected["source"], row.name
        assert row.base.prompt_length == expected["base_prompt"]
        assert row.source.prompt_length == expected["source_prompt"]
        assert row.source_position == row.source.prompt_length - 1


@pytest.mark.slow
@pytest.mark.parametrize("impl", ["reference", *["cpp"] * cpu_library.available()])
def test_losses_and_gradients_of_single_pairs(golden: Golden, embedded: tuple[Any, Any], impl: Any) -> None:
    count = golden.tensors["pair_losses"].shape[0]
    gradients: list[Tensor] = []
    result = cdas_fast.train(
        *embedded,
        golden.pairs[:count],
        golden.config(epochs=1, batch_size=1, learning_rate=0.0, impl=impl),
        callback=lambda info: gradients.append(info.gradient),
    )
    assert_same_losses(
        torch.tensor([record.minibatch_losses for record in result.history]), golden.tensors["pair_losses"]
    )
    assert_same_vectors(torch.cat(gradients), golden.tensors["pair_grads"])
    torch.testing.assert_close(result.vector.direction, golden.tensors["w0"], rtol=0, atol=1e-6)


def first_pair_by_triton(shared: Path) -> tuple[list[float], Tensor]:
    """Losses and gradient of the first pair of the refusal data, by kernels that are interpreted."""
    golden = Golden(shared, "refusal_L15")
    gradients: list[Tensor] = []
    result = cdas_fast.train(
        *cdas_fast.load_model("smollm2-135m", dtype=torch.float32, device="cpu"),
        golden.pairs[:1],
        golden.config(epochs=1, batch_size=1, learning_rate=0.0, impl="triton"),
        callback=lambda info: gradients.append(info.gradient),
    )
    return list(result.history[0].minibatch_losses), gradients[0]


@pytest.mark.slow
def test_a_pair_by_the_interpreted_triton_kernels(shared: Path, embedded: tuple[Any, Any]) -> None:
    tensors = Golden(shared, "refusal_L15").tensors
    with worker(interpret=True) as interpreter:
        losses, gradient = interpreter.call("test_golden:first_pair_by_triton", shared)["return"]
    assert_same_losses(torch.tensor(losses), tensors["pair_losses"][0])
    assert_same_vectors(gradient, tensors["pair_grads"][:1])


@pytest.mark.slow
def test_run_through_the_library(golden: Golden, embedded: tuple[Any, Any]) -> None:
    gradients: list[Tensor] = []
    result = cdas_fast.train(
        *embedded, golden.pairs, golden.config(), callback=lambda info: gradients.append(info.gradient)
    )
    losses = torch.tensor([loss for record in result.history for loss in record.minibatch_losses])
    assert_same_losses(losses, golden.tensors["minibatch_losses"])
    assert_same_vectors(torch.cat(gradients), golden.tensors["step_grads"])
    assert_same_vectors(result.vector.direction, golden.tensors["w_final"])


@pytest.mark.slow
def test_run_through_the_command_line(golden: Golden, embedded: tuple[Any, Any], tmp_path: Path) -> None:
    save_file({"direction": golden.tensors["w0"]}, tmp_path / "w0.safetensors")
    settings = golden.settings
    status = main(
        [
            *("train", "--model", "smollm2-135m", "--dtype", "float32", "--data", str(golden.data)),
            *("--output", str(tmp_path / "out"), "--layer", str(settings["layer"]), "--concept-id", "0"),
            *("--epochs", str(settings["epochs"]), "--batch-size", str(settings["batch_size"])),
            *("--learning-rate", str(settings["lr"]), "--max-examples", str(settings["examples"])),
            *("--max-output-tokens", str(settings["max_output_tokens"]), "--reduction", "token", "--no-shuffle"),
            *("--initial-direction", str(tmp_path / "w0.safetensors")),
        ]
    )
    assert status == 0
    records = [json.loads(line) for line in (tmp_path / "out" / "training_log.jsonl").read_text().splitlines()]
    losses = torch.tensor([loss for record in records for loss in record["minibatch_losses"]])
    assert_same_losses(losses, golden.tensors["minibatch_losses"])
    vector = cdas_fast.SteeringVector.from_pretrained(tmp_path / "out")
    assert_same_vectors(vector.direction, golden.tensors["w_final"])
