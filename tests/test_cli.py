"""The command: what it prints, where it writes, how it fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tiny_models import tiny_model, tiny_tokenizer
from tiny_runs import PAIRS

import cdas_fast
from cdas_fast import SteeringVector
from cdas_fast.cli import build_parser, main
from cdas_fast.errors import InvalidInputError


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny pairs as a file."""
    return PAIRS.to_file(tmp_path_factory.mktemp("data") / "pairs.jsonl")


@pytest.fixture
def train_arguments(model_folder: Path, data: Path, tmp_path: Path) -> list[str]:
    """A whole `train` command."""
    return [
        *("train", "--model", str(model_folder), "--data", str(data), "--layer", "1"),
        *("--output", str(tmp_path / "out"), "--epochs", "2", "--batch-size", "2"),
    ]


@pytest.fixture(scope="module")
def trained(model_folder: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("trained") / "out"
    command = ["train", "--model", str(model_folder), "--data", str(data), "--layer", "1", "--epochs", "1"]
    assert main([*command, "--output", str(folder)]) == 0
    return folder


def test_train_prints_time_and_memory_and_writes_the_folder(
    train_arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*train_arguments, "--validation", train_arguments[4]]) == 0
    out, error = capsys.readouterr()
    for part in ("the sea", "nats in 6 steps", "held-out loss", "factor a+", "median step", "Peak memory", "Try it:"):
        assert part in out, part
    assert "%|" not in error  # no progress bar where there is no terminal
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names >= {"steering_vector.safetensors", "config.json", "training_log.jsonl", "report.html"}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["layers"] == [1]
    assert config["base_model"] == train_arguments[2]
    assert config["metadata"]["settings"]["epochs"] == 2
    assert set(config["metadata"]["versions"]) >= {"torch", "transformers", "cdas_fast"}
    records = [json.loads(line) for line in (tmp_path / "out" / "training_log.jsonl").open()]
    assert "held_out_loss" in records[-1]


def test_every_setting_reaches_the_run(train_arguments: list[str], tmp_path: Path) -> None:
    arguments = [
        *train_arguments,
        *("--learning-rate", "0.01", "--rank", "2", "--seed", "5", "--reduction", "token", "--directions", "positive"),
        *("--max-output-tokens", "7", "--max-examples", "3", "--no-shuffle", "--initial-direction", "random"),
        *("--system-prompt", "Be brief.", "--source-tokens", "assistant\n", "--keep-spaces"),
        *("--checkpoint-every", "3", "--evaluate-every", "2", "--layer", "1", "3", "--schedule", "cosine"),
        *("--warmup-steps", "1", "--patience", "4", "--validation", train_arguments[4], "--recompute"),
        *("--concepts-together", "5", "--dtype", "bfloat16", "--device", "cpu"),
    ]
    assert main(arguments) == 0
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["metadata"]["settings"]
    expected = {
        "learning_rate": 0.01,
        "rank": 2,
        "seed": 5,
        "reduction": "token",
        "directions": "positive",
        "max_output_tokens": 7,
        "max_examples": 3,
        "shuffle": False,
        "initial_direction": "random",
        "system_prompt": "Be brief.",
        "source_tokens": "assistant\n",
        "clean_spaces": False,
        "checkpoint_every": 3,
        "evaluate_every": 2,
        "schedule": "cosine",
        "warmup_steps": 1,
        "patience": 4,
        "recompute": True,
        "concepts_together": 5,
        "layer": [1, 3],
    }
    assert {name: settings[name] for name in expected} == expected


