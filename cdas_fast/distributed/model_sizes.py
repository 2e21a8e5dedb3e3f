"""What a model's config implies: values of each part, FLOP, and what a layer keeps for its backward pass.

The model is built on the `meta` device, which holds shapes and no numbers, and its modules are read: nothing here
knows a family's formula, no weight is loaded. Configs of the models of the paper are shipped; those of others come from
a folder or the hub. They hold what sizes depend on, not what a model needs to run.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cdas_fast.errors import InvalidInputError, UnsupportedError, expected_got
from cdas_fast.models.loading import EMBEDDED_MODEL
from cdas_fast.models.structure import find_layers, text_config

# name of a hub repository, without the endings of its instruction-tuned twin -> file in configs/, layer of the paper
SHIPPED = {
    "meta-llama/Llama-3.1-8B": ("llama-3.1-8b", 12),
    "meta-llama/Llama-3.1-70B": ("llama-3.1-70b", 32),
    "google/gemma-2-2b": ("gemma-2-2b", None),
    "google/gemma-2-9b": ("gemma-2-9b", 20),
    "microsoft/Phi-3.5-mini": ("phi-3.5-mini", 16),
    "Qwen/Qwen2.5-7B": ("qwen2.5-7b", None),
    "HuggingFaceTB/SmolLM2-135M": ("smollm2-135m", 15),
}
_ENDINGS = ("-Instruct", "-instruct", "-it")

# NF4 with double quantisation, bytes a value: 4 bits, a scale of 1 byte for 64 values, one of 4 for 256 of those
FOUR_BIT_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
_STATISTIC_BYTES = 4  # log-sum-exp of attention and 1 / root mean square of a norm are float32


@dataclass(frozen=True)
class LayerSizes:
    """One decoder layer. Widths are values per token."""

    linear_values: int  # of all linear maps, without biases
    largest_linear: int  # values of the largest of them
    dense_values: int  # norms and biases, which are never quantised
    norms: tuple[int, ...]  # width of the input of each norm
    queries: int
    keys_values: int  # keys and values together
    heads: int
    inner: int  # between the MLP's linear maps
    hidden: int
    keeps_scores: bool = False  # its attention caps its logits, which PyTorch's fused attention cannot do

    def kept_bytes(self, itemsize: int, *, frozen_aware: bool = True, score_keys: int = 0) -> float:
        """Bytes a token that a forward pass keeps for the backward pass of the layer, if it is not run again.

        Frozen linear maps keep nothing. With `frozen_aware` ops:

            (sum of the norms' inputs + q + k + v + attention's output + gate + up) itemsize + heads x 4

        By the modules' own autograd a norm keeps its input in float32 and a statistic, and the MLP also act(gate).

        Args:
            itemsize: bytes of an activation.
            frozen_aware: whether norms and MLP are ops that keep no more than they need.
            score_keys: positions that a query attends to, if attention with capped logits is the model's own: it keeps
                keys and values for every query head, and tanh and softmax of all scores. 0 if it is fused.
        """
        attention: float = (2 * self.queries + self.keys_values) * itemsize + self.heads * _STATISTIC_BYTES
        if self.keeps_scores and score_keys:
            attention = 3 * self.queries * itemsize + self.score_bytes(itemsize, score_keys)
        if frozen_aware:
            return (sum(self.norms) + 2 * self.inner) * itemsize + attention
        norms = sum(width * max(itemsize, 4) + _STATISTIC_BYTES for width in self.norms)
        return norms + attention + 3 * self.inner * itemsize

    def score_bytes(self, itemsize: int, score_keys: int) -> float:
        """Bytes a token of attention scores that exist whole: tanh, softmax in float32, and that in the dtype."""
        return self.heads * score_keys * (2 * itemsize + 4) if self.keeps_scores else 0.0

    def backward_bytes(self, itemsize: int) -> float:
        """Bytes a token beyond what is kept, at the peak of the layer's backward pass.

        There gradients of the MLP's product, of gate and of up exist, that of the layer's output and that of its input.
        """
        return (3 * self.inner + 2 * self.hidden) * itemsize

    def forward_bytes(self, itemsize: int) -> float:
        """Bytes a token at the peak of a forward pass that keeps nothing: the MLP, the residual and its norm."""
        return (max(3 * self.inner, 2 * (2 * self.queries + self.keys_values)) + 2 * self.hidden) * itemsize


@dataclass(frozen=True)
class ModelSizes:
    """A decoder as the planner sees it."""

    name: str
    hidden_size: int
    vocabulary: int
    parameters: int
    embedding_values: int
    head_values: int  # of the output head, also if it is the embedding
    tied: bool  # the head is the embedding
    final_values: int  # what belongs to no layer, nor to embedding and head: the final norm
    layers: tuple[LayerSizes, ...]
    suggested_layer: int | None = None  # of the paper, for its models

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.layers)

    @property
    def head_flop(self) -> int:
        """Of one product of one token's final hidden state with the head."""
        return 2 * self.head_values


