"""A decoder whose norms and MLPs run by the fused ops keeps its values and gradients, and is itself again after."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tiny_models import CONFIGS, tiny_model
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from cdas_fast.errors import InvalidInputError
from cdas_fast.models import Decoder, inspect_decoder, run_suffix
from cdas_fast.models import fused as fused_module
from cdas_fast.models.fused import Fused, find_fused
from cdas_fast.models.structure import frozen
from cdas_fast.ops import cpu_library
from cdas_fast.ops.implementation import Implementation
from cdas_fast.ops.rotary_embedding import rotary_embedding

LAYERS = 5
NORMS = {"gemma2": 4, "gemma3": 6, "qwen3": 4, "olmo2": 4}  # of a layer; two elsewhere
IMPLEMENTATIONS: list[Any] = ["reference", *["cpp"] * cpu_library.available()]


@contextmanager
def fused_elementwise(decoder: Decoder, impl: Implementation = "auto") -> Iterator[Fused]:
    """What is found, applied."""
    fused = find_fused(decoder, impl)
    with fused.applied():
        yield fused


@pytest.fixture
def llama() -> Decoder:
    model = tiny_model()
    return inspect_decoder(model.requires_grad_(False))


def run(decoder: Decoder) -> tuple[Tensor, Tensor]:
    """The last four layers, and the gradient of what is injected into them."""
    generator = torch.Generator().manual_seed(3)
    shape = (2, 9, decoder.hidden_size)
    hidden, upstream = (torch.randn(shape, generator=generator).to(decoder.dtype) for _ in range(2))
    hidden.requires_grad_()
    out = run_suffix(decoder, 0, hidden)
    return out.detach(), torch.autograd.grad(out, hidden, upstream)[0]


def forwards(decoder: Decoder) -> dict[str, Any]:
    return {name: each.__dict__["forward"] for name, each in decoder.model.named_modules() if "forward" in vars(each)}


def assert_close(ours: Tensor, expected: Tensor, units: float) -> None:
    error = (ours.double() - expected.double()).norm() / expected.double().norm()
    assert error <= units * torch.finfo(ours.dtype).eps


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", CONFIGS)
def test_outputs_and_gradients_stay(name: str, impl: Any) -> None:
    decoder = inspect_decoder(tiny_model(name))
    with frozen(decoder.model):
        expected = run(decoder)
        with fused_elementwise(decoder, impl) as fused:
            ours = run(decoder)
            assert len(forwards(decoder)) == fused.norms + fused.mlps + fused.rotaries + fused.linears
        again = run(decoder)
    assert fused == Fused(norms=LAYERS * NORMS.get(name, 2) + 1, mlps=LAYERS, left_alone=())
    assert not torch.equal(ours[1], expected[1]), "else nothing else has run"
    for got, wanted, after in zip(ours, expected, again, strict=True):
        torch.testing.assert_close(got, wanted, rtol=2e-4, atol=2e-5 * float(wanted.abs().max()))
        assert torch.equal(after, wanted)
    assert not forwards(decoder)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3", "phi3", "olmo2"])
def test_16_bits(name: str, dtype: torch.dtype) -> None:
    """Every kind of module is recognised, with its own way of rounding."""
    decoder = inspect_decoder(tiny_model(name, dtype=dtype).requires_grad_(False))
    expected = run(decoder)
    with fused_elementwise(decoder, "reference") as fused:
        ours = run(decoder)
    assert fused == Fused(norms=LAYERS * NORMS.get(name, 2) + 1, mlps=LAYERS, left_alone=())
    assert_close(ours[0], expected[0], 1)
    assert_close(ours[1], expected[1], 8)


@pytest.mark.parametrize("activation", ["gelu_pytorch_tanh", "gelu_new", "silu"])
def test_activations_that_are_known(activation: str) -> None:
    decoder = inspect_decoder(tiny_model(hidden_act=activation).requires_grad_(False))
    with fused_elementwise(decoder, "reference") as fused:
        assert (fused.mlps, fused.left_alone) == (LAYERS, ())


@pytest.mark.parametrize("activation", ["gelu", "relu", "gelu_fast", "quick_gelu"])
def test_other_activations_are_left_alone_unless_they_agree(activation: str) -> None:
    decoder = inspect_decoder(tiny_model(hidden_act=activation).requires_grad_(False))
    with fused_elementwise(decoder, "reference") as fused:
        expected = (LAYERS, ()) if activation == "gelu_fast" else (0, ("LlamaMLP",))  # the tanh approximation as well
        assert (fused.mlps, fused.left_alone) == expected


class SlopedRMSNorm(LlamaRMSNorm):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states) + 0.01 * hidden_states


class ShiftedRMSNorm(LlamaRMSNorm):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states) + 0.01


class DetachedRMSNorm(LlamaRMSNorm):
    """The values are a norm's, the gradient is not."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        scale = torch.rsqrt(hidden_states.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * hidden_states * scale.detach()


