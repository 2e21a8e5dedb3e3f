"""What the losses over a frozen linear head share: the problem, validation, the driver over chunks, reduction.

    z = softcap(scale (W h + b)) / T,  p = softmax(z);  q likewise from the target

The loss of a row depends on that row alone and the head is frozen, so the forward pass makes the gradient of each row
as well, a chunk of rows at a time: no tensor of N x V numbers ever exists. Backward multiplies the gradient rows by the
incoming (N,). Means, weights and preference losses are ordinary autograd on the losses of the rows.

An implementation is a `ChunkKernel`, made from a `HeadProblem`; it fills the losses and gradient rows of one chunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from cdas_fast.errors import InvalidInputError, UnsupportedError, expected_got
from cdas_fast.ops.implementation import (
    Implementation,
    check_implementation,
    choose_implementation,
    math_dtype,
    require_floating,
    without_autocast,
)
from cdas_fast.ops.linear_head_reference import Formula, ReferenceChunk
from cdas_fast.ops.registration import register

Reduction = Literal["mean", "sum", "none"]
Loss = Literal["jsd", "forward_kl", "reverse_kl", "logprob"]
CHUNK_BYTES = 64 * 2**20


@dataclass(frozen=True)
class HeadParameters:
    """Which loss it is, and the numbers of its formula."""

    loss: Loss
    logit_softcap: float | None = None
    logit_scale: float = 1.0
    temperature: float = 1.0
    beta: float = 0.5  # of jsd


@dataclass(frozen=True, eq=False)
class HeadProblem:
    """N rows, what they are compared with, and the head. The tensors may have any strides and each its own dtype."""

    parameters: HeadParameters
    need_gradient: bool
    hidden: Tensor  # (N, D); its dtype decides that of the maths
    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    target_hidden: Tensor | None = None  # (N, D_target), of a divergence
    target_weight: Tensor | None = None  # (V, D_target); None: the target shares `weight`
    target_bias: Tensor | None = None  # (V,); None: the target has no bias
    labels: Tensor | None = None  # (N,) int64 of logprob, each in [0, V) or -1 where the row is ignored


class ChunkKernel(Protocol):
    """One implementation of one problem."""

    bytes_per_row: int  # of the buffers that live while a chunk is done
    row_multiple: int  # the number of rows of a chunk is best a multiple of it; 0 if any number does

    def run(self, rows: slice, loss: Tensor, gradient: Tensor | None) -> None:
        """Fill `loss` (C,) and `gradient` (C, D) of the `rows` start to stop, both in the dtype of the maths."""


def run_chunks(problem: HeadProblem, kernel: ChunkKernel, chunk_bytes: int) -> tuple[Tensor, Tensor | None]:
    """Losses (N,) and, if needed, gradient rows (N, D), both in the dtype of the maths.

    Gradient rows stay in float32 for float16 and bfloat16 too: backward scales them first and rounds once, and a loss
    scale applies before anything underflows in float16.
    """
    total, dtype = problem.hidden.shape[0], math_dtype(problem.hidden.dtype)
    loss = problem.hidden.new_empty(total, dtype=dtype)
    gradient = problem.hidden.new_empty(problem.hidden.shape, dtype=dtype) if problem.need_gradient else None
    chunk = rows_per_chunk(kernel, chunk_bytes)
    for start in range(0, total, chunk):
        rows = slice(start, min(start + chunk, total))
        kernel.run(rows, loss[rows], None if gradient is None else gradient[rows])
    return loss, gradient


def rows_per_chunk(kernel: ChunkKernel, chunk_bytes: int) -> int:
    """As many rows as `chunk_bytes` hold, at least one; a multiple of what the kernel prefers if that many fit."""
    rows = max(1, chunk_bytes // kernel.bytes_per_row)
    if kernel.row_multiple and rows > kernel.row_multiple:
        rows -= rows % kernel.row_multiple
    return rows


def solve(op: str, problem: HeadProblem, formula: Formula, impl: str, chunk_bytes: int) -> tuple[Tensor, Tensor | None]:
    """Losses and gradient rows of `problem` by the implementation chosen; `formula` is what the reference computes."""
    hidden = problem.hidden
    with without_autocast(hidden.device):
        kernel: ChunkKernel
        match choose_implementation(op, impl, hidden.device, math_dtype(hidden.dtype)):
            case "reference":
                kernel = ReferenceChunk(problem, formula)
            case "triton":
                from cdas_fast.ops.linear_head_triton import TritonChunk

                kernel = TritonChunk(problem)
            case "cpp":
                from cdas_fast.ops.linear_head_cpp import CppChunk

                kernel = CppChunk(problem)
        return run_chunks(problem, kernel, chunk_bytes)


def register_divergence(name: str, formula: Formula) -> Callable[..., tuple[Tensor, Tensor]]:
    """Define the op `cdas_fast::name` of a divergence between two heads."""

    def kernel(
        hidden: Tensor,
        target_hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target_weight: Tensor | None,
        target_bias: Tensor | None,
        loss: Loss,
        logit_softcap: float | None,
        logit_scale: float,
        temperature: float,
        beta: float,
        impl: str,
        chunk_bytes: int,
        need_gradient: bool,
    ) -> tuple[Tensor, Tensor]:
        problem = HeadProblem(
            HeadParameters(loss, logit_softcap, logit_scale, temperature, beta),
            need_gradient,
            hidden,
            weight,
            bias,
            target_hidden=target_hidden,
            target_weight=target_weight,
            target_bias=target_bias,
        )
        return _results(hidden, *solve(name, problem, formula, impl, chunk_bytes))

    schema = (
        f"{name}(Tensor hidden, Tensor target_hidden, Tensor weight, Tensor? bias, Tensor? target_weight, "
        "Tensor? target_bias, str loss, float? logit_softcap, float logit_scale, float temperature, float beta, "
        "str impl, int chunk_bytes, bool need_gradient) -> (Tensor, Tensor)"
    )
    return register(schema, kernel, fake=_fake, setup_context=_setup_context, backward=_backward)


def register_logprob(name: str, formula: Formula) -> Callable[..., tuple[Tensor, Tensor]]:
    """Define the op `cdas_fast::name` of the log-probability of labels."""

    def kernel(
        hidden: Tensor,
        labels: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        logit_softcap: float | None,
        logit_scale: float,
        temperature: float,
        ignore_index: int,
        impl: str,
        chunk_bytes: int,
        need_gradient: bool,
    ) -> tuple[Tensor, Tensor]:
        ignored = labels == ignore_index
        out_of_range = ~ignored & ((labels < 0) | (labels >= weight.shape[0]))
        problem = HeadProblem(
            HeadParameters("logprob", logit_softcap, logit_scale, temperature),
            need_gradient,
            hidden,
            weight,
            bias,
            labels=labels.masked_fill(ignored | out_of_range, -1),
        )
        loss, gradient = solve(name, problem, formula, impl, chunk_bytes)
        # Where labels are not checked beforehand, a wrong one must still be seen.
        loss.masked_fill_(out_of_range, math.nan)
        return _results(hidden, loss, gradient)

    schema = (
        f"{name}(Tensor hidden, Tensor labels, Tensor weight, Tensor? bias, float? logit_softcap, float logit_scale, "
        "float temperature, int ignore_index, str impl, int chunk_bytes, bool need_gradient) -> (Tensor, Tensor)"
    )
    return register(schema, kernel, fake=_fake, setup_context=_setup_context, backward=_backward)


def _results(hidden: Tensor, loss: Tensor, gradient: Tensor | None) -> tuple[Tensor, Tensor]:
    """An op returns tensors alone: an empty one stands for no gradient."""
    return loss, hidden.new_empty(0) if gradient is None else gradient


def _fake(hidden: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    need_gradient, dtype = arguments[-1], math_dtype(hidden.dtype)
    gradient = hidden.new_empty(hidden.shape, dtype=dtype) if need_gradient else None
    return _results(hidden, hidden.new_empty(hidden.shape[0], dtype=dtype), gradient)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, gradient = output
    if not inputs[-1]:
        raise RuntimeError("need_gradient is False, but hidden requires grad")
    ctx.save_for_backward(gradient)
    ctx.set_materialize_grads(False)
    ctx.dtype, ctx.inputs = inputs[0].dtype, len(inputs)


def _backward(ctx: Any, grad_loss: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_loss is None:
        return (None,) * ctx.inputs
    (gradient,) = ctx.saved_tensors
    if torch.is_grad_enabled():  # create_graph=True
        gradient = _Once.apply(gradient)
    unused = (grad_loss == 0)[:, None]  # such a row has no gradient, even if what was saved for it is NaN
    grad_hidden = (gradient * grad_loss[:, None]).masked_fill_(unused, 0.0).to(ctx.dtype)
    return grad_hidden, *(None,) * (ctx.inputs - 1)


class _Once(torch.autograd.Function):
    """Hands gradient rows on, which autograd knows to depend on `hidden`, but not how."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> None:
        raise UnsupportedError("the losses over a linear head have no second derivative with respect to hidden")


