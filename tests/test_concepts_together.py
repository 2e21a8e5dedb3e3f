"""Concepts that train together: each as it would alone, with its own folder, and in the same bits when resumed."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import signal
import subprocess
import sys
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_model, tiny_tokenizer
from tiny_runs import tiny_config, tiny_run

import cdas_fast
from cdas_fast import ContrastivePair, ContrastivePairs, SteeringVector
from cdas_fast.distributed.processes import Processes
from cdas_fast.errors import InvalidInputError, NonFiniteError
from cdas_fast.training import StepInfo
from cdas_fast.training.cache import build_cache
from cdas_fast.training.concept import Batch, ConceptTraining
from cdas_fast.training.concept_run import agreed_prefix
from cdas_fast.training.run_folder import Checkpoint, common_round

SIZES = {3: 5, 0: 2, 7: 4, 2: 1}  # concept -> pairs, in the order of the file
SETTINGS: dict[str, Any] = {"epochs": 2, "rank": 2, "checkpoint_every": 2}


def pairs_of(sizes: dict[int, int] = SIZES) -> ContrastivePairs:
    """Pairs of several concepts, of different number and length."""
    return ContrastivePairs(
        ContrastivePair(
            negative_input=f"Tell me about {'bread ' * number}{concept}.",
            negative_output=f"plain {concept} {'so ' * number}",
            positive_input=f"With {concept} ships: tell me about {number}.",
            positive_output=f"{concept} ahoy{'!' * number}",
            concept_id=concept,
            concept=f"ships, {concept}",
        )
        for concept, count in sizes.items()
        for number in range(count)
    )


@pytest.fixture(scope="module")
def alone() -> dict[int, Any]:
    """Each concept trained in a run of its own."""
    pairs = pairs_of()
    return {concept: tiny_run(pairs.of_concept(concept), **SETTINGS).only for concept in SIZES}


@pytest.mark.parametrize("packing", ["packed", "padded"])
@pytest.mark.parametrize("together", [None, 1, 2, 3, 100])
def test_each_is_trained_as_it_would_be_alone(together: int | None, packing: Any, alone: dict[int, Any]) -> None:
    result = tiny_run(pairs_of(), concepts_together=together, packing=packing, **SETTINGS)
    assert list(result.concepts) == list(SIZES)
    for concept, own in result.concepts.items():
        expected = alone[concept]
        assert own.vector.cosine(expected.vector) > 0.9999
        assert [record.step for record in own.history] == [record.step for record in expected.history]
        for record, its in zip(own.history, expected.history, strict=True):
            assert record.loss == pytest.approx(its.loss, rel=1e-3)
            assert record.grad_norm == pytest.approx(its.grad_norm, rel=1e-2)
            assert (record.learning_rate, record.tokens) == (its.learning_rate, its.tokens)
        assert own.vector.positive is not None
        torch.testing.assert_close(own.vector.positive.mean, expected.vector.positive.mean, rtol=1e-3, atol=1e-3)


def test_those_that_finish_make_room_for_the_next() -> None:
    """Of concepts with 9, 3, 6 and 3 steps, two at a time: the third joins when the second has ended, and so on."""
    seen: list[tuple[int, int]] = []
    tiny_run(pairs_of(), concepts_together=2, callback=lambda info: seen.append((info.concept_id, info.record.step)))
    rounds = [
        [(3, 1), (0, 1)],
        [(3, 2), (0, 2)],
        [(3, 3), (0, 3)],
        [(3, 4), (7, 1)],
        [(3, 5), (7, 2)],
        [(3, 6), (7, 3)],
        [(3, 7), (7, 4)],
        [(3, 8), (7, 5)],
        [(3, 9), (7, 6)],
        [(2, 1)],
        [(2, 2)],
        [(2, 3)],
    ]
    assert seen == [step for each in rounds for step in each]


def test_as_many_train_together_as_fill_a_micro_batch() -> None:
    def most(tokens: int) -> int:
        steps: list[tuple[int, int]] = []
        tiny_run(
            pairs_of(dict.fromkeys(range(6), 2)),
            micro_batch_tokens=tokens,
            callback=lambda info: steps.append((info.record.step, info.concept_id)),
        )
        return next(place for place, (step, _) in enumerate(steps) if step == 2)

    pair = tiny_run(pairs_of({0: 2}), epochs=1).history[0].tokens
    assert [most(tokens) for tokens in (1, pair, 2 * pair + 4, 3 * pair + 6, 100 * pair)] == [1, 1, 2, 3, 6]


def test_activations_are_held_of_those_at_work_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    caches: list[Any] = []
    own = build_cache

    def remembered(*args: Any, **kwargs: Any) -> Any:
        cache = own(*args, **kwargs)
        caches.append(weakref.ref(cache))
        return cache

    monkeypatch.setattr("cdas_fast.training.concept_run.build_cache", remembered)
    alive: list[int] = []

    def count(info: StepInfo) -> None:
        gc.collect()
        alive.append(sum(cache() is not None for cache in caches))

    result = tiny_run(pairs_of(dict.fromkeys(range(7), 2)), concepts_together=2, epochs=1, callback=count)
    assert len(caches) == 7
    assert max(alive) == 2
    assert all(own.cache is None for own in result.concepts.values())
    gc.collect()
    assert not any(cache() for cache in caches)


def test_each_has_a_folder_of_its_own(tmp_path: Path) -> None:
    result = tiny_run(pairs_of(), output_dir=tmp_path / "out", concepts_together=3, **SETTINGS)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {f"concept_{concept}" for concept in SIZES}
    for concept, own in result.concepts.items():
        folder = tmp_path / "out" / f"concept_{concept}"
        assert SteeringVector.from_pretrained(folder) == own.vector
        log = [json.loads(line) for line in (folder / "training_log.jsonl").open()]
        assert [record["loss"] for record in log] == [record.loss for record in own.history]
        assert (folder / "report.html").exists()
        assert not list(folder.glob(".*"))
        assert not (folder / "checkpoint.previous.safetensors").exists()
    with pytest.raises(InvalidInputError, match=r"got concept_0, .* Choose another one, or resume the run there\."):
        tiny_run(pairs_of(), output_dir=tmp_path / "out", concepts_together=3, **SETTINGS)


def test_held_out_pairs_are_those_of_the_concept(alone: dict[int, Any]) -> None:
    held_out = pairs_of({3: 1, 7: 2})
    result = tiny_run(pairs_of(), validation=held_out, concepts_together=3, **SETTINGS)
    for concept, own in result.concepts.items():
        measured = [record.held_out_loss for record in own.history if record.held_out_loss is not None]
        assert len(measured) == (2 if concept in (3, 7) else 0)
        if measured:
            pairs = pairs_of().of_concept(concept)
            its = tiny_run(pairs, validation=held_out.of_concept(concept), **SETTINGS)
            assert measured == pytest.approx(
                [each.held_out_loss for each in its.history if each.held_out_loss], rel=1e-3
            )


@pytest.mark.parametrize("where", ["a row", "the gradient"])
def test_one_that_meets_a_nan_is_left_and_the_others_go_on(
    where: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, alone: dict[int, Any]
) -> None:
    batch, update = ConceptTraining.batch, ConceptTraining.update

    def poisoned(training: ConceptTraining) -> Batch:
        found = batch(training)
        if training.concept_id == 3 and training.state.step == 1:
            (first, *rest), *others = found.minibatches
            first = dataclasses.replace(first, base_hidden=torch.full_like(first.base_hidden, float("nan")))
            return dataclasses.replace(found, minibatches=((first, *rest), *others))
        return found

    def broken(training: ConceptTraining, batch: Batch, sums: Any, gradient: Any, **others: Any) -> Any:
        if training.concept_id == 3 and training.state.step == 1:
            gradient = gradient * float("nan")
        return update(training, batch, sums, gradient, **others)

    if where == "a row":
        monkeypatch.setattr(ConceptTraining, "batch", poisoned)
    else:
        monkeypatch.setattr(ConceptTraining, "update", broken)
    result = tiny_run(pairs_of(), output_dir=tmp_path / "out", concepts_together=3, **SETTINGS)
    assert list(result.failed) == [3]
    expected = r"step 2: expected a finite loss and gradient, got NaN or infinity in " + (
        r"pair \d+ toward \w+" if where == "a row" else "the gradient"
    )
    with pytest.raises(NonFiniteError, match=expected):
        raise result.failed[3]
    assert list(result.concepts) == [0, 7, 2]
    for concept, own in result.concepts.items():
        assert own.vector.cosine(alone[concept].vector) > 0.9999
    assert not (tmp_path / "out" / "concept_3" / "config.json").exists()
    monkeypatch.undo()
    mended = tiny_run(pairs_of(), output_dir=tmp_path / "out", concepts_together=3, resume=True, **SETTINGS)
    assert not mended.failed
    assert mended.concepts[3].vector.cosine(alone[3].vector) > 0.9999
    assert len(mended.concepts[3].history) == len(alone[3].history)


def test_one_whose_activations_are_not_finite_is_left_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch, alone: dict[int, Any]
) -> None:
    def broken(decoder: Any, rows: Any, *args: Any, **kwargs: Any) -> Any:
        if len(rows.positive_prompts) == SIZES[7]:
            raise NonFiniteError("row: expected finite numbers, got NaN")
        return build_cache(decoder, rows, *args, **kwargs)

    monkeypatch.setattr("cdas_fast.training.concept_run.build_cache", broken)
    result = tiny_run(pairs_of(), concepts_together=2, **SETTINGS)
    assert list(result.failed) == [7]
    assert list(result.concepts) == [3, 0, 2]
    assert all(own.vector.cosine(alone[concept].vector) > 0.9999 for concept, own in result.concepts.items())
    assert list(tiny_run(pairs_of({7: 4, 1: 4}), **SETTINGS).failed) == [7, 1], "none is left"
    with pytest.raises(NonFiniteError, match="got NaN"):
        tiny_run(pairs_of({7: 4}), **SETTINGS)


def test_a_process_without_a_concept_does_nothing() -> None:
    shares = [
        cdas_fast.train(
            tiny_model(), tiny_tokenizer(), pairs_of({5: 1, 8: 2}), tiny_config(), processes=Processes(rank, 3)
        ).concepts
        for rank in range(3)
    ]
    assert [list(share) for share in shares] == [[8], [5], []]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was left in peace."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    tiny_run(pairs_of(), output_dir=folder, concepts_together=3, **SETTINGS)
    return folder


KILLED = """
import os, signal, sys
sys.path.insert(0, "tests")
from pathlib import Path
from test_concepts_together import SETTINGS, pairs_of
from tiny_models import tiny_model, tiny_tokenizer
from tiny_runs import tiny_config, tiny_run

