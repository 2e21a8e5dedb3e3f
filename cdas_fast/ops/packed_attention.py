"""Causal attention over rows of tokens that are packed one behind the other and all begin with the same prefix.

The rows of a batch have the tokens starts[b] to starts[b + 1] - 1; before the first of them lie the P tokens of the
prefix, whose keys and values are constants. For a query i of a row, the keys j of the prefix and of the row up to i:

    s_ij = softcap(scaling q_i . k_j),   p_i = softmax_j(s_i),   out_i = sum_j p_ij v_j

With g the gradient of out, D_i = sum_j p_ij (g_i . v_j) and c_ij the slope of the cap, 1 without one:

    ds_ij = p_ij (g_i . v_j - D_i) c_ij
    grad_v_j = sum_i p_ij g_i     grad_q_i = scaling sum_j ds_ij k_j     grad_k_j = scaling sum_i ds_ij q_i

Nothing is padded and nothing of size tokens x tokens is kept: backward makes the scores again.

Source: Dao, "FlashAttention-2" (2023), for the backward pass; Juravsky et al., "Hydragen" (2024), for the prefix.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from cdas_fast.errors import InvalidInputError, expected_got
from cdas_fast.ops.implementation import (
    Implementation,
    check_implementation,
    choose_implementation,
    math_dtype,
    require_floating,
    without_autocast,
)
from cdas_fast.ops.registration import no_second_derivative, register

_FLOOR = -1e30  # the score of a key that a query does not see


def packed_attention(
    query: Tensor,  # (N, H, E)
    key: Tensor,  # (N, G, E)
    value: Tensor,  # (N, G, F)
    starts: Tensor,  # (B + 1,) int64
    prefix_key: Tensor,  # (P, G, E)
    prefix_value: Tensor,  # (P, G, F)
    *,
    scaling: float,
    softcap: float | None = None,
    window: int | None = None,
    impl: Implementation = "auto",
) -> Tensor:
    """Attention of packed rows behind a shared prefix; see the module's docstring for the formula.

    Equivalent PyTorch for one row::

        keys, values = torch.cat([prefix_key, key]), torch.cat([prefix_value, value])  # (P + N, G, .)
        seen = torch.ones(N, P + N, dtype=torch.bool).tril(P)
        out = F.scaled_dot_product_attention(
            query.transpose(0, 1), keys.transpose(0, 1), values.transpose(0, 1), seen, scale=scaling, enable_gqa=True
        ).transpose(0, 1)

    Args:
        query: H heads of N tokens.
        key: G heads, a divisor of H: neighbouring heads of queries share one.
        value: G heads; their width F may differ from that of the keys.
        starts: where the B rows begin, from 0, and N; on the CPU.
        prefix_key: keys of the P tokens before each row, P >= 0.
        prefix_value: their values.
        scaling: of the scores.
        softcap: cap of the scores, softcap tanh(s / softcap).
        window: keys that a query sees at most, itself included; all if None.
        impl: `auto`, `reference` or `cpp`.

    Returns:
        (N, H, F) in the dtype of `query`. The maths is float32 (float64 for float64 input), autocast or not.

    Gradients reach `query`, `key` and `value`, once: there is no second derivative. The prefix gets none.

    Raises:
        InvalidInputError: shapes, dtypes, devices or starts that do not fit; a prefix that requires a gradient.
        MissingDependencyError: an implementation that is not installed.
        UnsupportedError: `impl="triton"`, of which there is none.
    """
    tensors = {"query": query, "key": key, "value": value, "prefix_key": prefix_key, "prefix_value": prefix_value}
    _check(tensors, starts, scaling, softcap, window)
    check_implementation("packed_attention", impl)
    out, _ = _attend(
        query, key, value, starts, prefix_key, prefix_value, float(scaling), softcap or 0.0, window or 0, impl
    )
    return out


class Problem(NamedTuple):
    """What there is to attend to, for an implementation. Tensors may have any strides."""

    query: Tensor  # (N, H, E)
    key: Tensor  # (N, G, E)
    value: Tensor  # (N, G, F)
    starts: Tensor  # (B + 1,) int64
    prefix_key: Tensor  # (P, G, E)
    prefix_value: Tensor  # (P, G, F)
    scaling: float
    softcap: float  # 0 for none
    window: int  # 0 for all


class Functions(Protocol):
    """What an implementation consists of."""

    def forward(self, problem: Problem) -> tuple[Tensor, Tensor]:
        """Result (N, H, F) in the dtype of the query, and log sum_j exp(s_ij) (N, H) in the dtype of the maths."""

    def backward(self, problem: Problem, grad_out: Tensor, log_sum: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of query, key and value, new and contiguous, in their dtypes."""