def divergence(
    op: str,
    registered: Callable[..., tuple[Tensor, Tensor]],
    parameters: HeadParameters,
    hidden: Tensor,
    target_hidden: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None,
    target_weight: Tensor | None,
    target_bias: Tensor | None,
    row_weights: Tensor | None,
    reduction: Reduction,
    impl: Implementation,
    chunk_bytes: int,
) -> Tensor:
    """What a public divergence does: validation, the registered op on rows (N, D), reduction."""
    if target_weight is None and target_bias is None:
        target_bias = bias
    heads = {"weight": weight, "bias": bias, "target_weight": target_weight, "target_bias": target_bias}
    _check_tensors(op, hidden, row_weights, target_hidden=target_hidden, **heads)
    if hidden.dim() < 1 or target_hidden.dim() < 1 or hidden.shape[:-1] != target_hidden.shape[:-1]:
        got = f"{tuple(hidden.shape)} and {tuple(target_hidden.shape)}"
        raise InvalidInputError(expected_got(f"{op}: hidden and target_hidden", "the same rows (..., D)", got))
    _check_head(op, weight, bias, width=hidden.shape[-1])
    target_head = weight if target_weight is None else target_weight
    _check_head(op, target_head, target_bias, width=target_hidden.shape[-1], of="target_", entries=weight.shape[0])
    _check_rows(op, hidden, row_weights, reduction)
    _check_parameters(op, parameters, impl, chunk_bytes)
    loss, _ = registered(
        hidden.reshape(-1, hidden.shape[-1]),
        target_hidden.reshape(-1, target_hidden.shape[-1]),
        weight,
        bias,
        None if target_weight is weight else target_weight,
        target_bias,
        parameters.loss,
        parameters.logit_softcap,
        parameters.logit_scale,
        parameters.temperature,
        parameters.beta,
        impl,
        chunk_bytes,
        hidden.requires_grad and torch.is_grad_enabled(),
    )
    return reduce(loss.reshape(hidden.shape[:-1]), row_weights, reduction)


