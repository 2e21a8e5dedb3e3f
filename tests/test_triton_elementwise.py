"""The Triton kernels of norms, gated activations and rotary embeddings, interpreted, against float64."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from head_cases import assert_as_right_as_torch, leaf
from test_gated_activation import plain as plain_gated
from test_gated_activation import true as true_gated
from test_rms_norm import EPS, VARIANTS
from test_rms_norm import plain as plain_norm
from torch import Tensor
from triton_worker import ROW_PARAMETERS, Apart, Made, Worker, worker

from cdas_fast.ops.rotary_embedding import rotary_embedding

KERNELS = "cdas_fast.kernels.elementwise:"
PROBES = "triton_probes:"
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPES = [(6, 64), (3, 67), (7, 1), (1, 576), (33, 12)]
FAR = 2**31 // 8 + 64  # rows so far apart that their offsets need 64 bits, from the ninth on

pytestmark = pytest.mark.usefixtures("nan_filled_empty")


@pytest.fixture(scope="module")
def kernels() -> Iterator[Worker]:
    with worker(interpret=True) as process:
        yield process


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# RMS norm


@pytest.mark.parametrize("parameters", ROW_PARAMETERS.values(), ids=ROW_PARAMETERS.keys())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norm_and_its_gradient(
    shape: tuple[int, int], variant: dict[str, Any], dtype: torch.dtype, parameters: Made | None, kernels: Worker
) -> None:
    x = leaf((randn(*shape) * torch.logspace(-2, 1, shape[0], dtype=torch.float64)[:, None]).to(dtype))
    weight, upstream = randn(shape[1], seed=1).to(dtype), randn(*shape, seed=2).to(dtype)
    maths = torch.promote_types(dtype, torch.float32)
    rounded = variant["round_normalized"]
    factor = variant["offset"] + weight.to(dtype if rounded else maths)
    exact = leaf(x.double())
    truth = factor.double() * exact / (exact.square().mean(-1, keepdim=True) + EPS).sqrt()
    theirs = plain_norm(x, weight, **variant)
    arguments = (factor.to(maths), EPS, rounded)

    def run(grad_out: Tensor | None) -> Tensor:
        given = (x.detach(), grad_out, *arguments, torch.empty(shape, dtype=dtype))
        out: Tensor = kernels.call(KERNELS + "rms_norm", *given, parameters=parameters)["out"]
        return out

    size = 32.0 if dtype == torch.float64 else 4.0
    # The interpreter cuts bfloat16 off where a GPU rounds: n and y are a unit off each, and torch's half of one.
    size += 2**17 * float(truth.detach().abs().max()) / 8 * (dtype == torch.bfloat16)
    assert_as_right_as_torch("value", run(None), theirs, truth, size)
    (their_gradient,) = torch.autograd.grad(theirs, x, upstream)
    (true_gradient,) = torch.autograd.grad(truth, exact, upstream.double())
    size = max(1.0, float(true_gradient.abs().max())) * (2**14 if dtype == torch.bfloat16 else 32)
    assert_as_right_as_torch("gradient", run(upstream), their_gradient, true_gradient, size)


@pytest.mark.parametrize("parameters", ROW_PARAMETERS.values(), ids=ROW_PARAMETERS.keys())
def test_extreme_rows_of_a_norm(parameters: Made | None, kernels: Worker) -> None:
    x = randn(7, 35).float()
    x[1], x[2], x[3] = 0, torch.finfo(torch.float32).tiny, 1e4
    factor, upstream = randn(35, seed=1).float(), randn(7, 35, seed=2).float()
    spoilt = x.clone()
    spoilt[4, 3], spoilt[5, 34] = math.nan, math.inf
    kept = [0, 1, 2, 3, 6]
    for grad_out in (None, upstream):
        clean, other = (
            kernels.call(
                KERNELS + "rms_norm", each, grad_out, factor, EPS, True, torch.empty(7, 35), parameters=parameters
            )["out"]
            for each in (x, spoilt)
        )
        assert clean.isfinite().all()
        assert torch.equal(clean[kept], other[kept])
        assert other[4].isnan().all()
        assert not other[5].isfinite().all()


# Gated activation


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("shape", [*SHAPES, (2, 2500)], ids=str)
def test_gated_activation_and_its_gradients(
    shape: tuple[int, int], activation: str, dtype: torch.dtype, kernels: Worker
) -> None:
    gate, up, upstream = (leaf((size * randn(*shape, seed=seed)).to(dtype)) for seed, size in enumerate((3, 1, 1)))
    exact = [leaf(gate.double()), leaf(up.double())]
    truth, theirs = true_gated(exact[0], exact[1], activation), plain_gated(gate, up, activation)
    inputs = [gate.detach(), up.detach()]
    out = kernels.call(KERNELS + "gated_activation", *inputs, activation, torch.empty(shape, dtype=dtype))["out"]
    given = {"grad_gate": torch.empty(shape, dtype=dtype), "grad_up": torch.empty(shape, dtype=dtype)}
    found = kernels.call(KERNELS + "gated_activation_backward", upstream.detach(), *inputs, activation, **given)
    their_gradients = torch.autograd.grad(theirs, (gate, up), upstream)
    true_gradients = torch.autograd.grad(truth, exact, upstream.double())
    size = 2**14 if dtype == torch.bfloat16 else 32.0  # the interpreter cuts bfloat16 off where a GPU rounds
    for what, ours, plain, right in zip(
        ("value", *given),
        (out, *(found[name] for name in given)),
        (theirs, *their_gradients),
        (truth, *true_gradients),
        strict=True,
    ):
        assert_as_right_as_torch(what, ours, plain, right, size * max(1.0, float(right.detach().abs().max())))
    for name in given:  # one alone is the same
        alone = kernels.call(
            KERNELS + "gated_activation_backward", upstream.detach(), *inputs, activation, **{name: given[name]}
        )
        assert torch.equal(alone[name], found[name])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_extreme_gates(activation: str, dtype: torch.dtype, kernels: Worker) -> None:
    """Large ones give 0 or the gate itself, with gradients to match; NaN stays where it is."""
    most = torch.finfo(dtype).max / 4
    gates = [-most, -1e4, -200.0, -60.0, 0.0, 60.0, 200.0, 1e4, most, math.nan, 1.0]
    gate = torch.tensor([gates], dtype=dtype)
    up, ones, empty = torch.full_like(gate, 2), torch.ones_like(gate), torch.empty_like(gate)
    out = kernels.call(KERNELS + "gated_activation", gate, up, activation, empty)["out"]
    outputs = {"grad_gate": empty, "grad_up": empty.clone()}
    found = kernels.call(KERNELS + "gated_activation_backward", ones, gate, up, activation, **outputs)
    positive = gate[:, 5:9]
    for result, expected in ((out, 2 * positive), (found["grad_gate"], 2 * ones[:, 5:9]), (found["grad_up"], positive)):
        assert torch.equal(result[:, 5:9], expected)
        assert result[:, :4].double().abs().max() < 1e-20
        assert result[:, 9].isnan()
        assert result[:, [*range(9), 10]].isfinite().all()


# Rotary embedding


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("batch", "heads", "tokens", "width", "tables"),
    [(2, 3, 5, 16, 2), (2, 9, 7, 6, 1), (1, 1, 1, 2, 1), (1, 40, 3, 130, 1)],
)
def test_rotation(
    batch: int, heads: int, tokens: int, width: int, tables: int, dtype: torch.dtype, kernels: Worker
) -> None:
    """As the reference; to the bit but for bfloat16, which the interpreter cuts off."""
    x = randn(batch, tokens, heads, width).to(dtype).transpose(1, 2)
    cos, sin = (randn(tables, tokens, width, seed=seed).to(dtype) for seed in (1, 2))
    expected = rotary_embedding(x, x, cos, sin, impl="reference")[0]
    for given in (x, x.contiguous()):
        out = torch.empty(batch, tokens, heads, width, dtype=dtype)
        found = kernels.call(KERNELS + "rotate", given, cos, sin, out)["out"].transpose(1, 2)
        if dtype == torch.bfloat16:
            assert (found.float() - expected.float()).abs().max() <= 3 * 2**-7 * expected.abs().max()
        else:
            assert torch.equal(found, expected)


# What tensors may look like


def test_rows_that_lie_far_apart(kernels: Worker) -> None:
    x, other, upstream = (randn(9, 20, seed=seed).bfloat16() for seed in range(3))
    factor, empty = torch.ones(20), torch.empty(9, 20, dtype=torch.bfloat16)
    far = [Apart(each, FAR) for each in (x, other, upstream)]
    for function, near, apart in (
        ("rms_norm", (x, upstream, factor, EPS, True, empty), (far[0], far[2], factor, EPS, True, empty)),
        ("gated_activation", (x, other, "silu", empty), (far[0], far[1], "silu", empty)),
    ):
        given = [kernels.call(KERNELS + function, *arguments)["out"] for arguments in (near, apart)]
        assert torch.equal(*given)
    gradients = [
        kernels.call(KERNELS + "gated_activation_backward", *arguments, "silu", grad_gate=empty, grad_up=empty.clone())
        for arguments in ((upstream, x, other), (far[2], far[0], far[1]))
    ]
    for name in ("grad_gate", "grad_up"):
        assert torch.equal(gradients[0][name], gradients[1][name])


def test_no_rows(kernels: Worker) -> None:
    empty = torch.empty(0, 8)
    kernels.call(KERNELS + "rms_norm", empty, None, torch.ones(8), EPS, True, empty.clone())
    kernels.call(KERNELS + "gated_activation", empty, empty, "silu", empty.clone())
    kernels.call(KERNELS + "rotate", torch.empty(1, 2, 0, 4), *[torch.empty(1, 0, 4)] * 2, torch.empty(1, 0, 2, 4))


X = torch.zeros(4, 6)


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        ("rms_norm", (X[0], None, X[0], EPS, True, X[0]), r"x: expected floating-point rows \(N, D\)"),
        ("rms_norm", (X.int(), None, X[0], EPS, True, X), r"x: expected floating-point rows \(N, D\)"),
        ("rms_norm", (X.T, None, X[0, :4], EPS, True, X.T), r"x: expected contiguous rows"),
        ("rms_norm", (X, None, X[0].double(), EPS, True, X), "factor: expected contiguous torch.float32"),
        ("rms_norm", (X, None, X[0, :5], EPS, True, X), r"factor: .* shape \(6,\)"),
        ("rms_norm", (X, X[:3], X[0], EPS, True, X), r"grad_out: .* shape \(4, 6\)"),
        ("rms_norm", (X, None, X[0], EPS, True, X.half()), "out: expected contiguous torch.float32"),
        ("gated_activation", (X, X.half(), "silu", X), "up: expected contiguous rows of torch.float32"),
        ("gated_activation", (X, X, "relu", X), "activation: expected one of silu, gelu_tanh, got 'relu'"),
        ("gated_activation_backward", (X[:2], X, X, "silu"), r"grad_out: .* shape \(4, 6\)"),
        ("rotate", (X, X, X, X), r"x: expected floating-point heads \(B, H, T, E\)"),
        ("rotate", (X[None, None, :, :5], X[None], X[None], X), "E even"),
        ("rotate", (X[None, None], X[None, :3], X[None], X[None, :, None]), r"cos: .* shape \(1, 4, 6\)"),
    ],
)
def test_what_does_not_fit_is_refused(function: str, arguments: Any, message: str, kernels: Worker) -> None:
    with pytest.raises(ValueError, match=f"^{message}|{message}"):
        kernels.call(KERNELS + function, *arguments)


# The ops


def as_the_reference(kernels: Worker, op: str, tensors: dict[str, Tensor], upstream: Any, **options: Any) -> None:
    """Value and gradients, whatever the strides."""
    with_impl = [
        kernels.call(PROBES + "op_and_gradients", op, tensors, upstream, impl=impl, **options)["return"]
        for impl in ("triton", "reference")
    ]
    for ours, expected in zip(*with_impl, strict=True):
        assert ours.is_contiguous() or ours.transpose(1, 2).is_contiguous()
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(lambda x: x, id="contiguous"),
        pytest.param(lambda x: x[0, 0, 0], id="one_row"),
        pytest.param(lambda x: x.transpose(1, 2), id="heads_first"),
        pytest.param(lambda x: x.mT.contiguous().mT, id="columns_first"),
        pytest.param(lambda x: torch.cat([x, x], -1)[..., :8], id="half_of_a_row"),
        pytest.param(lambda x: x[:0], id="empty"),
    ],
)
def test_ops(layout: Any, kernels: Worker) -> None:
    x, other, upstream = (layout(randn(2, 3, 5, 8, seed=seed).float()).detach() for seed in range(3))
    options: dict[str, Any] = {"eps": EPS, "offset": 1.0, "round_normalized": False}
    tensors = {"x": leaf(x), "weight": randn(8).float()}
    as_the_reference(kernels, "cdas_fast.ops.rms_norm:rms_norm", tensors, (upstream,), **options)
    for gate, up in ((leaf(x), leaf(other)), (leaf(x), other), (x, leaf(other))):
        gated = {"gate": gate, "up": up}
        as_the_reference(kernels, "cdas_fast.ops.gated_activation:gated_activation", gated, (upstream,))


def test_rotary_op(kernels: Worker) -> None:
    query, key = (leaf(randn(2, 5, heads, 8, seed=heads).float().transpose(1, 2)) for heads in (4, 2))
    cos, sin = (randn(2, 5, 8, seed=seed).float() for seed in (5, 6))
    tensors, upstream = {"query": query, "key": key, "cos": cos, "sin": sin}, (query.detach() * 2, key.detach() - 1)
    as_the_reference(kernels, "cdas_fast.ops.rotary_embedding:rotary_embedding", tensors, upstream)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("llama", "11 norms and 5 MLPs, 5 rotary embeddings"),
        ("gemma2", "21 norms and 5 MLPs, 5 rotary embeddings"),
        ("qwen3", "21 norms and 5 MLPs, 5 rotary embeddings"),
        ("phi3", "11 norms and 5 MLPs, 5 rotary embeddings"),
    ],
)
def test_models_run_by_them(name: str, wanted: str, kernels: Worker) -> None:
    fused, by_kernels, by_itself = kernels.call(PROBES + "fused_model", name)["return"]
    assert fused == wanted
    for ours, expected in zip(by_kernels, by_itself, strict=True):
        assert not torch.equal(ours, torch.zeros_like(ours))
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
