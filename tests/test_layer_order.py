"""Activations cached layer by layer: the bits of a pass batch by batch, each layer read once, resumed after a kill."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from test_activation_store import FullDisk
from tiny_models import tiny_model, tiny_tokenizer
from tiny_runs import PAIRS, tiny_config

import cdas_fast
from cdas_fast import ContrastivePairs, SteeringVector, load_model, storage
from cdas_fast.data.prompts import PromptFormat
from cdas_fast.data.rows import TokenRows, tokenize_pairs
from cdas_fast.distributed.processes import Processes
from cdas_fast.errors import NonFiniteError, StorageError
from cdas_fast.models.layer_weights import LayerWeights
from cdas_fast.models.packed import Runner, make_runner
from cdas_fast.models.skeleton import layer_weights
from cdas_fast.models.structure import inspect_decoder
from cdas_fast.training import cache as cache_module
from cdas_fast.training import layer_order
from cdas_fast.training.activation_store import ActivationStore, prefix_key
from cdas_fast.training.cache import build_cache, cache_identity, rows_prefix
from cdas_fast.training.layer_order import PROGRESS, LayerOrderPass
from cdas_fast.training.sequences import CachedSequences, SequencePass, cached_sequences, check_pass, merged_passes

ROOT = Path(__file__).resolve().parents[1]
LAYERS = 5
TOKENS = 150


def rows_of(pairs: Any = PAIRS) -> TokenRows:
    return tokenize_pairs(pairs, PromptFormat(tiny_tokenizer()), max_output_tokens=12)


def concept(number: int) -> ContrastivePairs:
    return ContrastivePairs.from_any(
        [
            {**record, "concept_id": number, "concept": f"the sea, {number}", "positive_output": f"The sea! {number}"}
            for record in PAIRS[: 2 + number].to_records()
        ]
    )


class Setting:
    """A streamed model, its runner, and the sequences of some sets of rows."""

    def __init__(
        self, folder: Path, dtype: str, packing: Any, layers: tuple[int, ...], sets: Iterable[TokenRows]
    ) -> None:
        self.decoder = inspect_decoder(load_model(folder, device="cpu", dtype=dtype, resident_layers=0)[0])
        self.layers, self.rows = layers, list(sets)
        self.prefix = rows_prefix(self.rows, self.rows[0].prefix_length)
        assert len(self.prefix) > 5
        self.runner: Runner = make_runner(self.decoder, self.prefix, packing)

    @property
    def weights(self) -> LayerWeights:
        weights = layer_weights(self.decoder.model)
        assert weights is not None
        return weights

    @property
    def sequences(self) -> list[CachedSequences]:
        return [cached_sequences(rows, self.layers, len(self.prefix)) for rows in self.rows]

    @property
    def passes(self) -> list[SequencePass]:
        return [*merged_passes(self.sequences), check_pass(self.sequences[0], len(self.prefix))]

    def store(self, folder: Path) -> ActivationStore:
        return ActivationStore(folder, cache_identity(self.runner, self.layers))

    def in_layer_order(self, store: ActivationStore, scratch: Path, **options: Any) -> None:
        settings = {"micro_batch_tokens": TOKENS, "progress": False, **options}
        LayerOrderPass(self.runner, self.weights, self.passes, store, scratch, **settings).run()

    def batch_by_batch(self, store: ActivationStore) -> None:
        cache_module._run(self.passes, self.runner, store, TOKENS, "", False)

    def keys(self) -> set[str]:
        return {sequence.key for one in self.passes for sequence in one.sequences}


def assert_same_entries(one: ActivationStore, other: ActivationStore, keys: Iterable[str]) -> None:
    for key in keys:
        found, expected = one.get(key), other.get(key)
        assert found is not None
        assert expected is not None
        assert found.keys() == expected.keys()
        for name, tensor in found.items():
            assert torch.equal(tensor, expected[name]), (key, name)


@pytest.mark.parametrize(
    ("layers", "memory_bytes"),
    [((1,), 2**30), ((0, 2, 4), 0), ((4,), 2**30)],
    ids=["one layer", "several, mapped", "the last"],
)
@pytest.mark.parametrize("packing", ["packed", "padded"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bits_of_a_pass_batch_by_batch(
    dtype: str, packing: Any, layers: tuple[int, ...], memory_bytes: int, model_folder: Path, tmp_path: Path
) -> None:
    sets = [rows_of(concept(0)), rows_of(concept(3)), rows_of(PAIRS[1:4])]  # of which one may be held out
    own, other = (Setting(model_folder, dtype, packing, layers, sets) for _ in range(2))
    stores = own.store(tmp_path / "own"), other.store(tmp_path / "other")
    before = own.weights.traffic.layers
    own.in_layer_order(stores[0], tmp_path / "scratch", memory_bytes=memory_bytes)
    assert own.weights.traffic.layers - before == LAYERS, "each is read once"
    other.batch_by_batch(stores[1])
    assert len(own.keys()) > 20
    assert_same_entries(stores[0], stores[1], own.keys())
    assert not (tmp_path / "scratch").exists()
    suffix = torch.randn(10, 32).to(own.decoder.dtype)  # what the runners know of the prefix is the same, too
    from cdas_fast.models.packed import Rows

    found, expected = (
        each.runner.suffix(layers[0], suffix, Rows((6, 4), len(each.prefix))).detach() for each in (own, other)
    )
    assert torch.equal(found, expected)


@pytest.mark.parametrize("packing", ["packed", "padded"])
def test_cache_of_one_concept_is_that_of_the_whole_model(packing: Any, model_folder: Path, tmp_path: Path) -> None:
    """Without the whole pass that the suffix is compared with, batches are those of `build_cache`."""
    own = Setting(model_folder, "float32", packing, (1, 3), [rows_of()])
    store = own.store(tmp_path)
    LayerOrderPass(
        own.runner, own.weights, own.sequences[0].passes, store, tmp_path / "scratch", micro_batch_tokens=TOKENS
    ).run()
    options: Any = {"packing": packing, "micro_batch_tokens": TOKENS}
    plain = inspect_decoder(load_model(model_folder, device="cpu")[0])
    expected = build_cache(plain, own.rows[0], own.layers, **options)
    before = own.weights.traffic.layers
    found = build_cache(own.decoder, own.rows[0], own.layers, runner=own.runner, store=store, micro_batch_tokens=TOKENS)
    assert own.weights.traffic.layers == before, "nothing was computed again"
    for number in range(len(found)):
        for name in ("base_hidden", "target_final", "source"):
            assert torch.equal(getattr(found.row(number), name), getattr(expected.row(number), name)), (number, name)
    assert torch.equal(found.positive_sources, expected.positive_sources)
    assert torch.equal(found.negative_sources, expected.negative_sources)


@pytest.mark.parametrize("packing", ["packed", "padded"])
def test_what_is_stored_needs_neither_embedding_nor_layers(packing: Any, model_folder: Path, tmp_path: Path) -> None:
    first = Setting(model_folder, "float32", packing, (1,), [rows_of()])
    first.in_layer_order(first.store(tmp_path), tmp_path / "scratch")
    again = Setting(model_folder, "float32", packing, (1,), [rows_of()])
    model: Any = again.decoder.model
    model.get_input_embeddings().forward = None  # would fail
    before = again.weights.traffic.layers
    again.in_layer_order(again.store(tmp_path), tmp_path / "scratch")
    assert again.weights.traffic.layers == before
    assert not (tmp_path / "scratch").exists()
    cache = build_cache(
        again.decoder, again.rows[0], (1,), runner=again.runner, store=again.store(tmp_path), micro_batch_tokens=TOKENS
    )
    assert len(cache) == len(again.rows[0].rows)


def test_concept_that_joins_is_all_that_is_run(model_folder: Path, tmp_path: Path) -> None:
    sets = [rows_of(concept(0)), rows_of(concept(3))]
    first = Setting(model_folder, "float32", "packed", (1,), sets[:1])
    store = first.store(tmp_path)
    first.in_layer_order(store, tmp_path / "scratch")
    both = Setting(model_folder, "float32", "packed", (1,), sets)
    assert both.prefix == first.prefix
    stored, before = store.size, {path.name for path in store.path.glob("*.bin")}
    both.in_layer_order(both.store(tmp_path), tmp_path / "scratch", micro_batch_tokens=1)  # a batch a sequence
    assert both.store(tmp_path).find(both.keys()) == both.keys()
    new = [path for path in store.path.glob("*.bin") if path.name not in before]
    assert sum(path.stat().st_size for path in new) < 1.7 * stored, "what was there is not stored again"


def test_processes_divide_the_batches(model_folder: Path, tmp_path: Path) -> None:
    whole = Setting(model_folder, "float32", "packed", (1, 3), [rows_of()])
    expected = whole.store(tmp_path / "whole")
    whole.in_layer_order(expected, tmp_path / "scratch")
    for rank in range(3):
        each = Setting(model_folder, "float32", "packed", (1, 3), [rows_of()])
        each.in_layer_order(each.store(tmp_path / "parts"), tmp_path / "parts.scratch", processes=Processes(rank, 3))
    store = whole.store(tmp_path / "parts")
    assert_same_entries(store, expected, whole.keys())
    assert not (tmp_path / "parts.scratch").exists()


# Interruptions


@pytest.fixture
def saves_after_every_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time stands still, so that a checkpoint has never taken any."""
    monkeypatch.setattr(layer_order, "time", SimpleNamespace(monotonic=lambda: 0.0))


