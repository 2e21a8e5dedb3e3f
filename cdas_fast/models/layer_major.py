"""Several passes through a range of layers, layer by layer: however many they are, weights are needed twice.

    forward     for each layer: for each pass: hidden = layer(hidden)
    backward    for each layer, from the last: for each pass: run it again unless its activations were kept, and go back

In between, nothing but one hidden state a pass and layer is kept, or a layer's activations where there is room. Weights
that are not on the device are read while the layer before computes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cdas_fast.models.layer_weights import LayerWeights
from cdas_fast.models.structure import Decoder
from cdas_fast.models.suffix import Edit, Rehearsal, finish, run_layer


@dataclass(frozen=True)
class LayerwisePass:
    """One micro-batch on its way through the layers, in the shape in which the model takes it."""

    decoder: Decoder
    rehearsal: Rehearsal
    context: Callable[[int | None], AbstractContextManager[None]]  # what a layer runs in; of None, the final norm
    read: Callable[[Tensor], Tensor]  # (B, T, D) -> the tokens asked for (M, D)
    edits: Mapping[int, Edit] = field(default_factory=dict)  # of layers' outputs (B, T, D)

    def run(self, layer: int, hidden: Tensor) -> Tensor:
        """Output of a layer, edited."""
        with self.context(layer):
            hidden = run_layer(self.decoder, self.rehearsal, layer, hidden)
        return self.edits[layer](hidden) if layer in self.edits else hidden

    def final(self, hidden: Tensor) -> Tensor:
        """Final hidden states (M, D) of the tokens asked for, after the final norm."""
        with self.context(None):
            return self.read(finish(self.decoder, hidden))


@dataclass
class KeepUpTo:
    """Which layers keep their activations for the backward pass: as many as fit in `budget` bytes.

    The first layer that is run is measured, and the others are taken to be like it.
    """

    budget: float  # bytes; infinite to keep all, 0 to run all layers again
    per_token: float | None = None  # measured

    def layers(self, layers: Sequence[int], tokens: int) -> frozenset[int]:
        """Those that keep, the last ones first: they are needed first."""
        if self.budget == float("inf"):
            return frozenset(layers)
        if not self.budget or self.per_token is None:
            return frozenset()
        count = int(self.budget // max(1.0, self.per_token * tokens))
        return frozenset(layers[len(layers) - min(count, len(layers)) :])


def run_layer_major(
    passes: Sequence[LayerwisePass],
    hidden: Sequence[Tensor],  # what goes into the first layer, (B, T, D) of each pass
    layers: range,
    weights: LayerWeights,
    keep: KeepUpTo,
    offload: bool = False,
) -> tuple[Tensor, ...]:
    """Final hidden states (M, D) of each pass. Differentiable, in one backward pass over all of them.

    What edits depend on gets its gradient then, by accumulation into the leaves. With `offload`, hidden states between
    layers that are run again wait in the host's pinned memory, or on a CPU in a temporary file.
    """
    schedule = _Schedule(passes, layers, weights, keep, offload)
    results: tuple[Tensor, ...] = _LayerMajor.apply(schedule, *hidden)
    return results


class _LayerMajor(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, schedule: _Schedule, *hidden: Tensor) -> tuple[Tensor, ...]:
        ctx.schedule = schedule
        return schedule.forward([each.detach() for each in hidden], any(ctx.needs_input_grad))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *ctx.schedule.backward(gradients))


class _Schedule:
    def __init__(
        self,
        passes: Sequence[LayerwisePass],
        layers: range,
        weights: LayerWeights,
        keep: KeepUpTo,
        offload: bool,
    ) -> None:
        self.passes, self.layers, self.weights, self.keep, self.offload = passes, layers, weights, keep, offload
        self.inputs: dict[int, list[Tensor]] = {}  # layer -> of each pass
        self.outputs: dict[int, list[Tensor]] = {}  # of layers that keep their activations
        self.finals: list[tuple[Tensor, Tensor]] = []

    def forward(self, hidden: list[Tensor], needs_grad: bool) -> tuple[Tensor, ...]:
        """Final hidden states; with `needs_grad`, what `backward` needs is kept."""
        tokens = sum(each.shape[0] * each.shape[1] for each in hidden)
        order = [*self.layers, *reversed(self.layers)] if needs_grad else [*self.layers]
        keeping = self.keep.layers(self.layers, tokens) if needs_grad else frozenset()
        measure = needs_grad and self.keep.per_token is None and 0 < self.keep.budget < float("inf")
        for place, layer in enumerate(self.layers):
            with self.weights.visit(layer, self._next_streamed(order, place)):
                if needs_grad and layer not in keeping:
                    self.inputs[layer] = [_away(each) for each in hidden] if self.offload else hidden
                if layer in keeping:
                    self.inputs[layer] = [each.detach().requires_grad_() for each in hidden]
                    with torch.enable_grad():
                        self.outputs[layer] = self._run(layer, self.inputs[layer])
                    hidden = [each.detach() for each in self.outputs[layer]]
                elif measure:
                    self.keep.per_token = _saved_bytes(self.passes[0], layer, hidden[0])
                    measure, keeping = False, self.keep.layers(self.layers, tokens)
                    hidden = self._run(layer, hidden)
                else:
                    hidden = self._run(layer, hidden)
        return self._finish(hidden, needs_grad)

    def backward(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """Gradients of what went into the first layer."""
        flowing = []
        for (entered, final), gradient in zip(self.finals, gradients, strict=True):
            flowing.append(torch.autograd.grad(final, entered, gradient)[0])
        self.finals.clear()
        order = [*reversed(self.layers), *self.layers]  # the next step begins where this one did
        for place, layer in enumerate(reversed(self.layers)):
            with self.weights.visit(layer, self._next_streamed(order, place)):
                inputs, outputs = self.inputs.pop(layer), self.outputs.pop(layer, None)
                for number, one in enumerate(self.passes):
                    if outputs is None:
                        entered = inputs[number].to(self.weights.device, non_blocking=True).detach().requires_grad_()
                        with torch.enable_grad():
                            output = one.run(layer, entered)
                    else:
                        entered, output = inputs[number], outputs[number]
                        outputs[number] = output.detach()  # let its graph go when this pass is done
                    torch.autograd.backward(output, flowing[number])
                    assert entered.grad is not None
                    flowing[number], entered.grad = entered.grad, None
        return flowing

    def _run(self, layer: int, hidden: Sequence[Tensor]) -> list[Tensor]:
        return [one.run(layer, each) for one, each in zip(self.passes, hidden, strict=True)]

    def _finish(self, hidden: Sequence[Tensor], needs_grad: bool) -> tuple[Tensor, ...]:
        results = []
        for one, each in zip(self.passes, hidden, strict=True):
            with torch.set_grad_enabled(needs_grad):
                entered = each.detach().requires_grad_(needs_grad)
                final = one.final(entered)
            if needs_grad:
                self.finals.append((entered, final))
            results.append(final.detach())
        return tuple(results)

    def _next_streamed(self, order: Sequence[int], place: int) -> int | None:
        """The next layer of the order that has to be read."""
        return next((layer for layer in order[place + 1 :] if layer not in self.weights.resident), None)


def _away(hidden: Tensor) -> Tensor:
    """A copy off the device: in pinned memory, or of a CPU's memory in a file without a name."""
    if hidden.device.type == "cuda":
        away = torch.empty(hidden.shape, dtype=hidden.dtype, pin_memory=True)
        return away.copy_(hidden, non_blocking=True)
    with tempfile.NamedTemporaryFile(prefix="cdas-fast-hidden-") as file:
        file.truncate(max(1, hidden.nbytes))
        away = torch.from_file(file.name, shared=True, size=hidden.numel(), dtype=hidden.dtype)
    return away.view(hidden.shape).copy_(hidden)


def _saved_bytes(one: LayerwisePass, layer: int, hidden: Tensor) -> float:
    """Bytes a token that autograd keeps of a layer, each memory counted once."""
    storages: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    own = {each.untyped_storage().data_ptr() for each in one.decoder.layers[layer].parameters()}
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        one.run(layer, hidden.detach().requires_grad_())
    kept = sum(nbytes for pointer, nbytes in storages.items() if pointer not in own)
    return kept / (hidden.shape[0] * hidden.shape[1])
