"""Which part of a training step takes how long: a stopwatch that hooks switch, forward and backward.

The clock always runs for one part. Where a part is entered or left, the tensor that crosses the border goes through a
`_Border`, an identity that switches the clock in the forward pass and, the other way round, in the backward pass. This
is exact because a decoder is a chain: autograd runs it in the reverse order of its forward pass.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cdas_fast.models.structure import Decoder

ATTENTION, MLP, HEAD, INTERCHANGE, DATA, OTHER = PARTS = (
    "attention",
    "MLP",
    "head and loss",
    "interchange",
    "data",
    "norms and other",
)
PARTS_DEFINED = (
    "parts of a step: by the clock, in steps apart from the timed ones, with hooks that switch it at the border of "
    "each part both forward and backward. attention and MLP: those modules, in all passes. head and loss: from the "
    "final hidden states to the loss, and back to their gradient. interchange: the intervention, and its gradient to "
    "w. data: collecting a batch. norms and other: the rest, such as residual additions, norms, rotary tables, masks, "
    "AdamW."
)


class Stopwatch:
    """Seconds by part."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.part = OTHER
        self.since = time.perf_counter()

    def start(self) -> None:
        """Let the clock run for norms and others from now on; the time before counts for nothing."""
        self._synchronize()
        self.part, self.since = OTHER, time.perf_counter()

    def enter(self, part: str) -> None:
        """Let the clock run for `part` from now on."""
        self._synchronize()
        now = time.perf_counter()
        self.seconds[self.part] += now - self.since
        self.part, self.since = part, now

    def cross(self, tensor: Tensor, before: str, after: str) -> Tensor:
        """The tensor itself, on its way from one part to another; its gradient goes the other way."""
        return _Border.apply(tensor, self, before, after)

    def during(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, whose time counts as `part` as far as it enters no other."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            self.enter(part)
            result = function(*args, **kwargs)
            self.enter(OTHER)
            return result

        return timed

    def around(self, part: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """`function`, whose forward pass, and whose backward pass from its result on, count as `part`."""

        def timed(*args: Any, **kwargs: Any) -> Tensor:
            self.enter(part)
            return self.cross(function(*args, **kwargs), part, OTHER)

        return timed

    def ends_with(self, direction: Tensor, after: str) -> Any:
        """What follows the backward pass, which ends with the gradient of the leaf `direction`, counts as `after`."""
        return direction.register_post_accumulate_grad_hook(lambda _: self.enter(after))

    @contextmanager
    def hooked(self, decoder: Decoder) -> Iterator[None]:
        """Watch the model."""
        handles: list[Any] = []

        def enters(part: str) -> Callable[[nn.Module, Any, Any], Any]:
            def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
                if args:
                    return (self.cross(args[0], OTHER, part), *args[1:]), kwargs
                return args, {**kwargs, "hidden_states": self.cross(kwargs["hidden_states"], OTHER, part)}

            return hook

        def leaves(part: str, after: str) -> Callable[[nn.Module, Any, Any], Any]:
            def hook(module: nn.Module, args: Any, output: Any) -> Any:
                if isinstance(output, Tensor):
                    return self.cross(output, part, after)
                if isinstance(output, tuple):
                    return (self.cross(output[0], part, after), *output[1:])
                output.last_hidden_state = self.cross(output.last_hidden_state, part, after)
                return output

            return hook

        for layer in decoder.layers:
            for name, module in layer.named_children():
                part = part_of(name)
                if part is not None:
                    handles.append(module.register_forward_pre_hook(enters(part), with_kwargs=True))
                    handles.append(module.register_forward_hook(leaves(part, OTHER)))
        handles.append(decoder.stack.register_forward_pre_hook(lambda module, args: self.enter(OTHER)))
        handles.append(decoder.stack.register_forward_hook(leaves(OTHER, HEAD)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def part_of(name: str) -> str | None:
    """The part that a child of a decoder layer is, by its name; None for norms and others."""
    if "norm" in name:
        return None
    if "attn" in name or "attention" in name:
        return ATTENTION
    return MLP if any(word in name for word in ("mlp", "feed_forward", "ffn", "moe")) else None


class _Border(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, watch: Stopwatch, before: str, after: str) -> Tensor:
        ctx.watch, ctx.before = watch, before
        watch.enter(after)
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        ctx.watch.enter(ctx.before)
        return gradient, None, None, None
