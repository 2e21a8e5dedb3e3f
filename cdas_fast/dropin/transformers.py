"""Losses of a Hugging Face training loop without its logits: final hidden states, the head, divergences of two models.

    logits = softcap(logit_scale (W h + b))

`hidden_and_head` gives h of a batch and the rest of that formula, `divergence` compares two models by them, and every
loss over a linear head takes a head as keywords: `linear_cross_entropy(hidden, labels, **head)`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypedDict
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from cdas_fast.errors import InvalidInputError, UnsupportedError, expected_got
from cdas_fast.models.structure import inspect_decoder
from cdas_fast.ops import linear_jsd, linear_kl
from cdas_fast.ops.implementation import Implementation, math_dtype
from cdas_fast.ops.linear_head import CHUNK_BYTES, Reduction


class HeadArguments(TypedDict):
    """A frozen head, as the keywords of the losses over a linear head."""

    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    logit_softcap: float | None
    logit_scale: float


# What the configuration of a model that was inspected says of its head: softcap and scale.
_INSPECTED: WeakKeyDictionary[nn.Module, tuple[float | None, float]] = WeakKeyDictionary()


def hidden_and_head(model: nn.Module, /, **inputs: Any) -> tuple[Tensor, HeadArguments]:
    """Run a causal language model up to its head: no logits are computed.

    The forward pass is the model's own, with its masks, adapters, hooks and wrappers; what goes into the head is kept,
    and the head is left with no positions. `labels` are not handed on and `use_cache` is False unless given.

    Args:
        model: a decoder-only model with a head that takes no part in training: frozen, or run under `torch.no_grad`.
            A wrapper that keeps the model as `module`, such as DistributedDataParallel, is run and looked into.
        inputs: what the model is called with.

    Returns:
        Final hidden states (B, T, D), those of position k for the token of position k + 1, and the head.

    On the first call for a model a forward pass over four tokens checks that softcap(logit_scale (W h + b)) really is
    what the model computes.

    Raises:
        InvalidInputError: a head that requires a gradient, which it would not get.
        UnsupportedError: a head that computes something else, is sharded over several processes, or has an adapter.
    """
    inner: Any = model
    while isinstance(getattr(inner, "module", None), nn.Module):
        inner = inner.module
    module = _head_module(inner)
    softcap, scale = _INSPECTED.get(inner) or _inspect(inner)
    for name, parameter in (("weight", module.weight), ("bias", module.bias)):
        if parameter is not None and parameter.requires_grad and torch.is_grad_enabled():
            wanted = "one that takes no part in training"
            remedy = "Freeze it, model.get_output_embeddings().requires_grad_(False), and tied embeddings with it."
            raise InvalidInputError(
                expected_got(
                    f"{type(inner).__name__}: {name} of the output head", wanted, "one that requires grad", remedy
                )
            )
    head = HeadArguments(
        weight=module.weight.detach(),
        bias=None if module.bias is None else module.bias.detach(),
        logit_softcap=softcap,
        logit_scale=scale,
    )
    return _run_up_to(module, model, {"use_cache": False, **inputs}).to(head["weight"].device), head


def divergence(
    hidden: Tensor,  # (..., D)
    target_hidden: Tensor,  # (..., D_target)
    head: HeadArguments,
    target_head: HeadArguments | None = None,
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    row_weights: Tensor | None = None,  # (...)
    reduction: Reduction = "mean",
    impl: Implementation = "auto",
    chunk_bytes: int = CHUNK_BYTES,
) -> Tensor:
    """Divergence of a trained model p and a target q by their final hidden states, as distillation defines it, in nats.

        beta = 0       KL(q || p), forward
        0 < beta < 1   (1 - beta) KL(p || m) + beta KL(q || m),  m = (1 - beta) p + beta q
        beta = 1       KL(p || q), reverse

    The ends are not the limits of what lies between, which are 0.

    Args:
        hidden: final hidden states of the trained model, the only ones that receive a gradient.
        target_hidden: those of the target.
        head: the head of the trained model.
        target_head: the head of the target; the same one if None. Its logit scale may differ, its softcap may not.
        beta: from 0 to 1.
        temperature: divisor of both logits.
        row_weights: see `linear_jsd`, as for all further arguments.
        reduction: `mean`, `sum` or `none`.
        impl: `auto`, `reference`, `cpp` or `triton`.
        chunk_bytes: memory for the logits of one chunk of rows.

    Raises:
        InvalidInputError: a beta outside 0 to 1, or what `linear_jsd` refuses.
        UnsupportedError: heads with different softcaps.

    Source: Agarwal et al., "On-Policy Distillation of Language Models" (2024), equation 1;
    the ends as trl and Liger have them.
    """
    if not 0 <= beta <= 1:
        raise InvalidInputError(expected_got("divergence: beta", "a number from 0 to 1", repr(beta)))
    target_weight = target_bias = None
    if target_head is not None:
        if target_head["logit_softcap"] != head["logit_softcap"]:
            wanted = f"that of head, {head['logit_softcap']}"
            raise UnsupportedError(
                expected_got("divergence: softcap of target_head", wanted, target_head["logit_softcap"])
            )
        target_weight, target_bias = target_head["weight"], target_head["bias"]
        ratio = target_head["logit_scale"] / head["logit_scale"]
        if ratio != 1.0:  # scale_q (W h + b) = scale_p (W (ratio h) + ratio b)
            target_hidden = target_hidden.to(math_dtype(target_hidden.dtype)) * ratio
            target_bias = None if target_bias is None else target_bias.to(math_dtype(target_bias.dtype)) * ratio
    keywords: dict[str, Any] = {
        **head,
        "target_weight": target_weight,
        "target_bias": target_bias,
        "temperature": temperature,
        "row_weights": row_weights,
        "reduction": reduction,
        "impl": impl,
        "chunk_bytes": chunk_bytes,
    }
    if 0 < beta < 1:
        return linear_jsd(hidden, target_hidden, beta=beta, **keywords)
    return linear_kl(hidden, target_hidden, direction="forward" if beta == 0 else "reverse", **keywords)


def counted_rows(labels: Tensor | None, ignore_index: int, *states: Tensor) -> tuple[Tensor, ...]:
    """The rows (N, D) of each of `states` (..., D) whose label (...) is not ignored; all as they are without labels."""
    if labels is None:
        return states
    for tensor in states:
        if tensor.shape[:-1] != labels.shape:
            got = f"shapes {tuple(labels.shape)} and {tuple(tensor.shape)}"
            raise InvalidInputError(expected_got("labels and hidden states", "the same rows", got))
    counted = labels != ignore_index
    return tuple(tensor[counted] for tensor in states)


def _inspect(model: nn.Module) -> tuple[float | None, float]:
    with _without_wrapped_autocast(model):
        head = inspect_decoder(model).head
    _INSPECTED[model] = head.logit_softcap, head.logit_scale
    return _INSPECTED[model]


def _head_module(model: Any) -> nn.Linear:
    """The head, whose weights are there and are all that it applies."""
    module = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    # Others, such as those of adapters, may apply more than weight and bias, or come to.
    if not isinstance(module, nn.Linear) or type(module).forward is not nn.Linear.forward:
        got = "none" if module is None else f"{type(module).__module__}.{type(module).__qualname__}"
        raise UnsupportedError(expected_got(f"{type(model).__name__}: output head", "a torch.nn.Linear", got))
    if module.weight.dim() != 2 or not module.weight.numel():
        what, got = f"{type(model).__name__}: weight of the output head", f"shape {tuple(module.weight.shape)}"
        raise UnsupportedError(
            expected_got(what, "all of it in this process", got, "Keep the head out of the sharding.")
        )
    return module


def _run_up_to(head: nn.Module, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    taken: list[Tensor] = []

    def take(module: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor]:
        (hidden,) = args
        taken.append(hidden)
        return (hidden[..., :0, :],)

    inputs.pop("labels", None)
    handle = head.register_forward_pre_hook(take)
    try:
        model(**inputs)
    finally:
        handle.remove()
    if len(taken) != 1:
        what = f"{type(model).__name__}: calls of the output head in a forward pass"
        raise UnsupportedError(expected_got(what, 1, len(taken), "If the model is compiled, pass the one that is not."))
    return taken[0]


@contextmanager
def _without_wrapped_autocast(model: Any) -> Iterator[None]:
    """Take off the autocast that accelerate wraps a forward pass in, keeping the original beside it."""
    original = vars(model).get("_original_forward")
    if original is None:
        yield
        return
    wrapped, model.forward = model.forward, original
    try:
        yield
    finally:
        model.forward = wrapped
