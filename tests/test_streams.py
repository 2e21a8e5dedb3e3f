"""Streams of a GPU that is not there: no layer is copied over memory that is still in use, in whatever order.

A stream is a clock of what it has launched, and of what of the other's it has waited for. Every copy to the device,
every dense weight made and every piece of memory given back is checked against these clocks, as a race detector does:
two uses of the same memory, one of which writes, have to be ordered by events.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_layer_weights import COUNT, layout_of, store_layers
from torch import Tensor

from cdas_fast.models import layer_weights
from cdas_fast.models.layer_weights import LayerWeights, Matrix, _Slot

COMPUTE, COPY = "compute", "copy"
Clock = dict[str, int]


@pytest.fixture
def stored(tmp_path: Path) -> Any:
    """Weights of some layers, and their files."""
    return store_layers(tmp_path)


class Stream:
    """What has been launched on it, and how much of the other's it has waited for."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.clock: Clock = {COMPUTE: 0, COPY: 0}

    def launch(self) -> int:
        self.clock[self.name] += 1
        return self.clock[self.name]

    def record_event(self) -> SimpleNamespace:
        return SimpleNamespace(clock=dict(self.clock), synchronize=lambda: None)

    def wait_event(self, event: Any) -> None:
        for name, launched in event.clock.items():
            self.clock[name] = max(self.clock[name], launched)


class Detector:
    """Keeps who used which memory when, and notes what was not in order."""

    def __init__(self) -> None:
        self.streams = {COMPUTE: Stream(COMPUTE), COPY: Stream(COPY)}
        self.used: dict[int, int] = {}  # memory -> when the compute stream last used it, or what was there before
        self.written: dict[int, int] = {}  # memory -> when a copy to it was last launched
        self.races: list[str] = []
        self.lock = threading.RLock()
        self.current = threading.local()

    def allocated(self, flat: Tensor) -> None:
        with self.lock:
            self.used[flat.data_ptr()] = self.streams[COMPUTE].launch()  # of whoever had the memory last
            self.written.pop(flat.data_ptr(), None)

    def copied(self, flat: Tensor) -> None:
        with self.lock:
            stream = self.streams[COPY]
            if stream.clock[COMPUTE] < self.used[flat.data_ptr()]:
                self.races.append("copied over memory that is in use")
            self.written[flat.data_ptr()] = stream.launch()

    def read(self, flat: Tensor) -> None:
        with self.lock:
            self.waited_for(flat, "read before it was there")
            self.used[flat.data_ptr()] = self.streams[COMPUTE].launch()

    def waited_for(self, flat: Tensor, otherwise: str) -> None:
        if self.streams[COMPUTE].clock[COPY] < self.written.get(flat.data_ptr(), 0):
            self.races.append(otherwise)


@pytest.fixture
def detector(monkeypatch: pytest.MonkeyPatch) -> Detector:
    """Has `LayerWeights` take the CPU for a GPU, with streams that are watched."""
    found = Detector()

    @contextmanager
    def on(stream: Stream) -> Iterator[None]:
        found.current.name = stream.name
        yield
        found.current.name = COMPUTE

    def empty(*args: Any, device: Any = None, pin_memory: bool = False, **kwargs: Any) -> Tensor:
        tensor = torch.empty(*args, **kwargs)
        if device is not None and tensor.dtype == torch.uint8:
            found.allocated(tensor)
        return tensor

    def send(host: Tensor, flat: Tensor) -> None:
        assert found.current.name == COPY
        found.copied(flat)
        flat.copy_(host)

    own_fill, own_let_go = Matrix.fill, LayerWeights._let_go

    def fill(self: Matrix, out: Tensor, tensors: Any) -> None:
        (storage,) = {each.untyped_storage().data_ptr() for each in tensors.values()}
        found.read(torch.empty(0, dtype=torch.uint8).set_(tensors["weight"].untyped_storage()))
        assert storage in found.used
        own_fill(self, out, tensors)

    def let_go(self: LayerWeights, slot: _Slot) -> None:
        own_let_go(self, slot)
        found.waited_for(slot.data, "given back while it is copied to")

    cuda = SimpleNamespace(current_stream=lambda device: found.streams[COMPUTE], stream=on)
    fake = SimpleNamespace(**{**vars(torch), "empty": empty, "cuda": cuda})
    monkeypatch.setattr(layer_weights, "torch", fake)
    monkeypatch.setattr(LayerWeights, "_send", staticmethod(send))
    monkeypatch.setattr(LayerWeights, "_let_go", let_go)
    monkeypatch.setattr(Matrix, "fill", fill)
    return found


