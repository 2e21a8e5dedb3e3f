"""What every op keeps to: torch's own checks, torch.compile, autograd, autocast, choice of implementation."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from head_cases import IMPLEMENTATIONS, Operations, leaf
from torch import Tensor

import cdas_fast.ops.nf4  # each registers its ops, and nothing else here does
import cdas_fast.ops.packed_attention
import cdas_fast.ops.rotary_embedding  # noqa: F401
from cdas_fast import clamp, interchange, linear_cross_entropy, linear_jsd, linear_kl, linear_logprob
from cdas_fast.errors import InvalidInputError, MissingDependencyError, UnsupportedError
from cdas_fast.ops import cpu_library
from cdas_fast.ops.gated_activation import gated_activation
from cdas_fast.ops.implementation import choose_implementation
from cdas_fast.ops.rms_norm import rms_norm

WIDTH, VOCABULARY, RANK, CONCEPTS = 5, 11, 2, 3
GENERATOR = torch.Generator().manual_seed(0)
WEIGHT = torch.randn(VOCABULARY, WIDTH, generator=GENERATOR)
BIAS = torch.randn(VOCABULARY, generator=GENERATOR)
OPS = torch.ops.cdas_fast


class Inputs(NamedTuple):
    """One set of rows for all functions; the first three may be trained."""

    hidden: Tensor  # (N, D)
    other: Tensor  # (N, D), the target or source
    direction: Tensor  # (K, R, D)
    labels: Tensor  # (N,)
    mask: Tensor  # (N,)
    direction_index: Tensor  # (N,)


def make_inputs(rows: int = 4, dtype: torch.dtype = torch.float32) -> Inputs:
    generator = torch.Generator().manual_seed(rows)
    hidden, other = torch.randn(2, rows, WIDTH, generator=generator).to(dtype)
    direction = torch.randn(CONCEPTS, RANK, WIDTH, generator=generator)
    index = torch.arange(rows)
    labels = torch.where(index == 1, -100, index % VOCABULARY)
    return Inputs(hidden.clone(), other.clone(), direction, labels, index % 3 != 1, index % CONCEPTS)


Function = Callable[..., Tensor]
HEAD_LOSSES: dict[str, Function] = {
    "linear_jsd": lambda x, **more: linear_jsd(
        x.hidden, x.other, WEIGHT, bias=BIAS, logit_softcap=3.0, reduction="none", **more
    ),
    "linear_kl_forward": lambda x, **more: linear_kl(x.hidden, x.other, WEIGHT, temperature=1.5, **more),
    "linear_kl_reverse": lambda x, **more: linear_kl(x.hidden, x.other, WEIGHT, direction="reverse", **more),
    "linear_logprob": lambda x, **more: linear_logprob(x.hidden, x.labels, WEIGHT, logit_scale=0.5, **more),
    "linear_cross_entropy": lambda x, **more: linear_cross_entropy(x.hidden, x.labels, WEIGHT, bias=BIAS, **more),
}
SUBSPACE: dict[str, Function] = {
    "interchange": lambda x, **more: interchange(
        x.hidden, x.other, x.direction, mask=x.mask, direction_index=x.direction_index, **more
    ),
    "clamp": lambda x, **more: clamp(x.hidden, 0.5, x.direction[0], mask=x.mask, **more),
}
ELEMENTWISE: dict[str, Function] = {
    "rms_norm": lambda x, **more: rms_norm(x.hidden, WEIGHT[0], 1e-6, offset=1.0, **more),
    "gated_activation": lambda x, **more: gated_activation(x.hidden, x.other, **more),
}
FUNCTIONS = HEAD_LOSSES | SUBSPACE | ELEMENTWISE
# function and what of its inputs is trained
TRAINED = [
    *((name, ("hidden",)) for name in HEAD_LOSSES),
    *(("interchange", trained) for trained in (("hidden",), ("other",), ("direction",), ("hidden", "direction"))),
    *(("clamp", trained) for trained in (("hidden",), ("direction",))),
    ("rms_norm", ("hidden",)),
    *(("gated_activation", trained) for trained in (("hidden",), ("other",), ("hidden", "other"))),
]
each_function = pytest.mark.parametrize("name", FUNCTIONS)
each_trained = pytest.mark.parametrize(
    ("name", "trained"), TRAINED, ids=lambda x: x if isinstance(x, str) else "-".join(x)
)


def train(inputs: Inputs, trained: tuple[str, ...]) -> tuple[Inputs, list[Tensor]]:
    """The inputs with leaves that require a gradient, and those leaves."""
    leaves = {name: leaf(getattr(inputs, name)) for name in trained}
    return inputs._replace(**leaves), list(leaves.values())


# torch's own checks


def samples() -> list[Any]:
    """Arguments of every op, by the name of the op."""
    x = make_inputs(dtype=torch.bfloat16)
    head, last = (None, 1.5, 1.0), ("reference", 1000)
    own_head = (torch.randn(VOCABULARY, 7), BIAS)
    subspace = [
        (make_inputs().hidden.reshape(2, 2, WIDTH), x.direction[0].clone(), x.mask.reshape(2, 2), None),
        (x.hidden, x.direction, x.mask, x.direction_index),
        (x.hidden, x.direction[1].clone(), None, None),
        (torch.randn(2, WIDTH, 3).mT, x.direction[1].clone(), None, None),
    ]
    clamps, backwards, projections = [], [], []
    for hidden, direction, mask, index in subspace:
        value = torch.randn(hidden.shape[0], RANK)
        where = (mask, index)
        clamps.append((leaf(hidden), leaf(value), leaf(direction), *where, "reference"))
        clamps.append((hidden, value, leaf(direction), *where, "reference"))
        clamps.append((leaf(hidden), value, direction, *where, "reference"))
        projections.append((leaf(hidden[:, 0] if hidden.dim() == 3 else hidden), leaf(direction), index, "reference"))
        for need in range(8):
            needs = (bool(need & 1), bool(need & 2), bool(need & 4))
            read = (hidden, value) if needs[2] else (None, None)
            backwards.append((torch.randn_like(hidden), *read, direction, *where, *needs, "reference"))
    queries = torch.randn(5, 4, 6), torch.randn(5, 2, 6), torch.randn(5, 2, 3)
    constants = torch.tensor([0, 2, 5]), torch.randn(2, 2, 6), torch.randn(2, 2, 3)
    arguments: dict[str, list[tuple[Any, ...]]] = {
        "linear_jsd": [
            (leaf(x.hidden), x.other, WEIGHT, BIAS, None, None, "jsd", *head, 0.3, *last, True),
            (x.hidden, x.other, WEIGHT, None, None, None, "jsd", *head, 0.3, *last, False),
        ],
        "linear_kl": [
            (leaf(x.hidden), x.other, WEIGHT, None, None, BIAS, "forward_kl", *head, 0.5, *last, True),
            (leaf(x.hidden), torch.randn(4, 7), WEIGHT, None, *own_head, "reverse_kl", *head, 0.5, *last, True),
        ],
        "linear_logprob": [
            (leaf(x.hidden), x.labels, WEIGHT, BIAS, *head, -100, *last, True),
            (x.hidden, x.labels, WEIGHT, None, *head, -100, *last, False),
        ],
        "clamp": clamps,
        "clamp_backward": backwards,
        "project": projections,
        "rms_norm": [
            (leaf(x.hidden), WEIGHT[0].bfloat16(), 1e-6, 0.0, True, "reference"),
            (torch.randn(2, WIDTH, 3).mT, WEIGHT[0], 1e-6, 1.0, False, "reference"),
        ],
        "rms_norm_backward": [
            (torch.randn(2, WIDTH, 3).mT, torch.randn(2, 3, WIDTH), WEIGHT[0], 1e-6, 1.0, False, "reference")
        ],
        "gated_activation": [
            (leaf(x.hidden), leaf(x.other), "silu", "reference"),
            (*leaf(torch.randn(3, 2 * WIDTH)).chunk(2, -1), "gelu_tanh", "reference"),
            (x.hidden, leaf(x.other), "silu", "reference"),
        ],
        "gated_activation_backward": [
            (x.hidden, *torch.randn(4, 2 * WIDTH).bfloat16().chunk(2, -1), "silu", *needs, "reference")
            for needs in ((True, True), (True, False), (False, True))
        ],
        "rotary_embedding": [
            (leaf(torch.randn(2, 4, 3, 6)), leaf(torch.randn(2, 1, 3, 6)), *torch.randn(2, 1, 3, 6), "reference"),
            (
                torch.randn(2, 3, 4, 6).transpose(1, 2),
                leaf(torch.randn(2, 1, 3, 6)),
                *torch.randn(2, 2, 3, 6),
                "reference",
            ),
        ],
        "packed_attention": [
            (*map(leaf, queries), *constants, 0.5, 0.0, 0, "reference"),
            (queries[0].mT.contiguous().mT, *map(leaf, queries[1:]), *constants, 0.5, 2.0, 3, "reference"),
        ],
        "packed_attention_backward": [
            (torch.randn(5, 4, 3), torch.randn(5, 4), *queries, *constants, 0.5, 2.0, 3, "reference")
        ],
    }
    nested = torch.ones(33).byte(), torch.ones(2).byte(), torch.ones(1), torch.ones(256), torch.tensor(0.5)
    plain = nested[0], torch.ones(2), None, None, None
    arguments["dequantize_nf4"] = [
        (*nested, 5, 13, torch.bfloat16, "reference"),
        (*plain, 5, 13, torch.float32, "reference"),
    ]
    arguments["dequantize_nf4_out"] = [
        (*nested, torch.empty(5, 13).half(), "reference"),
        (*plain, torch.empty(5, 13), "reference"),
    ]
    return [
        pytest.param(name, each, id=f"{name}-{number}")
        for name, several in arguments.items()
        for number, each in enumerate(several)
    ]


SAMPLES = samples()


@pytest.mark.parametrize(("name", "arguments"), SAMPLES)
def test_opcheck(name: str, arguments: tuple[Any, ...]) -> None:
    torch.library.opcheck(getattr(OPS, name).default, arguments)


def test_every_registered_op_has_a_sample() -> None:
    registered = {name.partition("::")[2] for name in torch._C._dispatch_get_all_op_names() if "cdas_fast::" in name}
    assert registered == {sample.values[0] for sample in SAMPLES}


# torch.compile


@each_trained
def test_compiles_into_one_graph_for_any_number_of_rows(name: str, trained: tuple[str, ...]) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def function(x: Inputs) -> Tensor:
        return FUNCTIONS[name](x._replace(hidden=x.hidden * 2)).square().sum()

    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for rows in (4, 6, 9):
        inputs, leaves = train(make_inputs(rows), trained)
        for tensor in inputs:
            if tensor is not inputs.direction:
                torch._dynamo.mark_dynamic(tensor, 0)
        ours, expected = compiled(inputs), function(inputs)
        torch.testing.assert_close(ours, expected)
        torch.testing.assert_close(torch.autograd.grad(ours, leaves), torch.autograd.grad(expected, leaves))
    assert counter.frame_count == 1


@each_function
def test_compiles_without_grad_mode(name: str) -> None:
    torch._dynamo.reset()
    inputs, _ = train(make_inputs(), ("hidden", "direction"))
    with torch.no_grad():
        ours = torch.compile(FUNCTIONS[name], fullgraph=True, backend="aot_eager")(inputs)
        torch.testing.assert_close(ours, FUNCTIONS[name](inputs))
    assert not ours.requires_grad


# Autograd


@each_trained
def test_only_what_is_trained_gets_a_gradient_and_no_input_changes(name: str, trained: tuple[str, ...]) -> None:
    plain = make_inputs()
    inputs, _ = train(plain, trained)
    FUNCTIONS[name](inputs).sum().backward()
    given = {name for name, tensor in inputs._asdict().items() if tensor.grad is not None}
    assert given == set(trained)
    assert all(torch.equal(now, before) for now, before in zip(inputs, plain, strict=True))


@each_function
def test_nothing_trained_gives_no_graph(name: str) -> None:
    assert FUNCTIONS[name](make_inputs()).grad_fn is None
    inputs, _ = train(make_inputs(), ("hidden",))
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert FUNCTIONS[name](inputs).grad_fn is None


@each_trained
def test_backward_twice_gives_the_same_gradient(name: str, trained: tuple[str, ...]) -> None:
    inputs, leaves = train(make_inputs(), trained)
    out = FUNCTIONS[name](inputs)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    first = torch.autograd.grad(out, leaves, upstream, retain_graph=True)
    thrice = torch.autograd.grad(out, leaves, 3 * upstream, retain_graph=True)
    again = torch.autograd.grad(out, leaves, upstream)
    assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))
    torch.testing.assert_close(thrice, tuple(3 * gradient for gradient in first))
    assert all(gradient.abs().max() > 0.01 for gradient in first)


@each_trained
def test_second_derivative_is_refused(name: str, trained: tuple[str, ...]) -> None:
    """Even where another path leads to what is trained, which autograd would take alone."""
    inputs, leaves = train(make_inputs(), trained)
    gradients = torch.autograd.grad(FUNCTIONS[name](inputs).square().sum(), leaves, create_graph=True)
    penalty = torch.stack([gradient.square().sum() for gradient in gradients]).sum()
    for allow_unused in (False, True):
        with pytest.raises(UnsupportedError, match="no second derivative"):
            torch.autograd.grad(penalty + leaves[0].sum(), leaves, retain_graph=True, allow_unused=allow_unused)
    with pytest.raises(UnsupportedError, match="no second derivative"):
        penalty.backward()


@pytest.mark.parametrize("name", HEAD_LOSSES)
def test_gradient_is_differentiable_in_the_upstream_gradient(name: str) -> None:
    """It is linear in it: a learned weight of each row, say."""
    inputs, (hidden,) = train(make_inputs(), ("hidden",))
    loss = FUNCTIONS[name](inputs)
    upstream = torch.ones_like(loss).requires_grad_()
    (gradient,) = torch.autograd.grad(loss, hidden, upstream, create_graph=True)
    (ours,) = torch.autograd.grad(gradient.sum(), upstream)
    torch.testing.assert_close(ours.sum(), gradient.detach().sum())
    if loss.dim():
        torch.testing.assert_close(ours, gradient.detach().sum(-1))


@pytest.mark.parametrize("name", HEAD_LOSSES)
def test_the_gradient_is_made_only_if_it_is_needed(name: str) -> None:
    plain = make_inputs()
    inputs, _ = train(plain, ("hidden",))
    for given, grad_mode, need_gradient in ((inputs, True, True), (inputs, False, False), (plain, True, False)):
        with torch.set_grad_enabled(grad_mode), Operations() as operations:
            FUNCTIONS[name](given)
        (call,) = (place for place, op in enumerate(operations.names) if op.startswith("cdas_fast."))
        assert operations.arguments[call][-1] is need_gradient


def test_gradient_that_was_not_made_is_not_taken_for_zero() -> None:
    x = make_inputs()
    arguments = (leaf(x.hidden), x.other, WEIGHT, None, None, None, "jsd", None, 1.0, 1.0, 0.5, "auto", 1000, False)
    with pytest.raises(RuntimeError, match="need_gradient is False, but hidden requires grad"):
        OPS.linear_jsd(*arguments)


# Autocast


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each_trained
def test_autocast_changes_nothing(name: str, trained: tuple[str, ...], dtype: torch.dtype) -> None:
    """Nor does it around backward."""
    inputs, leaves = train(make_inputs(dtype=dtype), trained)
    expected = FUNCTIONS[name](inputs)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(expected.dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = FUNCTIONS[name](inputs)
        gradients = torch.autograd.grad(ours, leaves, upstream)
    assert torch.equal(ours, expected)
    assert ours.dtype == expected.dtype
    for got, wanted in zip(gradients, torch.autograd.grad(expected, leaves, upstream), strict=True):
        assert torch.equal(got, wanted)
        assert got.dtype == wanted.dtype


@each_function
def test_autocast_changes_nothing_in_a_compiled_function(name: str) -> None:
    trained = "direction" if name in SUBSPACE else "hidden"
    inputs, leaves = train(make_inputs(), (trained,))

    def function(x: Inputs) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return FUNCTIONS[name](x)

    torch._dynamo.reset()
    ours = torch.compile(function, fullgraph=True, backend="aot_eager")(inputs)
    expected = FUNCTIONS[name](inputs)
    assert torch.equal(ours, expected)
    upstream = torch.ones_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad(ours, leaves, upstream), torch.autograd.grad(expected, leaves, upstream)
    )


# Choice of implementation


@pytest.mark.parametrize("impl", ["cpp", "triton"])
def test_implementation_takes_part_in_the_tests(impl: str) -> None:
    reason = {"cpp": cpu_library.why_not(), "triton": "needs TRITON_INTERPRET=1"}[impl]
    if impl not in IMPLEMENTATIONS:
        pytest.skip(reason)
    for function in FUNCTIONS.values():
        expected = function(make_inputs(), impl="reference")
        torch.testing.assert_close(function(make_inputs(), impl=impl), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif("triton" not in IMPLEMENTATIONS, reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("more", [{}, {"logit_softcap": 3.0, "logit_scale": 0.0625}, {"logit_scale": 8.0}], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["linear_jsd", "forward", "reverse", "linear_logprob"])
def test_products_of_16_bits(
    name: str, dtype: torch.dtype, more: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where torch.mm sums them in float32. Gradients of 1e-7 and of 10 are right to the last bits."""
    from cdas_fast.ops import linear_head_triton

    product, products = torch.mm, []

    def mm(a: Tensor, b: Tensor, out_dtype: Any = None, out: Any = None) -> Tensor:
        if out_dtype is None:
            return product(a, b, out=out)
        assert (a.dtype, b.dtype, out.dtype) == (dtype, dtype, out_dtype)
        products.append(out)
        return product(a.float(), b.float(), out=out)

    def loss(hidden: Tensor, target: Tensor, weight: Tensor, impl: Any) -> Tensor:
        arguments: dict[str, Any] = {**more, "impl": impl, "chunk_bytes": 37 * 10 * 3}
        if name == "linear_logprob":
            return linear_logprob(hidden, torch.arange(7), weight, **arguments)
        if name == "linear_jsd":
            return linear_jsd(hidden, target, weight, reduction="none", **arguments)
        return linear_kl(hidden, target, weight, reduction="none", direction=name, **arguments)  # type: ignore[arg-type]

    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(rows, 13, generator=generator).to(dtype) for rows in (7, 37))
    target = (hidden + torch.randn(7, 13, generator=generator) / 64).to(dtype)
    exact = leaf(hidden.double())
    truth = loss(exact, target.double(), weight.double(), "reference")
    monkeypatch.setattr(linear_head_triton, "_mm_has_out_dtype", lambda *_: True)
    monkeypatch.setattr(torch, "mm", mm)
    ours = loss(hidden.requires_grad_(), target, weight, "triton")
    monkeypatch.undo()
    assert len(products) >= 4
    torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=1e-5)
    upstream = torch.full((7,), 1024.0)  # a loss scale, without which float16 cannot hold the result
    (wanted,) = torch.autograd.grad(truth, exact, upstream.double())
    (got,) = torch.autograd.grad(ours, hidden, upstream)
    assert ((got.double() - wanted).abs() <= 3 * torch.finfo(dtype).eps * wanted.abs().max()).all()


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Say what is installed."""

    def describe(*, library: bool = False, triton: bool = False, interpreter: bool = False) -> None:
        monkeypatch.setattr(cpu_library, "available", lambda: library)
        monkeypatch.setattr(cpu_library, "why_not", lambda: "no library here")
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if triton else None)
        monkeypatch.setenv("TRITON_INTERPRET", "1" if interpreter else "0")

    return describe


@pytest.mark.parametrize(
    ("device", "installed", "chosen"),
    [
        ("cpu", {}, "reference"),
        ("cpu", {"library": True, "triton": True}, "cpp"),
        ("cpu", {"triton": True, "interpreter": True}, "reference"),
        ("cuda", {"library": True}, "reference"),
        ("cuda:1", {"library": True, "triton": True}, "triton"),
        *((device, {"library": True, "triton": True}, "reference") for device in ("mps", "xpu", "meta")),
    ],
)
def test_auto(device: str, installed: dict[str, bool], chosen: str, machine: Callable[..., None]) -> None:
    machine(**installed)
    assert choose_implementation("op", "auto", torch.device(device)) == chosen
    assert choose_implementation("op", "reference", torch.device(device)) == "reference"


def test_auto_leaves_float64_on_a_gpu_to_the_reference(machine: Callable[..., None]) -> None:
    machine(library=True, triton=True)
    for device, chosen in (("cuda", "reference"), ("cpu", "cpp")):
        assert choose_implementation("op", "auto", torch.device(device), torch.float64) == chosen


@pytest.mark.parametrize(
    ("impl", "device", "installed"),
    [
        ("cpp", "cpu", {"library": True}),
        ("triton", "cuda", {"triton": True}),
        ("triton", "cpu", {"triton": True, "interpreter": True}),
    ],
)
def test_by_name(impl: str, device: str, installed: dict[str, bool], machine: Callable[..., None]) -> None:
    machine(**installed)
    assert choose_implementation("op", impl, torch.device(device)) == impl


@pytest.mark.parametrize(
    ("impl", "device", "error", "message"),
    [
        ("cpp", "cpu", MissingDependencyError, r"impl='cpp': no library here"),
        ("cpp", "cuda:1", InvalidInputError, r"impl='cpp': expected tensors on cpu, got one on cuda:1\. Move .*triton"),
        ("triton", "cuda", MissingDependencyError, r"impl='triton' needs triton: pip install 'cdas_fast\[triton\]'"),
        ("triton", "cpu", InvalidInputError, r"impl='triton': expected tensors on cuda, got one on cpu\. Move .*'cpp'"),
        ("triton", "mps", InvalidInputError, r"impl='triton': expected tensors on cuda, got one on mps"),
        ("cuda", "cpu", InvalidInputError, r"impl: expected auto, reference, cpp or triton, got 'cuda'"),
    ],
)
def test_refused(impl: str, device: str, error: type[Exception], message: str, machine: Callable[..., None]) -> None:
    machine()
    with pytest.raises(error, match=f"^op: {message}"):
        choose_implementation("op", impl, torch.device(device))


def test_an_op_without_triton_takes_the_reference_on_a_gpu(machine: Callable[..., None]) -> None:
    machine(library=True, triton=True)
    gpu = torch.device("cuda")
    assert choose_implementation("op", "auto", gpu, has_triton=False) == "reference"
    with pytest.raises(InvalidInputError, match=r"Move the tensors to the CPU, or use impl='reference' or 'auto'"):
        choose_implementation("op", "cpp", gpu, has_triton=False)


@each_function
def test_functions_use_the_implementation_named(name: str, machine: Callable[..., None]) -> None:
    machine()
    assert torch.equal(FUNCTIONS[name](make_inputs()), FUNCTIONS[name](make_inputs(), impl="reference"))
    public = name.removesuffix("_forward").removesuffix("_reverse").replace("cross_entropy", "logprob")
    with pytest.raises(MissingDependencyError, match=f"^{public}: impl='cpp': no library here"):
        FUNCTIONS[name](make_inputs(), impl="cpp")