class Reference:
    """The formulas in plain PyTorch, row by row."""

    @staticmethod
    def forward(problem: Problem) -> tuple[Tensor, Tensor]:
        """See `Functions`."""
        query, value = problem.query, problem.value
        out = query.new_empty(*query.shape[:2], value.shape[2])
        log_sum = query.new_empty(query.shape[:2], dtype=math_dtype(query.dtype))
        for row in _rows(problem.starts):
            values = _with_prefix(problem.prefix_value, value[row])
            scores = _scores(problem, row)
            row_log_sum = scores.logsumexp(-1)
            weights = (scores - row_log_sum[..., None]).exp()
            out[row] = _ungrouped(weights @ values[:, None]).to(out.dtype)
            log_sum[row] = _ungrouped(row_log_sum[..., None])[..., 0]
        return out, log_sum

    @staticmethod
    def backward(problem: Problem, grad_out: Tensor, log_sum: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `Functions`."""
        query, key, value = problem[:3]
        grad_query, grad_key, grad_value = (
            torch.empty_like(each, memory_format=torch.contiguous_format) for each in (query, key, value)
        )
        prefix, groups = problem.prefix_key.shape[0], key.shape[1]
        for row in _rows(problem.starts):
            keys = _with_prefix(problem.prefix_key, key[row])
            values = _with_prefix(problem.prefix_value, value[row])
            scores = _scores(problem, row)
            weights = (scores - _grouped(log_sum[row][..., None], groups)).exp()
            gradient = _grouped(grad_out[row].to(scores.dtype), groups)
            slopes = gradient @ values[:, None].mT
            slopes = weights * (slopes - (weights * slopes).sum(-1, keepdim=True))
            if problem.softcap:
                slopes = slopes * (1 - (scores / problem.softcap).square()).masked_fill(scores == _FLOOR, 0.0)
            slopes = problem.scaling * slopes
            grad_query[row] = _ungrouped(slopes @ keys[:, None]).to(query.dtype)
            queries = _grouped(query[row].to(scores.dtype), groups)
            own_keys = (slopes.mT @ queries).sum(1)[:, prefix:]
            own_values = (weights.mT @ gradient).sum(1)[:, prefix:]
            grad_key[row], grad_value[row] = own_keys.transpose(0, 1), own_values.transpose(0, 1)
        return grad_query, grad_key, grad_value


def _rows(starts: Tensor) -> list[slice]:
    return [slice(begin, end) for begin, end in itertools.pairwise(starts.tolist()) if end > begin]


def _with_prefix(prefix: Tensor, own: Tensor) -> Tensor:
    """(P, G, E), (T, G, E) -> (G, P + T, E) in the dtype of the maths."""
    return torch.cat([prefix, own]).to(math_dtype(own.dtype)).transpose(0, 1)


def _grouped(heads: Tensor, groups: int) -> Tensor:
    """(T, H, E) -> (G, H / G, T, E)."""
    return heads.unflatten(1, (groups, heads.shape[1] // groups)).permute(1, 2, 0, 3)


def _ungrouped(heads: Tensor) -> Tensor:
    """(G, H / G, T, E) -> (T, H, E)."""
    return heads.permute(2, 0, 1, 3).flatten(1, 2)


def _scores(problem: Problem, row: slice) -> Tensor:
    """Capped and masked scores of the T tokens of a row, (G, H / G, T, P + T)."""
    keys, query = _with_prefix(problem.prefix_key, problem.key[row]), problem.query[row]
    scores = _grouped(query.to(keys.dtype), keys.shape[0]) @ keys[:, None].mT * problem.scaling
    if problem.softcap:
        scores = problem.softcap * (scores / problem.softcap).tanh()
    prefix = problem.prefix_key.shape[0]
    seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril(prefix)
    if problem.window:
        seen = seen.triu(prefix - problem.window + 1)
    return scores.masked_fill(~seen, _FLOOR)


def _functions(impl: str, query: Tensor) -> Functions:
    chosen = choose_implementation("packed_attention", impl, query.device, math_dtype(query.dtype), has_triton=False)
    if chosen == "cpp":
        from cdas_fast.ops import packed_attention_cpp

        return packed_attention_cpp
    return Reference()


def _kernel(*arguments: Any) -> tuple[Tensor, Tensor]:
    *inputs, impl = arguments
    problem = Problem(*inputs)
    with without_autocast(problem.query.device):
        return _functions(impl, problem.query).forward(problem)


def _fake(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    out = query.new_empty(query.shape[0], query.shape[1], value.shape[2])
    return out, query.new_empty(query.shape[:2], dtype=math_dtype(query.dtype))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scaling, ctx.softcap, ctx.window, ctx.impl = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, output[1])


def _backward(ctx: Any, grad_out: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    *tensors, log_sum = ctx.saved_tensors
    gradients = _attend_backward(grad_out, log_sum, *tensors, ctx.scaling, ctx.softcap, ctx.window, ctx.impl)
    return *gradients, *[None] * 7


def _backward_kernel(grad_out: Tensor, log_sum: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *inputs, impl = arguments
    problem = Problem(*inputs)
    with without_autocast(problem.query.device):
        return _functions(impl, problem.query).backward(problem, grad_out, log_sum)


def _backward_fake(
    grad_out: Tensor, log_sum: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any
) -> tuple[Tensor, ...]:
    return tuple(each.new_empty(each.shape) for each in (query, key, value))


_TENSORS = "Tensor query, Tensor key, Tensor value, Tensor starts, Tensor prefix_key, Tensor prefix_value"
_NUMBERS = "float scaling, float softcap, int window, str impl"
_attend = register(
    f"packed_attention({_TENSORS}, {_NUMBERS}) -> (Tensor, Tensor)",
    _kernel,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
_attend_backward = register(
    f"packed_attention_backward(Tensor grad_out, Tensor log_sum, {_TENSORS}, {_NUMBERS}) -> (Tensor, Tensor, Tensor)",
    _backward_kernel,
    fake=_backward_fake,
    backward=no_second_derivative("packed_attention has"),
)


def _check(
    tensors: dict[str, Tensor], starts: Tensor, scaling: float, softcap: float | None, window: int | None
) -> None:
    require_floating("packed_attention", **tensors)
    query, value = tensors["query"], tensors["value"]
    for name, tensor in tensors.items():
        if tensor.dim() != 3:
            raise InvalidInputError(expected_got(f"packed_attention: {name}", "three dimensions", tuple(tensor.shape)))
        if tensor.dtype != query.dtype:
            raise InvalidInputError(expected_got(f"packed_attention: {name}", query.dtype, tensor.dtype))
        if name.startswith("prefix") and tensor.requires_grad:
            raise InvalidInputError(
                expected_got(f"packed_attention: {name}", "a constant", "a tensor that requires a gradient")
            )
    tokens, _, width = query.shape
    groups, prefix = tensors["key"].shape[1], tensors["prefix_key"].shape[0]
    for name, shape in (
        ("key", (tokens, groups, width)),
        ("value", (tokens, groups, value.shape[2])),
        ("prefix_key", (prefix, groups, width)),
        ("prefix_value", (prefix, groups, value.shape[2])),
    ):
        if tuple(tensors[name].shape) != shape:
            raise InvalidInputError(
                expected_got(f"packed_attention: {name}", f"shape {shape}", tuple(tensors[name].shape))
            )
    if not groups or query.shape[1] % groups:
        wanted = f"a number of heads that divides the {query.shape[1]} of query"
        raise InvalidInputError(expected_got("packed_attention: key", wanted, groups))
    for argument, number, fits, wanted in (
        ("scaling", scaling, abs(scaling) < float("inf"), "a finite number"),
        ("softcap", softcap, softcap is None or 0 < softcap < float("inf"), "None or a finite number above 0"),
        ("window", window, window is None or window >= 1, "None or at least 1"),
    ):
        if not fits:
            raise InvalidInputError(expected_got(f"packed_attention: {argument}", wanted, number))
    if not isinstance(starts, Tensor):
        raise InvalidInputError(expected_got("packed_attention: starts", "a torch.Tensor", type(starts).__name__))
    if (starts.dtype, starts.dim(), starts.device.type) != (torch.int64, 1, "cpu"):
        got = f"{starts.dtype} {tuple(starts.shape)} on {starts.device}"
        raise InvalidInputError(expected_got("packed_attention: starts", "int64 of shape (B + 1,) on the CPU", got))
    if torch.compiler.is_compiling():
        return
    places = starts.tolist()
    if not places or places != sorted(places) or (places[0], places[-1]) != (0, tokens):
        wanted = f"ascending numbers from 0 to {tokens}, the number of tokens"
        raise InvalidInputError(expected_got("packed_attention: starts", wanted, places))