def interrupted(setting: Setting, store: ActivationStore, scratch: Path, at: int, **options: Any) -> None:
    """Stop when layer `at` has been run for the first batch, and a checkpoint was written after each before."""
    own = LayerOrderPass._through

    def stop(self: LayerOrderPass, layer: int, *args: Any) -> None:
        own(self, layer, *args)
        if layer == at:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LayerOrderPass, "_through", stop)
        with pytest.raises(KeyboardInterrupt):
            setting.in_layer_order(store, scratch, checkpoint_seconds=0.0, **options)


@pytest.mark.usefixtures("saves_after_every_layer")
@pytest.mark.parametrize(
    ("dtype", "packing", "memory_bytes"),
    [("float32", "packed", 2**30), ("float32", "padded", 0), ("bfloat16", "packed", 0)],
    ids=["packed", "padded, mapped", "bfloat16, packed, mapped"],
)
@pytest.mark.parametrize("at", range(LAYERS))
def test_interrupted_at_each_layer(
    at: int, dtype: str, packing: Any, memory_bytes: int, model_folder: Path, tmp_path: Path
) -> None:
    sets, layers = [rows_of(concept(0)), rows_of()], (1, 3)
    whole = Setting(model_folder, dtype, packing, layers, sets)
    expected = whole.store(tmp_path / "whole")
    whole.batch_by_batch(expected)
    first = Setting(model_folder, dtype, packing, layers, sets)
    interrupted(first, first.store(tmp_path / "store"), tmp_path / "scratch", at)
    assert (tmp_path / "scratch").exists()
    again = Setting(model_folder, dtype, packing, layers, sets)
    again.weights.keep(())  # nor what looking at the model has left in a slot
    store, before = again.store(tmp_path / "store"), again.weights.traffic.layers
    again.in_layer_order(store, tmp_path / "scratch", memory_bytes=memory_bytes)
    assert again.weights.traffic.layers - before == LAYERS - at, "those before are not read again"
    assert_same_entries(store, expected, whole.keys())
    assert not (tmp_path / "scratch").exists()
    whole.in_layer_order(whole.store(tmp_path / "prefix"), tmp_path / "scratch")
    assert_same_entries(store, whole.store(tmp_path / "prefix"), [prefix_key(whole.prefix, layers[0])])


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def of_another_model(path: Path) -> None:
    with safe_open(str(path), framework="pt") as file:
        metadata = file.metadata()
    save_file(load_file(path), path, metadata={**metadata, "identity": "another"})


