"""interchange and clamp against their formulas in float64, written with explicit loops."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from head_cases import COMPILED, IMPLEMENTATIONS
from torch import Tensor

from cdas_fast import clamp, interchange
from cdas_fast.errors import InvalidInputError

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
BATCH, PACKED = (4, 5), (6,)
SHAPES = [
    pytest.param({"shape": shape, "rank": rank, "concepts": concepts, "masked": masked}, id="-".join(words))
    for layout, shape in (("batch", BATCH), ("packed", PACKED))
    for rank in (1, 3)
    for concepts in (None, 3)
    for masked in (False, True)
    for words in [(layout, f"rank_{rank}", "K_directions" if concepts else "one_direction", *["mask"] * masked)]
]
EXTREMES = [
    pytest.param({"shape": (0, 5)}, id="empty_batch"),
    pytest.param({"shape": (2, 0)}, id="no_positions"),
    pytest.param({"shape": (0,), "concepts": 2}, id="no_rows"),
    pytest.param({"shape": (1, 1)}, id="one_position"),
    pytest.param({"shape": (3, 2), "rank": 0}, id="rank_0"),
    pytest.param({"shape": (3, 2), "width": 2, "rank": 2}, id="whole_space"),
    pytest.param({"shape": (3, 3), "width": 3, "rank": 3, "concepts": 3}, id="B_T_D_R_K_alike"),
]
VALUES = ["number", "per_direction", "per_row"]

pytestmark = pytest.mark.usefixtures("nan_filled_empty")


@dataclass
class Case:
    """Arguments of interchange, and of clamp with one of `values` in place of `source`."""

    hidden: Tensor
    source: Tensor
    direction: Tensor
    values: dict[str, Tensor]
    mask: Tensor | None = None
    direction_index: Tensor | None = None

    @property
    def where(self) -> dict[str, Any]:
        return {"mask": self.mask, "direction_index": self.direction_index}

    def tensors(self) -> dict[str, Any]:
        return {"hidden": self.hidden, "source": self.source, "direction": self.direction}

    def interchange(self, **extra: Any) -> Tensor:
        return interchange(**self.tensors(), **self.where, **extra)

    def clamp(self, value: str = "per_row", **extra: Any) -> Tensor:
        return clamp(self.hidden, self.values[value], self.direction, **self.where, **extra)

    def truth(self, value: str | None = None) -> Tensor:
        """h + sum_r (a_r - w_r . h) w_r, position by position; a_r is w_r . source unless a value is named."""
        out = self.hidden.double().clone()
        for place in torch.cartesian_prod(*(torch.arange(n) for n in self.hidden.shape[:-1])).reshape(
            -1, self.hidden.dim() - 1
        ):
            at = tuple(place.tolist())
            if self.mask is not None and not self.mask[at]:
                continue
            index = self.direction_index
            rows = (self.direction if index is None else self.direction[int(index[at[0]])]).double()
            for r, w in enumerate(rows):
                if value is None:
                    a = w.dot(self.source[at[0]].double())
                else:
                    a = self.values[value].double().expand(self.hidden.shape[0], rows.shape[0])[at[0], r]
                out[at] += (a - w.dot(self.hidden[at].double())) * w
        return out


def make_case(
    shape: tuple[int, ...] = BATCH,
    rank: int = 2,
    concepts: int | None = None,
    masked: bool = False,
    width: int = 7,
    dtype: torch.dtype = torch.float32,
    direction_dtype: torch.dtype | None = None,
) -> Case:
    """Random arguments; the rows of a direction are orthonormal. Every case with a mask has both kinds of position."""
    generator = torch.Generator().manual_seed(0)

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    rows = shape[0]
    direction = torch.linalg.qr(randn(concepts or 1, width, rank)).Q.mT.contiguous()
    values = {"number": randn(), "per_direction": randn(rank), "per_row": randn(rows, rank)}
    return Case(
        hidden=randn(*shape, width).to(dtype),
        source=randn(rows, width).to(dtype),
        direction=(direction if concepts else direction[0]).to(direction_dtype or dtype),
        values={name: value.to(dtype) for name, value in values.items()},
        mask=(torch.arange(math.prod(shape)) % 3 != 1).reshape(shape) if masked else None,
        direction_index=(torch.arange(rows) * 2 + 1) % concepts if concepts else None,
    )


def assert_rounded(out: Tensor, truth: Tensor, scale: float = 1.0) -> None:
    """Maths in float32 (or float64) on numbers of about `scale`, then one rounding to the dtype of the output."""
    if not truth.numel():
        assert out.shape == truth.shape
        return
    maths = torch.finfo(torch.promote_types(out.dtype, torch.float32)).eps
    excess = (out.double() - truth).abs() - torch.finfo(out.dtype).eps / 2 * truth.abs() - 16 * maths * max(scale, 1)
    worst = int(excess.nan_to_num(nan=math.inf).argmax())
    got, wanted = out.flatten()[worst].item(), truth.flatten()[worst].item()
    assert (excess <= 0).all(), f"worst at {worst}: got {got}, truth {wanted}"


# Truth


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [*SHAPES, *EXTREMES])
def test_interchange_is_its_formula(layout: dict[str, Any], dtype: torch.dtype, impl: str) -> None:
    skip_truncated(impl, dtype)
    case = make_case(**layout, dtype=dtype)
    out = case.interchange(impl=impl)
    assert (out.dtype, out.shape) == (dtype, case.hidden.shape)
    assert_rounded(out, case.truth())


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("layout", [*SHAPES, *EXTREMES])
def test_clamp_is_its_formula(layout: dict[str, Any], value: str, dtype: torch.dtype, impl: str) -> None:
    skip_truncated(impl, dtype)
    case = make_case(**layout, dtype=dtype)
    out = case.clamp(value, impl=impl)
    assert (out.dtype, out.shape) == (dtype, case.hidden.shape)
    assert_rounded(out, case.truth(value))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_are_used_as_given(dtype: torch.dtype) -> None:
    """Neither normalised nor made orthogonal."""
    case = make_case(dtype=dtype)
    case.direction = case.direction * 0.7 + 0.2
    assert_rounded(case.interchange(), case.truth())
    assert_rounded(case.clamp(), case.truth("per_row"))


@pytest.mark.parametrize("number", [3, -1.5])
def test_clamp_takes_a_python_number(number: float) -> None:
    case = make_case(masked=True)
    case.values["number"] = torch.tensor(float(number))
    assert torch.equal(clamp(case.hidden, number, case.direction, mask=case.mask), case.clamp("number"))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [*SHAPES, *EXTREMES])
def test_gradients_are_those_of_the_formula(layout: dict[str, Any], dtype: torch.dtype, impl: str) -> None:
    """Of hidden, source and a direction in float32, as training has it; its own dtype is gradcheck's."""
    skip_truncated(impl, dtype)
    case = make_case(**layout, dtype=dtype, direction_dtype=torch.promote_types(dtype, torch.float32))
    inputs = [tensor.requires_grad_() for tensor in case.tensors().values()]
    exact = make_case(**layout, dtype=dtype, direction_dtype=torch.promote_types(dtype, torch.float32))
    exact.hidden, exact.source, exact.direction = (each.detach().double().requires_grad_() for each in inputs)
    out = case.interchange(impl=impl)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    wanted = torch.autograd.grad(exact.truth(), list(exact.tensors().values()), upstream.double(), allow_unused=True)
    for ours, truth, tensor in zip(torch.autograd.grad(out, inputs, upstream), wanted, inputs, strict=True):
        truth = torch.zeros_like(tensor, dtype=torch.float64) if truth is None else truth
        assert (ours.dtype, ours.shape) == (tensor.dtype, tensor.shape)
        assert_rounded(ours, truth, scale=float(truth.abs().max()) if truth.numel() else 1.0)