def test_generate_compares_and_streams(trained: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", "--model", str(model_folder), "--vector", str(trained), "--max-new-tokens", "5"]
    assert main([*command, "--compare", "Tell me about bread."]) == 0
    out = capsys.readouterr().out
    assert [out.count(f"== {way}:") for way in ("unsteered", "positive", "negative")] == [1, 1, 1]
    assert main([*command, "--toward", "negative", "Tell me about bread."]) == 0
    assert "==" not in capsys.readouterr().out


def test_generate_without_vector(model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", "--model", str(model_folder), "--max-new-tokens", "3", "Hello"]
    assert main([*command, "--toward", "none"]) == 0
    capsys.readouterr()
    assert main(command) == 2
    assert "--vector: expected a folder or hub repository, got none" in capsys.readouterr().err


def test_evaluate_prints_a_table(
    trained: Path, model_folder: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["evaluate", "--model", str(model_folder), "--vector", str(trained), "--data", str(data)]
    assert main(command) == 0
    out = capsys.readouterr().out
    for part in ("no steering", "clamp", "interchange", "toward positive", "toward negative"):
        assert part in out


def test_contrast_makes_pairs(model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "list.txt").write_text("# things\nTell me about bread.\nTell me about trains.\n")
    command = [
        *("data", "contrast", "--concept", "the sea", "--instructions", str(tmp_path / "list.txt")),
        *("--model", str(model_folder), "--max-new-tokens", "4", "--output", str(tmp_path / "pairs.jsonl")),
    ]
    assert main(command) == 0
    assert "2 pairs written to" in capsys.readouterr().out
    assert [path.name for path in tmp_path.glob("pairs*")] == ["pairs.jsonl"]
    assert main(command) == 2
    assert "expected a new file, got an existing one" in capsys.readouterr().err
    assert main([*command, "--overwrite"]) == 0


@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        ({"--layer": "9"}, 2, "layer: expected an integer from 0 to 4 (this model's layers), got 9"),
        ({"--data": "missing.jsonl"}, 2, "missing.jsonl: expected a file, got no such file"),
        ({"--model": "./nowhere"}, 2, "model ./nowhere: expected a folder with a config.json"),
        ({"--model": "no-such-org/no-such-model"}, 2, "model no-such-org/no-such-model: expected smollm2-135m"),
        ({"--dtype": "int3"}, 2, "dtype: expected auto, float32, bfloat16, float16, got 'int3'"),
        ({"--device": "tpu"}, 2, "device: expected cpu, cuda or cuda:N, got 'tpu'"),
        ({"--epochs": "0"}, 2, "epochs: expected an integer of at least 1, got 0"),
        ({"--concept-id": "3"}, 2, "concept_id: expected one of 0, got 3"),
        ({"--initial-direction": "w.safetensors"}, 6, "w.safetensors: expected a safetensors file, got no file"),
        ({"--resident-layers": "9"}, 2, "resident_layers: expected a number from 0 to 5, got 9"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_mistakes_are_one_line(
    changes: dict[str, str | None],
    code: int,
    message: str,
    train_arguments: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    added = [part for item in changes.items() for part in item if part is not None]
    assert main([*train_arguments, *added]) == code
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("cdas-fast: error:")]
    assert len(lines) == 1
    assert message in lines[0]
    assert "Traceback" not in captured.err
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


def test_debug_shows_the_trace(train_arguments: list[str]) -> None:
    from cdas_fast.errors import InvalidInputError

    with pytest.raises(InvalidInputError):
        main([*train_arguments, "--epochs", "0", "--debug"])


def test_vector_of_another_model_is_refused(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "wide"
    tiny_model(hidden_size=64).save_pretrained(other)
    tiny_tokenizer().save_pretrained(other)
    command = ["generate", "--model", str(other), "--vector", str(trained), "--max-new-tokens", "4", "Hello"]
    assert main(command) == 2
    assert "width: expected 32 (the vector was trained on" in capsys.readouterr().err


def test_interrupt_keeps_the_run(train_arguments: list[str], tmp_path: Path) -> None:
    arguments = [sys.executable, "-m", "cdas_fast.cli", *train_arguments, "--epochs", "100000"]
    root = Path(__file__).resolve().parents[1]
    process = subprocess.Popen(arguments, cwd=root, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "out" / "training_log.jsonl"
    deadline = time.monotonic() + 240
    while not (log.exists() and log.stat().st_size > 1000) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert "interrupted; what was finished is kept. Go on with: cdas-fast train ... --resume" in error
    assert "Traceback" not in error
    assert (tmp_path / "out" / "checkpoint.safetensors").exists()


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["--help"], ["train", "--help"], ["generate", "--help"], ["data", "contrast", "--help"]):
        with pytest.raises(SystemExit) as ended:
            build_parser().parse_args(command)
        assert ended.value.code == 0
        assert "examples:" in capsys.readouterr().out


def test_show_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show-config"]) == 0
    assert "auto takes" in capsys.readouterr().out


@pytest.mark.slow
def test_demo_steers_both_ways(embedded: tuple[Any, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--output", str(tmp_path / "demo"), "--max-new-tokens", "24"]) == 0
    out = capsys.readouterr().out
    rows = {}
    for line in out.splitlines():
        parts = line.rsplit(maxsplit=3)
        if len(parts) == 4 and parts[1] in ("none", "clamp", "interchange"):
            rows[parts[0].strip(), parts[1]] = (float(parts[2]), float(parts[3]))
    unsteered, trained = rows["no steering", "none"], rows["trained", "clamp"]
    for name in ("random direction", "difference in means"):
        for intervention in ("clamp", "interchange"):
            assert rows["trained", intervention] < rows[name, intervention]
            assert rows["trained", intervention][1] < rows[name, intervention][1]
    assert trained[0] <= 0.5 * unsteered[0]
    assert trained[1] <= 0.7 * unsteered[1]
    report = (tmp_path / "demo" / "report.html").read_text()
    assert "Held-out divergence" in report
    assert "Answers" in report
    assert SteeringVector.from_pretrained(tmp_path / "demo").positive is not None
    assert os.path.getsize(tmp_path / "demo" / "report.html") < 2**20


def test_preset_is_what_is_not_given_otherwise(train_arguments: list[str], tmp_path: Path) -> None:
    place = train_arguments.index("--epochs")
    without = [*train_arguments[:place], *train_arguments[place + 2 :], "--learning-rate", "0.01"]
    assert main([*without, "--preset", "fast"]) == 0
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["metadata"]["settings"]
    assert settings["learning_rate"] == 0.01
    assert settings["batch_size"] == 2
    expected = cdas_fast.TrainingConfig.preset("fast", layer=1).to_dict()
    assert expected != cdas_fast.TrainingConfig(layer=1).to_dict()
    for name in ("epochs", "schedule", "warmup_steps", "betas", "initial_direction"):
        assert settings[name] == expected[name]


def test_published_preset_is_the_default() -> None:
    assert cdas_fast.TrainingConfig.preset("published", layer=3) == cdas_fast.TrainingConfig(layer=3)
    with pytest.raises(InvalidInputError, match="preset: expected published or fast, got 'quick'"):
        cdas_fast.TrainingConfig.preset("quick", layer=3)


def test_concepts_are_described_in_a_line_each(
    train_arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [
        {**record, "concept_id": concept, "concept": f"the sea, {concept}"}
        for concept in range(5)
        for record in PAIRS[:2].to_records()
    ]
    train_arguments[4] = str(cdas_fast.ContrastivePairs.from_records(records).to_file(tmp_path / "many.jsonl"))
    assert main([*train_arguments, "--concepts-together", "2", "--activations", str(tmp_path / "kept")]) == 0
    out = capsys.readouterr().out
    assert [out.count(f"Concept {concept}: the sea, {concept}: ") for concept in range(5)] == [1] * 5
    assert "nats in 2 steps" in out
    assert "Try it" not in out
    assert len(list((tmp_path / "kept").iterdir())) == 1
