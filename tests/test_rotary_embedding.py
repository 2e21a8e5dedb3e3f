"""rotary_embedding against its formula in float64 and against the functions of transformers."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from head_cases import DTYPES, assert_as_right_as_torch, leaf
from torch import Tensor

from cdas_fast.errors import InvalidInputError
from cdas_fast.ops import cpu_library
from cdas_fast.ops.rotary_embedding import rotary_embedding

SHAPES = [
    pytest.param((2, 4, 5, 64), 2, 1, id="aligned"),
    pytest.param((2, 3, 5, 64), 3, 2, id="a_table_for_each_row"),
    pytest.param((1, 9, 67, 64), 3, 1, id="one_sequence"),
    pytest.param((1, 2, 3, 14), 1, 1, id="half_below_a_vector"),
    pytest.param((2, 2, 3, 70), 1, 2, id="ragged_E"),
    pytest.param((1, 1, 1, 2), 1, 1, id="smallest"),
    pytest.param((1, 2, 0, 8), 1, 1, id="no_token"),
    pytest.param((0, 2, 3, 8), 1, 1, id="no_row"),
]
pytestmark = pytest.mark.usefixtures("nan_filled_empty")


def make_case(shape: tuple[int, ...], groups: int, tables: int, dtype: torch.dtype) -> list[Tensor]:
    """Query, key, cos, sin, and upstream gradients of the first two; the halves of the tables differ."""
    generator = torch.Generator().manual_seed(0)
    key, table = (shape[0], groups, *shape[2:]), (min(tables, shape[0]) if shape[0] else 1, *shape[2:])
    shapes = (shape, key, table, table, shape, key)
    return [torch.randn(each, generator=generator, dtype=torch.float64).to(dtype) for each in shapes]


def plain(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """As the docstring has it."""

    def rotated(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]

    return rotated(query), rotated(key)


def run(function: Any, query: Tensor, key: Tensor, *others: Tensor, **options: Any) -> list[Tensor]:
    """Both results and both gradients."""
    cos, sin, *upstream = others
    inputs = [query.detach().requires_grad_(), key.detach().requires_grad_()]
    out = function(*inputs, cos, sin, **options)
    return [*(each.detach() for each in out), *torch.autograd.grad(out, inputs, upstream)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "groups", "tables"), SHAPES)
def test_values_and_gradients(
    shape: tuple[int, ...], groups: int, tables: int, dtype: torch.dtype, each_impl: Any
) -> None:
    case = make_case(shape, groups, tables, dtype)
    ours, theirs = run(rotary_embedding, *case, impl=each_impl), run(plain, *case)
    truth = run(plain, *(each.double() for each in case))
    for got, wanted, true in zip(ours, theirs, truth, strict=True):
        assert (got.dtype, got.shape) == (wanted.dtype, wanted.shape)
        assert_as_right_as_torch("rotated", got, wanted, true, 1.0)
        if dtype in (torch.bfloat16, torch.float16):
            assert torch.equal(got, wanted), "it rounds where torch does"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model", ["llama", "gemma3", "phi3", "qwen3"])
def test_is_what_transformers_does(model: str, dtype: torch.dtype, each_impl: Any) -> None:
    theirs = importlib.import_module(f"transformers.models.{model}.modeling_{model}").apply_rotary_pos_emb
    case = make_case((1, 4, 7, 16), 2, 1, dtype)
    for got, wanted in zip(run(rotary_embedding, *case, impl=each_impl), run(theirs, *case), strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), id="tokens_first"),
        pytest.param(lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]], id="half_of_a_row"),
        pytest.param(lambda x: x.mT.contiguous().mT, id="columns_first"),
        pytest.param(lambda x: x.transpose(0, -1).contiguous().transpose(0, -1), id="rows_last"),
    ],
)
def test_strides_change_not_a_bit(layout: Any, each_impl: Any) -> None:
    case = make_case((2, 4, 5, 64), 2, 2, torch.float32)
    strided = [layout(each) if each.dim() == 4 else each.mT.contiguous().mT for each in case]
    expected = run(rotary_embedding, *case, impl=each_impl)
    for got, wanted in zip(run(rotary_embedding, *strided, impl=each_impl), expected, strict=True):
        assert torch.equal(got, wanted)


def test_heads_of_a_token_lie_together(each_impl: Any) -> None:
    query, key, cos, sin, *_ = make_case((2, 4, 5, 8), 2, 1, torch.float32)
    for out in rotary_embedding(query, key, cos, sin, impl=each_impl):
        assert out.transpose(1, 2).is_contiguous()


def test_gradcheck(each_impl: Any) -> None:
    query, key, cos, sin, *_ = make_case((2, 3, 2, 6), 1, 2, torch.float64)
    arguments = (leaf(query), leaf(key))
    assert torch.autograd.gradcheck(lambda q, k: rotary_embedding(q, k, cos, sin, impl=each_impl), arguments)
    assert torch.autograd.gradgradcheck(lambda q, k: rotary_embedding(q, k, cos, sin, impl=each_impl), arguments)


def test_keeps_the_tables_alone_for_the_backward_pass(each_impl: Any) -> None:
    query, key, cos, sin, *_ = make_case((1, 4, 9, 16), 2, 1, torch.bfloat16)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda each: kept.append(each.data_ptr()), lambda each: each):
        rotary_embedding(leaf(query), leaf(key), cos, sin, impl=each_impl)
    assert kept == [cos.data_ptr(), sin.data_ptr()]


def test_one_of_them_alone_may_be_trained(each_impl: Any) -> None:
    query, key, cos, sin, upstream, _ = make_case((1, 4, 9, 16), 2, 1, torch.float32)
    trained = leaf(query)
    rotated, other = rotary_embedding(trained, key, cos, sin, impl=each_impl)
    (gradient,) = torch.autograd.grad(rotated, trained, upstream)
    expected = leaf(query)
    torch.testing.assert_close(gradient, torch.autograd.grad(plain(expected, key, cos, sin)[0], expected, upstream)[0])
    torch.testing.assert_close(other, plain(query, key, cos, sin)[1])


@pytest.mark.skipif(not cpu_library.available(), reason="needs the C++ kernels")
def test_threads_change_not_a_bit() -> None:
    case = make_case((2, 9, 301, 64), 3, 2, torch.float32)
    results = []
    for threads in (1, 2, 7):
        torch.set_num_threads(threads)
        results.append(run(rotary_embedding, *case, impl="cpp"))
    for result in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(result, results[0], strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": torch.ones(4, 5, 8)}, r"query: expected shape \(B, H, T, E\), got shape \(4, 5, 8\)"),
        ({"query": torch.ones(2, 4, 5, 7)}, r"query: expected heads of an even width, got 7"),
        ({"key": torch.ones(2, 4, 6, 8)}, r"key: expected shape \(2, 4, 5, 8\), got shape \(2, 4, 6, 8\)"),
        ({"cos": torch.ones(3, 5, 8)}, r"cos: expected shape \(2, 5, 8\), got shape \(3, 5, 8\)"),
        ({"sin": torch.ones(2, 5, 8)}, r"sin: expected shape \(1, 5, 8\), got shape \(2, 5, 8\)"),
        ({"sin": torch.ones(1, 5, 8).double()}, r"sin: expected torch.float32, got torch.float64"),
        ({"cos": torch.ones(1, 5, 8, requires_grad=True)}, r"cos and sin: expected frozen tensors"),
        ({"impl": "cuda"}, r"impl: expected"),
    ],
)
def test_refused(changes: dict[str, Any], message: str) -> None:
    query, key, cos, sin, *_ = make_case((2, 4, 5, 8), 2, 1, torch.float32)
    arguments: dict[str, Any] = {"query": query, "key": key, "cos": cos, "sin": sin, **changes}
    with pytest.raises(InvalidInputError, match=f"^rotary_embedding: {message}"):
        rotary_embedding(**arguments)