@pytest.mark.parametrize("layout", SHAPES)
def test_float32_direction_on_bfloat16_activations(layout: dict[str, Any]) -> None:
    """As training has it: the direction is not rounded, and its gradient is float32."""
    case = make_case(**layout, dtype=torch.bfloat16, direction_dtype=torch.float32)
    case.direction.requires_grad_()
    out = case.interchange()
    assert out.dtype == torch.bfloat16
    assert_rounded(out.detach(), case.truth().detach())
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    got, wanted = (
        torch.autograd.grad(each, case.direction, upstream.to(each.dtype))[0] for each in (out, case.truth())
    )
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def skip_truncated(impl: str, dtype: torch.dtype) -> None:
    if impl == "triton" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter truncates to bfloat16 where a GPU rounds")


def small_case(layout: dict[str, Any]) -> Case:
    """Gradcheck calls the function twice for every number of the input."""
    return make_case(**{**layout, "shape": (2, 2) if len(layout["shape"]) == 2 else (3,)}, width=4, dtype=torch.float64)


@pytest.mark.parametrize("impl", COMPILED)
@pytest.mark.parametrize("layout", SHAPES)
def test_gradcheck_of_interchange(layout: dict[str, Any], impl: Any) -> None:
    case = small_case(layout)
    inputs = tuple(tensor.requires_grad_() for tensor in case.tensors().values())
    assert torch.autograd.gradcheck(lambda *args: interchange(*args, **case.where, impl=impl), inputs)


