"""The stand-in for pyvene's low-rank intervention against pyvene's own, alone and inside models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from head_cases import assert_as_right_as_torch, leaf
from tiny_models import CONFIGS, tiny_model
from torch import Tensor
from transformers.models.gpt2 import GPT2Config

pyvene = pytest.importorskip("pyvene", reason="needs pyvene: pip install pyvene", exc_type=ImportError)

from cdas_fast.dropin.pyvene import LowRankRotatedSpaceIntervention  # noqa: E402  # imports pyvene
from cdas_fast.errors import InvalidInputError  # noqa: E402

WIDTH, RANK = 24, 5
PARTITION = [[0, 2], [2, 3], [3, 5]]
SUBSPACES: dict[str, dict[str, Any]] = {
    "whole": {},
    "same_rows": {"subspaces": [[0, 3]] * 4},
    "same_parts": {"subspaces": [[0, 2]] * 4, "subspace_partition": PARTITION},
    "parts_of_each": {"subspaces": [[0], [2], [0], [2]], "subspace_partition": PARTITION},
    "use_fast": {"subspaces": [[1, 2], [0, 1], [3, 4], [1, 2]], "use_fast": True},
}


def both(dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Any, Any]:
    """Ours and pyvene's with one rotation, in `dtype`."""
    torch.manual_seed(0)
    pair = [
        kind(embed_dim=WIDTH, low_rank_dimension=RANK, **options).to(dtype)
        for kind in (LowRankRotatedSpaceIntervention, pyvene.LowRankRotatedSpaceIntervention)
    ]
    pair[0].load_state_dict(pair[1].state_dict())
    return pair[0], pair[1]


def activations(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    base, source = (leaf(torch.randn(*shape, WIDTH, generator=generator).to(dtype)) for _ in range(2))
    return base, source


def values(intervention: Any, base: Tensor, source: Tensor, subspaces: Any) -> list[Tensor]:
    """The result and all gradients, under an upstream gradient that is not 1."""
    out = intervention(base, source, subspaces)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, [base, source, *intervention.parameters()], upstream)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SUBSPACES)
