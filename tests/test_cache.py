"""Cached activations: what they are, row by row, and what a store of them spares."""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_model, tiny_tokenizer
from tiny_runs import PAIRS

from cdas_fast.data.pairs import ContrastivePairs
from cdas_fast.data.prompts import PromptFormat
from cdas_fast.data.rows import TokenRows, tokenize_pairs
from cdas_fast.errors import InvalidInputError, NonFiniteError, StorageError
from cdas_fast.models.packed import Runner, make_runner
from cdas_fast.models.structure import Decoder, inspect_decoder
from cdas_fast.training import cache as cache_module
from cdas_fast.training.activation_store import ActivationStore, StoreWriter
from cdas_fast.training.cache import ActivationCache, build_cache, cache_identity, rows_prefix
from cdas_fast.training.objective import DivergenceObjective, leave_alone

ROOT = Path(__file__).resolve().parents[1]
LAYERS = (1, 3)
BATCH_TOKENS = 150


def tiny_rows(pairs: Any = PAIRS, **settings: Any) -> TokenRows:
    return tokenize_pairs(pairs, PromptFormat(tiny_tokenizer()), max_output_tokens=12, **settings)


def assert_same_bits(one: ActivationCache, other: ActivationCache) -> None:
    assert one.shared_prefix_length == other.shared_prefix_length
    assert len(one) == len(other)
    for number in range(len(one)):
        for name in ("base_hidden", "target_final", "source"):
            assert torch.equal(getattr(one.row(number), name), getattr(other.row(number), name)), (number, name)
    assert torch.equal(one.positive_sources, other.positive_sources)
    assert torch.equal(one.negative_sources, other.negative_sources)


