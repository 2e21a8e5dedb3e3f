"""The intervention on a CPU by the compiled kernels; see csrc/interchange.h for what happens inside."""

from __future__ import annotations

import ctypes
import math

import torch
from torch import Tensor

from cdas_fast.errors import InvalidInputError, expected_got
from cdas_fast.ops import cpu_library


def clamp_forward(
    hidden: Tensor, value: Tensor, direction: Tensor, mask: Tensor | None, direction_index: Tensor | None
) -> Tensor:
    """See `Functions` in interchange.py."""
    out = cpu_library.in_huge_pages(torch.empty_like(hidden, memory_format=torch.contiguous_format))
    call = _Call(hidden, direction, mask, direction_index)
    call.arguments.hidden, call.arguments.hidden_stride = call.rows(hidden)
    call.arguments.value = call.address(value)
    call.arguments.out = out.data_ptr()
    call.run("cdas_clamp_forward")
    return out


def clamp_backward(
    grad_out: Tensor,
    hidden: Tensor | None,
    value: Tensor | None,
    direction: Tensor,
    mask: Tensor | None,
    direction_index: Tensor | None,
    need_hidden: bool,
    need_value: bool,
    need_direction: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """See `Functions` in interchange.py."""
    call = _Call(grad_out, direction, mask, direction_index)
    call.arguments.grad_out, call.arguments.grad_out_stride = call.rows(grad_out)
    grad_hidden = grad_value = grad_direction = None
    if need_hidden:
        grad_hidden = cpu_library.in_huge_pages(torch.empty_like(grad_out, memory_format=torch.contiguous_format))
        call.arguments.grad_hidden = grad_hidden.data_ptr()
    if need_value:
        grad_value = direction.new_zeros(grad_out.shape[0], direction.shape[-2])  # of a sequence without positions: 0
        call.arguments.grad_value = grad_value.data_ptr()
    if need_direction:
        assert hidden is not None
        assert value is not None
        grad_direction = torch.empty_like(direction, memory_format=torch.contiguous_format)
        call.arguments.hidden, call.arguments.hidden_stride = call.rows(hidden)
        call.arguments.value = call.address(value)
        call.arguments.grad_direction = grad_direction.data_ptr()
    call.run("cdas_clamp_backward")
    return grad_hidden, grad_value, grad_direction


def project(source: Tensor, direction: Tensor, direction_index: Tensor | None) -> Tensor:
    """See `Functions` in interchange.py. The gradient of the value of one row is W g, so W h takes the same kernel."""
    _, coordinates, _ = clamp_backward(source, None, None, direction, None, direction_index, False, True, False)
    assert coordinates is not None
    return coordinates


class _Call:
    """The arguments of one call, and the tensors that they point into."""

    def __init__(
        self, activations: Tensor, direction: Tensor, mask: Tensor | None, direction_index: Tensor | None
    ) -> None:
        self.library = cpu_library.load()
        self.kept: list[Tensor] = []
        rank, width = direction.shape[-2:]
        sequences = activations.shape[0]
        self.arguments = cpu_library.Clamp(
            rows=math.prod(activations.shape[:-1]),
            width=width,
            rank=rank,
            concepts=1 if direction_index is None else direction.shape[0],
            rows_per_sequence=max(activations.shape[1], 1) if activations.dim() == 3 else 1,
            direction=self.address(direction),
            dtype=cpu_library.DTYPES[activations.dtype],
            threads=torch.get_num_threads(),
        )
        if mask is not None:
            self.arguments.mask = self.address(mask)
        if direction_index is not None:
            if sequences and not 0 <= int(direction_index.min()) <= int(direction_index.max()) < direction.shape[0]:
                wanted = f"indices of the {direction.shape[0]} directions"
                raise InvalidInputError(expected_got("direction_index", wanted, direction_index.tolist()))
            self.arguments.concept_of = self.address(direction_index.long())

    def address(self, tensor: Tensor) -> int:
        """Where the numbers of a tensor lie, one after the other."""
        tensor = tensor.contiguous()
        self.kept.append(tensor)
        return tensor.data_ptr()

    def rows(self, activations: Tensor) -> tuple[int, int]:
        """Address and row stride of (..., D); a copy is made only where the rows do not lie evenly in memory."""
        flat = activations.reshape(-1, activations.shape[-1])
        if flat.stride(1) != 1:
            flat = flat.contiguous()
        self.kept.append(flat)
        return flat.data_ptr(), flat.stride(0)

    def run(self, function: str) -> None:
        """Call the kernel with a workspace of its own."""
        workspace = cpu_library.workspace(self.library.cdas_clamp_workspace(ctypes.byref(self.arguments)))
        self.arguments.workspace = workspace.data_ptr()
        getattr(self.library, function)(ctypes.byref(self.arguments))