def model_sizes(model: str) -> ModelSizes:
    """The sizes of a shipped model, of a folder with a `config.json`, or of a hub id.

    Raises:
        InvalidInputError: no such model, or a hub that cannot be reached from here.
        UnsupportedError: an architecture whose parts are not found.
    """
    found = _shipped(model)
    if found is None:
        return sizes_of(_config(model), model)
    name, layer = found
    text = resources.files("cdas_fast.distributed").joinpath("configs", f"{name}.json").read_text(encoding="utf-8")
    return sizes_of(_config_from(json.loads(text)), model, layer)


def sizes_of(config: Any, name: str, suggested_layer: int | None = None) -> ModelSizes:
    """The sizes of the decoder that a transformers config describes."""
    model = _on_meta(config, name)
    stack, layers = find_layers(model)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if embedding is None or head is None:
        raise UnsupportedError(expected_got(name, "a causal language model with embedding and output head", "another"))
    text = text_config(model)
    own = {id(parameter) for layer in layers for parameter in layer.parameters()}
    own |= {id(parameter) for module in (embedding, head) for parameter in module.parameters()}
    return ModelSizes(
        name=name,
        hidden_size=head.weight.shape[1],
        vocabulary=head.weight.shape[0],
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        embedding_values=embedding.weight.numel(),
        head_values=sum(parameter.numel() for parameter in head.parameters()),
        tied=head.weight is embedding.weight,
        final_values=sum(parameter.numel() for parameter in stack.parameters() if id(parameter) not in own),
        layers=tuple(_layer_sizes(layer, text, name) for layer in layers),
        suggested_layer=suggested_layer,
    )


def _shipped(model: str) -> tuple[str, int | None] | None:
    if model == EMBEDDED_MODEL:
        model = "HuggingFaceTB/SmolLM2-135M"
    for ending in _ENDINGS:
        model = model.removesuffix(ending)
    return SHIPPED.get(model)


def _config(model: str) -> Any:
    """The config of a folder or hub id."""
    path = Path(model).expanduser()
    if path.exists() or model.startswith((".", "/", "~")):
        if not (path / "config.json").is_file():
            raise InvalidInputError(expected_got(f"model {model}", "a folder with a config.json", "none there"))
        model = str(path)
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(model)
    except (OSError, ValueError, KeyError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        shipped = ", ".join(SHIPPED)
        wanted = f"{EMBEDDED_MODEL}, a folder with a config.json, or a hub id that can be reached from here"
        remedy = f"Without the hub these are known: {shipped}, and their instruction-tuned twins."
        raise InvalidInputError(expected_got(f"model {model}", wanted, first.rstrip("."), remedy)) from error


def _config_from(fields: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(fields.pop("model_type"), **fields)


def _on_meta(config: Any, name: str) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except (ValueError, KeyError, TypeError, ImportError, AttributeError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UnsupportedError(expected_got(name, "the config of a causal language model", first)) from error


def _layer_sizes(layer: nn.Module, config: Any, name: str) -> LayerSizes:
    """Read off a layer's modules, by the names that transformers gives them."""
    maps = {path.rpartition(".")[2]: each for path, each in layer.named_modules() if isinstance(each, nn.Linear)}
    has_attention = "qkv_proj" in maps or {"q_proj", "k_proj", "v_proj"} <= maps.keys()
    if not has_attention or not {"o_proj", "down_proj"} <= maps.keys():
        wanted = "linear maps q_proj, k_proj, v_proj (or qkv_proj), o_proj, down_proj in each layer"
        raise UnsupportedError(expected_got(name, wanted, ", ".join(maps) or "none"))
    queries = maps["o_proj"].in_features
    together = (
        maps["qkv_proj"].out_features
        if "qkv_proj" in maps
        else sum(maps[each].out_features for each in ("q_proj", "k_proj", "v_proj"))
    )
    keys_values = together - queries
    of_heads = {"q_norm": queries, "k_norm": keys_values // 2}  # a norm of each head has the width of one
    norms = [
        of_heads.get(path.rpartition(".")[2], sum(parameter.numel() for parameter in each.parameters()))
        for path, each in layer.named_modules()
        if type(each).__name__.endswith("Norm")
    ]
    linear = sum(each.weight.numel() for each in layer.modules() if isinstance(each, nn.Linear))
    return LayerSizes(
        linear_values=linear,
        largest_linear=max(each.weight.numel() for each in maps.values()),
        dense_values=sum(parameter.numel() for parameter in layer.parameters()) - linear,
        norms=tuple(norms),
        queries=queries,
        keys_values=keys_values,
        heads=int(config.num_attention_heads),
        inner=maps["down_proj"].in_features,
        hidden=maps["o_proj"].out_features,
        keeps_scores=getattr(config, "attn_logit_softcapping", None) is not None,
    )
