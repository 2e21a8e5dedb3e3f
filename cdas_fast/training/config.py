"""The settings of a training run."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from cdas_fast.data.rows import Directions
from cdas_fast.errors import InvalidInputError, expected_got
from cdas_fast.models.packed import Packing
from cdas_fast.ops.implementation import Implementation
from cdas_fast.storage import sha256_of

InitialDirection = Tensor | Literal["random", "difference-in-means", "principal-direction"]
Schedule = Literal["linear", "cosine"]
Reduction = Literal["sequence", "token"]
Preset = Literal["published", "fast"]

PRESETS: dict[str, dict[str, Any]] = {
    "published": {
        "epochs": 18,
        "batch_size": 8,
        "learning_rate": 0.04,
        "schedule": "linear",
        "warmup_steps": 0,
        "betas": (0.9, 0.999),
        "initial_direction": "random",
    },
    "fast": {
        "epochs": 4,
        "batch_size": 8,
        "learning_rate": 0.08,
        "schedule": "linear",
        "warmup_steps": 0,
        "betas": (0.7, 0.9),
        "initial_direction": "difference-in-means",
    },
}


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Settings of a training run; the defaults are those published for AxBench concepts.

    Args:
        layer: decoder layer whose output is intervened on, or several of them that share the direction.
        rank: rows of the direction, kept orthonormal.
        epochs: passes over the pairs.
        batch_size: pairs per step; each pair is one sequence per direction.
        learning_rate: peak rate of AdamW. With 0 the losses are measured and nothing is learnt.
        schedule: how the rate decays to 0 after the warm-up, `linear` or as half a `cosine`.
        warmup_steps: steps over which the rate rises linearly to its peak.
        patience: stop when the held-out loss has not fallen for so many evaluations, and keep the direction of the
            lowest one; None trains to the end and keeps the last direction.
        reduction: `sequence` averages the divergence over each response, then over the sequences of the step; `token`
            over all response tokens of a minibatch, then over the minibatches of the step (a batch of b pairs in both
            directions is two minibatches of b sequences), as the published code does.
        directions: `both`, or only toward the `positive` or the `negative` side.
        max_output_tokens: responses are cut to so many tokens; None leaves them whole.
        max_examples: keep the first so many pairs of each concept.
        shuffle: draw a new order of the pairs in each epoch.
        seed: of the initial direction and of the shuffling.
        initial_direction: `random`, `difference-in-means`, `principal-direction` (see `cdas_fast.training.directions`),
            or a tensor (rank, D), whose rows are made orthonormal if they are not.
        beta: weight of the target in the divergence, see `linear_jsd`.
        max_grad_norm: the gradient is clipped to this norm.
        betas: decay rates of AdamW's moments.
        system_prompt: the system message; None leaves it to the chat template.
        source_tokens: text at whose last token the source is read; the end of the prompt if None.
        clean_spaces: remove spaces before punctuation in prompts, as the published implementation does.
        prefix_length: positions that are never intervened on; None derives them from the chat template.
        packing: `packed` rows go through the model one behind the other, and the prefix that all share is computed
            once; `padded` ones each by itself; `auto` packs where it can, see `cdas_fast.models.packed.make_runner`.
        concepts_together: of several concepts, how many train at a time, their rows in the same micro-batches; None for
            as many as fill one. It bears on memory and speed; results differ by the rounding of products at most.
        micro_batch_tokens: tokens that go through the suffix at once, pads counted; bounds memory, not the result.
        recompute: keep no activations of the layers for the backward pass, which runs them once more: a third of the
            time more, for the memory of one hidden state a layer. It does not bear on the result.
        activation_bytes: of a model whose layers are read when they are needed, memory for what layers keep for the
            backward pass: as many as fit keep it, the others run once more. None for no limit; with `recompute` none
            keeps anything. It does not bear on the result.
        offload_activations: of such a model, hidden states between layers that run twice wait in the host's memory, and
            on a CPU in temporary files.
        cache_bytes: without an output folder, activations are kept in memory up to this size, and in temporary
            memory-mapped files beyond it.
        checkpoint_every: steps between checkpoints.
        evaluate_every: epochs between evaluations on held-out pairs.
        impl: implementation of the ops.
    """

    layer: int | Sequence[int]
    rank: int = 1
    epochs: int = 18
    batch_size: int = 8
    learning_rate: float = 0.04
    schedule: Schedule = "linear"
    warmup_steps: int = 0
    patience: int | None = None
    reduction: Reduction = "sequence"
    directions: Directions = "both"
    max_output_tokens: int | None = 128
    max_examples: int | None = None
    shuffle: bool = True
    seed: int = 0
    initial_direction: InitialDirection = "random"
    beta: float = 0.5
    max_grad_norm: float = 1.0
    betas: tuple[float, float] = (0.9, 0.999)
    system_prompt: str | None = None
    source_tokens: str | None = None
    clean_spaces: bool = True
    prefix_length: int | None = None
    packing: Packing = "auto"
    concepts_together: int | None = None
    micro_batch_tokens: int = 4096
    recompute: bool = False
    activation_bytes: int | None = None
    offload_activations: bool = False
    cache_bytes: int = 4 * 2**30
    checkpoint_every: int = 10
    evaluate_every: int = 1
    impl: Implementation = "auto"

    def __post_init__(self) -> None:
        layers = self.layers
        if not layers or len(set(layers)) != len(layers):
            raise InvalidInputError(expected_got("layer", "one layer or several different ones", repr(self.layer)))
        for name in (
            "rank",
            "epochs",
            "batch_size",
            "max_output_tokens",
            "max_examples",
            "concepts_together",
            "micro_batch_tokens",
            "checkpoint_every",
            "evaluate_every",
            "patience",
        ):
            value = getattr(self, name)
            optional = name in ("max_output_tokens", "max_examples", "concepts_together", "patience")
            if not (value is None and optional) and (
                isinstance(value, bool) or not isinstance(value, int) or value < 1
            ):
                raise InvalidInputError(expected_got(name, "an integer of at least 1", repr(value)))
        for name, fits, wanted in (
            ("learning_rate", 0 <= self.learning_rate < float("inf"), "a finite number of at least 0"),
            ("schedule", self.schedule in ("linear", "cosine"), "linear or cosine"),
            ("warmup_steps", isinstance(self.warmup_steps, int) and self.warmup_steps >= 0, "an integer of at least 0"),
            ("reduction", self.reduction in ("sequence", "token"), "sequence or token"),
            ("packing", self.packing in ("auto", "packed", "padded"), "auto, packed or padded"),
            ("directions", self.directions in ("both", "positive", "negative"), "both, positive or negative"),
            ("beta", 0 < self.beta < 1, "a number strictly between 0 and 1"),
            ("max_grad_norm", self.max_grad_norm > 0, "a number above 0"),
            ("prefix_length", self.prefix_length is None or self.prefix_length >= 0, "None or at least 0"),
            (
                "activation_bytes",
                self.activation_bytes is None or self.activation_bytes >= 0,
                "None or a number of bytes of at least 0",
            ),
            ("cache_bytes", self.cache_bytes >= 0, "a number of bytes of at least 0"),
            ("betas", len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas), "two numbers in [0, 1)"),
        ):
            if not fits:
                raise InvalidInputError(expected_got(name, wanted, repr(getattr(self, name))))
        if not isinstance(self.initial_direction, Tensor) and self.initial_direction not in (
            "random",
            "difference-in-means",
            "principal-direction",
        ):
            wanted = "random, difference-in-means, principal-direction or a tensor"
            raise InvalidInputError(expected_got("initial_direction", wanted, repr(self.initial_direction)))

    @classmethod
    def preset(cls, name: Preset | str, **settings: Any) -> TrainingConfig:
        """The settings of a preset, with others as they are given.

        `published` are the settings published for AxBench concepts, which are also the defaults; `fast` takes a quarter
        of the steps from the difference in means (the documentation shows what either reaches).

        Raises:
            InvalidInputError: no such preset, or a setting that does not fit.
        """
        if name not in PRESETS:
            raise InvalidInputError(expected_got("preset", " or ".join(PRESETS), repr(name)))
        return cls(**{**PRESETS[name], **settings})

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers, ascending."""
        return (self.layer,) if isinstance(self.layer, int) else tuple(sorted(self.layer))

    def rate(self, step: int, total_steps: int) -> float:
        """Learning rate of the step after `step` others."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / (self.warmup_steps + 1)
        done = (step - self.warmup_steps) / max(1, total_steps - self.warmup_steps)
        left = 1 - done if self.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
        return self.learning_rate * left

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON values; an initial direction given as a tensor is named by its hash."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values["layer"] = self.layer if isinstance(self.layer, int) else list(self.layers)
        values["betas"] = list(self.betas)
        if isinstance(self.initial_direction, Tensor):
            data = self.initial_direction.detach().to("cpu", torch.float32).contiguous()
            values["initial_direction"] = f"tensor {tuple(data.shape)} {sha256_of(data.numpy().tobytes())[:16]}"
        return values

    def identity(self) -> dict[str, Any]:
        """The settings that decide the result, for telling whether a run may be resumed."""
        result = self.to_dict()
        memory_and_speed = ("cache_bytes", "concepts_together", "recompute", "activation_bytes", "offload_activations")
        for name in (*memory_and_speed, "checkpoint_every", "evaluate_every"):
            del result[name]
        return result
