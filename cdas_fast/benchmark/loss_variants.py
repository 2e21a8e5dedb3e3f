"""The ways to compute a divergence of two heads that `loss.py` compares: ours, plain torch, rivals, and the floor."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from cdas_fast.benchmark.runner import Variant, import_problem, missing_implementation
from cdas_fast.ops.implementation import Implementation
from cdas_fast.ops.linear_head import CHUNK_BYTES
from cdas_fast.ops.linear_jsd import linear_jsd
from cdas_fast.ops.linear_kl import linear_kl

Divergence = Literal["jsd", "forward_kl", "reverse_kl"]
DIVERGENCES: tuple[str, ...] = get_args(Divergence)
LABELS = {
    "gemms": "three GEMMs",
    "cpp": "cdas_fast cpp",
    "triton": "cdas_fast triton",
    "reference": "cdas_fast reference",
    "eager": "eager",
    "chunked": "chunked",
    "compile": "torch.compile",
    "liger": "Liger",
    "liger-triton": "Liger Triton",
}
CHUNKED = ("gemms", "chunked", "compile")  # those whose number of rows at a time is chosen by trial
NOTES = {
    "liger": "its forward pass makes the gradients of hidden and of the head, asked or not",
    "liger-triton": "its forward pass makes the gradient, asked or not",
}


@dataclass(frozen=True)
class Task:
    """What is computed; N rows of width D, a vocabulary of V."""

    rows: int
    width: int
    vocabulary: int
    dtype: torch.dtype
    divergence: str = "jsd"
    logit_softcap: float | None = None


@dataclass(frozen=True)
class Inputs:
    """One set of tensors; `trained` is `hidden` as a leaf that requires a gradient."""

    hidden: Tensor  # (N, D)
    trained: Tensor  # (N, D)
    target: Tensor  # (N, D)
    weight: Tensor  # (V, D)


MeanLoss = Callable[[Tensor, Tensor, Tensor, "Tensor | None"], Tensor]  # over the rows named, over all if None


class LossVariant:
    """A mean loss that autograd can differentiate."""

    def __init__(self, mean_loss: MeanLoss) -> None:
        self.mean_loss = mean_loss

    def forward(self, inputs: Inputs) -> Tensor:
        """See `Variant`."""
        with torch.no_grad():
            return self.mean_loss(inputs.hidden, inputs.target, inputs.weight, None)

    def both(self, inputs: Inputs) -> Tensor:
        """See `Variant`."""
        return self.of_rows(inputs, None)[1]

    def of_rows(self, inputs: Inputs, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        """The mean loss of `rows`, and its gradient (N, D)."""
        loss = self.mean_loss(inputs.trained, inputs.target, inputs.weight, rows)
        (gradient,) = torch.autograd.grad(loss, inputs.trained)
        return loss.detach(), gradient


class Gemms:
    """The floor: two products with the head, and one with its transpose, in the dtype of the inputs, and no more."""

    def __init__(self, task: Task, chunk_rows: int, device: torch.device) -> None:
        shape = (min(chunk_rows, task.rows), task.vocabulary)
        self.logits, self.target_logits = (torch.zeros(shape, dtype=task.dtype, device=device) for _ in range(2))
        self.gradient = torch.zeros(task.rows, task.width, dtype=task.dtype, device=device)

    def forward(self, inputs: Inputs) -> None:
        """See `Variant`."""
        self._run(inputs, False)

    def both(self, inputs: Inputs) -> None:
        """See `Variant`."""
        self._run(inputs, True)

    def _run(self, inputs: Inputs, need_gradient: bool) -> None:
        for rows in chunks(inputs.hidden, self.logits.shape[0]):
            hidden, target = inputs.hidden[rows], inputs.target[rows]
            logits = self.logits[: hidden.shape[0]]
            torch.mm(hidden, inputs.weight.T, out=logits)
            torch.mm(target, inputs.weight.T, out=self.target_logits[: hidden.shape[0]])
            if need_gradient:
                torch.mm(logits, inputs.weight, out=self.gradient[rows])


def names_for(device: torch.device) -> list[str]:
    """The variants that run on `device` if what they need is installed."""
    barred = ("cpp",) if device.type == "cuda" else ("triton", "liger-triton")
    return [name for name in LABELS if name not in barred]


def missing(name: str, task: Task, device: torch.device) -> str | None:
    """Why a variant cannot run `task` on `device`, None if it can as far as one sees beforehand."""
    if not name.startswith("liger"):
        return missing_implementation(name, device)
    if name == "liger-triton" and device.type != "cuda":
        return "runs on a GPU alone"
    if task.logit_softcap is not None:
        return "knows no softcap"
    module = "transformers.fused_linear_jsd" if name == "liger-triton" else "chunked_loss"
    remedy = "pip install liger-kernel"
    return import_problem("liger_kernel", remedy) or import_problem(f"liger_kernel.{module}", remedy)


def working_bytes(name: str, task: Task, chunk_rows: int | None) -> int:
    """About what a variant allocates for fw+bw: what was measured at V = 40000 on a CPU, rounded up."""
    size = task.dtype.itemsize
    chunk = (chunk_rows or task.rows) * task.vocabulary
    gradient = 2 * task.rows * task.width * 4
    softcap = task.logit_softcap is not None
    match name:
        case "gemms":
            return 2 * chunk * size + gradient
        case "eager":
            return chunk * (size + 4 * (8 + softcap)) + gradient
        case "chunked" | "compile":
            return chunk * (size + 4 * (6 + 2 * softcap)) + gradient
        case "liger":
            return chunk * 8 * size + gradient + 2 * task.vocabulary * task.width * size
        case "liger-triton":  # by its code
            return chunk * (size + 4 * 8) + gradient
        case _:
            return 2 * CHUNK_BYTES + 5 * 4 * task.vocabulary + gradient


def build(name: str, task: Task, device: torch.device, chunk_rows: int | None) -> Variant:
    """The variant `name`, with `chunk_rows` at a time for those that are `CHUNKED`."""
    match name:
        case "gemms":
            return Gemms(task, chunk_rows or task.rows, device)
        case "eager":
            return LossVariant(_eager(task))
        case "chunked":
            return LossVariant(_in_chunks(task, chunk_rows or task.rows, chunk_losses))
        case "compile":
            torch.compiler.reset()  # it gives up on a function after some shapes
            compiled = torch.compile(chunk_losses, dynamic=False, fullgraph=True)
            return LossVariant(_in_chunks(task, chunk_rows or task.rows, compiled))
        case "liger":
            return LossVariant(_liger(task))
        case "liger-triton":
            return LossVariant(_liger_triton(task))
        case _:
            return LossVariant(_ours(name, task))  # type: ignore[arg-type]


def chunks(rows: Tensor, chunk_rows: int) -> list[slice]:
    """Slices of at most `chunk_rows` of the first dimension."""
    return [slice(start, start + chunk_rows) for start in range(0, rows.shape[0], chunk_rows)]


def _of(losses: Tensor, rows: Tensor | None) -> Tensor:
    return losses.mean() if rows is None else losses[rows].mean()


def _ours(impl: Implementation, task: Task) -> MeanLoss:
    def mean_loss(hidden: Tensor, target: Tensor, weight: Tensor, rows: Tensor | None) -> Tensor:
        options: dict[str, Any] = {"logit_softcap": task.logit_softcap, "impl": impl}
        if rows is not None:
            options["reduction"] = "none"
        if task.divergence == "jsd":
            loss = linear_jsd(hidden, target, weight, **options)
        else:
            direction: Any = task.divergence.removesuffix("_kl")
            loss = linear_kl(hidden, target, weight, direction=direction, **options)
        return loss if rows is None else _of(loss, rows)

    return mean_loss


def _eager(task: Task) -> MeanLoss:
    """What one writes in torch: whole logits in the dtype of the inputs, the rest in float32."""

    def log_softmax(hidden: Tensor, weight: Tensor) -> Tensor:
        logits = (hidden @ weight.T).float()
        if task.logit_softcap is not None:
            logits = task.logit_softcap * torch.tanh(logits / task.logit_softcap)
        return logits.log_softmax(-1)

    def mean_loss(hidden: Tensor, target: Tensor, weight: Tensor, rows: Tensor | None) -> Tensor:
        return _of(eager_divergence(log_softmax(hidden, weight), log_softmax(target, weight), task.divergence), rows)

    return mean_loss


def eager_divergence(log_p: Tensor, log_q: Tensor, divergence: str) -> Tensor:
    """The divergence of each row of log-probabilities (N, V), as the documentation of the ops writes it in torch."""
    if divergence == "forward_kl":
        return (log_q.exp() * (log_q - log_p)).sum(-1)
    if divergence == "reverse_kl":
        return (log_p.exp() * (log_p - log_q)).sum(-1)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    return ((log_p.exp() * (log_p - log_m)).sum(-1) + (log_q.exp() * (log_q - log_m)).sum(-1)) / 2


ChunkLosses = Callable[[Tensor, Tensor, Tensor, str, "float | None", bool], "tuple[Tensor, Tensor | None]"]


def chunk_losses(
    hidden: Tensor,  # (C, D)
    target: Tensor,  # (C, D)
    weight: Tensor,  # (V, D)
    divergence: str,
    logit_softcap: float | None,
    need_gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """Losses (C,) of a chunk and their gradients (C, D), with logits and their gradients in the dtype of the inputs.

    Plain torch at its best: one product reads the head for both sides, no tensor is written without need, and log m is
    the logarithm of a mean of probabilities, which costs one transcendental function instead of two.
    """
    logits = torch.cat([hidden, target]) @ weight.T
    if logit_softcap is None:
        log_p, log_q = torch.log_softmax(logits, -1, dtype=torch.float32).chunk(2)
        slope = None
    else:
        bent = logits.float().div_(logit_softcap).tanh_()
        slope = 1 - bent.chunk(2)[0].square() if need_gradient else None
        log_p, log_q = bent.mul_(logit_softcap).log_softmax(-1).chunk(2)
    del logits
    if divergence == "forward_kl":
        q = log_q.exp()
        loss = log_q.sub_(log_p).mul_(q).sum(-1)
        grad_logits = log_p.exp_().sub_(q) if need_gradient else None
    elif divergence == "reverse_kl":
        p = log_p.exp()
        share = log_p.sub_(log_q).mul_(p)
        loss = share.sum(-1)
        grad_logits = share.addcmul_(p, loss[:, None], value=-1) if need_gradient else None
    else:
        p, q = log_p.exp(), log_q.exp()
        log_m = (p + q).mul_(0.5).clamp_min_(torch.finfo(torch.float32).tiny).log_()
        kl_q = log_q.sub_(log_m).mul_(q).sum(-1)
        share = log_p.sub_(log_m).mul_(p)
        kl_p = share.sum(-1)
        loss = (kl_p + kl_q) / 2
        grad_logits = share.addcmul_(p, kl_p[:, None], value=-1).mul_(0.5) if need_gradient else None
    if grad_logits is None:
        return loss, None
    if slope is not None:
        grad_logits.mul_(slope)
    return loss, grad_logits.to(hidden.dtype) @ weight


def _in_chunks(task: Task, chunk_rows: int, losses_of: ChunkLosses) -> MeanLoss:
    def mean_loss(hidden: Tensor, target: Tensor, weight: Tensor, rows: Tensor | None) -> Tensor:
        losses = _InChunks.apply(hidden, target, weight, task, chunk_rows, losses_of)
        return _of(losses, rows)

    return mean_loss


class _InChunks(torch.autograd.Function):
    """Losses (N,), a chunk of rows at a time; the gradient is made in the forward pass, as ours is."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, target: Tensor, weight: Tensor, task: Task, chunk_rows: int, losses_of: ChunkLosses
    ) -> Tensor:
        need_gradient = ctx.needs_input_grad[0]
        loss = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
        gradient = torch.empty_like(hidden) if need_gradient else None
        hidden, weight = hidden.detach(), weight.detach()
        for rows in chunks(hidden, chunk_rows):
            found = losses_of(
                hidden[rows], target[rows], weight, task.divergence, task.logit_softcap, gradient is not None
            )
            loss[rows] = found[0]
            if gradient is not None and found[1] is not None:
                gradient[rows] = found[1]
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * grad_loss[:, None]).to(gradient.dtype), *(None,) * 5


