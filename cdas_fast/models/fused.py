"""RMS norms and gated MLPs of a frozen decoder by the fused ops, which make fewer passes over memory than the modules.

A module is known by its structure, and is replaced only if it does what the op does: once for each kind of module, both
are run on random inputs, and their values and the gradients of the input compared. The rotary embedding, a function and
no module, is compared likewise; an attention then runs its own forward pass with the op in the function's place. Linear
maps, which need no trial, go to another library where that is faster.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from cdas_fast.models.handle_linear import HandleLinear
from cdas_fast.models.structure import Decoder
from cdas_fast.ops.frozen_linear import frozen_linear, onednn_is_faster
from cdas_fast.ops.gated_activation import Activation, gated_activation
from cdas_fast.ops.implementation import Implementation, choose_implementation, without_autocast
from cdas_fast.ops.rms_norm import rms_norm
from cdas_fast.ops.rotary_embedding import rotary_embedding

Forward = Callable[..., Any]
Function = Callable[[nn.Module, Tensor], Tensor]  # what a kind of module computes, of a module and its input
Rotation = Callable[..., tuple[Tensor, Tensor]]  # of queries and keys, by two tables

MULTIPLE = 16  # of tokens: libraries keep code, and allocators memory, for each number of rows that they meet
LINEAR = (nn.Linear, HandleLinear)
RMS_NORMS = ((0.0, True), (0.0, False), (1.0, False), (1.0, True))  # offset, round_normalized


@dataclass(frozen=True)
class Ending:
    """What comes after the attention of the last layer, and maps each token by itself.

    Beyond attention a token meets no other, so where few are read, the others' need not be computed. Everything in
    `narrowed` is made of plain linear maps, so that a row of its result depends on the same row of its input alone.
    """

    narrowed: tuple[nn.Module, ...]  # the output projection of attention, and the MLP
    watched: tuple[nn.Module, ...]  # nothing is narrowed once others have changed one of these: they may read any token


@dataclass(frozen=True)
class Fused:
    """Which norms and MLPs of a decoder the fused ops can run."""

    norms: int
    mlps: int
    left_alone: tuple[str, ...]  # classes of the other norms and MLPs, in alphabetical order
    forwards: Mapping[nn.Module, Forward] = field(default_factory=dict, repr=False, compare=False)
    rotaries: int = field(default=0, compare=False)  # attentions whose rotary embedding is `rotary_embedding`
    linears: int = field(default=0, compare=False)  # linear maps by `frozen_linear`: none on most machines
    ending: Ending | None = field(default=None, repr=False, compare=False)

    def __str__(self) -> str:
        rest = f"; left alone: {', '.join(self.left_alone)}" if self.left_alone else ""
        linears = f", {self.linears} linear maps by oneDNN" if self.linears else ""
        return f"{self.norms} norms and {self.mlps} MLPs{linears}{rest}"

    @contextmanager
    def applied(self, read: Tensor | None = None) -> Iterator[None]:
        """Within the context, the modules run so. This sets `forward` on their instances, and takes it off again.

        Of a pass over one sequence (1, N, D) whose final hidden states are read at the tokens `read` (M,) alone, each
        named once, the last layer computes no more than it has to: see `Ending`. The others are then no one's hidden
        states.

        A module still takes its own forward pass where the op does not apply: where its weight requires a gradient, for
        input of another dtype than the weight's, after a change between training and evaluation, and, if it is a linear
        map, within autocast.
        One that others have given a `forward` or hooks since is left to them.
        """
        forwards = {module: forward for module, forward in self.forwards.items() if not _is_changed(module)}
        if read is not None and self.ending is not None and not any(map(_is_changed, self.ending.watched)):
            forwards |= {each: _narrowed(forwards.get(each, each.forward), read) for each in self.ending.narrowed}
        try:
            for module, forward in forwards.items():
                module.__dict__["forward"] = forward
            yield
        finally:
            for module, forward in forwards.items():
                if module.__dict__.get("forward") is forward:  # else someone has put their own in its place since
                    del module.__dict__["forward"]


def find_fused(decoder: Decoder, impl: Implementation = "auto") -> Fused:
    """Find the norms and MLPs of the decoder that `rms_norm` and `gated_activation` can run.

    These are the RMS norms of the layers and the final one, and the MLPs act(gate) up whose activation is SiLU or the
    tanh approximation of GELU. The values are those of the modules to a rounding unit of the dtype.

    A module is left alone if its results on random inputs differ from those of the op, if it has hooks or a `forward`
    of its own, or if `impl` is `auto` and no compiled kernel exists for its device: plain PyTorch is what it has.

    With the compiled kernels, plain float32 `nn.Linear` of the layers run by `frozen_linear` where that is faster.

    Raises:
        InvalidInputError: `impl` is no implementation, or one for another device.
        MissingDependencyError: an implementation that is not installed.
    """
    chosen = choose_implementation("find_fused", impl, decoder.device)
    kinds: dict[Hashable, Function | None] = {}
    forwards: dict[nn.Module, Forward] = {}
    rotations: dict[Rotation, Rotation | None] = {}
    norms, mlps, rotaries, linears = 0, 0, 0, 0
    left_alone = set()
    by_onednn = chosen == "cpp" and onednn_is_faster(decoder.device)
    like = torch.empty(0, dtype=decoder.dtype, device=decoder.device)
    for module in _modules(decoder):
        if by_onednn and type(module) is nn.Linear and module.weight.dtype == torch.float32 and not _is_changed(module):
            forwards[module] = _forward_of(module, _linear)
            linears += 1
        if not (impl == "auto" and chosen == "reference") and not _is_changed(module):
            with_rotary = _with_rotary(module, like, impl, rotations)
            if with_rotary is not None:
                forwards[module] = with_rotary
                rotaries += 1
        is_norm = type(module).__name__.endswith("Norm")
        if not is_norm and not hasattr(module, "down_proj"):
            continue
        function = None
        if not (impl == "auto" and chosen == "reference") and not _is_changed(module):
            kind = _kind(module)
            if kind not in kinds:
                kinds[kind] = _norm_function(module, impl) if is_norm else _mlp_function(module, like, impl)
            function = kinds[kind]
        if function is None:
            left_alone.add(type(module).__name__)
        else:
            forwards[module] = _forward_of(module, function)
            norms, mlps = norms + is_norm, mlps + (not is_norm)
    return Fused(norms, mlps, tuple(sorted(left_alone)), forwards, rotaries, linears, _find_ending(decoder, forwards))


def _find_ending(decoder: Decoder, forwards: Mapping[nn.Module, Forward]) -> Ending:
    """The output projection of the last layer's attention, and its MLP if it is among those that `forwards` run."""
    last = decoder.layers[-1]
    narrowed: list[nn.Module] = []
    for child in last.children():
        projection = getattr(child, "o_proj", None)
        if isinstance(projection, nn.Module) and type(projection) in LINEAR:
            narrowed.append(projection)
        inner = [each for name, each in child.named_children() if name.endswith("_proj")]
        if child in forwards and hasattr(child, "down_proj") and all(type(each) in LINEAR for each in inner):
            narrowed.append(child)
    return Ending(tuple(narrowed), (*last.modules(), *decoder.stack.children()))


