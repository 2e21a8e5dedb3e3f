"""A model whose decoder layers hold no linear weights of their own, but ask for them: see layer_weights.py.

It is a transformers model like any other, made without ever having its weights in memory: parameters are born on the
`meta` device, linear maps of the layers are replaced, and what is left (norms, biases, embedding, head) is read from
the checkpoint tensor by tensor.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cdas_fast.errors import InvalidInputError, StorageError, UnsupportedError, expected_got
from cdas_fast.models.handle_linear import HandleLinear
from cdas_fast.models.layer_weights import Handle, LayerWeights, Layout, Matrix, spread
from cdas_fast.models.quantization import PIECES, STATE, PackedCopy, is_quantized_copy, nf4_state
from cdas_fast.models.shards import Shards, StoredTensor
from cdas_fast.models.structure import find_layers, model_fingerprint
from cdas_fast.storage import sha256_of

ATTRIBUTE = "layer_weights"  # of the model: its `LayerWeights`
_NO_WEIGHT = re.compile(r"rotary_emb\.inv_freq$|attn\.masked_bias$")  # what old checkpoints hold of computed buffers
_STORED = "cdas_fast_stored"  # of the embedding: where its weight can be read again
_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of glibc's malloc.h
_SAMPLE = 256  # bytes of each tensor that tell one checkpoint from another


def layer_weights(model: nn.Module) -> LayerWeights | None:
    """The weights of a model that was loaded so; None of any other."""
    return getattr(model, ATTRIBUTE, None)


def load_skeleton(
    folder: Path,
    *,
    dtype: torch.dtype | str,
    device: torch.device,
    load_in_4bit: bool,
    resident_layers: int | None,
    packed_folder: Callable[[str], Path],
    trust_remote_code: bool = False,
) -> nn.Module:
    """A causal language model of a folder, in evaluation mode, its linear weights read when they are needed.

    Args:
        folder: with `config.json` and safetensors files, whose weights may be in 4 bits by bitsandbytes already.
        dtype: of the activations, norms, embedding and head; `auto` for that of the configuration.
        device: where it runs.
        load_in_4bit: whether linear weights of the layers are to be in NF4 with double quantisation.
        resident_layers: how many layers' weights stay on the device; all if None.
        packed_folder: where the packed copy of a checkpoint lies, by a hash of that checkpoint.
        trust_remote_code: whether code that comes with the model may run.

    Raises:
        InvalidInputError: tensors that the model has not, or that it has and the checkpoint has not.
        MissingDependencyError: 4-bit weights without bitsandbytes.
        StorageError: a file that is truncated or cannot be read.
        UnsupportedError: a model with weights in its layers that are no linear maps, such as a mixture of experts.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
    from transformers.utils import GENERATION_CONFIG_NAME

    if device.type == "cpu":
        _give_large_blocks_back()
    shards = Shards(folder)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    stored_in_4bit = is_quantized_copy(config.to_dict())
    if dtype == "auto":
        floating = (each.dtype for each in shards.values() if each.dtype.is_floating_point)
        dtype = getattr(config, "dtype", None) or next(floating, torch.float32)
    assert isinstance(dtype, torch.dtype)
    settings = config.to_dict()
    settings.pop("quantization_config", None)
    with parameters_on_meta():
        model = AutoModelForCausalLM.from_config(
            type(config).from_dict(settings), dtype=dtype, trust_remote_code=trust_remote_code
        )
    assert not any(buffer.is_meta for buffer in model.buffers())  # rotary tables would be uninitialised memory
    names = _Names(model, shards)
    for layer in range(len(names.prefixes)):
        names.matrices(layer, shards)  # what is wrong with a layer is said now, not when it is reached
    copy = None
    if load_in_4bit and not stored_in_4bit:
        identity = sha256_of(checkpoint_hash(shards), "nf4 double")[:16]
        copy = PackedCopy(packed_folder(identity), shards, config.to_dict(), names.prefixes, names.linear, device)

    def layout(layer: int) -> Layout:
        return Layout.of(names.matrices(layer, shards if copy is None else copy.layer(layer)))

    count = len(names.prefixes)
    if resident_layers is not None and not 0 <= resident_layers <= count:
        raise InvalidInputError(expected_got("resident_layers", f"a number from 0 to {count}", resident_layers))
    resident = None if resident_layers is None else spread(range(count), resident_layers)
    weights = LayerWeights(layout, count, device, resident=resident, host_bytes=_pinnable_bytes(device))
    names.replace_linear(weights)
    _read_the_rest(model, names, shards, dtype, device)
    if (folder / GENERATION_CONFIG_NAME).is_file() and model.can_generate():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    model.eval().requires_grad_(False)
    setattr(model, ATTRIBUTE, weights)
    kind = "nf4" if copy is not None or stored_in_4bit else "plain"
    # known before anything is dropped from memory, and of all weights
    weights.fingerprint = sha256_of(model_fingerprint(model), checkpoint_hash(shards), kind)
    return model


