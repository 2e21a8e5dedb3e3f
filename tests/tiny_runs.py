"""Contrastive pairs for tiny models, and runs on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiny_models import tiny_model, tiny_tokenizer

import cdas_fast
from cdas_fast.training import TrainingResult

PAIRS = cdas_fast.ContrastivePairs(
    cdas_fast.ContrastivePair(
        negative_input=f"Tell me about {thing}.",
        negative_output=f"{thing} is plain",
        positive_input=f"With the sea: tell me about {thing}.",
        positive_output=f"The sea! {thing} afloat",
        concept="the sea",
    )
    for thing in ("bread", "a lamp", "trains", "my old chair", "x")
)


def tiny_config(**changes: Any) -> cdas_fast.TrainingConfig:
    """Settings for a run of a few seconds at most."""
    values: dict[str, Any] = {"layer": 1, "epochs": 3, "batch_size": 2, "max_output_tokens": 12}
    return cdas_fast.TrainingConfig(**{**values, **changes})


def tiny_run(
    pairs: Any = PAIRS, *, model: Any = None, output_dir: Path | None = None, **changes: Any
) -> TrainingResult:
    """Train on a tiny Llama; keyword arguments are settings."""
    others = {name: changes.pop(name, None) for name in ("resume", "validation", "callback", "activations_dir")}
    return cdas_fast.train(
        tiny_model() if model is None else model,
        tiny_tokenizer(),
        pairs,
        tiny_config(**changes),
        output_dir=output_dir,
        **{**others, "resume": bool(others["resume"])},
    )
