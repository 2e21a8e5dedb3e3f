"""The head losses on a GPU: the products by the vendor's library, everything between them by one Triton kernel."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import cdas_fast.kernels.linear_head as kernels
from cdas_fast.ops.head_gemm import head_logits, times_head
from cdas_fast.ops.implementation import math_dtype

if TYPE_CHECKING:
    from cdas_fast.ops.linear_head import HeadProblem


class TritonChunk:
    """Logits in the dtype of the maths; their gradients in that of the head, where the product takes them."""

    row_multiple = 64  # of the tiles that a matrix product is made of

    def __init__(self, problem: HeadProblem) -> None:
        self.problem = problem
        self.dtype = math_dtype(problem.hidden.dtype)
        self.heads = 1 if problem.target_hidden is None else 2
        hidden, weight = problem.hidden, problem.weight
        self.grad_dtype = weight.dtype if hidden.dtype == weight.dtype and _keeps_float32(weight) else self.dtype
        self.grad_scale = _grad_scale(problem) if self.grad_dtype == torch.float16 else 1.0
        self.own_gradients = problem.need_gradient and self.grad_dtype != self.dtype  # else they overwrite the logits
        bytes_per_entry = self.heads * self.dtype.itemsize + self.own_gradients * self.grad_dtype.itemsize
        self.bytes_per_row = weight.shape[0] * bytes_per_entry
        self._biases = [None if bias is None else bias.contiguous() for bias in (problem.bias, problem.target_bias)]
        self._logits: Tensor | None = None
        self._grad_logits: Tensor | None = None

    def run(self, rows: slice, loss: Tensor, gradient: Tensor | None) -> None:
        """See `ChunkKernel`."""
        problem, parameters, count = self.problem, self.problem.parameters, rows.stop - rows.start
        if self._logits is None:  # the first chunk is the largest
            vocabulary = problem.weight.shape[0]
            self._logits = problem.hidden.new_empty(self.heads * count, vocabulary, dtype=self.dtype)
            if self.own_gradients:
                self._grad_logits = problem.hidden.new_empty(count, vocabulary, dtype=self.grad_dtype)
        logits = self._logits[: self.heads * count]
        grad_logits = None
        if gradient is not None:
            grad_logits = (self._logits if self._grad_logits is None else self._grad_logits)[:count]
        numbers = {
            "logit_softcap": parameters.logit_softcap,
            "logit_scale": parameters.logit_scale,
            "temperature": parameters.temperature,
        }
        if problem.target_hidden is None:
            assert problem.labels is not None
            self._product(problem.hidden[rows], problem.weight, logits)
            kernels.logprob_rows(
                logits,
                problem.labels[rows].contiguous(),
                bias=self._biases[0],
                loss=loss,
                grad_logits=grad_logits,
                grad_scale=self.grad_scale,
                **numbers,
            )
        else:
            self._both_products(problem.hidden[rows], problem.target_hidden[rows], logits)
            kernels.divergence_rows(
                logits[:count],
                logits[count:],
                bias=self._biases[0],
                target_bias=self._biases[1],
                divergence=parameters.loss,
                beta=parameters.beta,
                loss=loss,
                grad_logits=grad_logits,
                grad_scale=self.grad_scale,
                **numbers,
            )
        if gradient is None or grad_logits is None:
            return
        if self.grad_dtype == self.dtype:
            times_head(grad_logits, problem.weight, gradient)
        else:
            torch.mm(grad_logits, problem.weight, out_dtype=self.dtype, out=gradient)
        if self.grad_scale != 1.0:
            gradient.div_(self.grad_scale)

    def _both_products(self, hidden: Tensor, target_hidden: Tensor, logits: Tensor) -> None:
        count = hidden.shape[0]
        if self.problem.target_weight is None and hidden.dtype == target_hidden.dtype:
            # One product reads a shared head once.
            self._product(torch.cat([hidden, target_hidden]), self.problem.weight, logits)
            return
        target_weight = self.problem.weight if self.problem.target_weight is None else self.problem.target_weight
        self._product(hidden, self.problem.weight, logits[:count])
        self._product(target_hidden, target_weight, logits[count:])

    def _product(self, hidden: Tensor, weight: Tensor, out: Tensor) -> None:
        """hidden @ weight.T in the dtype of the maths, which 16-bit factors of one dtype need not be cast to."""
        if hidden.dtype == weight.dtype and _keeps_float32(weight):
            torch.mm(hidden, weight.T, out_dtype=self.dtype, out=out)
        else:
            head_logits(hidden.to(self.dtype), weight, out)


def _grad_scale(problem: HeadProblem) -> float:
    """A power of two that float16 gradients of logits are multiplied by, so that those of rare entries survive.

    |dloss/dz| is at most 1, for reverse_kl at most some ten: p (log p - log q - KL), for which 128 is allowed. float16
    reaches 2^16, and 2^-24 at its lower end: multiplied by 2^14 (2^7), entries down to 2^-38 (2^-31) count.
    """
    parameters = problem.parameters
    bound = (128 if parameters.loss == "reverse_kl" else 1) * abs(parameters.logit_scale) / parameters.temperature
    return math.ldexp(1.0, 15 - math.frexp(bound)[1])


def _keeps_float32(weight: Tensor) -> bool:
    """Whether a product with `weight` can give the float32 numbers that it is summed in."""
    return weight.dtype in (torch.float16, torch.bfloat16) and _mm_has_out_dtype(weight.device, weight.dtype)


@functools.cache
def _mm_has_out_dtype(device: torch.device, dtype: torch.dtype) -> bool:
    """torch has had it since 2.8, for CUDA devices; ROCm has refused it in some versions."""
    sample = torch.zeros(16, 16, dtype=dtype, device=device)
    try:
        torch.mm(sample, sample, out_dtype=torch.float32)
    except (RuntimeError, TypeError):  # NotImplementedError is a RuntimeError
        return False
    return True