_LIGER_BETA = {"jsd": 0.5, "forward_kl": 0.0, "reverse_kl": 1.0}
_IGNORED = -100


def _labels(hidden: Tensor, rows: Tensor | None) -> Tensor:
    """Liger gives the mean over the rows whose label is not -100, and nothing else."""
    if rows is None:
        return torch.zeros(hidden.shape[0], dtype=torch.int64, device=hidden.device)
    labels = torch.full((hidden.shape[0],), _IGNORED, device=hidden.device)
    labels[rows] = 0
    return labels


def _liger(task: Task) -> MeanLoss:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    liger = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0,
        weight_soft_loss=1.0,
        beta=_LIGER_BETA[task.divergence],
        ignore_index=_IGNORED,
        compiled=True,
    )

    def mean_loss(hidden: Tensor, target: Tensor, weight: Tensor, rows: Tensor | None) -> Tensor:
        return liger(hidden, weight, target, weight, _labels(hidden, rows))

    return mean_loss


def _liger_triton(task: Task) -> MeanLoss:
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

    liger = LigerFusedLinearJSD(jsd_beta=_LIGER_BETA[task.divergence], ignore_index=_IGNORED)

    def mean_loss(hidden: Tensor, target: Tensor, weight: Tensor, rows: Tensor | None) -> Tensor:
        return liger(hidden, weight, target, weight, None if rows is None else _labels(hidden, rows))

    return mean_loss
