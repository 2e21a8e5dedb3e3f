"""The Triton kernels of clamp and project, interpreted, against autograd of the plain expression in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from head_cases import assert_as_right_as_torch
from torch import Tensor
from triton_worker import ROW_PARAMETERS, Apart, Made, Worker, worker

KERNELS = "cdas_fast.kernels.interchange:"
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
GRADIENTS = ("grad_hidden", "grad_value", "grad_direction")

pytestmark = pytest.mark.usefixtures("nan_filled_empty")


@pytest.fixture(scope="module")
def kernels() -> Iterator[Worker]:
    with worker(interpret=True) as process:
        yield process


@dataclass
class Case:
    """Arguments of clamp: rows of sequences, and what comes back into the backward pass."""

    hidden: Tensor
    grad_out: Tensor
    value: Tensor
    direction: Tensor
    place: dict[str, Any]

    def forward(self, kernels: Worker, **extra: Any) -> Tensor:
        named = {"out": torch.empty_like(self.hidden), **self.place, **extra}
        given = kernels.call(KERNELS + "clamp_forward", self.hidden, self.value, self.direction, **named)
        out: Tensor = given["out"]
        return out

    def backward(self, kernels: Worker, needed: tuple[str, ...] = GRADIENTS, **extra: Any) -> tuple[Tensor, ...]:
        """The gradients that are `needed`, in their order."""
        maths = self.value.dtype
        like = (self.hidden, self.value.to(maths), self.direction.to(maths))
        outputs = {name: torch.empty_like(each) for name, each in zip(GRADIENTS, like, strict=True) if name in needed}
        arguments = (self.grad_out, self.hidden, self.value, self.direction)
        given = kernels.call(KERNELS + "clamp_backward", *arguments, **{**outputs, **self.place, **extra})
        return tuple(given[name] for name in needed)

    def expected(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """The plain expression in torch and its gradients; nothing is read where the mask is False."""
        mask = self.place.get("mask")
        index, count = self.place.get("direction_index"), self.place["rows_per_sequence"]
        hidden, value, direction = (
            each.to(dtype, copy=True).requires_grad_() for each in (self.hidden, self.value, self.direction)
        )
        rows = (direction if index is None else direction[index]).expand(value.shape[0], *direction.shape[-2:])
        rows = rows.repeat_interleave(count, 0)
        read = hidden if mask is None else hidden.masked_fill(~mask[:, None], 0.0)
        missing = value.repeat_interleave(count, 0) - (rows @ read[:, :, None])[:, :, 0]
        out = read + (missing[:, None] @ rows)[:, 0]
        out = out if mask is None else torch.where(mask[:, None], out, hidden)
        return out.detach(), *torch.autograd.grad(out, (hidden, value, direction), self.grad_out.to(dtype))


def make_case(
    sequences: int = 3,
    count: int = 5,
    width: int = 37,
    rank: int = 3,
    concepts: int | None = None,
    masked: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Case:
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    maths = torch.promote_types(dtype, torch.float32)
    rows = sequences * count
    shape = (rank, width) if concepts is None else (concepts, rank, width)
    place: dict[str, Any] = {"rows_per_sequence": count}
    if concepts is not None:
        place["direction_index"] = torch.randint(concepts, (sequences,), generator=generator)
    if masked:
        place["mask"] = torch.rand(rows, generator=generator) < 0.6
    return Case(
        randn(rows, width).to(dtype),
        randn(rows, width).to(dtype),
        randn(sequences, rank).to(maths),
        (randn(*shape) / width**0.5).to(maths),
        place,
    )


def assert_right(case: Case, kernels: Worker, **extra: Any) -> None:
    ours = case.forward(kernels, **extra), *case.backward(kernels, **extra)
    truth = case.expected(torch.float64)
    plain = [each.to(mine.dtype) for each, mine in zip(case.expected(case.value.dtype), ours, strict=True)]
    for what, mine, torchs, true in zip(("out", *GRADIENTS), ours, plain, truth, strict=True):
        assert_as_right_as_torch(what, mine, torchs, true, max(1.0, true.abs().max().item()))


# Truth


@pytest.mark.parametrize("parameters", ROW_PARAMETERS.values(), ids=ROW_PARAMETERS.keys())
@pytest.mark.parametrize("masked", [False, True], ids=["everywhere", "masked"])
@pytest.mark.parametrize("concepts", [None, 4], ids=["shared", "indexed"])
@pytest.mark.parametrize("rank", [1, 3])
def test_result_and_gradients(
    rank: int, concepts: int | None, masked: bool, parameters: Made | None, kernels: Worker
) -> None:
    assert_right(make_case(rank=rank, concepts=concepts, masked=masked), kernels, parameters=parameters)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("parameters", ROW_PARAMETERS.values(), ids=ROW_PARAMETERS.keys())
def test_every_dtype(parameters: Made | None, dtype: torch.dtype, kernels: Worker) -> None:
    assert_right(make_case(concepts=2, masked=True, dtype=dtype), kernels, parameters=parameters)


@pytest.mark.parametrize("direction_dtype", [torch.bfloat16, torch.float16], ids=str)
def test_direction_and_value_of_another_dtype(direction_dtype: torch.dtype, kernels: Worker) -> None:
    case = make_case(dtype=torch.bfloat16)
    narrow = replace(case, value=case.value.to(direction_dtype), direction=case.direction.to(direction_dtype))
    wide = replace(case, value=narrow.value.float(), direction=narrow.direction.float())
    assert torch.equal(narrow.forward(kernels), wide.forward(kernels))
    outputs = {"grad_value": torch.empty(3, 3), "grad_direction": torch.empty(3, 37)}
    arguments = (narrow.grad_out, narrow.hidden, narrow.value, narrow.direction)
    given = kernels.call(KERNELS + "clamp_backward", *arguments, **outputs, **case.place)
    for name, expected in zip(GRADIENTS[1:], wide.backward(kernels, GRADIENTS[1:]), strict=True):
        assert torch.equal(given[name], expected)


@pytest.mark.parametrize("parameters", ROW_PARAMETERS.values(), ids=ROW_PARAMETERS.keys())
@pytest.mark.parametrize(
    "shape",
    [
        pytest.param({"sequences": 4, "count": 8, "width": 64, "rank": 4}, id="aligned"),
        pytest.param({"sequences": 1, "count": 1, "width": 33}, id="one_row"),
        pytest.param({"sequences": 9, "count": 1, "width": 20}, id="packed"),
        pytest.param({"sequences": 9, "count": 1, "width": 20, "concepts": 5}, id="packed_indexed"),
        pytest.param({"sequences": 2, "count": 3, "width": 1, "rank": 1}, id="width_1"),
        pytest.param({"sequences": 2, "count": 7, "width": 17, "rank": 16, "concepts": 2}, id="rank_16"),
        pytest.param({"sequences": 2, "count": 3, "width": 24, "rank": 5, "concepts": 7}, id="more_concepts_than_used"),
        pytest.param({"sequences": 1, "count": 90, "width": 12, "rank": 2}, id="one_long_sequence"),
    ],
)
def test_every_shape(shape: dict[str, Any], parameters: Made | None, kernels: Worker) -> None:
    assert_right(make_case(**shape), kernels, parameters=parameters)


@pytest.mark.parametrize("parameters", ROW_PARAMETERS.values(), ids=ROW_PARAMETERS.keys())
@pytest.mark.parametrize("concepts", [None, 4], ids=["shared", "indexed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_project(dtype: torch.dtype, concepts: int | None, parameters: Made | None, kernels: Worker) -> None:
    case = make_case(sequences=7, count=1, concepts=concepts, dtype=dtype)
    index = case.place.get("direction_index")
    rows = case.direction.expand(7, 3, 37) if index is None else case.direction[index]
    truth, plain = ((rows.to(to) @ case.hidden.to(to)[:, :, None])[:, :, 0] for to in (torch.float64, rows.dtype))
    out = torch.empty(7, 3, dtype=rows.dtype)
    given = kernels.call(KERNELS + "project", case.hidden, case.direction, index, out, parameters=parameters)
    assert_as_right_as_torch("coordinates", given["out"], plain, truth, scale=1)


def test_interchange_and_its_gradients_are_made_of_these(kernels: Worker) -> None:
    """As the module's docstring says: project, clamp, and for project's own gradients clamp of zeros."""
    case = make_case(concepts=2, masked=True)
    source, index = torch.randn(3, 37, generator=torch.Generator().manual_seed(1)), case.place["direction_index"]
    leaves = [each.double().requires_grad_() for each in (case.hidden, source, case.direction)]
    value = (leaves[2][index] @ leaves[1][:, :, None])[:, :, 0]
    rows = leaves[2][index].repeat_interleave(5, 0)
    missing = value.repeat_interleave(5, 0) - (rows @ leaves[0][:, :, None])[:, :, 0]
    out = torch.where(case.place["mask"][:, None], leaves[0] + (missing[:, None] @ rows)[:, 0], leaves[0])
    truth = torch.autograd.grad(out, leaves, case.grad_out.double())

    case.value = kernels.call(KERNELS + "project", source, case.direction, index, torch.empty(3, 3))["out"]
    torch.testing.assert_close(case.forward(kernels), out.float())
    grad_hidden, grad_value, grad_direction = case.backward(kernels)
    zeros = torch.zeros(1, 37).expand(3, 37)
    one_row_each = {"direction_index": index, "rows_per_sequence": 1}
    projection = Case(zeros, source, grad_value, case.direction, one_row_each)
    grad_source = projection.forward(kernels, out=torch.empty(3, 37))
    grad_direction = grad_direction + projection.backward(kernels, ("grad_direction",))[0]
    for ours, expected in zip((grad_hidden, grad_source, grad_direction), truth, strict=True):
        torch.testing.assert_close(ours, expected.float())


# Laws


@pytest.mark.parametrize("needed", [("grad_hidden",), ("grad_value",), ("grad_direction",)], ids=lambda names: names[0])
@pytest.mark.parametrize("parameters", ROW_PARAMETERS.values(), ids=ROW_PARAMETERS.keys())
def test_one_gradient_alone_is_the_same(parameters: Made | None, needed: tuple[str, ...], kernels: Worker) -> None:
    case = make_case(concepts=2, masked=True)
    together = dict(zip(GRADIENTS, case.backward(kernels, parameters=parameters), strict=True))
    (alone,) = case.backward(kernels, needed, parameters=parameters)
    torch.testing.assert_close(alone, together[needed[0]], rtol=1e-6, atol=1e-6)


def test_hidden_and_value_are_not_needed_for_the_other_gradients(kernels: Worker) -> None:
    case = make_case(masked=True)
    outputs = {"grad_hidden": torch.empty_like(case.hidden), "grad_value": torch.empty_like(case.value)}
    given = kernels.call(KERNELS + "clamp_backward", case.grad_out, None, None, case.direction, **outputs, **case.place)
    for name, expected in zip(GRADIENTS[:2], case.backward(kernels), strict=False):
        torch.testing.assert_close(given[name], expected)


@pytest.mark.parametrize("parameters", ROW_PARAMETERS.values(), ids=ROW_PARAMETERS.keys())
@pytest.mark.parametrize("concepts", [None, 2], ids=["shared", "indexed"])
@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
def test_masked_rows_may_hold_anything(
    value: float, concepts: int | None, parameters: Made | None, kernels: Worker
) -> None:
    case = make_case(concepts=concepts, masked=True)
    mask = case.place["mask"]
    mask[5:10] = False  # a whole sequence
    clean = case.forward(kernels, parameters=parameters), case.backward(kernels, parameters=parameters)
    case.hidden[~mask] = case.grad_out[~mask] = value
    case.value[1] = math.nan
    out = case.forward(kernels, parameters=parameters)
    grad_hidden, *others = case.backward(kernels, parameters=parameters)
    for copied, source, expected in ((out, case.hidden, clean[0]), (grad_hidden, case.grad_out, clean[1][0])):
        assert torch.equal(copied[~mask].nan_to_num(nan=7.0), source[~mask].nan_to_num(nan=7.0))
        assert torch.equal(copied[mask], expected[mask])
    assert all(torch.equal(ours, expected) for ours, expected in zip(others, clean[1][1:], strict=True))


@pytest.mark.parametrize("parameters", ROW_PARAMETERS.values(), ids=ROW_PARAMETERS.keys())
def test_a_bad_row_reaches_only_itself(parameters: Made | None, kernels: Worker) -> None:
    case, clean = make_case(), make_case()
    case.hidden[7, 3] = math.nan
    out, expected = (each.forward(kernels, parameters=parameters) for each in (case, clean))
    others = torch.arange(15) != 7
    assert out[7].isnan().all()
    assert torch.equal(out[others], expected[others])


@pytest.mark.parametrize("parameters", ROW_PARAMETERS.values(), ids=ROW_PARAMETERS.keys())
@pytest.mark.parametrize("wrong", [-1, 2, 2**40])
def test_a_concept_that_there_is_not_gives_nan(wrong: int, parameters: Made | None, kernels: Worker) -> None:
    case, clean = make_case(concepts=2), make_case(concepts=2)
    case.place["direction_index"][1] = wrong
    for given in (case, clean):
        given.grad_out[5:10] = 0.0 if given is clean else 1.0  # so that the clean one adds nothing to grad_direction
    out, (grad_hidden, grad_value, grad_direction) = (
        case.forward(kernels, parameters=parameters),
        case.backward(kernels, parameters=parameters),
    )
    assert out[5:10].isnan().all()
    assert grad_hidden[5:10].isnan().all()
    assert grad_value.isnan().any(1).tolist() == [False, True, False]
    rest = torch.arange(15)[(torch.arange(15) < 5) | (torch.arange(15) >= 10)]
    assert torch.equal(out[rest], clean.forward(kernels, parameters=parameters)[rest])
    torch.testing.assert_close(grad_direction, clean.backward(kernels, parameters=parameters)[2])


def test_the_order_of_sequences_within_a_concept_is_kept(kernels: Worker) -> None:
    """Sums over positions are made in one order, so that equal calls give equal bits; here, that of the batch."""
    case = make_case(sequences=6, concepts=2)
    case.place["direction_index"] = torch.tensor([1, 0, 1, 0, 1, 0])
    sorted_first = torch.tensor([1, 3, 5, 0, 2, 4])
    rows = (sorted_first[:, None] * 5 + torch.arange(5)).flatten()
    place = {**case.place, "direction_index": case.place["direction_index"][sorted_first]}
    moved = Case(case.hidden[rows], case.grad_out[rows], case.value[sorted_first], case.direction, place)
    assert torch.equal(case.backward(kernels)[2], moved.backward(kernels)[2])


# Memory


@pytest.mark.parametrize("parameters", ROW_PARAMETERS.values(), ids=ROW_PARAMETERS.keys())
def test_results_may_take_the_place_of_what_they_come_from(parameters: Made | None, kernels: Worker) -> None:
    case = make_case(masked=True, concepts=2)
    assert torch.equal(
        case.forward(kernels, parameters=parameters, out=case.hidden), case.forward(kernels, parameters=parameters)
    )
    ours = case.backward(kernels, parameters=parameters, grad_hidden=case.grad_out)
    for mine, expected in zip(ours, case.backward(kernels, parameters=parameters), strict=True):
        assert torch.equal(mine, expected)


def test_inputs_stay_as_they_are(kernels: Worker) -> None:
    case = make_case(masked=True, concepts=2)
    outputs = {"grad_value": torch.empty(3, 3), "grad_direction": torch.empty(2, 3, 37)}
    arguments = {"grad_out": case.grad_out, "hidden": case.hidden, "value": case.value, "direction": case.direction}
    given = kernels.call(KERNELS + "clamp_backward", **arguments, **case.place, **outputs)
    for name, before in {**arguments, **case.place}.items():
        assert (
            given[name] is before or given[name] == before
            if isinstance(before, int)
            else torch.equal(given[name], before)
        )


@pytest.mark.parametrize("stride", [40, 2**30], ids=["padded_rows", "beyond_2^31_numbers"])
@pytest.mark.parametrize("concepts", [None, 2], ids=["shared", "indexed"])
def test_rows_may_lie_apart(concepts: int | None, stride: int, kernels: Worker) -> None:
    case = make_case(sequences=3, count=1, concepts=concepts)
    named = {"value": case.value, "direction": case.direction, **case.place}
    hidden, grad_out, empty = (Apart(each, stride) for each in (case.hidden, case.grad_out, torch.empty(3, 37)))
    given = kernels.call(KERNELS + "clamp_forward", hidden=hidden, out=empty, **named)
    assert torch.equal(given["out"], case.forward(kernels))
    outputs = {
        "grad_hidden": empty,
        "grad_value": torch.empty(3, 3),
        "grad_direction": torch.empty_like(case.direction),
    }
    given = kernels.call(KERNELS + "clamp_backward", grad_out=grad_out, hidden=hidden, **named, **outputs)
    assert all(torch.equal(given[name], each) for name, each in zip(GRADIENTS, case.backward(kernels), strict=True))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8], ids=str)
def test_strided_and_small_indices_and_values(dtype: torch.dtype, kernels: Worker) -> None:
    case = make_case(concepts=2)
    index = case.place["direction_index"]
    other = replace(
        case,
        value=case.value[0].expand(3, 3),
        place={**case.place, "direction_index": torch.stack([index, 1 - index], 1).to(dtype)[:, 0]},
    )
    case.value = case.value[0].repeat(3, 1)
    assert torch.equal(other.forward(kernels), case.forward(kernels))
    arguments = (case.grad_out, case.hidden, other.value, case.direction)
    outputs = {"grad_direction": torch.empty_like(case.direction)}
    given = kernels.call(KERNELS + "clamp_backward", *arguments, **outputs, **other.place)
    assert torch.equal(given["grad_direction"], case.backward(kernels)[2])


@pytest.mark.parametrize(("sequences", "count"), [(0, 4), (3, 0)], ids=["no_sequence", "sequences_of_no_row"])
def test_no_rows(sequences: int, count: int, kernels: Worker) -> None:
    hidden, value, direction = torch.empty(0, 37), torch.zeros(sequences, 3), torch.zeros(3, 37)
    named: dict[str, Any] = {"value": value, "direction": direction, "rows_per_sequence": count}
    assert kernels.call(KERNELS + "clamp_forward", hidden, out=hidden, **named)["out"].shape == (0, 37)
    outputs = {"grad_value": torch.empty(sequences, 3), "grad_direction": torch.empty(3, 37)}
    given = kernels.call(KERNELS + "clamp_backward", hidden, hidden, **named, **outputs)
    assert torch.equal(given["grad_value"], torch.zeros(sequences, 3))
    assert torch.equal(given["grad_direction"], torch.zeros(3, 37))
    assert kernels.call(KERNELS + "project", hidden, direction, None, torch.empty(0, 3))["out"].shape == (0, 3)


# Bad arguments


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(6, 4).long()}, r"hidden: expected floating-point rows \(N, D\), got torch.int64"),
        ({"hidden": torch.zeros(2, 3, 4)}, r"hidden: expected floating-point rows \(N, D\), .* shape \(2, 3, 4\)"),
        ({"hidden": torch.zeros(4, 6).T}, r"hidden: expected contiguous rows of .*strides \(1, 6\)"),
        ({"rows_per_sequence": 4}, "rows_per_sequence: expected a divisor of 6 rows, got 4"),
        ({"value": torch.zeros(3, 2)}, r"value: expected .*shape \(2, 2\).* got .*shape \(3, 2\)"),
        ({"direction": torch.zeros(2, 5)}, r"direction: expected .*shape \(2, 4\).* got .*shape \(2, 5\)"),
        ({"direction": torch.zeros(3, 2, 4)}, r"direction: expected .* \(K, R, D\) with a direction_index, got"),
        ({"direction": torch.zeros(4, 2).T}, r"direction: expected contiguous .*strides \(1, 2\)"),
        ({"direction_index": torch.zeros(2).long()}, r"direction: expected .* \(K, R, D\) with a direction_index"),
        ({"mask": torch.ones(6)}, "mask: expected .*torch.bool.* got .*torch.float32"),
        ({"mask": torch.ones(2).bool()}, r"mask: expected .*shape \(6,\).* got .*shape \(2,\)"),
        ({"out": torch.zeros(6, 4).half()}, "out: expected .*torch.float32.* got torch.float16"),
        ({"out": torch.zeros(5, 4)}, r"out: expected .*shape \(6, 4\).* got .*shape \(5, 4\)"),
    ],
    ids=lambda change: "-".join(change) if isinstance(change, dict) else "",
)
def test_bad_arguments_of_clamp(change: dict[str, Any], message: str, kernels: Worker) -> None:
    hidden = torch.zeros(6, 4)
    good = {"hidden": hidden, "value": torch.zeros(2, 2), "direction": torch.zeros(2, 4), "out": hidden.clone()}
    kernels.call(KERNELS + "clamp_forward", **good, rows_per_sequence=3)
    with pytest.raises(ValueError, match=f"^{message}"):
        kernels.call(KERNELS + "clamp_forward", **{**good, "rows_per_sequence": 3, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grad_hidden": torch.zeros(5, 4)}, r"grad_hidden: expected .*shape \(6, 4\)"),
        ({"grad_value": torch.zeros(2, 2).half()}, "grad_value: expected .*torch.float32.* got torch.float16"),
        ({"grad_direction": torch.zeros(4, 2).T}, r"grad_direction: expected contiguous .*strides \(1, 2\)"),
        ({"grad_direction": torch.zeros(2, 4), "hidden": None}, "grad_direction: expected hidden and value"),
        ({"grad_direction": torch.zeros(2, 4), "value": None}, "grad_direction: expected hidden and value"),
        ({"grad_direction": torch.zeros(2, 4), "hidden": torch.zeros(6, 4).half()}, "hidden: .* got torch.float16"),
        ({"grad_direction": torch.zeros(2, 4), "value": torch.zeros(6, 2)}, r"value: expected .*shape \(2, 2\)"),
    ],
    ids=lambda change: "-".join(change) if isinstance(change, dict) else "",
)
def test_bad_arguments_of_its_gradients(change: dict[str, Any], message: str, kernels: Worker) -> None:
    hidden, direction = torch.zeros(6, 4), torch.zeros(2, 4)
    good = {"grad_out": hidden, "hidden": hidden, "value": torch.zeros(2, 2), "direction": direction}
    with pytest.raises(ValueError, match=f"^{message}"):
        kernels.call(KERNELS + "clamp_backward", **{**good, "rows_per_sequence": 3, **change})
