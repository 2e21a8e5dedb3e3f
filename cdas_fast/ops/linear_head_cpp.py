"""The head losses on a CPU: one call of the compiled kernels a chunk."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cdas_fast.ops import cpu_library
from cdas_fast.ops.implementation import math_dtype

if TYPE_CHECKING:
    from cdas_fast.ops.linear_head import HeadProblem


class CppChunk:
    """See csrc/linear_head.h for what happens inside."""

    def __init__(self, problem: HeadProblem) -> None:
        self.library = cpu_library.load()
        self.problem = problem
        self.dtype = math_dtype(problem.hidden.dtype)
        heads = 1 if problem.target_hidden is None else 2
        self.bytes_per_row = heads * problem.weight.shape[0] * self.dtype.itemsize
        self.row_multiple = int(self.library.cdas_head_loss_rows(cpu_library.DTYPES[self.dtype]))
        self._workspace: Tensor | None = None
        # Kept here as long as the kernels may read them.
        self._biases = [None if bias is None else bias.to(self.dtype) for bias in (problem.bias, problem.target_bias)]
        self._biases = [None if bias is None else bias.contiguous() for bias in self._biases]
        self._labels = None if problem.labels is None else problem.labels.contiguous()

    def run(self, rows: slice, loss: Tensor, gradient: Tensor | None) -> None:
        """See `ChunkKernel`."""
        arguments = self._arguments(rows, loss, gradient)
        if self._workspace is None:  # the first chunk is the largest
            self._workspace = cpu_library.workspace(self.library.cdas_head_loss_workspace(ctypes.byref(arguments)))
        arguments.workspace = self._workspace.data_ptr()
        self.library.cdas_head_loss(ctypes.byref(arguments))

    def _arguments(self, rows: slice, loss: Tensor, gradient: Tensor | None) -> cpu_library.HeadLoss:
        problem, parameters = self.problem, self.problem.parameters
        hidden, weight = problem.hidden[rows], problem.weight
        arguments = cpu_library.HeadLoss(
            rows=hidden.shape[0],
            vocabulary=weight.shape[0],
            width=weight.shape[1],
            hidden=cpu_library.Matrix.of(hidden),
            weight=cpu_library.Matrix.of(weight),
            bias=_address(self._biases[0]),
            target_bias=_address(self._biases[1]),
            loss=loss.data_ptr(),
            gradient=_address(gradient),
            softcap=parameters.logit_softcap or 0.0,
            scale=parameters.logit_scale,
            temperature=parameters.temperature,
            beta=parameters.beta,
            gradient_dtype=cpu_library.DTYPES[self.dtype],
            divergence=cpu_library.DIVERGENCES[parameters.loss],
            threads=torch.get_num_threads(),
        )
        if problem.target_hidden is not None:
            target_weight = weight if problem.target_weight is None else problem.target_weight
            arguments.target_width = target_weight.shape[1]
            arguments.target_hidden = cpu_library.Matrix.of(problem.target_hidden[rows])
            arguments.target_weight = cpu_library.Matrix.of(target_weight)
        if self._labels is not None:
            arguments.labels = self._labels[rows].data_ptr()
        return arguments


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