@pytest.mark.parametrize("packing", ["packed", "padded"])
@pytest.mark.parametrize("memory_bytes", [2**30, 0], ids=["in memory", "in files"])
@pytest.mark.parametrize("directions", ["both", "negative"])
def test_rows_are_what_the_model_itself_computes(packing: Any, memory_bytes: int, directions: Any) -> None:
    decoder, rows = inspect_decoder(tiny_model()), tiny_rows(directions=directions, first_pair=7)
    cache = build_cache(decoder, rows, LAYERS[::-1], packing=packing, memory_bytes=memory_bytes, micro_batch_tokens=150)
    shared = cache.shared_prefix_length
    assert 0 < shared <= rows.prefix_length
    assert len(cache) == len(rows.rows)

    def whole(ids: Any) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            states = decoder.model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states
        return torch.stack([states[layer + 1][0] for layer in LAYERS], 1), states[-1][0]

    total = 0
    for number, row in enumerate(rows.rows):
        found = cache.row(number)
        base, _ = whole(row.base.ids)
        sources, final = whole(row.source.ids)
        assert found.row is row
        assert cache.base_length(number) == len(found.base_hidden) == len(row.base.ids) - shared
        torch.testing.assert_close(found.base_hidden, base[shared:, 0], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(found.source, sources[row.source_position], rtol=1e-3, atol=1e-3)
        predicting = slice(row.source.prompt_length - 1, len(row.source.ids) - 1)
        torch.testing.assert_close(found.target_final, final[predicting], rtol=1e-3, atol=1e-3)
        total += found.base_hidden.nbytes + found.target_final.nbytes
    for prompts, side in (
        (rows.positive_prompts, cache.positive_sources),
        (rows.negative_prompts, cache.negative_sources),
    ):
        expected = torch.stack([whole(prompt)[0][-1] for prompt in prompts])
        torch.testing.assert_close(side, expected, rtol=1e-3, atol=1e-3)
        total += side.nbytes
    assert cache.nbytes == total
    if cache.folder is not None:
        cache.folder.cleanup()


def test_caches_share_a_runner() -> None:
    decoder, rows, held_out = inspect_decoder(tiny_model()), tiny_rows(), tiny_rows(PAIRS[:2])
    runner = make_runner(decoder, rows_prefix([rows, held_out], rows.prefix_length))
    caches = [build_cache(decoder, each, LAYERS, runner=runner) for each in (rows, held_out)]
    assert all(cache.runner is runner for cache in caches)
    assert_same_bits(caches[0], build_cache(decoder, rows, LAYERS))


def test_prefix_of_rows_ends_before_every_source_position() -> None:
    rows = tiny_rows(PAIRS[:1], directions="negative")
    ids = rows.rows[0].base.ids
    same = dataclasses.replace(rows, positive_prompts=(ids[:9],), negative_prompts=(ids[:8],))
    same = dataclasses.replace(same, rows=(dataclasses.replace(rows.rows[0], source=rows.rows[0].base),))
    assert rows_prefix([same], 100) == ids[:7]
    assert rows_prefix([same, rows], 3) == ids[:3]


def test_runner_that_does_not_fit_is_refused() -> None:
    decoder, rows = inspect_decoder(tiny_model()), tiny_rows()
    prefix = rows_prefix([rows], rows.prefix_length)
    other = inspect_decoder(tiny_model(seed=1))
    with pytest.raises(InvalidInputError, match="runner: expected one of the same model, got one of another model"):
        build_cache(decoder, rows, LAYERS, runner=make_runner(other, prefix))
    begins = "expected every sequence to begin with the runner's prefix of {} tokens and to go on, got one of "
    wrong = (*prefix[:-1], prefix[-1] + 1)
    with pytest.raises(InvalidInputError, match=begins.format(len(prefix))):
        build_cache(decoder, rows, LAYERS, runner=make_runner(decoder, wrong))
    with pytest.raises(InvalidInputError, match=f"expected a prefix of at most {len(prefix) - 1} tokens, got"):
        build_cache(decoder, rows, LAYERS, runner=make_runner(decoder, prefix), prefix_length=len(prefix) - 1)
    row = dataclasses.replace(rows.rows[0], source=rows.rows[0].base)
    whole = row.base.ids[:-3]
    rows = dataclasses.replace(rows, rows=(row,), positive_prompts=(whole,), negative_prompts=(whole,))
    with pytest.raises(InvalidInputError, match=begins.format(len(whole)) + f"{len(whole)} tokens"):
        build_cache(decoder, rows, LAYERS, runner=make_runner(decoder, whole), prefix_length=len(whole))


class Work:
    """A tiny model, rows and a runner, whose passes are counted, and may be interrupted before one of them."""

    def __init__(self, folder: Path, rows: TokenRows | None = None, packing: Any = "padded", **model: Any) -> None:
        self.rows = tiny_rows() if rows is None else rows
        self.decoder: Decoder = inspect_decoder(tiny_model(**model))
        self.runner: Runner = make_runner(self.decoder, rows_prefix([self.rows], self.rows.prefix_length), packing)
        self.folder, self.passes = folder, 0
        self.batches: list[Any] = []  # what each pass was given
        self.before_pass: Callable[[int], None] = lambda number: None
        own = self.runner.capture

        def capture(*args: Any, **options: Any) -> Any:
            self.before_pass(self.passes)
            self.passes += 1
            self.batches.append((args, options))
            return own(*args, **options)

        self.runner.capture = capture  # type: ignore[method-assign]

    def store(self) -> ActivationStore:
        return ActivationStore(self.folder, cache_identity(self.runner, LAYERS))

    def build(self, store: ActivationStore | None, **settings: Any) -> ActivationCache:
        """The cache; `passes` says how many it took."""
        self.passes, self.batches = 0, []
        settings = {"micro_batch_tokens": BATCH_TOKENS, "rows": self.rows, **settings}
        return build_cache(self.decoder, settings.pop("rows"), LAYERS, runner=self.runner, store=store, **settings)

    def interrupt(self, number: int) -> None:
        """Build until the pass of that number, from 0, and be interrupted there."""

        def stop(reached: int) -> None:
            if reached == number:
                raise KeyboardInterrupt

        self.before_pass = stop
        with pytest.raises(KeyboardInterrupt):
            self.build(self.store())
        self.before_pass = lambda number: None


def all_bits(store: ActivationStore) -> dict[str, Any]:
    keys = [json.loads(line)["key"] for path in store.path.glob("*.jsonl") for line in path.read_text().splitlines()]
    assert len(set(keys)) == len(keys)
    found = {key: store.get(key) or {} for key in keys}
    return {key: {name: tensor.view(torch.uint8).tolist() for name, tensor in found[key].items()} for key in keys}


@pytest.mark.parametrize("packing", ["packed", "padded"])
@pytest.mark.parametrize("directions", ["both", "positive"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_store_changes_no_bit_and_spares_every_pass(packing: Any, directions: Any, dtype: Any, tmp_path: Path) -> None:
    work = Work(tmp_path, tiny_rows(directions=directions, first_pair=3), packing, dtype=dtype)
    without = work.build(None)
    passes = work.passes
    first = work.build(work.store())
    assert work.passes == passes > 5
    again = work.build(work.store())
    assert work.passes == 0
    for cache in (first, again):
        assert_same_bits(without, cache)
        assert cache.folder is None
        assert cache.nbytes == without.nbytes
        losses, expected = (
            DivergenceObjective(work.decoder, each.runner, each.layers, prefix_length=work.rows.prefix_length).evaluate(
                [each.row(number) for number in range(len(each))], leave_alone
            )
            for each in (cache, without)
        )
        assert torch.equal(losses, expected)


@pytest.mark.parametrize("packing", ["packed", "padded"])
@pytest.mark.parametrize("twice", [False, True], ids=["each pair once", "each pair twice"])
def test_interrupted_pass_ends_with_the_same_bits(packing: Any, twice: bool, tmp_path: Path) -> None:
    pairs = [*PAIRS.to_records(), *PAIRS.to_records()] if twice else PAIRS.to_records()
    rows = tiny_rows(ContrastivePairs.from_any(pairs))
    whole = Work(tmp_path / "whole", rows, packing)
    expected = whole.build(whole.store())
    passes = whole.passes
    for number in (0, 1, passes // 2, passes - 1):
        work = Work(tmp_path / str(number), rows, packing)
        work.interrupt(number)
        resumed = work.build(work.store())
        assert work.passes == passes - number
        assert_same_bits(resumed, expected)
        assert all_bits(work.store()) == all_bits(whole.store())


@pytest.mark.parametrize("place", [0, 7, 13, -2])
def test_missing_entry_runs_its_whole_batch_alone(place: int, tmp_path: Path) -> None:
    work = Work(tmp_path)
    expected = work.build(None)
    store = work.store()
    work.build(store)
    batches = work.batches
    (index,) = store.path.glob("*.jsonl")
    broken = json.loads(index.read_text().splitlines()[place])
    data = bytearray(index.with_suffix(".bin").read_bytes())
    data[next(iter(broken["tensors"].values()))["offset"]] ^= 1
    index.with_suffix(".bin").write_bytes(data)
    assert_same_bits(work.build(work.store()), expected)
    (batch,) = work.batches
    assert batch in batches
    assert len(batch[0][0]) > 1
    (added,) = (path for path in store.path.glob("*.jsonl") if path != index)
    assert [json.loads(line)["key"] for line in added.read_text().splitlines()] == [broken["key"]]
    assert_same_bits(work.build(work.store()), expected)
    assert work.passes == 0


def test_other_batches_give_valid_results(tmp_path: Path) -> None:
    work = Work(tmp_path)
    expected = work.build(None)
    work.interrupt(3)
    resumed = work.build(work.store(), micro_batch_tokens=60)
    assert work.passes > 0
    for number in range(len(expected)):
        for name in ("base_hidden", "target_final", "source"):
            found, right = (getattr(cache.row(number), name) for cache in (resumed, expected))
            torch.testing.assert_close(found, right, rtol=1e-3, atol=1e-3)
    work.build(work.store(), micro_batch_tokens=10**6)
    assert work.passes == 0


def test_fewer_pairs_are_found_and_more_are_added(tmp_path: Path) -> None:
    work = Work(tmp_path)
    work.build(work.store(), rows=tiny_rows(PAIRS[:3]))
    assert work.passes > 0
    work.build(work.store(), rows=tiny_rows(PAIRS[1:3]))
    assert work.passes == 0
    work.build(work.store(), micro_batch_tokens=1)
    assert work.passes == 2 * 2 * 2  # a base and a source in each direction of two pairs


KILLED = """
import os, signal, sys
sys.path.insert(0, "tests")
from test_cache import *
cache_module.COMMIT_SECONDS = 0.0
torch.set_num_threads(1)
work = Work(Path(sys.argv[1]))
work.before_pass = lambda number: os.kill(os.getpid(), signal.SIGKILL) if number == int(sys.argv[2]) else None
work.build(work.store())
"""


@pytest.mark.parametrize("number", [0, 1, 4])
def test_sigkill_loses_only_what_was_not_committed(number: int, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "killed"), str(number)],
        cwd=ROOT,
        capture_output=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    whole = Work(tmp_path / "whole")
    expected = whole.build(whole.store())
    work = Work(tmp_path / "killed")
    assert_same_bits(work.build(work.store()), expected)
    assert work.passes == whole.passes - number


def test_what_another_process_stores_meanwhile_is_not_computed(tmp_path: Path) -> None:
    work, other = Work(tmp_path), Work(tmp_path)

    def meanwhile(number: int) -> None:
        if number == 1:
            other.build(other.store())

    work.before_pass = meanwhile
    cache = work.build(work.store())
    assert work.passes == 2
    assert other.passes > 2
    assert_same_bits(cache, other.build(None))


def test_commits_are_not_made_after_every_fast_batch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    own, commits = StoreWriter.commit, []

    def commit(writer: StoreWriter) -> None:
        commits.append(1)
        own(writer)

    monkeypatch.setattr(StoreWriter, "commit", commit)
    work = Work(tmp_path)
    monkeypatch.setattr(cache_module, "COMMIT_SECONDS", 1000.0)
    work.build(work.store())
    assert len(commits) == 1
    work.store().remove()
    monkeypatch.setattr(cache_module, "COMMIT_SECONDS", 0.0)
    work.build(work.store())
    assert len(commits) == 2 + work.passes


def test_full_disk_keeps_the_batches_before(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    work = Work(tmp_path)
    work.build(None)
    passes = work.passes
    own, room = io.FileIO.write, [20_000]

    class File(io.FileIO):
        def write(self, content: Any) -> int:
            room[0] -= len(content)
            if room[0] < 0 and str(self.name).endswith(".bin"):
                raise OSError(errno.ENOSPC, "No space left on device")
            return own(self, content)

    with monkeypatch.context() as patched:
        patched.setattr(io, "FileIO", File)
        with pytest.raises(StorageError, match=r"MiB free for cached activations, got No space left on device\. Free"):
            work.build(work.store())
    stopped_at = work.passes
    assert 1 < stopped_at < passes
    work.build(work.store())
    assert work.passes == passes - stopped_at + 1


def test_too_little_room_is_found_before_the_first_pass(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    work = Work(tmp_path)
    cache = work.build(None)
    free = cache.nbytes - 1
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(10**9, 10**9, free))
    with pytest.raises(StorageError, match=r"MiB free for cached activations, got 0 MiB\. Free some space"):
        work.build(work.store())
    assert work.passes == 0
    free += 1
    work.interrupt(3)
    found = [work.store().get(key) or {} for key in all_bits(work.store())]
    free -= sum(tensor.nbytes for entry in found for tensor in entry.values()) + 1
    with pytest.raises(StorageError, match=r"MiB free for cached activations, got 0 MiB\. Free some space"):
        work.build(work.store())
    free += 1
    work.build(work.store())
    free = 0
    work.build(work.store())
    assert work.passes == 0


def test_row_that_is_not_finite_is_not_stored(tmp_path: Path) -> None:
    work = Work(tmp_path)
    model: Any = work.decoder.model
    model.get_input_embeddings().weight.data[work.rows.rows[8].base.ids[-1]] = float("nan")
    store = work.store()
    for _ in range(2):
        with pytest.raises(NonFiniteError, match=r"pair \d toward \w+: .*expected finite numbers, got NaN"):
            work.build(store)
    assert all(torch.isfinite(tensor).all() for key in all_bits(store) for tensor in (store.get(key) or {}).values())


def test_progress_begins_with_what_was_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bars = []

    class Bar(cache_module.tqdm):  # type: ignore[name-defined]
        def __init__(self, **options: Any) -> None:
            super().__init__(**{**options, "file": io.StringIO(), "disable": False})
            bars.append((self, self.n))

    monkeypatch.setattr(cache_module, "tqdm", Bar)
    work = Work(tmp_path)
    work.interrupt(3)
    work.build(work.store())
    (first, started), (second, resumed) = bars
    assert started == 0 < first.n == resumed < second.n
    assert second.n == second.total == first.total
    assert work.build(work.store())
    assert len(bars) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": [1]}, r"layers: expected \[1, 3\], got \[1\]"),
        ({"model": "0"}, "model: expected '[0-9a-f]{64}', got '0'"),
        ({"packing": "packed"}, "packing: expected 'padded', got 'packed'"),
        ({"prefix": None}, "prefix: expected '[0-9a-f]{64}', got None"),
    ],
)
def test_store_for_something_else_is_refused(change: Any, message: str, tmp_path: Path) -> None:
    work = Work(tmp_path)
    with pytest.raises(InvalidInputError, match=f"store of activations: {message}. Open the store with the `cache_id"):
        work.build(ActivationStore(tmp_path, {**cache_identity(work.runner, LAYERS), **change}))


def test_identity_names_what_changes_the_values(tmp_path: Path) -> None:
    work = Work(tmp_path)
    prefix = work.runner.prefix_ids
    own = cache_identity(work.runner, LAYERS)
    others = [
        cache_identity(work.runner, [1]),
        cache_identity(work.runner, LAYERS, name="tiny"),
        cache_identity(work.runner, LAYERS, revision="abc"),
        cache_identity(make_runner(work.decoder, prefix[:-1], "padded"), LAYERS),
        cache_identity(make_runner(work.decoder, (*prefix[:-1], 9), "padded"), LAYERS),
        cache_identity(make_runner(work.decoder, prefix, "packed"), LAYERS),
        cache_identity(make_runner(work.decoder, prefix, "padded", "reference"), LAYERS, "reference"),
        cache_identity(Work(tmp_path, seed=1).runner, LAYERS),
        cache_identity(Work(tmp_path, dtype=torch.bfloat16).runner, LAYERS),
    ]
    identities = [json.dumps(identity, sort_keys=True) for identity in (own, *others)]
    assert len(set(identities)) == len(identities)
    assert cache_identity(Work(tmp_path).runner, LAYERS[::-1], "cpp") == own
    assert work.build(ActivationStore(tmp_path, {**own, "name": "tiny", "revision": "abc"}))


def test_entry_that_vanished_says_so(tmp_path: Path) -> None:
    work = Work(tmp_path)
    store = work.store()
    cache = work.build(store)
    store.remove()
    with pytest.raises(StorageError, match=r"cached activations: expected an entry \w+, got none any more\. Run again"):
        cache.row(0)