@pytest.mark.parametrize("impl", COMPILED)
@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("layout", SHAPES)
def test_gradcheck_of_clamp(layout: dict[str, Any], value: str, impl: Any) -> None:
    case = small_case(layout)
    inputs = tuple(tensor.requires_grad_() for tensor in (case.hidden, case.values[value], case.direction))
    assert torch.autograd.gradcheck(lambda *args: clamp(*args, **case.where, impl=impl), inputs)


# Laws


def rows_of(case: Case) -> Tensor:
    """The direction of each sequence or packed row, (B, R, D)."""
    if case.direction_index is None:
        return case.direction.expand(case.hidden.shape[0], *case.direction.shape)
    return case.direction[case.direction_index]


def coordinates(case: Case, activations: Tensor) -> Tensor:
    return torch.einsum("b...d,brd->b...r", activations, rows_of(case))


@pytest.mark.parametrize("layout", SHAPES)
def test_source_equal_to_base_is_the_identity(layout: dict[str, Any]) -> None:
    case = make_case(**layout, dtype=torch.float64)
    if case.hidden.dim() == 3:
        case.hidden = case.source[:, None].expand_as(case.hidden)
    else:
        case.hidden = case.source
    torch.testing.assert_close(case.interchange(), case.hidden)


@pytest.mark.parametrize("layout", SHAPES)
def test_coordinates_are_set_and_the_rest_is_kept(layout: dict[str, Any]) -> None:
    """W Phi(h; a) = a, and what is orthogonal to the subspace stays."""
    case = make_case(**{**layout, "masked": False}, dtype=torch.float64)
    shape = coordinates(case, case.hidden).shape
    for out, wanted in (
        (case.interchange(), coordinates(case, case.source)),
        (case.clamp(), case.values["per_row"]),
    ):
        wanted = wanted.reshape(shape[0], *[1] * (len(shape) - 2), shape[-1]).expand(shape)
        torch.testing.assert_close(coordinates(case, out), wanted)
        change = out - case.hidden
        within = torch.einsum("b...r,brd->b...d", coordinates(case, change), rows_of(case))
        torch.testing.assert_close(change, within)
        assert change.abs().max() > 0.1


@pytest.mark.parametrize("layout", SHAPES)
def test_twice_is_once(layout: dict[str, Any]) -> None:
    case = make_case(**layout, dtype=torch.float64)
    for function in (Case.interchange, Case.clamp):
        once = function(case)
        torch.testing.assert_close(function(replace(case, hidden=once)), once)
        assert (once - case.hidden).abs().max() > 0.1