def without_metadata(path: Path) -> None:
    save_file(load_file(path), path)


@pytest.mark.usefixtures("saves_after_every_layer")
@pytest.mark.parametrize("change", [truncate, empty, of_another_model, without_metadata])
def test_checkpoint_that_is_not_this_ones_is_not_used(
    change: Callable[[Path], None], model_folder: Path, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    setting = Setting(model_folder, "float32", "packed", (1, 3), [rows_of()])
    store, scratch = setting.store(tmp_path / "store"), tmp_path / "scratch"
    interrupted(setting, store, scratch, 3)
    change(next(scratch.glob(f"*/{PROGRESS}")))
    before = setting.weights.traffic.layers
    setting.in_layer_order(store, scratch)
    assert setting.weights.traffic.layers - before >= LAYERS - 3
    broken = change in (truncate, empty)
    assert ("not used" in caplog.text) == broken, caplog.text
    assert not broken or re.search(r"layer-order\.safetensors: not used \(.*\); the pass begins anew", caplog.text)
    expected = setting.store(tmp_path / "expected")
    setting.batch_by_batch(expected)
    assert_same_entries(store, expected, setting.keys())


@pytest.mark.usefixtures("saves_after_every_layer")
def test_passes_over_other_sequences_leave_a_checkpoint_alone(model_folder: Path, tmp_path: Path) -> None:
    """As of processes that divide the concepts among them."""
    setting = Setting(model_folder, "float32", "packed", (1, 3), [rows_of()])
    store, scratch = setting.store(tmp_path / "store"), tmp_path / "scratch"
    interrupted(setting, store, scratch, 3)
    other = Setting(model_folder, "float32", "packed", (1, 3), [rows_of(concept(0))])
    other.in_layer_order(other.store(tmp_path / "other"), scratch)
    assert len(list(scratch.glob(f"*/{PROGRESS}"))) == 1
    before = setting.weights.traffic.layers
    setting.in_layer_order(store, scratch)
    assert setting.weights.traffic.layers - before < LAYERS


@pytest.mark.usefixtures("saves_after_every_layer")
def test_checkpoint_of_other_batches_is_not_used(model_folder: Path, tmp_path: Path) -> None:
    setting = Setting(model_folder, "float32", "packed", (1, 3), [rows_of()])
    store, scratch = setting.store(tmp_path / "store"), tmp_path / "scratch"
    interrupted(setting, store, scratch, 1)
    again = Setting(model_folder, "float32", "packed", (1, 3), [rows_of()])
    before = again.weights.traffic.layers
    again.in_layer_order(store, scratch, micro_batch_tokens=70)
    assert again.weights.traffic.layers - before == LAYERS
    other = Setting(model_folder, "float32", "packed", (1, 3), [rows_of()])
    expected = other.store(tmp_path / "expected")
    other.in_layer_order(expected, scratch, micro_batch_tokens=70)
    assert_same_entries(store, expected, setting.keys())


def test_a_minute_lies_between_checkpoints(monkeypatch: pytest.MonkeyPatch, model_folder: Path, tmp_path: Path) -> None:
    """And ten times as long as the last one took."""
    now = 0.0
    calls: list[int] = []
    saves: list[tuple[int, float]] = []

    def layer_takes(self: LayerOrderPass, layer: int, *args: Any) -> None:
        nonlocal now
        now += 4.0 if calls[-1:] != [layer] else 0.0
        calls.append(layer)
        own(self, layer, *args)

    def save(self: LayerOrderPass, layer: int, *args: Any) -> None:
        nonlocal now
        saves.append((layer, now))
        now += 2.0

    own = LayerOrderPass._through
    monkeypatch.setattr(layer_order, "time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(LayerOrderPass, "_through", layer_takes)
    monkeypatch.setattr(LayerOrderPass, "_save", save)
    setting = Setting(model_folder, "float32", "packed", (3,), [rows_of()])
    options: Any = {"micro_batch_tokens": 1}  # many batches
    setting.in_layer_order(setting.store(tmp_path / "one"), tmp_path / "scratch", **options)
    assert saves == []
    assert now == 20
    setting.in_layer_order(setting.store(tmp_path / "two"), tmp_path / "scratch", checkpoint_seconds=3, **options)
    assert saves == [(1, 24.0)], "the next one would come 20 seconds after its end"


def test_full_disk_is_found_before_the_pass(
    monkeypatch: pytest.MonkeyPatch, model_folder: Path, tmp_path: Path
) -> None:
    setting = Setting(model_folder, "float32", "packed", (1,), [rows_of()])
    store = setting.store(tmp_path / "store")
    monkeypatch.setattr(layer_order, "shutil", SimpleNamespace(disk_usage=lambda place: SimpleNamespace(free=10)))
    message = r"expected 0 MiB free for hidden states, got 0 MiB\. Free some space, or choose another folder"
    with pytest.raises(StorageError, match=message):
        setting.in_layer_order(store, tmp_path / "scratch", memory_bytes=0)


@pytest.mark.usefixtures("saves_after_every_layer")
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_full_disk_loses_nothing(
    share: float, monkeypatch: pytest.MonkeyPatch, model_folder: Path, tmp_path: Path
) -> None:
    setting = Setting(model_folder, "float32", "packed", (1, 3), [rows_of(concept(0)), rows_of()])
    expected, store = (setting.store(tmp_path / name) for name in ("whole", "store"))
    scratch = tmp_path / "scratch"
    setting.in_layer_order(expected, scratch, checkpoint_seconds=0.0)
    with monkeypatch.context() as patch:
        FullDisk(patch, int(share * expected.size), ".bin")
        with pytest.raises(StorageError, match=r"No space left on device\. Free some space or choose another folder"):
            setting.in_layer_order(store, scratch, checkpoint_seconds=0.0)
    reached = int(safe_open(str(next(scratch.glob(f"*/{PROGRESS}"))), framework="pt").metadata()["layer"])
    before = setting.weights.traffic.layers
    assert reached >= 1
    setting.weights.keep(())
    setting.in_layer_order(store, scratch)
    assert setting.weights.traffic.layers - before == LAYERS - reached
    assert_same_entries(store, expected, setting.keys())


@pytest.mark.usefixtures("saves_after_every_layer")
def test_full_disk_keeps_the_checkpoint_before(
    monkeypatch: pytest.MonkeyPatch, model_folder: Path, tmp_path: Path
) -> None:
    setting = Setting(model_folder, "float32", "packed", (1, 3), [rows_of()])
    store, scratch = setting.store(tmp_path / "store"), tmp_path / "scratch"
    own: Any = vars(storage)["save_file"]
    saved = 0

    def save(tensors: Any, path: str, metadata: Any) -> None:
        nonlocal saved
        saved += 1
        own(tensors, path, metadata)
        if saved == 3:
            with Path(path).open("r+b") as file:
                file.truncate(100)
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(storage, "save_file", save)
        with pytest.raises(StorageError, match="no space left on the disk; nothing was overwritten"):
            setting.in_layer_order(store, scratch, checkpoint_seconds=0.0)
    before = setting.weights.traffic.layers
    setting.weights.keep(())
    setting.in_layer_order(store, scratch)
    assert setting.weights.traffic.layers - before == LAYERS - 2
    expected = setting.store(tmp_path / "expected")
    setting.batch_by_batch(expected)
    assert_same_entries(store, expected, setting.keys())


# Whole runs

RECORDS = [record for number in (0, 1) for record in concept(number).to_records()]
SETTINGS: dict[str, Any] = {"checkpoint_every": 2, "epochs": 2, "micro_batch_tokens": TOKENS}


def run(folder: Path, out: Path, pairs: Any = RECORDS, **changes: Any) -> Any:
    others = {name: changes.pop(name) for name in ("resume", "activations_dir", "validation") if name in changes}
    return cdas_fast.train(
        folder,
        None,
        pairs,
        tiny_config(**{**SETTINGS, **changes}),
        output_dir=out,
        device="cpu",
        resident_layers=1,
        progress=False,
        **others,
    )


def test_nothing_is_left_but_the_results(model_folder: Path, tmp_path: Path) -> None:
    run(model_folder, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"concept_0", "concept_1"}
    run(model_folder, tmp_path / "again", activations_dir=tmp_path / "kept", validation=PAIRS[:2].to_records())
    assert all(path.is_dir() and path.suffix == "" for path in (tmp_path / "kept").iterdir()), "stores alone"
    for number in (0, 1):
        vectors = [SteeringVector.from_pretrained(tmp_path / out / f"concept_{number}") for out in ("out", "again")]
        assert vectors[0].cosine(vectors[1]) > 0.9999


def test_run_of_a_streamed_model_is_that_of_the_whole_one(model_folder: Path, tmp_path: Path) -> None:
    found = run(model_folder, tmp_path / "out")
    expected = cdas_fast.train(model_folder, None, RECORDS, tiny_config(**SETTINGS), device="cpu", progress=False)
    for number, result in found.concepts.items():
        assert result.vector.cosine(expected.concepts[number].vector) > 0.99999


def test_row_that_is_not_finite_fails_its_concept_alone(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    """Of a letter that only one row contains, the embedding is infinite."""
    tokenizer, model = tiny_tokenizer(), tiny_model()
    (letter,) = tokenizer("Q")["input_ids"]
    with torch.no_grad():
        model.get_input_embeddings().weight[letter] = float("inf")
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    records = [dict(record) for record in RECORDS]
    of_other = [record for record in records if record["concept_id"] == 1]
    of_other[1]["negative_output"] = "plain Q"
    with caplog.at_level(logging.WARNING):
        result = run(tmp_path / "model", tmp_path / "out", records)
    assert list(result.concepts) == [0]
    assert list(result.failed) == [1]
    assert isinstance(result.failed[1], NonFiniteError)
    message = r"pair 1.*: expected finite numbers, got NaN or infinity\. Load the model in float32"
    assert re.search(message, str(result.failed[1])), str(result.failed[1])
    assert re.search(message, caplog.text)
    assert (tmp_path / "out" / ".activations").exists(), "the run is not complete"
    alone = run(tmp_path / "model", tmp_path / "alone", [record for record in records if record["concept_id"] == 0])
    assert result.concepts[0].vector.cosine(alone.vector) > 0.9999
    assert json.loads((tmp_path / "alone" / "config.json").read_text())