def logprob(
    op: str,
    registered: Callable[..., tuple[Tensor, Tensor]],
    parameters: HeadParameters,
    hidden: Tensor,
    labels: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None,
    ignore_index: int,
    impl: Implementation,
    chunk_bytes: int,
    row_weights: Tensor | None = None,
    reduction: Reduction = "none",
) -> Tensor:
    """What a public function of labels does: validation, then the registered op, in the shape of `labels`."""
    _check_tensors(op, hidden, row_weights, weight=weight, bias=bias)
    if hidden.dim() < 1:
        raise InvalidInputError(expected_got(f"{op}: hidden", "shape (..., D)", "shape ()"))
    _check_head(op, weight, bias, width=hidden.shape[-1])
    _check_labels(op, hidden, labels, weight.shape[0], ignore_index)
    _check_rows(op, hidden, row_weights, reduction)
    _check_parameters(op, parameters, impl, chunk_bytes)
    result, _ = registered(
        hidden.reshape(-1, hidden.shape[-1]),
        labels.reshape(-1),
        weight,
        bias,
        parameters.logit_softcap,
        parameters.logit_scale,
        parameters.temperature,
        ignore_index,
        impl,
        chunk_bytes,
        hidden.requires_grad and torch.is_grad_enabled(),
    )
    return result.reshape(labels.shape)


def reduce(loss: Tensor, row_weights: Tensor | None, reduction: Reduction, counted: Tensor | None = None) -> Tensor:
    """The losses of rows (...), weighted, as they are or as their sum or mean.

    The mean divides by the sum of the weights, or by the number of rows, of the rows that are `counted`: all if None.
    """
    weights = None if row_weights is None else row_weights.to(loss.dtype)
    if weights is not None:
        # Only what is not finite is dropped: d(weight * loss)/dweight is the loss, at weight 0 too.
        loss = torch.where((weights == 0) & ~loss.isfinite(), 0.0, loss) * weights
    if reduction == "none":
        return loss
    total = loss.sum()
    if reduction == "sum":
        return total
    if counted is not None:
        weights = counted.to(loss.dtype) if weights is None else weights * counted
    if weights is None:
        return total / max(loss.numel(), 1)
    weight_sum = weights.sum()
    return total / torch.where(weight_sum == 0, 1.0, weight_sum)


