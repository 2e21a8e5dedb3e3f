"""Resident layers and the ring of slots: whoever asks gets the right weight, in whatever order."""

from __future__ import annotations

import itertools
import random
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from cdas_fast.errors import InvalidInputError, StorageError
from cdas_fast.models.layer_weights import ALIGNMENT, LayerWeights, Layout, Matrix, spread
from cdas_fast.models.shards import read_header

COUNT = 7
CPU = torch.device("cpu")


def store_layers(folder: Path) -> tuple[list[dict[str, Tensor]], list[Path]]:
    """The weights of seven layers, and their files; sizes that no alignment divides, and that differ."""
    generator = torch.Generator().manual_seed(0)
    layers, paths = [], []
    for layer in range(COUNT):
        tensors = {
            name: torch.randn(shape, generator=generator).to(torch.bfloat16)
            for name, shape in {"a": (3, 5 + layer), "b": (7, 11), "c": (1, 1)}.items()
        }
        paths.append(folder / f"{layer}.safetensors")
        save_file(tensors, str(paths[-1]))
        layers.append(tensors)
    return layers, paths


@pytest.fixture
def stored(tmp_path: Path) -> tuple[list[dict[str, Tensor]], list[Path]]:
    """See `store_layers`."""
    return store_layers(tmp_path)


def layout_of(path: Path) -> Layout:
    stored = read_header(path).items()
    return Layout.of({name: Matrix((each.shape[0], each.shape[1]), {"weight": each}) for name, each in stored})


def make(paths: list[Path], **settings: object) -> LayerWeights:
    return LayerWeights(lambda layer: layout_of(paths[layer]), COUNT, CPU, **settings)  # type: ignore[arg-type]


def test_pieces_are_aligned_and_do_not_overlap(stored: tuple[list[dict[str, Tensor]], list[Path]]) -> None:
    layout = layout_of(stored[1][0])
    places = sorted(
        (begin, begin + layout.matrices[name].pieces[piece].nbytes)
        for name, of_matrix in layout.places.items()
        for piece, begin in of_matrix.items()
    )
    assert all(begin % ALIGNMENT == 0 for begin, _ in places)
    assert all(end <= begin for (_, end), (begin, _) in zip(places, [*places[1:], (layout.nbytes, 0)], strict=True))