def _give_large_blocks_back() -> None:
    """Let glibc return blocks of 1 MiB and more to the system as soon as they are freed.

    By itself it keeps blocks of up to 32 MiB for later ones, which in a training step on a CPU comes to several times
    the activations of a layer; with a limit of 4 MiB, the pieces between smaller ones are still 0.4 GiB for an
    8B-shaped Llama. A page fault for 4 KiB is little beside what is computed with so much.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 2**20)


def _pinnable_bytes(device: torch.device) -> int:
    """Host memory that a process may pin for layers that it reads again: its share of half of what is free."""
    if device.type != "cuda":
        return 0
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0
    free = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), 0)
    return free // 2 // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def drop_embedding(model: Any) -> None:
    """Give the memory of the input embedding back, unless the head shares it; read again when it is next used."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    weight, stored = embedding.weight, getattr(embedding, _STORED, None)
    if stored is None or not weight.numel() or (head is not None and head.weight is weight):
        return
    weight.data = weight.new_empty(0)  # others may hold the parameter

    def read_again(module: nn.Module, args: Any) -> None:
        weight.data = stored.read().to(weight.device, weight.dtype)
        hook.remove()

    hook = embedding.register_forward_pre_hook(read_again)


def drop_head(model: Any) -> Callable[[], None]:
    """Give the memory of the head back, and of an input embedding that shares it; what is returned reads it again."""
    head = model.get_output_embeddings()
    weight, stored = head.weight, getattr(head, _STORED)
    dtype, device = weight.dtype, weight.device
    weight.data = torch.empty(0, dtype=dtype, device=device)

    def read_again() -> None:
        weight.data = stored.read().to(device, dtype)

    return read_again


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Let parameters be born on the `meta` device, without memory; buffers are computed as ever."""
    own = nn.Module.register_parameter

    def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        own(module, name, parameter)

    nn.Module.register_parameter = register  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = own  # type: ignore[method-assign]


class _Names:
    """Which tensors of a checkpoint are what in a model."""

    def __init__(self, model: nn.Module, shards: Shards) -> None:
        self.model, self.shards = model, shards
        _, layers = find_layers(model)
        self.layers = layers
        modules = {module: name for name, module in model.named_modules()}
        path = modules[layers]
        base = f"{getattr(model, 'base_model_prefix', '')}."
        # a base model saved by itself lacks the prefix
        self._cut = base if path.startswith(base) and not any(name.startswith(base) for name in shards) else ""
        self.prefixes = [self.stored(f"{path}.{layer}.") for layer in range(len(layers))]
        self.linear = {name for name, module in layers[0].named_modules() if type(module) is nn.Linear}
        self._check()

    def stored(self, name: str) -> str:
        """The name in the checkpoint of a tensor of the model."""
        return name.removeprefix(self._cut)

    def matrices(self, layer: int, stored: Mapping[str, StoredTensor]) -> dict[str, Matrix]:
        """The linear weights of a layer."""
        found = {}
        for linear in sorted(self.linear):
            name = f"{self.prefixes[layer]}{linear}.weight"
            if name not in stored:
                raise InvalidInputError(expected_got(f"model {self.shards.folder}", f"a tensor {name}", "none"))
            wanted = self._shape(layer, linear)
            if f"{name}.{STATE}" in stored:
                shape, offset = nf4_state(stored, name)
                pieces = {piece: stored[f"{name}.{piece}"] for piece in PIECES if f"{name}.{piece}" in stored}
                matrix = Matrix(shape, {"weight": stored[name], **pieces}, True, offset)
            else:
                shape = tuple(stored[name].shape)  # type: ignore[assignment]
                matrix = Matrix(shape, {"weight": stored[name]})
            what = f"{stored[name].path}: {name}"
            if not matrix.quantized and not stored[name].dtype.is_floating_point:
                remedy = "Take the original model, with --load-in-4bit if it is to be small."
                raise UnsupportedError(
                    expected_got(what, "floating-point numbers, or NF4 by bitsandbytes", stored[name].dtype, remedy)
                )
            if shape != wanted:
                raise InvalidInputError(expected_got(what, f"shape {wanted}, by the configuration", shape))
            found[linear] = matrix
        return found

    def replace_linear(self, weights: LayerWeights) -> None:
        """Put a `HandleLinear` in the place of each linear map of the layers."""
        for layer, module in enumerate(self.layers):
            for linear in self.linear:
                own = module.get_submodule(linear)
                shape = self._shape(layer, linear)
                parent, _, name = linear.rpartition(".")
                replacement = HandleLinear(Handle(weights, layer, linear), shape, own.bias)  # type: ignore[arg-type]
                setattr(module.get_submodule(parent), name, replacement)

    def _shape(self, layer: int, linear: str) -> tuple[int, int]:
        module: Any = self.layers[layer].get_submodule(linear)
        return module.out_features, module.in_features

    def _check(self) -> None:
        """Refuse layers that differ in their linear maps, weights that are none, and tensors without a place."""
        for layer in self.layers:
            found = {name for name, module in layer.named_modules() if type(module) is nn.Linear}
            large = [name for name, each in layer.named_parameters() if each.dim() > 1]
            others = [name for name in large if name.removesuffix(".weight") not in self.linear]
            if found != self.linear or others:
                got = ", ".join(others[:3]) or f"{sorted(found ^ self.linear)[:3]} in some of them alone"
                remedy = "Load the model whole, without 4-bit weights and streaming."
                kind = type(self.model).__name__
                raise UnsupportedError(expected_got(kind, "layers whose weights are linear maps", got, remedy))
        known = {self.stored(name) for name in self.model.state_dict()}
        for name in self.shards:
            plain = re.sub(r"(\.weight)\..*$", r"\1", name)  # quantisation adds pieces behind the name
            in_a_layer = any(name.startswith(prefix) for prefix in self.prefixes)
            if in_a_layer and plain not in known and not _NO_WEIGHT.search(name):
                raise InvalidInputError(
                    expected_got(f"model {self.shards.folder}", "tensors that its configuration has a place for", name)
                )


def _read_the_rest(model: nn.Module, names: _Names, shards: Shards, dtype: torch.dtype, device: torch.device) -> None:
    """Read every parameter that is no linear weight of a layer, and buffers if they are stored; all to the device."""
    ends: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]  # type: ignore[operator]
    aliases: dict[nn.Parameter, list[str]] = {}  # a tied parameter has two names, and one tensor under either
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(parameter, []).append(names.stored(name))
    read: dict[nn.Parameter, nn.Parameter] = {}
    for parameter, own_names in aliases.items():
        stored = next((shards[name] for name in own_names if name in shards), None)
        if stored is None:
            raise InvalidInputError(expected_got(f"model {shards.folder}", f"a tensor {own_names[0]}", "none"))
        if stored.shape != tuple(parameter.shape):
            what, wanted = f"{stored.path}: {stored.name}", f"shape {tuple(parameter.shape)}, by the configuration"
            raise InvalidInputError(expected_got(what, wanted, stored.shape))
        read[parameter] = nn.Parameter(stored.read().to(device, dtype), requires_grad=False)
        for end in ends:
            if end is not None and parameter is end.weight:
                setattr(end, _STORED, stored)
    kept = model.state_dict().keys()
    for name, buffer in model.named_buffers():
        stored = shards.get(names.stored(name)) if name in kept else None
        if stored is not None:
            if stored.shape != tuple(buffer.shape):
                what, wanted = f"{stored.path}: {stored.name}", f"shape {tuple(buffer.shape)}, by the configuration"
                raise InvalidInputError(expected_got(what, wanted, stored.shape))
            buffer.copy_(stored.read())
    for module in model.modules():
        for name, own in [*module.named_parameters(recurse=False)]:
            module._parameters[name] = read[own]
        for name, buffer in [*module.named_buffers(recurse=False)]:
            module._buffers[name] = buffer.to(device)


def checkpoint_hash(shards: Shards) -> str:
    """SHA-256 over names, shapes, dtypes and a sample of every tensor of a checkpoint."""
    digest = hashlib.sha256()
    for name in sorted(shards):
        stored = shards[name]
        digest.update(json.dumps([name, stored.shape, str(stored.dtype)]).encode())
        try:
            with open(stored.path, "rb", buffering=0) as file:
                for place in {0, stored.nbytes // 2}:
                    file.seek(stored.offset + place)
                    digest.update(file.read(min(_SAMPLE, stored.nbytes - place)))
        except OSError as error:
            raise StorageError(expected_got(str(stored.path), "to be read", error.strerror)) from error
    return digest.hexdigest()
