"""A linear map whose weight is somewhere else: see cdas_fast/ops/handle_linear.py."""

from __future__ import annotations

from torch import Tensor, nn

from cdas_fast.ops.handle_linear import WeightHandle, handle_linear


class HandleLinear(nn.Module):
    """A linear map that asks a handle for its frozen weight (O, I); the bias, if any, is its own."""

    def __init__(self, handle: WeightHandle, shape: tuple[int, int], bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.handle = handle
        self.out_features, self.in_features = shape
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """x W^T + b."""
        return handle_linear(x, self.handle, self.bias)

    def extra_repr(self) -> str:
        """As `nn.Linear` shows itself."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