def _check_tensors(op: str, hidden: Tensor, row_weights: Tensor | None, **frozen: Tensor | None) -> None:
    optional = ("bias", "target_weight", "target_bias")
    given: dict[str, Any] = {name: each for name, each in frozen.items() if each is not None or name not in optional}
    require_floating(op, hidden=hidden, **given, **({} if row_weights is None else {"row_weights": row_weights}))
    if not torch.is_grad_enabled():
        return
    for name, tensor in given.items():
        if tensor.requires_grad:
            remedy = f"Only hidden receives a gradient; pass {name}.detach()."
            raise InvalidInputError(expected_got(f"{op}: {name}", "a frozen tensor", "one that requires grad", remedy))


def _check_head(
    op: str, weight: Tensor, bias: Tensor | None, *, width: int, of: str = "", entries: int | None = None
) -> None:
    """A head fits the `width` of its activations and, if it is the second, has as many `entries` as the first."""
    fits = weight.dim() == 2 and weight.shape[1] == width and (entries is None or weight.shape[0] == entries)
    if not fits:
        wanted = f"shape ({'V' if entries is None else entries}, {width})"
        raise InvalidInputError(expected_got(f"{op}: {of}weight", wanted, f"shape {tuple(weight.shape)}"))
    if 0 in weight.shape:
        wanted = "at least one vocabulary entry of at least one number"
        raise InvalidInputError(expected_got(f"{op}: {of}weight", wanted, f"shape {tuple(weight.shape)}"))
    if bias is not None and bias.shape != weight.shape[:1]:
        wanted = f"shape ({weight.shape[0]},)"
        raise InvalidInputError(expected_got(f"{op}: {of}bias", wanted, f"shape {tuple(bias.shape)}"))


def _check_labels(op: str, hidden: Tensor, labels: Tensor, vocabulary: int, ignore_index: int) -> None:
    if not isinstance(labels, Tensor):
        raise InvalidInputError(expected_got(f"{op}: labels", "a torch.Tensor", type(labels).__name__))
    if labels.dtype != torch.int64:
        raise InvalidInputError(expected_got(f"{op}: labels", "dtype torch.int64", labels.dtype))
    if labels.device != hidden.device:
        raise InvalidInputError(expected_got(f"{op}: labels", f"a tensor on {hidden.device}", labels.device))
    if labels.shape != hidden.shape[:-1]:
        wanted, got = f"shape {tuple(hidden.shape[:-1])}", f"shape {tuple(labels.shape)}"
        raise InvalidInputError(expected_got(f"{op}: labels", wanted, got))
    if not isinstance(ignore_index, int):
        raise InvalidInputError(expected_got(f"{op}: ignore_index", "a whole number", repr(ignore_index)))
    # Elsewhere than on a CPU this would wait for the device.
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        bad = labels[((labels < 0) | (labels >= vocabulary)) & (labels != ignore_index)]
        if bad.numel():
            wanted = f"labels from 0 to {vocabulary - 1}, or ignore_index {ignore_index}"
            raise InvalidInputError(expected_got(f"{op}: labels", wanted, bad[0].item()))


def _check_rows(op: str, hidden: Tensor, row_weights: Tensor | None, reduction: str) -> None:
    if row_weights is not None and row_weights.shape != hidden.shape[:-1]:
        wanted, got = f"shape {tuple(hidden.shape[:-1])}", f"shape {tuple(row_weights.shape)}"
        raise InvalidInputError(expected_got(f"{op}: row_weights", wanted, got))
    if reduction not in ("mean", "sum", "none"):
        raise InvalidInputError(expected_got(f"{op}: reduction", "mean, sum or none", repr(reduction)))


def _check_parameters(op: str, parameters: HeadParameters, impl: str, chunk_bytes: int) -> None:
    cap = parameters.logit_softcap
    for name, number, fits, wanted in (
        ("beta", parameters.beta, 0 < parameters.beta < 1, "a number strictly between 0 and 1"),
        ("temperature", parameters.temperature, 0 < parameters.temperature < math.inf, "a finite number above 0"),
        ("logit_scale", parameters.logit_scale, -math.inf < parameters.logit_scale < math.inf, "a finite number"),
        ("logit_softcap", cap, cap is None or 0 < cap < math.inf, "None or a finite number above 0"),
        ("chunk_bytes", chunk_bytes, isinstance(chunk_bytes, int) and chunk_bytes > 0, "a whole number above 0"),
    ):
        if not fits:
            raise InvalidInputError(expected_got(f"{op}: {name}", wanted, repr(number)))
    check_implementation(op, impl)
