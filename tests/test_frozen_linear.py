"""frozen_linear against float64 and torch.nn.functional.linear, and where decoders take it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from head_cases import assert_as_right_as_torch, leaf
from tiny_models import tiny_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from cdas_fast.models import fused as fused_module
from cdas_fast.models import inspect_decoder
from cdas_fast.models.fused import find_fused
from cdas_fast.ops import cpu_library
from cdas_fast.ops import frozen_linear as linear_module
from cdas_fast.ops.frozen_linear import frozen_linear, onednn_is_faster

needs_kernels = pytest.mark.skipif(not cpu_library.available(), reason="needs the C++ kernels")
needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs a torch with oneDNN")


def make_case(rows: tuple[int, ...], inputs: int, outputs: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (*rows, inputs), (outputs, inputs), (outputs,), (*rows, outputs)
    x, weight, bias, upstream = (torch.randn(shape, generator=generator) for shape in shapes)
    return leaf(x), weight, bias, upstream


@needs_onednn
@pytest.mark.parametrize("has_bias", [False, True], ids=["no_bias", "bias"])
@pytest.mark.parametrize(("inputs", "outputs"), [(576, 192), (1536, 576), (5, 7), (1, 1)])
@pytest.mark.parametrize("rows", [(1,), (2,), (3,), (81,), (672,), (1, 1912), (2, 3, 4), (0,), (2, 0)], ids=str)
def test_values_and_gradients(rows: tuple[int, ...], inputs: int, outputs: int, has_bias: bool) -> None:
    x, weight, bias, upstream = make_case(rows, inputs, outputs)
    given = bias if has_bias else None
    exact = leaf(x.double())
    truth = nn.functional.linear(exact, weight.double(), None if given is None else given.double())
    plain, ours = nn.functional.linear(x, weight, given), frozen_linear(x, weight, given)
    assert_as_right_as_torch("value", ours, plain, truth, 4 * inputs**0.5)  # partial sums grow with the root
    (true_gradient,) = torch.autograd.grad(truth, exact, upstream.double())
    gradient, plain_gradient = (torch.autograd.grad(each, x, upstream)[0] for each in (ours, plain))
    assert_as_right_as_torch("gradient", gradient, plain_gradient, true_gradient, 4 * outputs**0.5)


@needs_onednn
def test_strides() -> None:
    x, weight, _, upstream = make_case((4, 9), 40, 24)
    expected = frozen_linear(x, weight)
    (gradient,) = torch.autograd.grad(expected, x, upstream)
    strided = torch.stack([x.detach()] * 2, -1)[..., 0].requires_grad_()
    ours = frozen_linear(strided, torch.cat([weight, weight], 1)[:, :40])
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(torch.autograd.grad(ours, strided, upstream.mT.contiguous().mT)[0], gradient)
    (ones,) = torch.autograd.grad(frozen_linear(x, weight).sum(), x)  # an expanded gradient
    torch.testing.assert_close(ones, weight.sum(0).expand_as(x))


@needs_onednn
def test_a_second_derivative_is_refused() -> None:
    x, weight, _, _ = make_case((2,), 4, 3)
    (gradient,) = torch.autograd.grad(frozen_linear(x, weight).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@needs_onednn
def test_keeps_the_weight_alone_for_the_backward_pass() -> None:
    x, weight, bias, _ = make_case((64,), 32, 16)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda each: kept.append(each.data_ptr()), lambda each: each):
        frozen_linear(x, weight, bias)
    assert kept == [weight.data_ptr()]


@needs_onednn
def test_compiles() -> None:
    x, weight, bias, upstream = make_case((3,), 8, 6)
    compiled: Any = torch.compile(frozen_linear, fullgraph=True, backend="aot_eager")
    expected, ours = frozen_linear(x, weight, bias), compiled(x, weight, bias)
    assert torch.equal(ours, expected)
    assert torch.equal(*(torch.autograd.grad(each, x, upstream)[0] for each in (ours, expected)))


@pytest.mark.parametrize(
    ("vendor", "capability", "mkl", "enabled", "device", "expected"),
    [
        ("AuthenticAMD", "AVX512", True, True, "cpu", True),
        ("AuthenticAMD", "AVX512_VNNI", True, True, "cpu", True),
        ("GenuineIntel", "AVX512", True, True, "cpu", False),
        (None, "AVX512", True, True, "cpu", False),
        ("AuthenticAMD", "AVX2", True, True, "cpu", False),
        ("AuthenticAMD", "AVX512", False, True, "cpu", False),
        ("AuthenticAMD", "AVX512", True, False, "cpu", False),
        ("AuthenticAMD", "AVX512", True, True, "meta", False),
    ],
)
@needs_onednn
def test_where_it_is_faster(
    vendor: str | None,
    capability: str,
    mkl: bool,
    enabled: bool,
    device: str,
    expected: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(linear_module, "_vendor", lambda: vendor)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: mkl)
    monkeypatch.setattr(type(torch.backends.mkldnn), "enabled", enabled)
    assert onednn_is_faster(torch.device(device)) is expected


def test_without_a_list_of_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise OSError(name)

    monkeypatch.setattr(linear_module, "Path", missing)
    assert linear_module._vendor.__wrapped__() is None


class Products(TorchDispatchMode):
    """Counts the products by oneDNN and the others."""

    def __init__(self) -> None:
        super().__init__()
        self.onednn = self.others = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        self.onednn += name == "_linear_pointwise"
        self.others += name in ("mm", "addmm", "bmm")
        return function(*args, **(kwargs or {}))


def products(call: Any) -> tuple[int, int]:
    with Products() as counted:
        call()
    return counted.onednn, counted.others


@pytest.fixture
def faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_module, "onednn_is_faster", lambda device: True)


@needs_kernels
@needs_onednn
@pytest.mark.usefixtures("faster")
def test_decoders_take_it_for_plain_frozen_maps() -> None:
    """And for nothing else: not for what is trained, hooked, of another dtype or class, nor within autocast."""
    model = tiny_model("qwen2").requires_grad_(False)  # with biases
    decoder = inspect_decoder(model)
    layer: Any = decoder.layers[0]
    layers: Any = decoder.layers
    layers[1].self_attn.q_proj.__class__ = type("Doubled", (nn.Linear,), {})
    handle = layers[1].self_attn.k_proj.register_forward_hook(lambda *_: None)
    fused = find_fused(decoder)
    assert fused.linears == 5 * 7 - 2
    assert str(fused) == "11 norms and 5 MLPs, 33 linear maps by oneDNN"
    x = torch.randn(1, 9, decoder.hidden_size)
    linear = layer.self_attn.q_proj
    with fused.applied():
        assert products(lambda: linear(x)) == (1, 0)
        assert products(lambda: layer.mlp(x)) == (3, 0)
        assert products(lambda: layers[1].self_attn.q_proj(x)) == (0, 1)
        assert products(lambda: layers[1].self_attn.k_proj(x)) == (0, 1)
        assert products(lambda: layers[1].self_attn.v_proj(x)) == (1, 0)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert products(lambda: linear(x)) == (0, 1)
            assert linear(x).dtype == torch.bfloat16
        for trained in (linear.weight, linear.bias):
            trained.requires_grad_()
            assert products(lambda: linear(x)) == (0, 1)
            assert torch.autograd.grad(linear(x).sum(), trained)[0].abs().max() > 0
            with torch.no_grad():
                assert products(lambda: linear(x)) == (1, 0)
            trained.requires_grad_(False)
        linear.to(torch.bfloat16)
        assert products(lambda: linear(x.bfloat16())) == (0, 1)
    handle.remove()
    assert products(lambda: layer.mlp(x)) == (0, 3)


@needs_onednn
@pytest.mark.usefixtures("faster")
def test_the_reference_and_other_dtypes_do_without() -> None:
    assert find_fused(inspect_decoder(tiny_model()), "reference").linears == 0
    assert find_fused(inspect_decoder(tiny_model(dtype=torch.bfloat16))).linears == 0
    assert find_fused(inspect_decoder(tiny_model(dtype=torch.float64))).linears == 0


@needs_kernels
@needs_onednn
@pytest.mark.parametrize("is_faster", [False, True])
def test_the_rule_decides(is_faster: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_module, "onednn_is_faster", lambda device: is_faster)
    assert find_fused(inspect_decoder(tiny_model())).linears == 35 * is_faster
