"""The head losses in plain PyTorch: logits, log softmax, the formula of the loss, the chain rule back to `hidden`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cdas_fast.ops.head_gemm import head_logits, times_head
from cdas_fast.ops.implementation import math_dtype

if TYPE_CHECKING:
    from cdas_fast.ops.linear_head import HeadParameters, HeadProblem

# (log_p, log_q or labels, parameters, need_gradient) -> the losses (C,) and, if needed, their gradients with respect to
# z (C, V). log_p and log_q are (C, V), belong to the formula and may be overwritten; labels are (C,).
Formula = Callable[[Tensor, Tensor, "HeadParameters", bool], tuple[Tensor, Tensor | None]]


class ReferenceChunk:
    """Each step is a tensor operation over a whole chunk."""

    row_multiple = 0

    def __init__(self, problem: HeadProblem, formula: Formula) -> None:
        self.problem = problem
        self.formula = formula
        self.dtype = math_dtype(problem.hidden.dtype)
        # (C, V) tensors alive at once: both logits and both log softmaxes, or one each; and the slope of the cap.
        buffers = 2 if problem.target_hidden is None else 4
        buffers += problem.need_gradient and problem.parameters.logit_softcap is not None
        self.bytes_per_row = buffers * problem.weight.shape[0] * self.dtype.itemsize

    def run(self, rows: slice, loss: Tensor, gradient: Tensor | None) -> None:
        """See `ChunkKernel`."""
        problem, parameters = self.problem, self.problem.parameters
        log_p, slope, target = self._compared(rows)
        row_loss, grad_logits = self.formula(log_p, target, parameters, gradient is not None)
        loss.copy_(row_loss)
        if gradient is None or grad_logits is None:
            return
        if slope is not None:
            grad_logits.mul_(slope)
        times_head(grad_logits, problem.weight, gradient)
        gradient.mul_(parameters.logit_scale / parameters.temperature)

    def _compared(self, rows: slice) -> tuple[Tensor, Tensor | None, Tensor]:
        """log p, the slope of the cap if it is needed, and log q or the labels."""
        problem = self.problem
        hidden = problem.hidden[rows].to(self.dtype)
        if problem.target_hidden is None:
            assert problem.labels is not None
            labels = problem.labels[rows]
            hidden = hidden.masked_fill((labels < 0)[:, None], 0.0)  # an ignored row may hold NaN
            return *self._log_softmax(head_logits(hidden, problem.weight), problem.bias), labels
        target_hidden = problem.target_hidden[rows].to(self.dtype)
        if problem.target_weight is None:
            # One product reads a shared head once.
            logits, target_logits = head_logits(torch.cat([hidden, target_hidden]), problem.weight).chunk(2)
        else:
            logits = head_logits(hidden, problem.weight)
            target_logits = head_logits(target_hidden, problem.target_weight)
        log_p, slope = self._log_softmax(logits, problem.bias)
        return log_p, slope, self._log_softmax(target_logits, problem.target_bias, is_target=True)[0]

    def _log_softmax(
        self, logits: Tensor, bias: Tensor | None, is_target: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """log softmax(z) of the products W h (C, V), and the slope of the cap if it is needed; overwrites `logits`."""
        parameters, slope = self.problem.parameters, None
        if bias is not None:
            logits.add_(bias.to(self.dtype))
        if parameters.logit_scale != 1.0:
            logits.mul_(parameters.logit_scale)
        if parameters.logit_softcap is not None:
            logits.div_(parameters.logit_softcap).tanh_()
            if self.problem.need_gradient and not is_target:
                slope = 1 - logits.square()
            logits.mul_(parameters.logit_softcap)
        if parameters.temperature != 1.0:
            logits.div_(parameters.temperature)
        return logits.log_softmax(-1), slope