def use(detector: Detector, stored: Any, seed: int, passes: int = 12, host_bytes: int | None = None) -> None:
    """Visits and plain uses in random order, or forth and back, with changes of what stays."""
    layers, paths = stored
    chance = random.Random(seed)
    resident = frozenset(chance.sample(range(COUNT), chance.randrange(4)))
    weights = LayerWeights(
        lambda layer: layout_of(paths[layer]),
        COUNT,
        torch.device("cpu"),
        resident=resident,
        slots=chance.choice([2, 3, 4]),
        host_bytes=chance.choice([0, 700, 10**6]) if host_bytes is None else host_bytes,
    )
    weights._stream = detector.streams[COPY]  # type: ignore[assignment]

    def dense(layer: int) -> None:
        found = weights.dense(layer, "a", torch.float32)  # not the stored dtype, so it is made
        assert torch.equal(found, layers[layer]["a"].float())

    for _ in range(passes):
        order = [*range(COUNT), *reversed(range(COUNT))]
        if chance.random() < 0.4:
            chance.shuffle(order)
        for place, layer in enumerate(order):
            if chance.random() < 0.7:
                then = order[place + 1] if place + 1 < len(order) else None
                with weights.visit(layer, chance.choice([then, None])):
                    dense(layer)
                    if chance.random() < 0.3:
                        dense(layer)
            else:
                dense(layer)
        if chance.random() < 0.3:
            weights.keep(frozenset(chance.sample(range(COUNT), chance.randrange(4))))
    weights.release()


@pytest.mark.parametrize("seed", range(25))
def test_nothing_is_copied_over_what_is_in_use(seed: int, detector: Detector, stored: Any) -> None:
    use(detector, stored, seed)
    assert detector.races == []


def ignore_readers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LayerWeights, "_left", lambda self, layer: None)


def ignore_allocations(monkeypatch: pytest.MonkeyPatch) -> None:
    own = LayerWeights._until_now
    from_left = LayerWeights._left

    def left(self: LayerWeights, layer: int) -> None:
        self._until_now = lambda: own(self)  # type: ignore[method-assign]
        from_left(self, layer)
        self._until_now = lambda: None  # type: ignore[method-assign]

    monkeypatch.setattr(LayerWeights, "_until_now", lambda self: None)
    monkeypatch.setattr(LayerWeights, "_left", left)


def ignore_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    own = LayerWeights._copy

    def copy(self: LayerWeights, layer: int, flat: Tensor) -> None:
        own(self, layer, flat)

    monkeypatch.setattr(LayerWeights, "_copy", copy)


@pytest.mark.parametrize(
    ("forget", "race"),
    [
        (ignore_readers, "copied over memory that is in use"),
        (ignore_allocations, "copied over memory that is in use"),
        (ignore_copies, "read before it was there"),
        (ignore_copies, "given back while it is copied to"),
    ],
)
def test_a_wait_that_is_forgotten_is_found(
    forget: Any,
    race: str,
    detector: Detector,
    stored: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    forget(monkeypatch)
    for seed in range(25):
        use(detector, stored, seed, passes=3)
    assert race in detector.races


@pytest.mark.parametrize("locked", [True, False])
def test_two_threads_do_not_fill_the_same_staging_memory(
    locked: bool,
    detector: Detector,
    stored: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A resident layer is loaded while another is read ahead, and no host memory may be pinned for either."""
    busy: list[int] = []
    together = 0
    own = layer_weights.Layout.read_into

    def read_into(self: Any, flat: Tensor) -> None:
        nonlocal together
        busy.append(flat.data_ptr())
        together += busy.count(flat.data_ptr()) > 1
        time.sleep(0.002)
        own(self, flat)
        busy.remove(flat.data_ptr())

    monkeypatch.setattr(layer_weights.Layout, "read_into", read_into)
    if not locked:
        monkeypatch.setattr(layer_weights, "Lock", nullcontext)
        with suppress(AssertionError):  # the weights may be wrong, and at times are
            for seed in range(5):
                use(detector, stored, seed, passes=2, host_bytes=0)
        assert together
        return
    for seed in range(5):
        use(detector, stored, seed, passes=2, host_bytes=0)
    assert not together


@pytest.mark.parametrize(("device", "index"), [("cuda", 1), ("cuda:0", 0), ("cuda:3", 3)])
def test_the_reader_works_by_way_of_its_own_gpu(device: str, index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By number: torch refuses to set a device without one."""
    chosen: list[Any] = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert layer_weights._reader_for(torch.device(device)).submit(lambda: 5).result() == 5
    assert chosen == [index]
    assert layer_weights._reader_for(torch.device("cpu")).submit(lambda: 5).result() == 5
    assert len(chosen) == 1