@pytest.mark.parametrize("ahead", [True, False], ids=["ahead", "in_time"])
@pytest.mark.parametrize("slots", [2, 3, 5])
@pytest.mark.parametrize("resident", [(), (0, 3, 6), range(COUNT)], ids=["none", "some", "all"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_any_order_gives_the_right_weights(
    dtype: torch.dtype,
    resident: tuple[int, ...],
    slots: int,
    ahead: bool,
    stored: tuple[list[dict[str, Tensor]], list[Path]],
) -> None:
    layers, paths = stored
    weights = make(paths, resident=resident, slots=slots, ahead=ahead)
    chance = random.Random(1)
    for _ in range(200):
        layer, name = chance.randrange(COUNT), chance.choice("abc")
        if chance.random() < 0.5:
            with weights.visit(layer, chance.choice([None, *range(COUNT)])):
                for _ in range(2):
                    assert torch.equal(weights.dense(layer, name, dtype), layers[layer][name].to(dtype))
        else:
            assert torch.equal(weights.dense(layer, name, dtype), layers[layer][name].to(dtype))
    bound = sum(layout_of(paths[layer]).nbytes for layer in resident) + slots * max(
        layout_of(path).nbytes for path in paths
    )
    held = [*weights._kept.values(), *(slot.data for slot in weights._ring)]
    assert sum(each.nbytes for each in held) <= bound
    weights.release()
    assert weights.device_bytes == 0
    assert torch.equal(weights.dense(2, "a", dtype), layers[2]["a"].to(dtype))


def test_a_layer_is_read_once_while_it_is_there(stored: tuple[list[dict[str, Tensor]], list[Path]]) -> None:
    weights = make(stored[1], resident=(1,))
    for layer in (0, 0, 1, 1, 2, 2, 1, 0):
        with weights.visit(layer):
            weights.dense(layer, "a", torch.float32)
    assert weights.traffic.layers == 2
    assert weights.traffic.bytes == sum(layout_of(stored[1][layer]).nbytes for layer in (0, 2))


def test_the_next_layer_is_read_meanwhile(stored: tuple[list[dict[str, Tensor]], list[Path]]) -> None:
    weights = make(stored[1], resident=())
    order = [*range(COUNT), *reversed(range(COUNT))]
    for layer, then in zip(order, [*order[1:], None], strict=True):
        with weights.visit(layer, then):
            deadline = time.monotonic() + 10
            while any(slot.filling is not None and not slot.filling.done() for slot in weights._ring):
                assert time.monotonic() < deadline
                time.sleep(0.001)
    assert weights.traffic.awaited == 1, "the first one alone"
    assert weights.traffic.layers == 2 * COUNT - 3, "three are there at the turn"


def test_nothing_is_read_beyond_what_is_resident(stored: tuple[list[dict[str, Tensor]], list[Path]]) -> None:
    """A backward pass that ends at the first layer of the suffix needs none before it."""
    weights = make(stored[1], resident=range(3, COUNT))
    for layer in (*range(3, COUNT), *reversed(range(3, COUNT))):
        weights.dense(layer, "a", torch.float32)
    assert weights.traffic.layers == 0
    assert weights._ring == []


def test_a_dense_weight_is_made_once_a_visit(stored: tuple[list[dict[str, Tensor]], list[Path]]) -> None:
    weights = make(stored[1])
    with weights.visit(3):
        first = weights.dense(3, "b", torch.float32)
        assert weights.dense(3, "b", torch.float32) is first
    with weights.visit(4):
        assert weights.dense(4, "b", torch.float32).data_ptr() == first.data_ptr(), "in the same memory"


def test_what_is_kept_can_be_changed(stored: tuple[list[dict[str, Tensor]], list[Path]]) -> None:
    layers, paths = stored
    weights = make(paths)
    for layer in range(COUNT):
        weights.dense(layer, "a", torch.bfloat16)
    whole = weights.device_bytes
    weights.keep((5,))
    assert weights.resident == {5}
    assert weights.device_bytes < whole / 4
    assert torch.equal(weights.dense(0, "a", torch.bfloat16), layers[0]["a"])


def test_a_failed_read_is_an_error_each_time_and_can_be_mended(
    stored: tuple[list[dict[str, Tensor]], list[Path]],
) -> None:
    layers, paths = stored
    weights = make(paths, resident=(), slots=2)
    for layer in range(COUNT):
        weights.layout(layer)
    content = paths[3].read_bytes()
    paths[3].write_bytes(content[:-40])
    for _ in range(3):
        with pytest.raises(StorageError, match=r"3\.safetensors: .* The file is truncated"):
            weights.dense(3, "b", torch.float32)
        assert torch.equal(weights.dense(2, "b", torch.bfloat16), layers[2]["b"])
        with pytest.raises(StorageError, match="truncated"), weights.visit(2, then=3), weights.visit(3):
            pass
    paths[3].write_bytes(content)
    assert torch.equal(weights.dense(3, "b", torch.bfloat16), layers[3]["b"])


def test_a_missing_file_names_itself(stored: tuple[list[dict[str, Tensor]], list[Path]]) -> None:
    weights = make(stored[1], resident=range(COUNT))
    weights.layout(1)
    stored[1][1].unlink()
    with pytest.raises(StorageError, match=r"1\.safetensors: .*No such file"):
        weights.dense(1, "a", torch.float32)


def test_the_reader_ends_with_the_weights(stored: tuple[list[dict[str, Tensor]], list[Path]]) -> None:
    before = threading.active_count()
    weights = make(stored[1], resident=())
    with weights.visit(0, then=1):
        pass
    del weights
    deadline = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before


def test_one_slot_is_too_few(stored: tuple[list[dict[str, Tensor]], list[Path]]) -> None:
    with pytest.raises(InvalidInputError, match="slots: expected at least 2, got 1"):
        make(stored[1], slots=1)


@pytest.mark.parametrize(("layers", "count"), [(10, 0), (10, 1), (10, 3), (10, 10), (10, 12), (1, 1), (47, 28)])
def test_resident_layers_are_spread(layers: int, count: int) -> None:
    chosen = sorted(spread(range(5, 5 + layers), count))
    assert len(chosen) == min(count, layers)
    assert set(chosen) <= set(range(5, 5 + layers))
    gaps = [after - before for before, after in itertools.pairwise(chosen)]
    assert not gaps or max(gaps) - min(gaps) <= 1
