"""Running part of a decoder: its first layers to record activations, its last ones from an injected activation.

The model's own forward pass does the work, so its masks, rotary tables, sliding windows, soft caps and final norm
apply as they are. Layers that are not wanted hand on what they are given, and layer L hands on the injected tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cdas_fast.models.structure import Decoder

Edit = Callable[[Tensor], Tensor]
Recompute = Callable[[int], AbstractContextManager[None]]  # of a layer, what it has to run in once more


@dataclass(frozen=True)
class Capture:
    """Activations of one pass over (B, T) tokens."""

    hidden: dict[int, Tensor]  # layer -> its output (B, T, D)
    final: Tensor | None  # after the final norm (B, T, D); None if the pass stopped earlier


@torch.no_grad()
def capture_activations(
    decoder: Decoder,
    input_ids: Tensor,  # (B, T)
    layers: Sequence[int],
    *,
    attention_mask: Tensor | None = None,  # (B, T)
    position_ids: Tensor | None = None,  # (B, T)
    stop_after: int | None = None,
) -> Capture:
    """Run the decoder over tokens and keep the outputs of `layers`.

    With `stop_after`, layers beyond it are not run and `Capture.final` is None. Rows padded on the right need no
    `attention_mask`: causal attention never looks at what follows.
    """
    hidden: dict[int, Tensor] = {}

    def keep(layer: int) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            hidden[layer] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [decoder.layers[layer].register_forward_hook(keep(layer)) for layer in set(layers)]
    beyond = range(decoder.num_layers if stop_after is None else stop_after + 1, decoder.num_layers)
    try:
        with _replaced(decoder, dict.fromkeys(beyond, _identity)):
            output = decoder.stack(
                input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
            )
    finally:
        for handle in handles:
            handle.remove()
    return Capture(hidden=hidden, final=output[0] if stop_after is None else None)


def run_suffix(
    decoder: Decoder,
    layer: int,
    hidden: Tensor,  # (B, T, D)
    *,
    attention_mask: Tensor | None = None,  # (B, T)
    position_ids: Tensor | None = None,  # (B, T)
    edits: Mapping[int, Edit] | None = None,
    recompute: Recompute | None = None,
) -> Tensor:
    """Final hidden states (B, T, D), after the final norm, when layer `layer` puts out `hidden`.

    Layers 0 to `layer` are not run. `edits` change the output of later layers: layer -> function of (B, T, D).
    Differentiable with respect to `hidden` and to whatever the edits depend on. Rows padded on the right need no
    `attention_mask`; rows padded on the left need it, and `position_ids` if the pads are not to count.

    With `recompute`, nothing within a layer is kept for the backward pass, which runs each layer once more instead:
    a third of the time more, for memory of one hidden state a layer.
    """
    replacements: dict[int, Edit] = dict.fromkeys(range(layer), _identity)
    replacements[layer] = lambda _: hidden
    later = range(layer + 1, decoder.num_layers) if recompute is not None and torch.is_grad_enabled() else range(0)
    with (
        _replaced(decoder, replacements),
        _edited(decoder, edits or {}),
        _recomputed(decoder, later, recompute or (lambda layer: nullcontext())),
    ):
        output = decoder.stack(
            inputs_embeds=hidden.detach(),  # only its shape, dtype and device matter
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=False,
        )
    return output[0]


@dataclass(frozen=True)
class Rehearsal:
    """What the stack makes of its inputs before the first layer, and what it calls each layer with."""

    entering: Tensor  # (B, T, D), what goes into layer 0
    calls: tuple[tuple[tuple[Any, ...], dict[str, Any]], ...]  # positional and keyword arguments beside hidden states


def rehearse(
    decoder: Decoder,
    *,
    input_ids: Tensor | None = None,  # (B, T), or
    inputs_embeds: Tensor | None = None,  # (B, T, D)
    position_ids: Tensor | None = None,  # (B, T)
) -> Rehearsal:
    """Run the stack without its layers, and note how it calls them: with masks, rotary tables and the like.

    `run_layer` can then run each of them when its weights are at hand.
    """
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    entering: list[Tensor] = []

    def note(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        entering.append(hidden_states)
        calls.append((args, kwargs))
        return (hidden_states,) if decoder.returns_tuple else hidden_states

    with torch.no_grad(), _with_forwards(decoder, dict.fromkeys(range(decoder.num_layers), note)):
        decoder.stack(input_ids=input_ids, inputs_embeds=inputs_embeds, position_ids=position_ids, use_cache=False)
    return Rehearsal(entering[0], tuple(calls))


def run_layer(decoder: Decoder, rehearsal: Rehearsal, layer: int, hidden: Tensor) -> Tensor:
    """Output (B, T, D) of one layer."""
    args, kwargs = rehearsal.calls[layer]
    output = decoder.layers[layer](hidden, *args, **kwargs)
    result: Tensor = output[0] if isinstance(output, tuple) else output
    return result


def finish(decoder: Decoder, hidden: Tensor) -> Tensor:
    """Final hidden states (B, T, D), after the final norm, when the last layer puts out `hidden` (B, T, D)."""
    replacements = dict.fromkeys(range(decoder.num_layers - 1), _identity)
    with _replaced(decoder, {**replacements, decoder.num_layers - 1: lambda _: hidden}):
        result: Tensor = decoder.stack(inputs_embeds=hidden.detach(), use_cache=False)[0]
    return result


def _identity(hidden: Tensor) -> Tensor:
    return hidden


def handing_on(decoder: Decoder, layers: Iterable[int]) -> AbstractContextManager[None]:
    """Within the context, these layers are not run, and hand on what they are given."""
    return _replaced(decoder, dict.fromkeys(layers, _identity))


@contextmanager
def _replaced(decoder: Decoder, replacements: Mapping[int, Edit]) -> Iterator[None]:
    """Let layers apply a function of their input instead of their own forward pass."""

    def forward_of(function: Edit) -> Callable[..., Any]:
        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            output = function(hidden_states)
            return (output,) if decoder.returns_tuple else output

        return forward

    with _with_forwards(decoder, {index: forward_of(function) for index, function in replacements.items()}):
        yield


@contextmanager
def _recomputed(decoder: Decoder, layers: range, context: Recompute) -> Iterator[None]:
    """Let layers keep their inputs alone, and run again in their context when the backward pass reaches them."""

    def forward_of(index: int) -> Callable[..., Any]:
        return partial(
            checkpoint,
            decoder.layers[index].forward,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=lambda: (nullcontext(), context(index)),
        )

    with _with_forwards(decoder, {index: forward_of(index) for index in layers}):
        yield


@contextmanager
def _with_forwards(decoder: Decoder, forwards: Mapping[int, Callable[..., Any]]) -> Iterator[None]:
    """Let layers have other forwards."""
    own: dict[int, Any] = {}  # forwards that others, such as accelerate's hooks, have set on the instance
    try:
        for index, forward in forwards.items():
            layer = decoder.layers[index]
            own[index] = layer.__dict__.get("forward")
            layer.__dict__["forward"] = forward
        yield
    finally:
        for index, forward in own.items():
            if forward is None:
                del decoder.layers[index].__dict__["forward"]
            else:
                decoder.layers[index].__dict__["forward"] = forward


@contextmanager
def _edited(decoder: Decoder, edits: Mapping[int, Edit]) -> Iterator[None]:
    handles = [decoder.layers[index].register_forward_hook(edit_hook(edit)) for index, edit in edits.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def edit_hook(edit: Edit) -> Callable[[nn.Module, Any, Any], Any]:
    """A forward hook that applies `edit` to a layer's hidden states, whether it returns them alone or in a tuple."""

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (edit(output[0]), *output[1:])
        return edit(output)

    return hook