@pytest.mark.parametrize("layout", SHAPES)
def test_interchange_is_a_clamp_to_the_coordinates_of_the_source(layout: dict[str, Any]) -> None:
    case = make_case(**layout)
    case.values["per_row"] = coordinates(case, case.source)
    torch.testing.assert_close(case.clamp(), case.interchange())


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32, torch.uint8], ids=str)
@pytest.mark.parametrize("shape", [BATCH, PACKED], ids=["batch", "packed"])
def test_each_row_has_the_direction_that_its_index_names(
    shape: tuple[int, ...], index_dtype: torch.dtype, impl: str
) -> None:
    case = make_case(shape, concepts=3)
    assert case.direction_index is not None
    assert case.direction_index.unique().tolist() == [0, 1, 2]
    together = replace(case, direction_index=case.direction_index.to(index_dtype)).interchange(impl=impl)
    for row, index in enumerate(case.direction_index.tolist()):
        alone = interchange(case.hidden[row : row + 1], case.source[row : row + 1], case.direction[index])
        torch.testing.assert_close(together[row : row + 1], alone)


# Masks


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [BATCH, PACKED], ids=["batch", "packed"])
def test_masked_positions_keep_every_bit(shape: tuple[int, ...], dtype: torch.dtype, impl: str) -> None:
    case = make_case(shape, masked=True, dtype=dtype)
    assert case.mask is not None
    case.hidden[~case.mask] = torch.tensor(
        [0.0, -0.0, 1e-7, torch.finfo(dtype).max, math.inf, -math.inf, 3.1], dtype=dtype
    )
    bits = {8: torch.int64, 4: torch.int32, 2: torch.int16}[dtype.itemsize]
    for out in (case.interchange(impl=impl), case.clamp("number", impl=impl)):
        assert torch.equal(out[~case.mask].view(bits), case.hidden[~case.mask].view(bits))
        assert (out[case.mask] != case.hidden[case.mask]).any(-1).all()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("function", ["interchange", "clamp"])
@pytest.mark.parametrize("concepts", [None, 3])
@pytest.mark.parametrize("shape", [BATCH, PACKED], ids=["batch", "packed"])
def test_masked_positions_reach_neither_other_positions_nor_any_other_gradient(
    shape: tuple[int, ...], concepts: int | None, function: str, impl: str
) -> None:
    """Padding may hold NaN, as may the source or value of what is masked throughout, and the gradient that comes in."""
    results = []
    for filler in (0.0, math.nan):
        case = make_case(shape, masked=True, concepts=concepts)
        assert case.mask is not None
        case.mask[0] = False
        case.hidden[~case.mask] = filler
        unread = ~case.mask if case.mask.dim() == 1 else ~case.mask.any(1)
        assert unread.any()
        case.source[unread] = case.values["per_row"][unread] = filler
        read = case.source if function == "interchange" else case.values["per_row"]
        inputs = [tensor.requires_grad_() for tensor in (case.hidden, read, case.direction)]
        out = case.interchange(impl=impl) if function == "interchange" else case.clamp(impl=impl)
        upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        upstream[~case.mask] = filler
        hidden, read_gradient, direction = torch.autograd.grad(out, inputs, upstream)
        torch.testing.assert_close(hidden[~case.mask], upstream[~case.mask], rtol=0, atol=0, equal_nan=True)
        assert torch.equal(read_gradient[unread], torch.zeros_like(read_gradient[unread]))
        results.append([out[case.mask], hidden[case.mask], read_gradient, direction])
    torch.testing.assert_close(*results)
    assert all(result.isfinite().all() for result in results[1])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_everything_masked_changes_nothing_but_is_a_new_tensor(impl: str) -> None:
    case = make_case()
    case.mask = torch.zeros(BATCH, dtype=torch.bool)
    case.direction.requires_grad_()
    out = case.interchange(impl=impl)
    assert torch.equal(out, case.hidden)
    assert out.data_ptr() != case.hidden.data_ptr()
    assert torch.equal(torch.autograd.grad(out.sum(), case.direction)[0], torch.zeros(2, 7))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_bad_row_reaches_only_itself(impl: str) -> None:
    case, clean = make_case(), make_case()
    case.hidden[2, 1], case.source[0] = math.nan, math.inf
    out, expected = case.interchange(impl=impl), clean.interchange(impl=impl)
    bad = torch.zeros(BATCH, dtype=torch.bool)
    bad[2, 1] = bad[0] = True
    torch.testing.assert_close(out[~bad], expected[~bad])
    assert not out[bad].isfinite().any()