class GatedRMSNorm(LlamaRMSNorm):
    def forward(self, hidden_states: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(hidden_states) * gate


class DoubledMLP(LlamaMLP):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class DropoutMLP(LlamaMLP):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(x), 0.5, self.training)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("odd", [SlopedRMSNorm, ShiftedRMSNorm, DetachedRMSNorm, GatedRMSNorm, DoubledMLP, DropoutMLP])
def test_odd_classes_are_left_alone(odd: type[nn.Module], dtype: torch.dtype) -> None:
    decoder = inspect_decoder(tiny_model(dtype=dtype).requires_grad_(False))
    layer: Any = decoder.layers[1]
    changed = layer.mlp if issubclass(odd, LlamaMLP) else layer.input_layernorm
    changed.train(odd is DropoutMLP).__class__ = odd
    with fused_elementwise(decoder, "reference") as fused:
        assert fused.left_alone == (odd.__name__,)
        assert (fused.norms, fused.mlps) == ((11, 4) if changed is layer.mlp else (10, 5))
        assert "forward" not in vars(changed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_attention_runs_itself_with_the_fused_rotation(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    rotated: list[tuple[int, ...]] = []

    def noting(query: Tensor, *args: Any, **options: Any) -> Any:
        rotated.append(tuple(query.shape))
        return rotary_embedding(query, *args, **options)

    monkeypatch.setattr(fused_module, "rotary_embedding", noting)
    decoder = inspect_decoder(tiny_model(name, dtype=dtype).requires_grad_(False))
    attention: Any = decoder.layers[2]
    modeling = sys.modules[type(attention.self_attn).__module__]
    before = dict(vars(modeling))
    with fused_elementwise(decoder, "reference") as fused:
        assert fused.rotaries == LAYERS
        del rotated[:]
        run(decoder)
        # OLMo 2 keeps tables in float32 beside activations in 16 bits, which its own function is left to
        assert rotated == [(2, 4, 9, 8)] * (0 if (name, dtype) == ("olmo2", torch.bfloat16) else LAYERS - 1)
        assert vars(modeling) == before
    count = len(rotated)
    run(decoder)
    assert len(rotated) == count


@pytest.mark.parametrize("what", ["another_function", "no_function", "a_wrapped_forward", "a_hook"])
def test_other_attention_is_left_alone(what: str, llama: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    layer: Any = llama.layers[1]
    kind = type(layer.self_attn)
    modeling = sys.modules[kind.__module__]
    own = modeling.apply_rotary_pos_emb
    expected = 0
    match what:
        case "another_function":
            monkeypatch.setattr(
                modeling, "apply_rotary_pos_emb", lambda *args: tuple(1.1 * each for each in own(*args))
            )
        case "no_function":
            monkeypatch.setattr(modeling, "apply_rotary_pos_emb", None)
        case "a_wrapped_forward":
            monkeypatch.setattr(kind, "forward", functools.wraps(kind.forward)(lambda self, *args, **kwargs: None))
        case _:
            layer.self_attn.register_forward_hook(lambda *_: None)
            expected = LAYERS - 1
    assert find_fused(llama, "reference").rotaries == expected


def test_what_others_have_changed_is_left_alone(llama: Decoder) -> None:
    layers: Any = llama.layers
    first, second, third, fourth, fifth = (layer.input_layernorm for layer in layers)
    calls: list[Any] = []
    handles = [
        first.register_forward_hook(lambda *args: calls.append(args)),
        second.register_forward_pre_hook(lambda *args: calls.append(args)),
        third.register_full_backward_hook(lambda *args: calls.append(args)),
        layers[1].mlp.act_fn.register_forward_hook(lambda *args: calls.append(args)),
        layers[2].mlp.register_forward_hook(lambda *args: calls.append(args)),
    ]
    theirs = fourth.__dict__["forward"] = lambda x: LlamaRMSNorm.forward(fourth, x)
    expected = run(llama)
    count = len(calls)
    with fused_elementwise(llama) as fused:
        if cpu_library.available():
            assert fused == Fused(norms=7, mlps=3, left_alone=("LlamaMLP", "LlamaRMSNorm"))
        ours = run(llama)
        assert fourth.__dict__["forward"] is theirs
        changed = fifth.__dict__["forward"] = lambda x: LlamaRMSNorm.forward(fifth, x)
    assert len(calls) == 2 * count
    torch.testing.assert_close(ours[1], expected[1], rtol=2e-4, atol=2e-5 * float(expected[1].abs().max()))
    assert forwards(llama) == {
        "model.layers.3.input_layernorm": theirs,
        "model.layers.4.input_layernorm": changed,
    }
    for handle in handles:
        handle.remove()


def test_everything_is_restored_after_an_error(llama: Decoder) -> None:
    modules = {name: dict(vars(each)) for name, each in llama.model.named_modules()}
    wrong: Any = "no tensor"
    with pytest.raises(AttributeError), fused_elementwise(llama, "reference"):
        run_suffix(llama, 0, wrong)
    assert {name: vars(each) for name, each in llama.model.named_modules()} == modules


def test_a_context_within_a_context_changes_nothing(llama: Decoder) -> None:
    with fused_elementwise(llama, "reference"):
        before = forwards(llama)
        with fused_elementwise(llama, "reference") as inner:
            assert inner == Fused(0, 0, ("LlamaMLP", "LlamaRMSNorm"))
            assert forwards(llama) == before
        assert forwards(llama) == before
    assert not forwards(llama)


def test_each_kind_is_checked_once(llama: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[type] = []

    def noting(function: Any) -> Any:
        return lambda module, *others: checked.append(type(module)) or function(module, *others)  # type: ignore[func-returns-value]

    for function in (fused_module._norm_function, fused_module._mlp_function):
        monkeypatch.setattr(fused_module, function.__name__, noting(function))
    with fused_elementwise(llama, "reference"):
        pass
    assert sorted(each.__name__ for each in checked) == ["LlamaMLP", "LlamaRMSNorm"]


def test_each_epsilon_is_a_kind() -> None:
    decoder = inspect_decoder(tiny_model().requires_grad_(False))
    layer: Any = decoder.layers[2]
    layer.input_layernorm.variance_epsilon = 0.5
    expected = run(decoder)
    with fused_elementwise(decoder, "reference") as fused:
        assert fused.norms == 11
        ours = run(decoder)
    torch.testing.assert_close(ours[0], expected[0], rtol=2e-4, atol=1e-4)


def test_the_check_leaves_no_trace(llama: Decoder) -> None:
    llama.model.requires_grad_(True)
    before = {name: each.clone() for name, each in llama.model.named_parameters()}
    state = torch.get_rng_state()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16), fused_elementwise(llama, "reference") as fused:
        assert (fused.norms, fused.mlps) == (11, 5)
    assert torch.equal(torch.get_rng_state(), state)
    for name, each in llama.model.named_parameters():
        assert each.grad is None
        assert each.requires_grad
        assert torch.equal(each, before[name])


def test_modules_run_themselves_where_the_ops_do_not_apply(llama: Decoder) -> None:
    norm: Any = llama.layers[0].input_layernorm
    mlp: Any = llama.layers[0].mlp
    x = torch.randn(3, llama.hidden_size, generator=torch.Generator().manual_seed(0))
    halved, by_name = norm(x.bfloat16()), norm(hidden_states=x)
    mlp.__class__ = DropoutMLP
    norm.weight.requires_grad_()
    (wanted,) = torch.autograd.grad(norm(x).square().sum(), norm.weight)
    with fused_elementwise(llama, "reference"):
        assert torch.equal(norm(x.bfloat16()), halved)
        assert norm(x.bfloat16()).dtype == halved.dtype == torch.float32
        assert torch.equal(norm(hidden_states=x), by_name)
        assert torch.equal(torch.autograd.grad(norm(x).square().sum(), norm.weight)[0], wanted)
        assert "forward" in vars(mlp)
        assert (mlp(x) != 0).all()
        mlp.train()
        assert (mlp(x) == 0).any()
        mlp.eval().gate_proj.weight.requires_grad_()
        (gradient,) = torch.autograd.grad(mlp(x).square().sum(), mlp.gate_proj.weight)
        assert gradient.abs().max() > 0


def test_auto_leaves_plain_torch_to_the_modules(llama: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_library, "available", lambda: False)
    with fused_elementwise(llama) as fused:
        assert fused == Fused(0, 0, ("LlamaMLP", "LlamaRMSNorm"))
        assert str(fused) == "0 norms and 0 MLPs; left alone: LlamaMLP, LlamaRMSNorm"


def test_refused(llama: Decoder) -> None:
    with pytest.raises(InvalidInputError, match="expected tensors on cuda, got one on cpu"):
        find_fused(llama, "triton")
    with pytest.raises(InvalidInputError, match="impl: expected"), fused_elementwise(llama, "cuda"):  # type: ignore[arg-type]
        pass
    assert not forwards(llama)
