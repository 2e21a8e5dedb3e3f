"""Attention of packed rows behind a shared prefix: against float64, and against torch's own attention."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cdas_fast.errors import InvalidInputError, UnsupportedError
from cdas_fast.ops import cpu_library
from cdas_fast.ops.packed_attention import packed_attention

SETS = cpu_library.instruction_sets() if cpu_library.available() else []
CASES: dict[str, dict[str, Any]] = {
    "one_row": {"lengths": [7]},
    "rows_of_all_sizes_and_an_empty_one": {"lengths": [100, 1, 0, 33, 65]},
    "no_prefix": {"lengths": [5, 66], "prefix": 0},
    "long_prefix": {"lengths": [3, 2], "prefix": 150},
    "every_head_its_own": {"lengths": [20, 9], "heads": 3, "groups": 3},
    "one_for_all_heads": {"lengths": [20, 9], "heads": 5, "groups": 1},
    "ragged_widths": {"lengths": [70, 4], "width": 37, "value_width": 5},
    "wide_heads": {"lengths": [70, 4], "width": 96, "value_width": 130},
    "softcap": {"lengths": [70, 30], "softcap": 2.0},
    "window_shorter_than_the_prefix": {"lengths": [70, 30], "window": 4},
    "window_longer_than_a_block": {"lengths": [200, 3], "window": 90},
    "window_of_one": {"lengths": [66, 3], "window": 1},
    "softcap_and_window": {"lengths": [90], "softcap": 3.0, "window": 20},
    "no_tokens": {"lengths": [0, 0]},
    "no_rows": {"lengths": []},
}
pytestmark = pytest.mark.usefixtures("nan_filled_empty")
implementations = pytest.mark.parametrize("impl", ["reference", *["cpp"] * bool(SETS)])
cases = pytest.mark.parametrize("case", list(CASES))


@pytest.fixture(params=SETS)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    library, best = cpu_library.load(), cpu_library.instruction_set()
    assert library.cdas_use_instruction_set(request.param.encode())
    yield request.param
    assert library.cdas_use_instruction_set(best.encode())


class Problem:
    """Random inputs of one case, and the gradient of its result."""

    def __init__(
        self,
        lengths: list[int],
        prefix: int = 6,
        heads: int = 4,
        groups: int = 2,
        width: int = 16,
        value_width: int | None = None,
        dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        value_width = width if value_width is None else value_width
        tokens = sum(lengths)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

        self.inputs = normal(tokens, heads, width), normal(tokens, groups, width), normal(tokens, groups, value_width)
        self.prefix = normal(prefix, groups, width), normal(prefix, groups, value_width)
        self.grad_out = normal(tokens, heads, value_width)
        self.starts = torch.tensor([0, *itertools.accumulate(lengths)])
        self.options: dict[str, Any] = {"scaling": width**-0.5, **options}

    def attend(self, inputs: Sequence[Tensor], impl: Any) -> Tensor:
        """`packed_attention` of query, key and value."""
        (query, key, value), (prefix_key, prefix_value) = inputs, self.prefix
        return packed_attention(query, key, value, self.starts, prefix_key, prefix_value, **self.options, impl=impl)

    def run(self, impl: Any) -> list[Tensor]:
        """Its result, and the gradients of query, key and value."""
        inputs = [each.detach().requires_grad_() for each in self.inputs]
        out = self.attend(inputs, impl)
        return [out.detach(), *torch.autograd.grad(out, inputs, self.grad_out.to(out.dtype))]

    def plain(self, dtype: torch.dtype) -> list[Tensor]:
        """The same as one writes it in torch, in `dtype`, differentiated by autograd."""
        inputs = [each.detach().to(dtype).requires_grad_() for each in self.inputs]
        query, key, value = inputs
        rows = []
        for begin, end in itertools.pairwise(self.starts.tolist()):
            keys, values = (
                torch.cat([prefix.to(dtype), own[begin:end]]).repeat_interleave(query.shape[1] // own.shape[1], 1)
                for prefix, own in zip(self.prefix, (key, value), strict=True)
            )
            scores = torch.einsum("ihe,jhe->hij", query[begin:end], keys) * self.options["scaling"]
            if (cap := self.options.get("softcap")) is not None:
                scores = cap * (scores / cap).tanh()
            offset = torch.arange(end - begin)[:, None] + self.prefix[0].shape[0] - torch.arange(keys.shape[0])
            window = self.options.get("window") or keys.shape[0]
            scores = scores.masked_fill((offset < 0) | (offset >= window), float("-inf"))
            rows.append(torch.einsum("hij,jhf->ihf", scores.float().softmax(-1).to(dtype), values))
            if dtype == torch.float64:
                rows[-1] = torch.einsum("hij,jhf->ihf", scores.softmax(-1), values)
        out = torch.cat(rows) if rows else query.new_zeros(self.grad_out.shape) * query.sum()
        gradients = torch.autograd.grad(out, inputs, self.grad_out.to(dtype), allow_unused=True)
        zeros = map(torch.zeros_like, inputs)
        return [out.detach(), *(zero if each is None else each for zero, each in zip(zeros, gradients, strict=True))]


def norm_of_error(ours: Tensor, right: Tensor) -> float:
    return float((ours.double() - right).norm())


@implementations
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@cases
def test_error_is_at_most_twice_that_of_plain_torch(case: str, dtype: torch.dtype, impl: Any) -> None:
    problem = Problem(**CASES[case], dtype=dtype)
    truth, plain, ours = problem.plain(torch.float64), problem.plain(dtype), problem.run(impl)
    for name, right, theirs, mine in zip(("out", "query", "key", "value"), truth, plain, ours, strict=True):
        assert mine.dtype == dtype
        rounding = torch.finfo(dtype).eps * float(right.norm())
        assert norm_of_error(mine, right) <= 2 * norm_of_error(theirs, right) + rounding, name


@cases
def test_right_on_every_instruction_set(case: str, instruction_set: str) -> None:
    problem = Problem(**CASES[case], dtype=torch.float64)
    for right, mine in zip(problem.plain(torch.float64), problem.run("cpp"), strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-10, atol=1e-12)
    problem = Problem(**CASES[case])
    for right, mine in zip(problem.plain(torch.float64), problem.run("cpp"), strict=True):
        torch.testing.assert_close(mine.double(), right, rtol=1e-4, atol=1e-5)


@implementations
def test_is_torchs_own_attention(impl: Any) -> None:
    """Of a row behind its prefix, as the last positions of one causal sequence."""
    problem = Problem([11], prefix=5)
    query, key, value = problem.inputs
    keys, values = (
        torch.cat([prefix, own]).transpose(0, 1) for prefix, own in zip(problem.prefix, (key, value), strict=True)
    )
    whole_query = torch.cat([query.new_zeros(5, 4, 16), query]).transpose(0, 1)
    theirs = F.scaled_dot_product_attention(whole_query, keys, values, is_causal=True, enable_gqa=True)
    ours = problem.attend(problem.inputs, impl)
    torch.testing.assert_close(ours, theirs.transpose(0, 1)[5:])


@implementations
@pytest.mark.parametrize("case", ["rows_of_all_sizes_and_an_empty_one", "softcap_and_window", "ragged_widths"])
def test_gradcheck(case: str, impl: Any) -> None:
    options = {**CASES[case], "lengths": [3, 0, 5], "prefix": 2, "width": 3, "value_width": 2}
    if "window" in options:
        options["window"] = 4
    problem = Problem(**options, dtype=torch.float64)
    inputs = [each.requires_grad_() for each in problem.inputs]

    def function(*tensors: Tensor) -> Tensor:
        return problem.attend(tensors, impl)

    assert torch.autograd.gradcheck(function, inputs)
    out = function(*inputs)
    first = torch.autograd.grad(out.sum(), inputs, retain_graph=True)
    second = torch.autograd.grad(out.sum(), inputs)
    assert all(map(torch.equal, first, second))
    with pytest.raises(UnsupportedError, match="second derivative"):
        torch.autograd.grad(torch.autograd.grad(function(*inputs).sum(), inputs, create_graph=True)[0].sum(), inputs)


@implementations
def test_rows_do_not_see_each_other(impl: Any) -> None:
    """Other rows may even be NaN; and a row is the same alone."""
    problem = Problem([9, 70, 4])
    out, *gradients = problem.run(impl)
    for each in problem.inputs:
        each[:9] = float("nan")
        each[79:] = float("nan")
    spoilt, *spoilt_gradients = problem.run(impl)
    assert spoilt[:9].isnan().all()
    for whole, beside in zip((out, *gradients), (spoilt, *spoilt_gradients), strict=True):
        assert torch.equal(whole[9:79], beside[9:79])
    problem.inputs = tuple(each[9:79].clone() for each in problem.inputs)  # type: ignore[assignment]
    problem.grad_out, problem.starts = problem.grad_out[9:79], torch.tensor([0, 70])
    for whole, alone in zip((out, *gradients), problem.run(impl), strict=True):
        torch.testing.assert_close(whole[9:79], alone)


@implementations
def test_scores_of_ten_thousand_stay_finite(impl: Any) -> None:
    problem = Problem([20], scaling=1e4)
    out, *gradients = problem.run(impl)
    assert all(each.isfinite().all() for each in (out, *gradients))
    exact = problem.plain(torch.float64)[0]
    torch.testing.assert_close(out.double(), exact, rtol=1e-2, atol=1e-2)


@implementations
def test_tensors_as_models_make_them(impl: Any) -> None:
    """Heads before tokens, or parts of one tensor, give the same bits as contiguous ones."""
    problem = Problem([30, 12])
    expected = problem.run(impl)
    query, key, value = problem.inputs
    fused = torch.cat([query, key, value], dim=1)
    for inputs in (
        tuple(each.transpose(0, 1).contiguous().transpose(0, 1) for each in problem.inputs),
        tuple(fused.split([4, 2, 2], dim=1)),
        tuple(each.transpose(1, 2).contiguous().transpose(1, 2) for each in problem.inputs),
    ):
        problem.inputs = inputs  # type: ignore[assignment]
        assert all(map(torch.equal, problem.run(impl), expected))


@pytest.mark.skipif(not SETS, reason="needs the C++ kernels")
def test_the_number_of_threads_changes_no_bit() -> None:
    problem = Problem([70, 3, 130, 1])
    alone = problem.run("cpp")
    torch.set_num_threads(3)
    assert all(map(torch.equal, problem.run("cpp"), alone))


@implementations
@pytest.mark.parametrize("case", ["one_row", "softcap_and_window"])
def test_compiles_into_one_graph(case: str, impl: Any) -> None:
    options = CASES[case]
    problem = Problem(**options)
    inputs = tuple(each.requires_grad_() for each in problem.inputs)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(*tensors: Tensor) -> Tensor:
        return problem.attend(tensors, impl)

    out = compiled(*inputs)
    expected = problem.run(impl)
    assert torch.equal(out.detach(), expected[0])
    gradients = torch.autograd.grad(out, inputs, problem.grad_out)
    assert all(map(torch.equal, gradients, expected[1:]))


@implementations
def test_autocast_does_not_lower_the_maths(impl: Any) -> None:
    problem = Problem([30])
    expected = problem.run(impl)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(map(torch.equal, problem.run(impl), expected))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": torch.zeros(4, 2, 16)}, r"key: expected shape \(5, 2, 16\), got \(4, 2, 16\)"),
        ({"value": torch.zeros(5, 1, 16)}, r"value: expected shape \(5, 2, 16\)"),
        ({"query": torch.zeros(5, 16)}, "query: expected three dimensions"),
        ({"query": torch.zeros(5, 3, 16)}, "key: expected a number of heads that divides the 3 of query, got 2"),
        ({"value": torch.zeros(5, 2, 16).half()}, "value: expected torch.float32, got torch.float16"),
        ({"prefix_key": torch.zeros(6, 2, 15)}, r"prefix_key: expected shape \(6, 2, 16\)"),
        ({"prefix_value": torch.zeros(3, 2, 16)}, r"prefix_value: expected shape \(6, 2, 16\)"),
        ({"prefix_key": torch.zeros(6, 2, 16, requires_grad=True)}, "prefix_key: expected a constant"),
        ({"starts": torch.tensor([0, 6])}, r"starts: expected ascending numbers from 0 to 5.*got \[0, 6\]"),
        ({"starts": torch.tensor([0, 4, 3, 5])}, "starts: expected ascending"),
        ({"starts": torch.tensor([1, 5])}, "starts: expected ascending"),
        ({"starts": torch.tensor([0, 5], dtype=torch.int32)}, "starts: expected int64"),
        ({"starts": [0, 5]}, "starts: expected a torch.Tensor, got list"),
        ({"scaling": float("nan")}, "scaling: expected a finite number"),
        ({"softcap": 0.0}, "softcap: expected None or a finite number above 0"),
        ({"window": 0}, "window: expected None or at least 1"),
        ({"impl": "cuda"}, "impl: expected auto, reference, cpp or triton, got 'cuda'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {
        "query": torch.zeros(5, 4, 16),
        "key": torch.zeros(5, 2, 16),
        "value": torch.zeros(5, 2, 16),
        "starts": torch.tensor([0, 5]),
        "prefix_key": torch.zeros(6, 2, 16),
        "prefix_value": torch.zeros(6, 2, 16),
        "scaling": 0.25,
    }
    packed_attention(**good)
    with pytest.raises(InvalidInputError, match=f"^packed_attention: {message}"):
        packed_attention(**{**good, **change})


def test_there_is_no_triton_kernel() -> None:
    problem = Problem([3])
    with pytest.raises(UnsupportedError, match="There is no Triton kernel of this op"):
        problem.run("triton")
