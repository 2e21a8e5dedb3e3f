"""The parts of a causal language model, found by structure and checked by running it, not by a table of classes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cdas_fast.errors import InvalidInputError, UnsupportedError, expected_got
from cdas_fast.storage import sha256_of

_REPACKS = "support_avx512bf16_for_cpu"  # of bitsandbytes' Linear4bit


@dataclass(frozen=True)
class Head:
    """The map from final hidden states to logits: softcap(logit_scale (W h + b))."""

    weight: Tensor  # (V, D), detached
    bias: Tensor | None  # (V,), detached
    logit_softcap: float | None
    logit_scale: float

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of final hidden states, (..., D) -> (..., V), in the dtype of `hidden`."""
        logits = nn.functional.linear(hidden, self.weight.to(hidden.dtype), self.bias)
        logits = logits * self.logit_scale
        if self.logit_softcap is not None:
            logits = self.logit_softcap * torch.tanh(logits / self.logit_softcap)
        return logits


@dataclass(frozen=True)
class Decoder:
    """A causal language model taken apart: `stack` runs `layers` and the final norm, `head` makes logits."""

    model: nn.Module
    stack: nn.Module
    layers: nn.ModuleList
    head: Head
    hidden_size: int
    context_length: int | None
    returns_tuple: bool  # whether a layer returns (hidden, ...) or hidden alone

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.layers)

    @property
    def device(self) -> torch.device:
        """Device of the first parameter of the first layer."""
        return next(self.layers[0].parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the activations: of the first parameter of the first layer that is not quantised."""
        for parameter in self.layers[0].parameters():
            if parameter.is_floating_point() and getattr(parameter, "quant_state", None) is None:
                return parameter.dtype
        raise UnsupportedError(expected_got("first layer", "a floating-point parameter that is not quantised", "none"))

    def layer_index(self, layer: int, name: str = "layer") -> int:
        """`layer` itself if the model has it; raises `InvalidInputError` otherwise."""
        if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < self.num_layers:
            raise InvalidInputError(
                expected_got(name, f"an integer from 0 to {self.num_layers - 1} (this model's layers)", repr(layer))
            )
        return layer


def text_config(model: nn.Module) -> Any:
    """The configuration of the language model itself, also inside a multimodal one."""
    config = getattr(model, "config", None)
    if config is None:
        raise UnsupportedError(expected_got("model", "a Hugging Face model with a config", type(model).__name__))
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def find_layers(model: Any) -> tuple[nn.Module, nn.ModuleList]:
    """The module that runs the decoder layers, and their list.

    The list is the `nn.ModuleList` of the configured number of layers, each with parameters, that lies outermost and,
    if several do, inside the model's own `get_decoder()`. Raises `UnsupportedError` if none or several remain.
    """
    wanted = getattr(text_config(model), "num_hidden_layers", None)
    found: list[tuple[str, nn.Module, nn.ModuleList]] = []
    for name, module in model.named_modules():
        for child_name, child in module.named_children():
            path = f"{name}.{child_name}" if name else child_name
            inside = any(path.startswith(f"{other}.") for other, _, _ in found)
            if not isinstance(child, nn.ModuleList) or len(child) != wanted or inside:
                continue
            if all(next(layer.parameters(), None) is not None for layer in child):
                found.append((path, module, child))
    if len(found) > 1 and hasattr(model, "get_decoder"):
        own = model.get_decoder()
        inner = set(own.modules()) if isinstance(own, nn.Module) else set()
        found = [entry for entry in found if entry[2] in inner] or found
    if len(found) != 1:
        names = ", ".join(path for path, _, _ in found) or "none"
        raise UnsupportedError(
            expected_got(f"{type(model).__name__}", f"one list of {wanted} decoder layers", names)
            + ". Only decoder-only language models are supported."
        )
    _, stack, layers = found[0]
    return stack, layers


def inspect_decoder(model: nn.Module) -> Decoder:
    """Take a causal language model apart, and check by one short forward pass that the parts make the whole.

    The pass runs four tokens: every decoder layer must be called once and in order, and the head applied to the final
    hidden states must give the model's own logits. Raises `UnsupportedError` if not. Of a model whose linear weights
    are read when they are needed, the last layer alone is run, and the others hand on what they are given.
    """
    stack, layers = find_layers(model)
    config = text_config(model)
    head = _find_head(model, config)
    calls: list[tuple[int, bool]] = []  # layer, whether it returned a tuple
    final: list[Tensor] = []

    def note_call(index: int) -> Callable[[nn.Module, Any, Any], None]:
        return lambda module, args, output: calls.append((index, isinstance(output, tuple)))

    handles = [layer.register_forward_hook(note_call(index)) for index, layer in enumerate(layers)]
    handles.append(stack.register_forward_hook(lambda module, args, output: final.append(output[0])))
    tokens = torch.arange(4, device=next(layers[0].parameters()).device)[None] % head.weight.shape[0]
    idle = layers[:-1] if hasattr(model, "layer_weights") else layers[:0]
    try:
        with torch.no_grad(), evaluation_mode(model), _handing_on(idle):
            logits = model(input_ids=tokens, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    order = [index for index, _ in calls]
    if order != list(range(len(layers))):
        raise UnsupportedError(
            expected_got(type(model).__name__, f"layers called once, in order 0 to {len(layers) - 1}", order)
        )
    _check_head(model, head, final[0], logits)
    return Decoder(
        model=model,
        stack=stack,
        layers=layers,
        head=head,
        hidden_size=head.weight.shape[1],
        context_length=getattr(config, "max_position_embeddings", None),
        returns_tuple=calls[-1][1],
    )


@contextmanager
def _handing_on(layers: nn.ModuleList) -> Iterator[None]:
    """Let layers return what they are given, as a tensor: what transformers' layers do since version 5."""
    for layer in layers:
        layer.__dict__["forward"] = lambda hidden_states, *args, **kwargs: hidden_states
    try:
        yield
    finally:
        for layer in layers:
            del layer.__dict__["forward"]


def _find_head(model: Any, config: Any) -> Head:
    module = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    weight = getattr(module, "weight", None)
    if module is None or weight is None:
        raise UnsupportedError(
            expected_got(
                f"{type(model).__name__}", "a causal language model with an output head", "a model without one"
            )
            + ". Load it with AutoModelForCausalLM."
        )
    if not weight.is_floating_point():
        raise UnsupportedError(expected_got("output head", "floating-point weights", weight.dtype))
    bias = getattr(module, "bias", None)
    scale = getattr(config, "logit_scale", None)  # Cohere multiplies
    scaling = getattr(config, "logits_scaling", None)  # Granite divides
    return Head(
        weight=weight.detach(),
        bias=None if bias is None else bias.detach(),
        logit_softcap=getattr(config, "final_logit_softcapping", None),
        logit_scale=float(scale) if scale is not None else 1.0 / float(scaling) if scaling else 1.0,
    )


def _check_head(model: nn.Module, head: Head, final: Tensor, logits: Tensor) -> None:
    ours = head.logits(final)
    if ours.shape == logits.shape:
        error = (ours.float() - logits.float()).abs().max().item()
        tolerance = 16 * torch.finfo(logits.dtype).eps * max(logits.abs().max().item(), 1.0)
        if error <= tolerance:
            return
        got = f"a difference of {error:.2g}"
    else:
        got = f"shape {tuple(logits.shape)} instead of {tuple(ours.shape)}"
    raise UnsupportedError(
        expected_got(
            f"{type(model).__name__}: output head",
            "logits = softcap(scale (W h + b)) of the final hidden states",
            got,
            "The model does something else to its logits, which the fused loss would leave out.",
        )
    )


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Switch dropout and the like off, and restore each module's own mode afterwards.

    bitsandbytes' 4-bit layers are kept from what they do in evaluation on a CPU with AVX-512-BF16: turn their weights,
    for good, into a form that no gradient gets through, without an error.
    """
    modes = [(module, module.training) for module in model.modules()]
    repacking = [module for module in model.modules() if getattr(module, _REPACKS, False)]
    model.eval()
    for module in repacking:
        setattr(module, _REPACKS, False)
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for module in repacking:
            setattr(module, _REPACKS, True)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without parameter gradients; each module and parameter is as it was afterwards.

    Raises:
        UnsupportedError: 4-bit layers of bitsandbytes that let no gradient through any more, see `evaluation_mode`.
    """
    _refuse_repacked(model)
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    with evaluation_mode(model):
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter, flag in flags:
                parameter.requires_grad_(flag)


def _refuse_repacked(model: nn.Module) -> None:
    for name, module in model.named_modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            got = "one that has run in evaluation mode on a CPU with AVX-512-BF16"
            remedy = "Load the model again, or let cdas_fast load it with load_in_4bit."
            raise UnsupportedError(expected_got(name, "a 4-bit layer that lets gradients through", got, remedy))


def model_fingerprint(model: nn.Module) -> str:
    """SHA-256 over the configuration and a sample of every parameter: tells whether two models are the same.

    A model whose linear weights are not its parameters knows its own (see skeleton.py).
    """
    known = getattr(getattr(model, "layer_weights", None), "fingerprint", "")
    if known:
        return str(known)
    config = text_config(model).to_dict()
    for volatile in (
        "_name_or_path",
        "transformers_version",
        "quantization_config",
        "use_cache",
        "dtype",
        "_commit_hash",
    ):
        config.pop(volatile, None)
    parts = [json.dumps(config, sort_keys=True, default=str)]
    for name, parameter in model.named_parameters():
        flat = parameter.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // 64)][:64].float().cpu()
        parts.append(f"{name} {tuple(parameter.shape)} {parameter.dtype} {sample.tolist()}")
    return sha256_of(*parts)
