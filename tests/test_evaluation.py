"""Held-out divergence: what it measures, and what it refuses."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_training import plain_row_loss
from tiny_models import tiny_model, tiny_tokenizer
from tiny_runs import PAIRS, tiny_run

from cdas_fast.errors import IncompatibleModelError, InvalidInputError
from cdas_fast.evaluation import HeldOutDivergence, baseline_vectors, held_out_divergence
from cdas_fast.steering import SteeringVector
from cdas_fast.training import ConceptResult
from cdas_fast.training.objective import mean_divergence


@pytest.fixture(scope="module")
def trained() -> ConceptResult:
    """A run on the first three pairs; two are left."""
    return tiny_run(PAIRS[:3], epochs=8, learning_rate=0.1).only


def measure(vectors: dict[str, SteeringVector], **options: Any) -> dict[tuple[str, str], HeldOutDivergence]:
    rows = held_out_divergence(tiny_model(), tiny_tokenizer(), PAIRS[3:], vectors, max_output_tokens=12, **options)
    return {(row.name, row.intervention): row for row in rows}


@pytest.mark.parametrize("reduction", ["sequence", "token"])
def test_values_equal_whole_forward_passes(trained: ConceptResult, reduction: str) -> None:
    from cdas_fast.data.prompts import PromptFormat
    from cdas_fast.data.rows import tokenize_pairs

    model, rows = tiny_model(), tokenize_pairs(PAIRS[3:], PromptFormat(tiny_tokenizer()), max_output_tokens=12)
    found = measure({"trained": trained.vector}, reduction=reduction)
    for name, direction in (("interchange", trained.vector.direction), ("none", torch.zeros(1, 32))):
        for side in ("positive", "negative"):
            own = [row for row in rows.rows if row.toward == side]
            with torch.no_grad():
                sums = [float(plain_row_loss(model, row, direction, (1,), rows.prefix_length)) for row in own]
            lengths = [row.base.response_length for row in own]
            expected = sum(sums) / sum(lengths)
            if reduction == "sequence":
                expected = sum(total / length for total, length in zip(sums, lengths, strict=True)) / len(own)
            row = found["no steering" if name == "none" else "trained", name]
            assert getattr(row, f"toward_{side}") == pytest.approx(expected, rel=1e-4)


def test_clamp_uses_the_factors_times_the_multiplier(trained: ConceptResult) -> None:
    one, two = measure({"v": trained.vector}), measure({"v": trained.vector}, multiplier=2.0)
    assert one["v", "clamp"] != two["v", "clamp"]
    assert one["v", "interchange"] == two["v", "interchange"]
    assert one["no steering", "none"] == two["no steering", "none"]


def test_vector_without_factors_is_measured_by_interchange_alone(trained: ConceptResult) -> None:
    import dataclasses

    bare = dataclasses.replace(trained.vector, positive=None, negative=None)
    assert set(measure({"bare": bare})) == {("no steering", "none"), ("bare", "interchange")}


def test_baselines_have_factors_of_their_own(trained: ConceptResult) -> None:
    assert trained.cache is not None
    baselines = baseline_vectors(trained)
    assert set(baselines) == {"random direction", "difference in means"}
    for vector in baselines.values():
        assert abs(vector.cosine(trained.vector)) < 0.99
        assert vector.positive is not None
        expected = (trained.cache.positive_sources.float() @ vector.direction.T).mean(0)
        torch.testing.assert_close(vector.positive.mean, expected)


def test_vectors_that_do_not_go_together_are_refused(trained: ConceptResult) -> None:
    with pytest.raises(InvalidInputError, match="vectors: expected at least one, got none"):
        measure({})
    other = tiny_run(PAIRS[:3], layer=2, epochs=1).vector
    with pytest.raises(IncompatibleModelError, match=r"vector b: expected layers \[1\].* got layers \[2\]"):
        measure({"a": trained.vector, "b": other})


def test_average_over_tokens_weighs_long_responses_more() -> None:
    rows: list[Any] = [SimpleNamespace(response_length=2), SimpleNamespace(response_length=6)]
    losses = torch.tensor([1.0, 4.0])
    assert mean_divergence(rows, losses, "sequence") == 2.5
    assert mean_divergence(rows, losses, "token") == pytest.approx((2 * 1.0 + 6 * 4.0) / 8)
