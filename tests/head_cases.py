"""What the tests of the head losses share: cases, bounds on the error, a record of the operations run."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cdas_fast.ops import cpu_library

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
REDUCTIONS = ["none", "sum", "mean"]
# Those that can run here; test_registration.py says which are left out. Triton's interpreter is for small cases.
COMPILED = ["reference", *["cpp"] * cpu_library.available()]
IMPLEMENTATIONS = [*COMPILED, *["triton"] * (os.environ.get("TRITON_INTERPRET") == "1")]
SCALARS: dict[str, Any] = {"logit_softcap": 3.0, "logit_scale": 0.7, "temperature": 1.7}
OPTIONS: dict[str, tuple[str, ...]] = {
    "no_option": (),
    "bias": ("bias",),
    "target_bias_alone": ("target_bias",),
    "softcap": ("logit_softcap",),
    "scale": ("logit_scale",),
    "temperature": ("temperature",),
    "target_head": ("bias", "target_weight"),
    "target_head_with_bias": ("target_weight", "target_bias"),
    "all": ("bias", "target_weight", "target_bias", *SCALARS),
}
LABEL_OPTIONS = {name: names for name, names in OPTIONS.items() if not any("target" in each for each in names)}
LABEL_OPTIONS["all"] = ("bias", *SCALARS)
SHAPES = [
    pytest.param({"rows": (32,), "width": 64, "vocabulary": 128}, id="aligned"),
    pytest.param({"rows": (31,)}, id="ragged_N"),
    pytest.param({"rows": (32,), "width": 64, "vocabulary": 101}, id="ragged_V"),
    pytest.param({"rows": (32,), "width": 67, "vocabulary": 128}, id="ragged_D"),
    pytest.param({"rows": (1,)}, id="one_row"),
    pytest.param({"rows": ()}, id="no_row_dimension"),
    pytest.param({"rows": (2, 5)}, id="3-D"),
    pytest.param({"rows": (2, 3, 2)}, id="4-D"),
    pytest.param({"rows": (5,), "width": 1, "vocabulary": 2}, id="smallest_head"),
    pytest.param({"rows": (5,), "width": 4, "vocabulary": 1}, id="one_vocabulary_entry"),
    pytest.param({"rows": (0,)}, id="empty"),
    pytest.param({"rows": (2, 0)}, id="empty_3-D"),
]


@dataclass
class Case:
    """Arguments of a head loss. `hidden` is a leaf that requires a gradient, `target` hidden states or labels."""

    function: Callable[..., Tensor]
    hidden: Tensor
    target: Tensor
    weight: Tensor
    options: dict[str, Any]

    def loss(self, reduction: str | None = "none", **extra: Any) -> Tensor:
        if reduction is not None:
            extra["reduction"] = reduction
        return self.function(self.hidden, self.target, self.weight, **{**self.options, **extra})

    def rows(self, rows: Any) -> Case:
        return replace(self, hidden=leaf(self.hidden[rows]), target=self.target[rows])

    def copy(self) -> Case:
        """A case whose hidden states and targets may be changed."""
        return replace(self, hidden=leaf(self.hidden), target=self.target.clone())

    def in_float64(self) -> Case:
        """The case of a hidden leaf in float64, for a gradient that nothing rounds."""
        return replace(self, hidden=leaf(self.hidden.double()))

    def log_p(self, dtype: torch.dtype) -> Tensor:
        """log softmax of the head of `hidden`: the product at `dtype`, the rest in at least float32."""
        return self._log_softmax(self.hidden, self.weight, self.options.get("bias"), dtype)

    def log_q(self, dtype: torch.dtype) -> Tensor:
        """The same of the target."""
        weight, bias = self.options.get("target_weight"), self.options.get("target_bias")
        if weight is None:
            weight, bias = self.weight, self.options.get("bias") if bias is None else bias
        return self._log_softmax(self.target, weight, bias, dtype)

    def _log_softmax(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        logits = hidden.to(dtype) @ weight.to(dtype).T
        logits = logits if bias is None else logits + bias.to(dtype)
        logits = logits.to(torch.promote_types(dtype, torch.float32)) * self.options.get("logit_scale", 1.0)
        cap = self.options.get("logit_softcap")
        logits = logits if cap is None else cap * torch.tanh(logits / cap)
        return (logits / self.options.get("temperature", 1.0)).log_softmax(-1)


def leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_()


def make_case(
    function: Callable[..., Tensor],
    *options: str,
    rows: tuple[int, ...] = (7,),
    width: int = 13,
    vocabulary: int = 37,
    dtype: torch.dtype = torch.float32,
    labels: bool = False,
    **given: Any,
) -> Case:
    """Random arguments with logits of about +-5, and the `options` named."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    target_width = width + 5 if "target_weight" in options else width
    tensors = {
        "bias": randn(vocabulary),
        "target_weight": randn(vocabulary, target_width) / 2,
        "target_bias": randn(vocabulary),
    }
    chosen = {name: {**tensors, **SCALARS}[name] for name in options}
    target = torch.randint(vocabulary, rows, generator=generator) if labels else randn(*rows, target_width)
    return Case(function, leaf(randn(*rows, width)), target, randn(vocabulary, width) / 2, chosen | given)