# Contracts

FUNCTIONS = pytest.mark.parametrize("function", [Case.interchange, Case.clamp], ids=["interchange", "clamp"])


@FUNCTIONS
@pytest.mark.parametrize("trained", ["hidden", "source", "direction"])
def test_frozen_inputs_get_no_gradient_and_none_changes(trained: str, function: Callable[[Case], Tensor]) -> None:
    case = make_case(masked=True, concepts=3)
    read = "source" if function is Case.interchange else "value"
    tensors = {**case.tensors(), "value": case.values["per_row"]}
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    trained = read if trained == "source" else trained
    tensors[trained].requires_grad_()
    function(case).sum().backward()
    assert [name for name, tensor in tensors.items() if tensor.grad is not None] == [trained]
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors.items())
    with torch.no_grad():
        assert function(case).grad_fn is None
    tensors[trained].requires_grad_(False)
    assert not function(case).requires_grad


@FUNCTIONS
@pytest.mark.parametrize("layout", SHAPES[::2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_changes_nothing(
    dtype: torch.dtype, layout: dict[str, Any], function: Callable[[Case], Tensor]
) -> None:
    case = make_case(**layout, dtype=dtype)
    case.direction.requires_grad_()
    expected = function(case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = function(case)
    assert out.dtype == dtype
    assert torch.equal(out, expected)
    assert torch.equal(*(torch.autograd.grad(each.sum(), case.direction)[0] for each in (out, expected)))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@FUNCTIONS
@pytest.mark.parametrize("layout", SHAPES)
def test_non_contiguous_inputs(layout: dict[str, Any], function: Callable[..., Tensor], impl: str) -> None:
    case = make_case(**layout)

    def strided(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else torch.stack([tensor, torch.zeros_like(tensor)], dim=-1)[..., 0]

    values = {name: strided(value) for name, value in case.values.items()}
    others = {name: strided(tensor) for name, tensor in {**case.tensors(), **case.where}.items()}
    other = Case(**others, values=values)  # type: ignore[arg-type]
    for each in (case, other):
        each.direction.requires_grad_()
    ours, expected = function(other, impl=impl), function(case, impl=impl)
    torch.testing.assert_close(ours, expected)
    upstream = torch.randn(*ours.shape, 2, generator=torch.Generator().manual_seed(1))[..., 0]
    torch.testing.assert_close(
        torch.autograd.grad(ours, other.direction, upstream),
        torch.autograd.grad(expected, case.direction, upstream.contiguous()),
    )


def test_meta_tensors_give_shape_and_dtype() -> None:
    hidden = torch.empty(2, 3, 4, device="meta", dtype=torch.bfloat16)
    for out in (interchange(hidden, hidden[:, 0], hidden[0, :1]), clamp(hidden, 1.0, hidden[0, :1])):
        assert (out.shape, out.dtype, out.device.type) == (hidden.shape, hidden.dtype, "meta")


@FUNCTIONS
@pytest.mark.parametrize(("trained", "kept"), [("hidden", 0), ("direction", 1)])
def test_activations_are_kept_for_the_gradient_of_the_direction_alone(
    trained: str, kept: int, function: Callable[[Case], Tensor]
) -> None:
    case = make_case()
    case.tensors()[trained].requires_grad_()
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        function(case)
    assert sum(tensor.shape == case.hidden.shape for tensor in saved) == kept


# Bad inputs

GOOD: dict[str, Any] = {"hidden": torch.zeros(2, 3, 4), "direction": torch.zeros(2, 4), "mask": torch.ones(2, 3).bool()}
MANY, INDEX = torch.zeros(5, 2, 4), torch.zeros(2, dtype=torch.long)


def names(change: Any) -> str | None:
    return "-".join(change) if isinstance(change, dict) else None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": [0.0]}, "hidden: expected a torch.Tensor, got list"),
        ({"hidden": torch.zeros(2, 3, 4).int()}, "hidden: expected a floating-point dtype, got torch.int32. Cast it"),
        ({"hidden": torch.zeros(4)}, r"hidden: expected shape \(B, T, D\) or \(N, D\), got shape \(4,\)"),
        ({"hidden": torch.zeros(1, 2, 3, 4)}, r"hidden: expected shape .*, got shape \(1, 2, 3, 4\)"),
        ({"direction": torch.zeros(2, 4).to(torch.int8)}, "direction: expected .* got torch.int8. Dequantise it first"),
        ({"direction": torch.zeros(2, 4, device="meta")}, "direction: expected a tensor on cpu, got one on meta"),
        ({"direction": torch.zeros(4)}, r"direction: expected shape \(R, 4\) or \(K, R, 4\), got shape \(4,\)"),
        ({"direction": torch.zeros(2, 5)}, r"direction: expected shape \(R, 4\) .*, got shape \(2, 5\)"),
        ({"direction": MANY}, r"direction_index: expected given exactly if .* got none with direction \(5, 2, 4\)"),
        ({"direction_index": INDEX}, r"direction_index: expected given exactly if .* got one with direction \(2, 4\)"),
        (
            {"direction": MANY, "direction_index": torch.zeros(3, dtype=torch.long)},
            r"direction_index: expected shape \(2,\), got shape \(3,\)",
        ),
        ({"direction": MANY, "direction_index": INDEX.float()}, "index: expected an integer dtype, got torch.float32"),
        ({"direction": MANY, "direction_index": INDEX.bool()}, "index: expected an integer dtype, got torch.bool"),
        ({"direction": MANY, "direction_index": INDEX.to("meta")}, "index: expected a tensor on cpu, got meta"),
        ({"direction": MANY, "direction_index": INDEX + 5}, "index: expected indices .* 0 to 4, got 5"),
        ({"direction": MANY, "direction_index": INDEX - 1}, "index: expected indices .* 0 to 4, got -1"),
        ({"mask": [True, False]}, "mask: expected a torch.Tensor, got list"),
        ({"mask": torch.ones(2, 3)}, "mask: expected dtype torch.bool, got torch.float32"),
        ({"mask": torch.ones(2).bool()}, r"mask: expected shape \(2, 3\), got shape \(2,\)"),
        ({"mask": torch.ones(2, 3, device="meta").bool()}, "mask: expected a tensor on cpu, got meta"),
        ({"impl": "cuda"}, "impl: expected auto, reference, cpp or triton, got 'cuda'"),
    ],
    ids=names,
)
@pytest.mark.parametrize(
    ("function", "extra"),
    [(interchange, {"source": torch.zeros(2, 4)}), (clamp, {"value": 1.0})],
    ids=["interchange", "clamp"],
)
def test_bad_input(
    function: Callable[..., Tensor], extra: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    function(**GOOD, **extra)
    with pytest.raises(InvalidInputError, match=rf"^{function.__name__}: .*{message}"):
        function(**{**GOOD, **extra, **change})


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (None, "a torch.Tensor, got NoneType"),
        (torch.zeros(2, 4).long(), "a floating-point dtype, got torch.int64"),
        (torch.zeros(2, 4, device="meta"), "a tensor on cpu, got one on meta"),
        (torch.zeros(4), r"shape \(2, 4\), got \(4,\)"),
        (torch.zeros(2, 3, 4), r"shape \(2, 4\), got \(2, 3, 4\)"),
        (torch.zeros(1, 4), r"shape \(2, 4\), got \(1, 4\)"),
    ],
    ids=["none", "integers", "other_device", "one_for_all", "one_per_position", "one_row"],
)
def test_bad_source(source: Any, message: str) -> None:
    with pytest.raises(InvalidInputError, match=f"^interchange: source: expected {message}"):
        interchange(source=source, **GOOD)


@pytest.mark.parametrize("shape", [(3,), (2, 3), (3, 2), (1, 2), (2, 2, 1)], ids=str)
def test_bad_value(shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidInputError) as error:
        clamp(value=torch.zeros(shape), **GOOD)
    assert str(error.value) == f"clamp: value: expected a number, shape (2,) or shape (2, 2), got shape {shape}"
