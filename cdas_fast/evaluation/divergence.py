"""Divergence that steering leaves on held-out pairs, beside what no steering and simpler directions leave."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from cdas_fast.data.pairs import ContrastivePairs
from cdas_fast.data.prompts import PromptFormat
from cdas_fast.data.rows import tokenize_pairs
from cdas_fast.errors import IncompatibleModelError, InvalidInputError, expected_got
from cdas_fast.models.structure import frozen, inspect_decoder
from cdas_fast.steering.vector import Factors, SteeringVector
from cdas_fast.training.cache import ActivationCache, build_cache
from cdas_fast.training.concept_run import ConceptResult
from cdas_fast.training.config import Reduction
from cdas_fast.training.directions import difference_in_means, random_direction
from cdas_fast.training.objective import (
    DivergenceObjective,
    Interchange,
    Intervention,
    clamp_to,
    leave_alone,
    mean_divergence,
)


@dataclass(frozen=True)
class HeldOutDivergence:
    """Mean JSD in nats over held-out pairs."""

    name: str
    intervention: str  # "none", "clamp" (to the factors, as at inference) or "interchange" (with the pair's own source)
    toward_positive: float
    toward_negative: float


def held_out_divergence(
    model: nn.Module,
    tokenizer: Any,
    pairs: Any,
    vectors: Mapping[str, SteeringVector],
    *,
    multiplier: float = 1.0,
    reduction: Reduction = "sequence",
    max_output_tokens: int | None = 128,
    source_tokens: str | None = None,
    clean_spaces: bool = True,
    micro_batch_tokens: int = 4096,
    cache: ActivationCache | None = None,
    progress: bool = True,
) -> list[HeldOutDivergence]:
    """How far the steered model's predictions are from those of the counterfactual prompt, by vector.

    Toward positive: mean_k JSD( p_Phi(. | x, y^c_<k) || p(. | x^c, y^c_<k) ), averaged over pairs; toward negative
    likewise with the roles exchanged. Each vector is measured twice: clamped to multiplier x
    its factors, as `steer` does, and with the pair's own source activation, as in training.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        pairs: contrastive pairs that the vectors were not trained on.
        vectors: by name; they act at the same layers.
        multiplier: of the factors.
        reduction: `sequence` averages over each response, then over pairs; `token` over all response tokens.
        max_output_tokens: responses are cut to so many tokens.
        source_tokens: see `TrainingConfig`.
        clean_spaces: see `TrainingConfig`.
        micro_batch_tokens: see `TrainingConfig`.
        cache: activations of these pairs, if there are any.
        progress: whether to show a progress bar.

    Raises:
        InvalidInputError: no vector.
        IncompatibleModelError: a vector that does not fit the model, or vectors at different layers or prefixes.
    """
    if not vectors:
        raise InvalidInputError(expected_got("vectors", "at least one", "none"))
    units = {name: vector.normalized() for name, vector in vectors.items()}
    first = next(iter(units.values()))
    for name, vector in units.items():
        vector.check_model(model, tokenizer)
        if (vector.layers, vector.prefix_length) != (first.layers, first.prefix_length):
            wanted = f"layers {list(first.layers)} and prefix {first.prefix_length} like the others"
            got = f"layers {list(vector.layers)} and prefix {vector.prefix_length}"
            raise IncompatibleModelError(expected_got(f"vector {name}", wanted, got))
    decoder = inspect_decoder(model)
    with frozen(model):
        if cache is None:
            prompt_format = PromptFormat(tokenizer, first.system_prompt, source_tokens, clean_spaces)
            rows = tokenize_pairs(
                ContrastivePairs.from_any(pairs),
                prompt_format,
                max_output_tokens=max_output_tokens,
                context_length=decoder.context_length,
            )
            cache = build_cache(
                decoder,
                rows,
                first.layers,
                prefix_length=first.prefix_length,
                micro_batch_tokens=micro_batch_tokens,
                description="Caching held-out activations",
                progress=progress,
            )
        objective = DivergenceObjective(
            decoder,
            cache.runner,
            cache.layers,
            prefix_length=first.prefix_length,
            micro_batch_tokens=micro_batch_tokens,
        )
        rows_toward = {
            side: [row for row in map(cache.row, range(len(cache))) if row.row.toward == side]
            for side in ("positive", "negative")
        }

        def measure(name: str, intervention_name: str, intervention: Intervention) -> HeldOutDivergence:
            sides = []
            for rows in rows_toward.values():
                sides.append(mean_divergence(rows, objective.evaluate(rows, intervention), reduction))
            return HeldOutDivergence(name, intervention_name, *sides)

        results = [measure("no steering", "none", leave_alone)]
        for name, vector in units.items():
            direction = vector.direction.to(decoder.device)
            if vector.positive is not None and vector.negative is not None:
                positive, negative = (
                    multiplier * side.mean.to(decoder.device) for side in (vector.positive, vector.negative)
                )
                results.append(measure(name, "clamp", clamp_to(direction, positive, negative)))
            results.append(measure(name, "interchange", Interchange(direction)))
    return results


def baseline_vectors(result: ConceptResult, seed: int = 1) -> dict[str, SteeringVector]:
    """A random direction and the difference in means, with factors read off the trained one's prompts."""
    if result.cache is None:
        wanted = "the result of a run over a single concept, which keeps its activations"
        raise InvalidInputError(expected_got("result", wanted, "one without activations"))
    positive, negative = result.cache.positive_sources.float(), result.cache.negative_sources.float()
    vector = result.vector
    directions = {
        "random direction": random_direction(vector.rank, vector.hidden_size, seed),
        "difference in means": difference_in_means(positive, negative, vector.rank, seed),
    }
    return {
        name: dataclasses.replace(
            vector,
            direction=direction,
            positive=Factors.from_projections(positive @ direction.T),
            negative=Factors.from_projections(negative @ direction.T),
            metadata={},
        )
        for name, direction in directions.items()
    }


def divergence_table(rows: Sequence[HeldOutDivergence]) -> str:
    """Held-out divergences as a text table."""
    width = max(len("no steering"), *(len(row.name) for row in rows))
    lines = [f"{'held-out JSD (nats)':{width}}  {'intervention':12}  toward positive  toward negative"]
    lines += [
        f"{row.name:{width}}  {row.intervention:12}  {row.toward_positive:15.4f}  {row.toward_negative:15.4f}"
        for row in rows
    ]
    return "\n".join(lines)
