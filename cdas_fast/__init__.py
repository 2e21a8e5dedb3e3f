"""Steering vectors by Concept Distributed Alignment Search, fast.

`import cdas_fast` is light: torch comes with the ops, transformers with models and training, each when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cdas_fast.data.convert import pairs_from_axbench, pairs_from_messages
    from cdas_fast.data.pairs import ContrastivePair, ContrastivePairs
    from cdas_fast.environment import show_config
    from cdas_fast.errors import CDASError
    from cdas_fast.evaluation.divergence import HeldOutDivergence, held_out_divergence
    from cdas_fast.models.loading import load_model
    from cdas_fast.ops.interchange import clamp, interchange
    from cdas_fast.ops.linear_jsd import linear_jsd
    from cdas_fast.ops.linear_kl import linear_kl
    from cdas_fast.ops.linear_logprob import linear_cross_entropy, linear_logprob
    from cdas_fast.steering.generation import generate
    from cdas_fast.steering.vector import SteeringVector
    from cdas_fast.training.config import TrainingConfig
    from cdas_fast.training.loop import TrainingResult, train

__version__ = "0.1.0"

_HOMES = {
    "CDASError": "cdas_fast.errors",
    "ContrastivePair": "cdas_fast.data.pairs",
    "ContrastivePairs": "cdas_fast.data.pairs",
    "HeldOutDivergence": "cdas_fast.evaluation.divergence",
    "SteeringVector": "cdas_fast.steering.vector",
    "TrainingConfig": "cdas_fast.training.config",
    "TrainingResult": "cdas_fast.training.loop",
    "clamp": "cdas_fast.ops.interchange",
    "generate": "cdas_fast.steering.generation",
    "held_out_divergence": "cdas_fast.evaluation.divergence",
    "interchange": "cdas_fast.ops.interchange",
    "linear_cross_entropy": "cdas_fast.ops.linear_logprob",
    "linear_jsd": "cdas_fast.ops.linear_jsd",
    "linear_kl": "cdas_fast.ops.linear_kl",
    "linear_logprob": "cdas_fast.ops.linear_logprob",
    "load_model": "cdas_fast.models.loading",
    "pairs_from_axbench": "cdas_fast.data.convert",
    "pairs_from_messages": "cdas_fast.data.convert",
    "show_config": "cdas_fast.environment",
    "train": "cdas_fast.training.loop",
}

__all__ = [
    "CDASError",
    "ContrastivePair",
    "ContrastivePairs",
    "HeldOutDivergence",
    "SteeringVector",
    "TrainingConfig",
    "TrainingResult",
    "__version__",
    "clamp",
    "generate",
    "held_out_divergence",
    "interchange",
    "linear_cross_entropy",
    "linear_jsd",
    "linear_kl",
    "linear_logprob",
    "load_model",
    "pairs_from_axbench",
    "pairs_from_messages",
    "show_config",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'cdas_fast' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