def gradients(loss: Tensor, *inputs: Tensor, upstream: Tensor | None = None) -> tuple[Tensor, ...]:
    if upstream is None:
        upstream = torch.randn(loss.shape, generator=torch.Generator().manual_seed(1)) + 2
    return torch.autograd.grad(loss, inputs, upstream.to(loss.dtype))


def assert_as_right_as_torch(what: str, ours: Tensor, plain: Tensor, truth: Tensor, scale: float) -> None:
    """|ours - truth| <= 2 max|plain - truth| + rounding, of the result to its dtype and of maths on the `scale` given.

    Where plain torch is not finite, its error counts as 0.
    """
    assert ours.shape == truth.shape
    if not truth.numel():
        return
    maths = torch.finfo(torch.promote_types(ours.dtype, torch.float32)).eps
    error = (ours.double() - truth).abs()
    band = 8 * maths * scale + torch.finfo(ours.dtype).eps / 2 * truth.abs()
    excess = error - 2 * (plain.double() - truth).abs().nan_to_num(0).max() - band
    worst = int(excess.nan_to_num(nan=math.inf).argmax())
    ours_is, plain_is, truth_is = (each.detach().flatten()[worst].item() for each in (ours, plain, truth))
    assert (excess <= 0).all(), f"{what}: worst at {worst}: ours {ours_is}, plain torch {plain_is}, truth {truth_is}"


def assert_right(
    case: Case,
    ours: Tensor,
    plain: Callable[[Case], Tensor],
    truth: Callable[[Case], Tensor],
    scale: float = 1.0,
) -> None:
    """The loss of each row and its gradient, under an upstream gradient that is not 1, to numbers of about `scale`."""
    exact = case.in_float64()
    torch_loss, true_loss = plain(case), truth(exact)
    assert ours.dtype == (torch.float64 if case.hidden.dtype == torch.float64 else torch.float32)
    assert_as_right_as_torch("loss", ours, torch_loss, true_loss, scale)
    (gradient,), (torch_gradient,) = gradients(ours, case.hidden), gradients(torch_loss, case.hidden)
    (true_gradient,) = gradients(true_loss, exact.hidden)
    assert gradient.dtype == case.hidden.dtype
    scale *= float(case.weight.abs().max())
    if case.weight.dtype in (torch.float16, torch.bfloat16) and true_gradient.numel():
        # The gradients of the logits may be rounded to the dtype of the head that they meet.
        eps = torch.finfo(case.weight.dtype).eps / torch.finfo(torch.float32).eps
        scale += eps * float(true_gradient.abs().max()) / 8
    assert_as_right_as_torch("gradient", gradient, torch_gradient, true_gradient, scale)


class Operations(TorchDispatchMode):
    """The operations run: their names, the arguments that are no tensors, and the bytes that their results hold."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.arguments: list[tuple[Any, ...]] = []
        self.largest = self.peak = 0
        self._before: set[int] = set()
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func.overloadpacket))
        self.arguments.append(tuple(each for each in args if not isinstance(each, Tensor)))
        self._before |= {each.untyped_storage()._cdata for each in tree_leaves(args) if isinstance(each, Tensor)} - {
            *self._storages
        }
        result = func(*args, **(kwargs or {}))
        self._storages = {key: kept for key, kept in self._storages.items() if not kept[0].expired()}
        for each in tree_leaves(result):
            if isinstance(each, Tensor) and (storage := each.untyped_storage())._cdata not in self._before:
                self._storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        sizes = [size for _, size in self._storages.values()]
        self.largest, self.peak = max([self.largest, *sizes]), max(self.peak, sum(sizes))
        return result
