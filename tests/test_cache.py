"""Cached activations: what they are, row by row."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from tiny_models import tiny_model, tiny_tokenizer
from tiny_runs import PAIRS

from cdas_fast.data.prompts import PromptFormat
from cdas_fast.data.rows import TokenRows, tokenize_pairs
from cdas_fast.errors import InvalidInputError
from cdas_fast.models.packed import make_runner
from cdas_fast.models.structure import inspect_decoder
from cdas_fast.training.cache import ActivationCache, build_cache, rows_prefix

LAYERS = (1, 3)


def tiny_rows(pairs: Any = PAIRS, **settings: Any) -> TokenRows:
    return tokenize_pairs(pairs, PromptFormat(tiny_tokenizer()), max_output_tokens=12, **settings)


def assert_same_bits(one: ActivationCache, other: ActivationCache) -> None:
    assert one.shared_prefix_length == other.shared_prefix_length
    assert len(one) == len(other)
    for number in range(len(one)):
        for name in ("base_hidden", "target_final", "source"):
            assert torch.equal(getattr(one.row(number), name), getattr(other.row(number), name)), (number, name)
    assert torch.equal(one.positive_sources, other.positive_sources)
    assert torch.equal(one.negative_sources, other.negative_sources)


@pytest.mark.parametrize("packing", ["packed", "padded"])
@pytest.mark.parametrize("memory_bytes", [2**30, 0], ids=["in memory", "in files"])
@pytest.mark.parametrize("directions", ["both", "negative"])
def test_rows_are_what_the_model_itself_computes(packing: Any, memory_bytes: int, directions: Any) -> None:
    decoder, rows = inspect_decoder(tiny_model()), tiny_rows(directions=directions, first_pair=7)
    cache = build_cache(decoder, rows, LAYERS[::-1], packing=packing, memory_bytes=memory_bytes, micro_batch_tokens=150)
    shared = cache.shared_prefix_length
    assert 0 < shared <= rows.prefix_length
    assert len(cache) == len(rows.rows)

    def whole(ids: Any) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            states = decoder.model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states
        return torch.stack([states[layer + 1][0] for layer in LAYERS], 1), states[-1][0]

    total = 0
    for number, row in enumerate(rows.rows):
        found = cache.row(number)
        base, _ = whole(row.base.ids)
        sources, final = whole(row.source.ids)
        assert found.row is row
        assert cache.base_length(number) == len(found.base_hidden) == len(row.base.ids) - shared
        torch.testing.assert_close(found.base_hidden, base[shared:, 0], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(found.source, sources[row.source_position], rtol=1e-3, atol=1e-3)
        predicting = slice(row.source.prompt_length - 1, len(row.source.ids) - 1)
        torch.testing.assert_close(found.target_final, final[predicting], rtol=1e-3, atol=1e-3)
        total += found.base_hidden.nbytes + found.target_final.nbytes
    for prompts, side in (
        (rows.positive_prompts, cache.positive_sources),
        (rows.negative_prompts, cache.negative_sources),
    ):
        expected = torch.stack([whole(prompt)[0][-1] for prompt in prompts])
        torch.testing.assert_close(side, expected, rtol=1e-3, atol=1e-3)
        total += side.nbytes
    assert cache.nbytes == total
    if cache.folder is not None:
        cache.folder.cleanup()


def test_caches_share_a_runner() -> None:
    decoder, rows, held_out = inspect_decoder(tiny_model()), tiny_rows(), tiny_rows(PAIRS[:2])
    runner = make_runner(decoder, rows_prefix([rows, held_out], rows.prefix_length))
    caches = [build_cache(decoder, each, LAYERS, runner=runner) for each in (rows, held_out)]
    assert all(cache.runner is runner for cache in caches)
    assert_same_bits(caches[0], build_cache(decoder, rows, LAYERS))


def test_prefix_of_rows_ends_before_every_source_position() -> None:
    rows = tiny_rows(PAIRS[:1], directions="negative")
    ids = rows.rows[0].base.ids
    same = dataclasses.replace(rows, positive_prompts=(ids[:9],), negative_prompts=(ids[:8],))
    same = dataclasses.replace(same, rows=(dataclasses.replace(rows.rows[0], source=rows.rows[0].base),))
    assert rows_prefix([same], 100) == ids[:7]
    assert rows_prefix([same, rows], 3) == ids[:3]


def test_runner_that_does_not_fit_is_refused() -> None:
    decoder, rows = inspect_decoder(tiny_model()), tiny_rows()
    prefix = rows_prefix([rows], rows.prefix_length)
    other = inspect_decoder(tiny_model(seed=1))
    with pytest.raises(InvalidInputError, match="runner: expected one of the same model, got one of another model"):
        build_cache(decoder, rows, LAYERS, runner=make_runner(other, prefix))
    begins = "expected every sequence to begin with the runner's prefix of {} tokens and to go on, got one of "
    wrong = (*prefix[:-1], prefix[-1] + 1)
    with pytest.raises(InvalidInputError, match=begins.format(len(prefix))):
        build_cache(decoder, rows, LAYERS, runner=make_runner(decoder, wrong))
    with pytest.raises(InvalidInputError, match=f"expected a prefix of at most {len(prefix) - 1} tokens, got"):
        build_cache(decoder, rows, LAYERS, runner=make_runner(decoder, prefix), prefix_length=len(prefix) - 1)
    row = dataclasses.replace(rows.rows[0], source=rows.rows[0].base)
    whole = row.base.ids[:-3]
    rows = dataclasses.replace(rows, rows=(row,), positive_prompts=(whole,), negative_prompts=(whole,))
    with pytest.raises(InvalidInputError, match=begins.format(len(whole)) + f"{len(whole)} tokens"):
        build_cache(decoder, rows, LAYERS, runner=make_runner(decoder, whole), prefix_length=len(whole))
