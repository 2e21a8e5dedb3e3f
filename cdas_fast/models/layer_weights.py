"""The linear weights of decoder layers: some resident on the device, the others passing through a ring of slots.

    file --read--> slot (a layer's bytes, flat) --dense--> (O, I) in the dtype of the activations

On CUDA a layer goes through pinned host memory, which is kept for the layers that are read again and again, and is
copied on a stream of its own. What a slot holds is known by the layer's number at every use, so that a weight is the
right one or is read again, in whatever order the layers are visited.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Lock
from typing import Protocol

import torch
from torch import Tensor

from cdas_fast.errors import InvalidInputError, expected_got
from cdas_fast.models.quantization import nf4_weight
from cdas_fast.models.shards import StoredTensor
from cdas_fast.ops.nf4 import dequantize_nf4

ALIGNMENT = 64  # bytes, of each tensor in a slot: a cache line, and the widest vector register
SLOTS = 3  # the layer that is visited, the next one, and the last one, which a turn needs again


@dataclass(frozen=True)
class Matrix:
    """The weight (O, I) of a linear map, and the stored tensors that it is made of."""

    shape: tuple[int, int]
    pieces: Mapping[str, StoredTensor]  # "weight", and of 4-bit weights those of `quantization.PIECES`
    quantized: bool = False
    offset: float | None = None  # of the scales of a 4-bit weight

    def is_dense(self, dtype: torch.dtype) -> bool:
        """Whether what is stored is the weight in `dtype`."""
        return not self.quantized and self.pieces["weight"].dtype == dtype

    def fill(self, out: Tensor, tensors: Mapping[str, Tensor]) -> None:
        """Write the weight into `out` (O, I), of the pieces' tensors."""
        if self.quantized:
            dequantize_nf4(nf4_weight(tensors, self.shape, self.offset), out.dtype, out=out)
        else:
            out.copy_(tensors["weight"])