import cdas_fast
from cdas_fast.training import concept_run, run_folder

place, number, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
calls = 0

def dying(function):
    def wrapped(*args, **kwargs):
        global calls
        calls += 1
        if calls == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return wrapped

if place == "cache":
    concept_run.build_cache = dying(concept_run.build_cache)
elif place == "write":
    run_folder.write_tensors = dying(run_folder.write_tensors)
elif place == "artifact":
    concept_run.SteeringVector.save_pretrained = dying(concept_run.SteeringVector.save_pretrained)
elif place == "log":
    run_folder.RunFolder.append = dying(run_folder.RunFolder.append)
tiny_run(pairs_of(), output_dir=folder, resume=folder.exists(), concepts_together=3, **SETTINGS)
"""


@pytest.mark.parametrize(
    ("place", "numbers"),
    [
        ("cache", (2,)),
        ("cache", (4,)),
        ("write", (3, 7)),
        ("write", (8, 4, 5)),
        ("write", (9,)),
        ("write", (10,)),
        ("artifact", (1, 1)),
        ("artifact", (3,)),
        ("log", (5, 3, 4)),
        ("log", (12,)),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value)),
)
def test_killed_runs_resume_to_the_same_bits(
    place: str, numbers: Iterable[int], uninterrupted: Path, tmp_path: Path
) -> None:
    root = Path(__file__).resolve().parents[1]
    for number in numbers:
        command = [sys.executable, "-c", KILLED, place, str(number), str(tmp_path / "out")]
        done = subprocess.run(command, cwd=root, capture_output=True, check=False)
        assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    result = tiny_run(pairs_of(), output_dir=tmp_path / "out", resume=True, concepts_together=3, **SETTINGS)
    assert list(result.concepts) == list(SIZES)
    for concept in SIZES:
        folders = [place / f"concept_{concept}" for place in (tmp_path / "out", uninterrupted)]
        assert SteeringVector.from_pretrained(folders[0]) == SteeringVector.from_pretrained(folders[1])
        assert result.concepts[concept].vector == SteeringVector.from_pretrained(folders[1])
        logs = [[json.loads(line) for line in (folder / "training_log.jsonl").open()] for folder in folders]
        for record in [*logs[0], *logs[1]]:
            del record["seconds"]
        assert logs[0] == logs[1]


def test_resumed_with_another_number_together(tmp_path: Path, alone: dict[int, Any]) -> None:
    def interrupt(info: StepInfo) -> None:
        if (info.concept_id, info.record.step) == (3, 4):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tiny_run(pairs_of(), output_dir=tmp_path / "out", concepts_together=3, callback=interrupt, **SETTINGS)
    steps: list[int] = []
    result = tiny_run(
        pairs_of(),
        output_dir=tmp_path / "out",
        concepts_together=1,
        resume=True,
        callback=lambda info: steps.append(info.concept_id),
        **SETTINGS,
    )
    assert steps[:2] == [3, 3], "steps 5 and 6"
    for concept, own in result.concepts.items():
        assert own.vector.cosine(alone[concept].vector) > 0.9999


def checkpoint(round_: int, step: int = 1, company: str = "us") -> Checkpoint:
    """A state that only counts."""
    return Checkpoint(step, *(torch.zeros(1, 2),) * 3, round=round_, company=company)


def test_common_round_is_the_last_that_all_hold() -> None:
    found = {1: (checkpoint(20, 20), checkpoint(10, 10)), 2: (checkpoint(10, 4), checkpoint(6, 0)), 3: ()}
    last, states = common_round(found, "us")
    assert last == 10
    assert {concept: state.step for concept, state in states.items()} == {1: 10, 2: 4}
    assert common_round({1: (), 2: ()}, "us") == (0, {})
    for company in ("them", "us"):
        apart = {1: (checkpoint(20, 20), checkpoint(10, 10)), 2: (checkpoint(9, 4, company),)}
        last, states = common_round(apart, "us")
        assert last == 0
        assert {concept: state.step for concept, state in states.items()} == {1: 20, 2: 4}


@pytest.mark.parametrize(
    ("prefixes", "expected"),
    [
        ([(1, 2, 3)], (1, 2, 3)),
        ([(1, 2, 3), (1, 2)], (1, 2)),
        ([(1, 2), (1, 2, 3), (1, 9, 3)], (1,)),
        ([(1, 2, 3), (1, 2, 4), (1, 2, 3)], (1, 2)),
        ([(1,), ()], ()),
        ([], ()),
    ],
)
def test_agreed_prefix(prefixes: list[tuple[int, ...]], expected: tuple[int, ...]) -> None:
    assert agreed_prefix(prefixes) == expected


def test_concepts_together_has_to_be_a_number() -> None:
    with pytest.raises(InvalidInputError, match="concepts_together: expected an integer of at least 1, got 0"):
        tiny_run(concepts_together=0)


def test_torchrun_divides_the_concepts(model_folder: Path, tmp_path: Path) -> None:
    data = pairs_of().to_file(tmp_path / "pairs.jsonl")
    command = [
        *(
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            "-m",
            "cdas_fast.cli",
        ),
        *("train", "--model", str(model_folder), "--data", str(data), "--layer", "1", "--epochs", "2"),
        *("--batch-size", "2", "--rank", "2", "--max-output-tokens", "12", "--output", str(tmp_path / "out")),
    ]
    root = Path(__file__).resolve().parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    for arguments in ((), ("--resume",)):
        done = subprocess.run(
            [*command, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        for concept in SIZES:
            assert f"ships, {concept}" in done.stdout
    single = tiny_run(pairs_of(), **SETTINGS)
    for concept in SIZES:
        vector = SteeringVector.from_pretrained(tmp_path / "out" / f"concept_{concept}")
        assert vector.cosine(single.concepts[concept].vector) > 0.9999