def _narrowed(own: Forward, read: Tensor) -> Forward:
    """The forward of a module that maps each token by itself, run for the tokens `read` (M,) of (1, N, .) alone.

    The rows of the others are zero: no more their hidden states, but numbers that nobody reads, and through which no
    gradient flows.
    """

    more = -len(read) % MULTIPLE

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        given = nn.functional.pad(x[0].index_select(0, read), (0, 0, 0, more))
        rows: Tensor = own(given[None], *args, **kwargs)[0, : len(read)]
        return rows.new_zeros(x.shape[1], rows.shape[1]).index_copy(0, read, rows)[None]

    return forward


def _modules(decoder: Decoder) -> list[nn.Module]:
    """Those of the layers, and what the stack holds itself: the final norm. Each once."""
    # the last ones first: of each kind one is tried, and the last layers are those that have to be there anyway
    modules = dict.fromkeys(module for layer in reversed(decoder.layers) for module in layer.modules())
    return list(modules | dict.fromkeys(decoder.stack.children()))


def _is_changed(module: nn.Module) -> bool:
    """Whether others have attached anything to the module."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in module.__dict__


def _kind(module: nn.Module) -> Hashable:
    """What modules that compute the same function of their parameters have in common."""
    attributes = [item for item in vars(module).items() if isinstance(item[1], bool | int | float | str | None)]
    parameters = [(name, each.shape, each.dtype, each.device) for name, each in module.named_parameters()]
    children = [(name, type(child), _is_changed(child)) for name, child in module.named_modules() if child != module]
    return type(module), *sorted(attributes), *parameters, *children


def _forward_of(module: nn.Module, function: Function) -> Forward:
    own, training = type(module).forward, module.training

    def forward(*args: Any, **kwargs: Any) -> Any:
        if len(args) != 1 or kwargs or module.training != training or not _applies(module, args[0]):
            return own(module, *args, **kwargs)
        return function(module, args[0])

    return forward


def _applies(module: nn.Module, x: Tensor) -> bool:
    weight = getattr(module, "weight", None)  # of a norm or a linear map; an MLP's belong to its projections
    return weight is None or (x.dtype == weight.dtype and not (weight.requires_grad and torch.is_grad_enabled()))


def _linear(linear: Any, x: Tensor) -> Tensor:
    """An `nn.Linear` by `frozen_linear`, if it is still what that takes."""
    trained = linear.bias is not None and linear.bias.requires_grad and torch.is_grad_enabled()
    if trained or x.dtype != torch.float32 or torch.is_autocast_enabled(x.device.type):
        return nn.Linear.forward(linear, x)
    return frozen_linear(x, linear.weight, linear.bias)


def _norm_function(module: nn.Module, impl: Implementation) -> Function | None:
    """The variant of `rms_norm` that a norm is; None if it is none."""
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    weight = getattr(module, "weight", None)
    if not type(module).__name__.endswith("RMSNorm") or not isinstance(epsilon, float):
        return None
    if any(module.children()) or any(module.buffers()) or [name for name, _ in module.named_parameters()] != ["weight"]:
        return None
    if not isinstance(weight, Tensor) or weight.dim() != 1 or not weight.is_floating_point():
        return None
    generator = torch.Generator().manual_seed(0)
    random_weight = torch.randn(weight.shape, generator=generator)  # one of ones or zeros would tell little
    sample = copy.deepcopy(module)
    sample.weight = nn.Parameter(random_weight.to(weight), requires_grad=False)
    x = torch.randn(3, 5, weight.shape[0], generator=generator)
    x = (x * torch.tensor([1e-3, 0.1, 1.0, 3.0, 30.0])[:, None]).to(weight)  # the first shows where epsilon is
    expected = _results(type(module).forward, sample, x)
    row_scale = x.double().square().mean(-1, keepdim=True).sqrt()
    best: tuple[float, Function | None] = (math.inf, None)
    for offset, round_normalized in RMS_NORMS:

        def function(norm: Any, x: Tensor, offset: float = offset, round_normalized: bool = round_normalized) -> Tensor:
            return rms_norm(x, norm.weight, epsilon, offset=offset, round_normalized=round_normalized, impl=impl)

        ours = _results(function, sample, x)
        if expected is not None and ours is not None and _agree(ours, expected, row_scale):
            error = (ours[0] - expected[0]).double().abs().sum().item()
            if error < best[0]:
                best = (error, function)
    return best[1]


def _mlp_function(module: nn.Module, like: Tensor, impl: Implementation) -> Function | None:
    """The MLP by `gated_activation`; None if it is something else."""
    children = {name for name, _ in module.named_children()} - {"act_fn", "activation_fn"}
    if children == {"gate_proj", "up_proj", "down_proj"}:
        first, act = "gate_proj", "act_fn"
    elif children == {"gate_up_proj", "down_proj"}:
        first, act = "gate_up_proj", "activation_fn"
    else:
        return None
    width = getattr(module.get_submodule(first), "in_features", None)
    if not isinstance(width, int):
        return None
    activation = _activation(getattr(module, act, None), like.device)
    if activation is None:
        return None

    def function(mlp: Any, x: Tensor) -> Tensor:
        gate, up = (mlp.gate_proj(x), mlp.up_proj(x)) if act == "act_fn" else mlp.gate_up_proj(x).chunk(2, dim=-1)
        down: Tensor = mlp.down_proj(gated_activation(gate, up, activation=activation, impl=impl))
        return down

    x = torch.randn(2, 5, width, generator=torch.Generator().manual_seed(0)).to(like)
    expected, ours = _results(type(module).forward, module, x), _results(function, module, x)
    return function if expected is not None and ours is not None and _agree(ours, expected) else None


_ROTARY = "apply_rotary_pos_emb"


def _with_rotary(
    module: nn.Module, like: Tensor, impl: Implementation, known: dict[Rotation, Rotation | None]
) -> Forward | None:
    """The module's own forward with `rotary_embedding` for what transformers calls so; None if it calls no such thing.

    The copy of its code looks names up in a copy of the modeling module's: no other model that shares it is affected.
    """
    own = type(module).forward
    if not isinstance(own, FunctionType) or hasattr(own, "__wrapped__") or _ROTARY not in own.__code__.co_names:
        return None
    function = own.__globals__.get(_ROTARY)
    if not callable(function):
        return None
    if function not in known:
        known[function] = _rotary_function(function, like, impl)
    rotary = known[function]
    if rotary is None:
        return None
    copied = FunctionType(
        own.__code__, {**own.__globals__, _ROTARY: rotary}, own.__name__, own.__defaults__, own.__closure__
    )
    copied.__kwdefaults__ = own.__kwdefaults__
    return MethodType(copied, module)


def _rotary_function(own: Rotation, like: Tensor, impl: Implementation) -> Rotation | None:
    """What transformers rotates queries and keys by, as `rotary_embedding`; None if it does something else."""

    def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        tensors = (query, key, cos, sin)
        fits = query.dim() == key.dim() == 4 and cos.dim() == 3 and all(each.dtype == query.dtype for each in tensors)
        if args or kwargs or not fits or cos.shape[-1] != query.shape[-1] or query.device != like.device:
            return own(*tensors, *args, **kwargs)
        return rotary_embedding(*tensors, impl=impl)

    generator = torch.Generator().manual_seed(0)
    x, cos, sin = (torch.randn(shape, generator=generator).to(like) for shape in ((2, 3, 5, 16), *[(2, 5, 16)] * 2))

    def of(rotation: Rotation) -> Function:
        return lambda _, x: torch.cat(rotation(x, x[:, 1:2], cos, sin), 1)

    expected, ours = (_results(of(rotation), nn.Identity(), x) for rotation in (own, rotate))
    return rotate if expected is not None and ours is not None and _agree(ours, expected) else None


def _activation(function: Any, device: torch.device) -> Activation | None:
    """Which of those known an activation is, by its values."""
    if isinstance(function, nn.Module) and (_is_changed(function) or any(True for _ in function.parameters())):
        return None
    probe = torch.linspace(-8, 8, 257, device=device)
    with torch.no_grad():
        try:
            values = function(probe)
        except Exception:
            return None
    known: tuple[tuple[Activation, Tensor], ...] = (
        ("silu", nn.functional.silu(probe)),
        ("gelu_tanh", nn.functional.gelu(probe, approximate="tanh")),
    )
    for name, expected in known:
        if isinstance(values, Tensor) and torch.allclose(values, expected, rtol=1e-6, atol=1e-6):
            return name
    return None


def _results(function: Function, module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor] | None:
    """Value and gradient of the input, for one upstream gradient; None if the function does not take such an input."""
    x = x.detach().requires_grad_()
    generator = torch.Generator().manual_seed(1)
    with torch.inference_mode(False), torch.enable_grad(), without_autocast(x.device), torch.random.fork_rng([]):
        try:
            out = function(module, x)
            upstream = torch.randn(out.shape, generator=generator).to(out)
            return out.detach(), torch.autograd.grad(out, x, upstream)[0]
        except Exception:
            return None


def _agree(ours: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], row_scale: Tensor | float = 1.0) -> bool:
    """Whether values differ by no more than a rounding unit of the largest, and half of one on average.

    Gradients may differ by twice that, for the modules round them in between; their rows are multiplied by `row_scale`
    first. The average is the root mean square. NaN, or zeros alone, never agree.
    """
    unit = max(torch.finfo(expected[0].dtype).eps, 1e-6)
    for got, wanted, scale, units in zip(ours, expected, (1.0, row_scale), (1, 2), strict=True):
        if (got.dtype, got.shape) != (wanted.dtype, wanted.shape):
            return False
        size = (wanted.double() * scale).abs()
        error = ((got.double() - wanted.double()) * scale).abs()
        allowed = units * unit
        if not (size.max() > 0 and error.max() <= allowed * size.max() and error.norm() <= allowed / 2 * size.norm()):
            return False
    return True