@dataclass(frozen=True)
class Layout:
    """Where the pieces of a layer's matrices lie in a slot."""

    matrices: Mapping[str, Matrix]
    places: Mapping[str, Mapping[str, int]]  # offset in bytes, by matrix and piece
    nbytes: int

    @classmethod
    def of(cls, matrices: Mapping[str, Matrix]) -> Layout:
        """One piece behind the other, in the order in which they lie in their files."""
        pieces = [(name, key, stored) for name, matrix in matrices.items() for key, stored in matrix.pieces.items()]
        end, places = 0, {name: dict.fromkeys(matrix.pieces, 0) for name, matrix in matrices.items()}
        for name, key, stored in sorted(pieces, key=lambda piece: (str(piece[2].path), piece[2].offset)):
            places[name][key] = end
            end += -(-stored.nbytes // ALIGNMENT) * ALIGNMENT
        return cls(matrices, places, end)

    def read_into(self, flat: Tensor) -> None:
        """Read all pieces into a slot, (nbytes,) uint8 on the CPU."""
        for name, matrix in self.matrices.items():
            for key, stored in matrix.pieces.items():
                begin = self.places[name][key]
                stored.read_into(flat[begin : begin + stored.nbytes])

    def tensors(self, flat: Tensor, name: str) -> dict[str, Tensor]:
        """The pieces of a matrix as views of a slot."""
        return {
            key: flat[begin : begin + stored.nbytes].view(stored.dtype).view(stored.shape)
            for key, stored in self.matrices[name].pieces.items()
            for begin in (self.places[name][key],)
        }


class Scratch:
    """Memory for one dense weight at a time, used again and again: new pages would cost more than the conversion."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._flat: dict[torch.dtype, Tensor] = {}

    def room(self, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """Memory of a shape, good until the next call of the same dtype."""
        count, flat = math.prod(shape), self._flat.get(dtype)
        if flat is None or len(flat) < count:
            flat = self._flat[dtype] = torch.empty(count, dtype=dtype, device=self.device)
        return flat[:count].view(shape)

    def release(self) -> None:
        """Give the memory back."""
        self._flat.clear()

    @property
    def nbytes(self) -> int:
        """Size."""
        return sum(flat.nbytes for flat in self._flat.values())


@dataclass
class _Slot:
    data: Tensor  # (bytes of the largest layer so far,) uint8 on the device
    layer: int | None = None
    filling: Future[None] | None = None  # until the layer is there
    copied: torch.cuda.Event | None = None  # on the stream that copies
    read: torch.cuda.Event | None = None  # on the stream that computed with what was there, or whose memory it was
    used: int = 0


@dataclass
class Traffic:
    """What was read so far, of layers that are not resident."""

    layers: int = 0
    bytes: int = 0
    awaited: int = 0  # layers that were asked for and not there yet


class DenseWeights(Protocol):
    """Who makes the weights of layers."""

    def dense(self, layer: int, name: str, dtype: torch.dtype) -> Tensor:
        """A weight (O, I) in `dtype`, for reading until the next call at most."""


@dataclass(frozen=True)
class Handle:
    """Who to ask for one weight: see `cdas_fast.ops.handle_linear`."""

    weights: DenseWeights = field(repr=False)
    layer: int
    name: str

    def dense(self, dtype: torch.dtype) -> Tensor:
        """See `WeightHandle`."""
        return self.weights.dense(self.layer, self.name, dtype)


class LayerWeights:
    """Linear weights of all layers of a model, by layer and name.

    Args:
        layouts: finds out where a layer's weights are stored; called when the layer is first needed.
        count: number of layers.
        device: where they are needed.
        resident: layers that stay on the device once they were needed; all if None.
        slots: layers that may be on the device beside those.
        host_bytes: on CUDA, host memory that may be pinned for layers that are not resident, beside a slot's worth.
        ahead: whether the next layer is read while one is visited.
    """

    def __init__(
        self,
        layouts: Callable[[int], Layout],
        count: int,
        device: torch.device,
        *,
        resident: Collection[int] | None = None,
        slots: int = SLOTS,
        host_bytes: int = 0,
        ahead: bool = True,
    ) -> None:
        if slots < 2:
            raise InvalidInputError(expected_got("slots", "at least 2", slots))
        self.count, self.device, self.slots, self.host_bytes = count, device, slots, host_bytes
        self.traffic = Traffic()
        self.fingerprint = ""  # of the model that they belong to
        self._layouts = layouts
        self._known: dict[int, Layout] = {}
        self._resident = frozenset(range(count) if resident is None else resident)
        self._kept: dict[int, Tensor] = {}  # resident layers
        self._ring: list[_Slot] = []
        self._host: dict[int, Tensor] = {}  # pinned
        self._staging: Tensor | None = None  # pinned, for layers without a place of their own there
        self._dense: dict[tuple[str, torch.dtype], Tensor] = {}  # of the layer that is visited
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}  # for them; see `Scratch`
        self._scratch = Scratch(device)  # for those outside of visits
        self._visited: int | None = None
        self._last: int | None = None
        self._clock = itertools.count(1)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._pinning = Lock()  # of `_host` and `_staging`
        self._reader = _reader_for(device) if ahead else None

    @property
    def resident(self) -> frozenset[int]:
        """Layers that stay on the device."""
        return self._resident

    def layout(self, layer: int) -> Layout:
        """What a layer consists of."""
        if layer not in self._known:
            self._known[layer] = self._layouts(layer)
        return self._known[layer]

    def keep(self, resident: Collection[int]) -> None:
        """Change which layers stay on the device; the memory of the others is given back."""
        self._resident = frozenset(resident)
        for layer in [*self._kept]:
            if layer not in self._resident:
                del self._kept[layer]
        self._buffers.clear()
        self._drop_ring()

    def release(self) -> None:
        """Give all memory back; what is asked for later is read again."""
        self._kept.clear()
        self._host.clear()
        self._buffers.clear()
        self._scratch.release()
        self._drop_ring()

    @property
    def device_bytes(self) -> int:
        """Memory on the device: resident layers, slots, and memory for dense weights."""
        flats = [*self._kept.values(), *(slot.data for slot in self._ring)]
        return sum(flat.nbytes for flat in [*flats, *self._buffers.values()]) + self._scratch.nbytes

    def dense(self, layer: int, name: str, dtype: torch.dtype) -> Tensor:
        """A weight (O, I) in `dtype`; read now if it is not there. For reading until the next call at most.

        Within `visit` of the layer it is made once.
        """
        if layer == self._visited and (name, dtype) in self._dense:
            return self._dense[name, dtype]
        flat = self._flat(layer)
        if layer != self._visited:
            self._expect(layer)
        layout = self.layout(layer)
        matrix, tensors = layout.matrices[name], layout.tensors(flat, name)
        if matrix.is_dense(dtype):
            return tensors["weight"]
        weight = self._room(layer, name, matrix, dtype)
        matrix.fill(weight, tensors)
        if layer == self._visited:
            self._dense[name, dtype] = weight
        return weight

    def _room(self, layer: int, name: str, matrix: Matrix, dtype: torch.dtype) -> Tensor:
        """Memory for a dense weight."""
        if layer == self._visited:
            buffer = self._buffers.get((name, dtype))
            if buffer is None or buffer.shape != matrix.shape:
                buffer = self._buffers[name, dtype] = torch.empty(matrix.shape, dtype=dtype, device=self.device)
            return buffer
        return self._scratch.room(matrix.shape, dtype)

    @contextmanager
    def visit(self, layer: int, then: int | None = None) -> Iterator[None]:
        """Within the context, the layer's dense weights are made once, and layer `then` is read meanwhile."""
        if self._last is not None:  # used outside of visits
            self._left(self._last)
        self._flat(layer)
        self._visited = layer
        try:
            if then is not None:
                self._prefetch(then)
            yield
        finally:
            self._visited = None
            self._dense.clear()
            self._left(layer)

    def _expect(self, layer: int) -> None:
        """Read ahead in the direction in which layers were asked for lately, if any of them had to be read."""
        before, self._last = self._last, layer
        if before is not None and layer != before:
            self._left(before)
            following = layer + (1 if layer > before else -1)
            if self._ring and 0 <= following < self.count:
                self._prefetch(following)

    def _flat(self, layer: int) -> Tensor:
        """The layer's bytes on the device."""
        if layer in self._kept:
            return self._kept[layer]
        if layer in self._resident:
            nbytes = self.layout(layer).nbytes
            flat = self._kept[layer] = self._filled(layer, torch.empty(nbytes, dtype=torch.uint8, device=self.device))
            return flat
        slot = next((slot for slot in self._ring if slot.layer == layer), None)
        if slot is None:
            self.traffic.awaited += 1
            slot = self._fill(layer)
        elif slot.filling is not None and not slot.filling.done():
            self.traffic.awaited += 1
        slot.used = next(self._clock)
        if slot.filling is not None:
            filling, slot.filling = slot.filling, None
            try:
                filling.result()
            except BaseException:
                slot.layer = None  # what it holds is nobody's
                raise
        if slot.copied is not None:
            torch.cuda.current_stream(self.device).wait_event(slot.copied)
            slot.copied = None
        return slot.data

    def _prefetch(self, layer: int) -> None:
        if self._reader is None or layer in self._resident or any(slot.layer == layer for slot in self._ring):
            return
        self._fill(layer)

    def _fill(self, layer: int) -> _Slot:
        """Begin to read a layer into a slot."""
        nbytes = self.layout(layer).nbytes
        if len(self._ring) < self.slots:
            slot = _Slot(torch.empty(nbytes, dtype=torch.uint8, device=self.device), read=self._until_now())
            self._ring.append(slot)
        else:
            read_now = self._last if self._visited is None else self._visited
            slot = self._free_slot([slot for slot in self._ring if slot.layer is None or slot.layer != read_now])
        if slot.filling is not None:  # nobody came for it
            slot.filling.exception()
        slot.layer, slot.filling, slot.used = None, None, next(self._clock)
        if len(slot.data) < nbytes:
            self._let_go(slot)
            slot.data = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
            slot.read = self._until_now()

        def fill() -> None:
            if self._stream is not None and slot.read is not None:
                self._stream.wait_event(slot.read)
            slot.copied = self._copy(layer, slot.data[:nbytes])

        slot.layer = layer
        self.traffic.layers += 1
        self.traffic.bytes += nbytes
        if self._reader is not None:
            slot.filling = self._reader.submit(fill)
        else:
            slot.filling = Future()
            try:
                fill()
                slot.filling.set_result(None)
            except BaseException as error:
                slot.filling.set_exception(error)
        return slot

    @staticmethod
    def _free_slot(slots: Sequence[_Slot]) -> _Slot:
        """Which of the slots that nobody reads now is filled next: the one that was used longest ago."""
        return min(slots, key=lambda slot: slot.used)

    def _left(self, layer: int) -> None:
        """Note on CUDA until when the slot of a layer is read by what was launched so far."""
        if self._stream is None:
            return
        for slot in self._ring:
            if slot.layer == layer:
                slot.read = self._until_now()

    def _until_now(self) -> torch.cuda.Event | None:
        """On CUDA, when all that was launched so far is done, also with memory that was given back meanwhile."""
        return None if self._stream is None else torch.cuda.current_stream(self.device).record_event()

    def _let_go(self, slot: _Slot) -> None:
        """Let whoever gets a slot's memory next wait until nothing is copied to it any more."""
        if slot.filling is not None:
            slot.filling.exception()
        if slot.copied is not None:
            torch.cuda.current_stream(self.device).wait_event(slot.copied)
            slot.copied = None

    def _filled(self, layer: int, flat: Tensor) -> Tensor:
        """Bring a layer into memory that was just allocated."""
        launched = self._until_now()
        if self._stream is not None and launched is not None:
            self._stream.wait_event(launched)
        copied = self._copy(layer, flat)
        if copied is not None:
            torch.cuda.current_stream(self.device).wait_event(copied)
        return flat

    def _copy(self, layer: int, flat: Tensor) -> torch.cuda.Event | None:
        """Bring a layer's bytes into `flat`; on CUDA an event says when they are there."""
        layout = self.layout(layer)
        if self._stream is None:
            layout.read_into(flat)
            return None
        with self._pinning:  # the reader and the thread that computes may both come here
            host = self._host.get(layer)
            if host is None:
                host, stays = self._pinned(layer, layout.nbytes)
                layout.read_into(host)
                if stays:
                    self._host[layer] = host
            with torch.cuda.stream(self._stream):
                self._send(host, flat)
                event = self._stream.record_event()
            if layer not in self._host:
                event.synchronize()  # the staging memory is filled again next time
        return event

    @staticmethod
    def _send(host: Tensor, flat: Tensor) -> None:
        """Copy pinned memory to the device on the current stream; returns before that is done."""
        flat.copy_(host, non_blocking=True)

    def _pinned(self, layer: int, nbytes: int) -> tuple[Tensor, bool]:
        """Host memory for a layer, and whether it may stay there."""
        used = sum(flat.nbytes for flat in self._host.values())
        if layer not in self._resident and used + nbytes <= self.host_bytes:
            return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True), True
        if self._staging is None or len(self._staging) < nbytes:
            self._staging = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
        return self._staging[:nbytes], False

    def _drop_ring(self) -> None:
        for slot in self._ring:
            self._let_go(slot)
        self._ring.clear()


def _reader_for(device: torch.device) -> ThreadPoolExecutor:
    """A thread that reads; one that reads for a GPU pins memory by way of that one, and not of the first."""
    if device.type != "cuda":
        return ThreadPoolExecutor(1, "cdas-fast-reader")
    index = torch.cuda.current_device() if device.index is None else device.index
    return ThreadPoolExecutor(1, "cdas-fast-reader", initializer=torch.cuda.set_device, initargs=(index,))


def spread(layers: Sequence[int], count: int) -> frozenset[int]:
    """`count` of the layers, at even distances, so that those between them can be read while these compute."""
    count = min(count, len(layers))
    return frozenset(layers[math.floor((place + 0.5) * len(layers) / count)] for place in range(count))
