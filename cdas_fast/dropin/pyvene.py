"""`cdas_fast.interchange` as an intervention of pyvene."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cdas_fast.errors import InvalidInputError, MissingDependencyError, expected_got
from cdas_fast.ops import interchange

try:
    import pyvene
except ModuleNotFoundError as error:
    raise MissingDependencyError(f"cdas_fast.dropin.pyvene needs pyvene: pip install pyvene ({error})") from error


class LowRankRotatedSpaceIntervention(pyvene.LowRankRotatedSpaceIntervention):
    """`pyvene.LowRankRotatedSpaceIntervention` by the fused op.

        Phi(h) = h + W^T (W h_source - W h)

    W is the transpose of `rotate_layer.weight`, R orthonormal rows kept so by pyvene's parametrization. Parameters,
    arguments, saving and loading are pyvene's. `subspaces` picks rows of W for each example, as many as it likes, with
    or without a partition. The maths is float32 (float64 for float64 activations).
    """

    def forward(
        self,
        base: Tensor,  # (B, ..., D)
        source: Tensor,  # the same, or what broadcasts to it
        subspaces: Sequence[Sequence[int]] | None = None,  # B lists of rows, or of parts of the partition
        **kwargs: Any,
    ) -> Tensor:
        """Phi(base), of the shape and dtype of `base`."""
        direction = self.rotate_layer.weight.T
        index = None
        if subspaces is not None:
            if len(subspaces) != base.shape[0]:
                wanted = f"one list for each of {base.shape[0]} examples"
                raise InvalidInputError(expected_got("subspaces", wanted, len(subspaces)))
            chosen = [self._rows(subspace) for subspace in subspaces]
            distinct = list(dict.fromkeys(chosen[:1] if self.use_fast else chosen))
            if len(distinct) == 1:
                direction = direction[list(distinct[0])]
            else:
                kept = direction.new_zeros(len(distinct), direction.shape[0], 1)
                for place, rows in enumerate(distinct):
                    kept[place, list(rows)] = 1  # a row of zeros changes nothing
                direction = kept * direction
                index = torch.tensor([distinct.index(rows) for rows in chosen], device=base.device)
                index = index.repeat_interleave(base[0, ..., 0].numel())
        packed = base.reshape(-1, base.shape[-1])
        source = source.expand_as(base).reshape(packed.shape)
        return interchange(packed, source, direction, direction_index=index).reshape(base.shape)

    def _rows(self, subspace: Sequence[int]) -> tuple[int, ...]:
        if self.subspace_partition is None:
            return tuple(int(row) for row in subspace)
        return tuple(int(row) for part in subspace for row in self.subspace_partition[part])

    def __str__(self) -> str:
        return "LowRankRotatedSpaceIntervention()"