def test_values_and_gradients_are_pyvenes(name: str, dtype: torch.dtype) -> None:
    options = dict(SUBSPACES[name])
    subspaces = options.pop("subspaces", None)
    base, source = activations(4, dtype=dtype)
    ours, theirs = both(**options)
    exact = both(torch.float64, **options)[1]
    exact.load_state_dict(ours.state_dict())
    truth = values(exact, leaf(base.double()), leaf(source.double()), subspaces)
    got, its = values(ours, base, source, subspaces), values(theirs, base, source, subspaces)
    assert (truth[0] - base.double()).abs().max() > 0.1
    for what, mine, plain, true in zip(("out", "base", "source", "rotation"), got, its, truth, strict=True):
        assert mine.dtype == plain.dtype
        assert_as_right_as_torch(what, mine, plain, true, scale=float(true.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_each_example_may_have_any_rows(dtype: torch.dtype) -> None:
    """Numbers of rows that differ, and none, which pyvene cannot do."""
    subspaces = [[0, 3], [4], [], [1, 2, 3]]
    base, source = activations(4, 3, dtype=dtype)
    ours, theirs = both(dtype, keep_last_dim=True)
    got = values(ours, base, source, subspaces)
    rotation = theirs.rotate_layer.weight
    wanted = []
    for example, rows in enumerate(subspaces):
        chosen = rotation[:, rows]
        wanted.append(base[example] + (source[example] - base[example]) @ chosen @ chosen.T)
    out = torch.stack(wanted)
    torch.testing.assert_close(got[0], out)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    gradients = torch.autograd.grad(out, [base, source, *theirs.parameters()], upstream)
    for mine, true in zip(got[1:], gradients, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-5, atol=1e-5)


def test_activations_may_have_positions_and_one_source_for_all() -> None:
    base, source = activations(4, 3)
    ours, theirs = both(keep_last_dim=True)
    for other in (source, source[:1], source[:, :1], source[0, 0]):
        torch.testing.assert_close(ours(base, other), theirs(base, other), rtol=1e-5, atol=1e-5)


def test_the_subspace_has_the_coordinates_of_the_source_and_nothing_else_changes() -> None:
    base, source = activations(4, dtype=torch.float64)
    ours, _ = both(torch.float64)
    rotation = ours.rotate_layer.weight
    out = ours(base, source)
    close: dict[str, Any] = {"rtol": 0, "atol": 1e-5}  # the rotation was drawn in float32
    torch.testing.assert_close(out @ rotation, source @ rotation, **close)
    outside = torch.eye(WIDTH, dtype=torch.float64) - rotation @ rotation.T
    torch.testing.assert_close(out @ outside, base @ outside, **close)
    assert (out - base).abs().max() > 0.1
    assert torch.equal(ours(base, base), base)


def test_subspaces_for_another_number_of_examples_are_refused() -> None:
    base, source = activations(4)
    with pytest.raises(InvalidInputError, match="one list for each of 4 examples, got 3"):
        both()[0](base, source, [[0]] * 3)


# Inside models


@pytest.fixture(params=["gpt2", "llama"])
def model(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    config = GPT2Config(vocab_size=320, n_embd=32, n_layer=3, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)
    monkeypatch.setitem(CONFIGS, "gpt2", lambda: config)
    return tiny_model(request.param).requires_grad_(False)


def intervenable(kind: type, model: Any, units: int = 1, **options: Any) -> tuple[Any, Any]:
    representation = pyvene.RepresentationConfig(1, "block_output", "pos", units, low_rank_dimension=RANK, **options)
    config = pyvene.IntervenableConfig(
        model_type=type(model), representations=[representation], intervention_types=kind
    )
    torch.manual_seed(0)
    whole = pyvene.IntervenableModel(config, model)
    (intervention,) = whole.interventions.values()
    return whole, intervention


def run(whole: Any, places: Any, **options: Any) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    base, source = ({"input_ids": torch.randint(3, 300, (2, 9), generator=generator)} for _ in range(2))
    _, counterfactual = whole(base, [source], {"sources->base": places}, **options)
    return counterfactual.logits


CALLS: dict[str, tuple[int, dict[str, Any], Any, dict[str, Any]]] = {
    "one_position": (1, {}, (6, 2), {}),
    "two_positions": (2, {}, ([[[6, 7]] * 2], [[[2, 3]] * 2]), {}),
    "subspaces": (1, {"subspace_partition": PARTITION}, (6, 2), {"subspaces": [[[0, 1], [1, 2]]]}),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_model_gives_the_logits_and_gradients_that_pyvenes_gives(model: Any, call: str) -> None:
    units, given, places, options = CALLS[call]
    results, state = [], None
    for kind in (pyvene.LowRankRotatedSpaceIntervention, LowRankRotatedSpaceIntervention):
        whole, intervention = intervenable(kind, model, units, **given)
        state = state or intervention.state_dict()
        intervention.load_state_dict(state)
        logits = run(whole, places, **options)
        logits.logsumexp(-1).sum().backward()
        results.append([logits.detach(), *(each.grad for each in intervention.parameters())])
    plain = model(input_ids=torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(3))).logits
    assert (results[0][0] - plain).abs().max() > 0.01
    assert results[0][1].abs().max() > 1e-3
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


def test_a_step_of_training_keeps_the_rows_orthonormal(model: Any) -> None:
    whole, intervention = intervenable(LowRankRotatedSpaceIntervention, model)
    optimiser = torch.optim.Adam(whole.get_trainable_parameters(), lr=0.01)
    before = run(whole, (6, 2)).logsumexp(-1).sum()
    before.backward()
    optimiser.step()
    assert run(whole, (6, 2)).logsumexp(-1).sum() < before
    rows = intervention.rotate_layer.weight.T
    torch.testing.assert_close(rows @ rows.T, torch.eye(RANK))


def test_what_was_saved_loads_into_either(model: Any, tmp_path: Path) -> None:
    whole, _ = intervenable(LowRankRotatedSpaceIntervention, model)
    logits = run(whole, (6, 2))
    whole.save(str(tmp_path))
    again = pyvene.IntervenableModel.load(str(tmp_path), model)
    (intervention,) = again.interventions.values()
    assert type(intervention) is LowRankRotatedSpaceIntervention
    torch.testing.assert_close(run(again, (6, 2)), logits, rtol=0, atol=0)
    theirs, other = intervenable(pyvene.LowRankRotatedSpaceIntervention, model)
    other.load_state_dict(intervention.state_dict())
    torch.testing.assert_close(run(theirs, (6, 2)), logits, rtol=1e-4, atol=1e-5)
