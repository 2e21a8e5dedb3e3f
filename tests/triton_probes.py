"""What tests reach of kernels/ from within a worker: device functions, and the search for launch parameters."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_launch: Any = import_module("cdas_fast.kernels.launch")
_kernels: Any = import_module("cdas_fast.kernels.linear_head")
_exponentials, _log_mixture, _tanh = _kernels._exponentials, _kernels._log_mixture, _kernels._tanh


@triton.jit
def _probe(x: Any, weight: Any, out: Any, count: Any, NAME: tl.constexpr, BLOCK: tl.constexpr) -> None:  # noqa: N803
    lanes = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    number = tl.load(x + lanes, mask=lanes < count, other=0.0)
    if NAME == "exp":
        result, _ = _exponentials(number)
    elif NAME == "expm1":
        _, result = _exponentials(number)
    elif NAME == "tanh":
        result = _tanh(number)
    else:  # the logarithm of 1 - weight + weight exp(number)
        power, minus_one = _exponentials(number)
        result = _log_mixture(weight * minus_one, (1.0 - weight) + weight * power, NAME == "log of half")
    tl.store(out + lanes, result, mask=lanes < count)


def apply(name: str, x: Tensor, weight: float = 0.5) -> Any:
    """exp, expm1, tanh, or the log of a mixture with e^x."""
    out = torch.empty_like(x)
    _probe[(triton.cdiv(x.numel(), 4096),)](x, weight, out, x.numel(), NAME=name, BLOCK=4096)
    return out


def divergence_with_autotune(logits: Tensor, target_logits: Tensor, loss: Tensor, grad_logits: Tensor) -> Any:
    """jsd as on a GPU with CDAS_FAST_TRITON_AUTOTUNE=1, where later candidates are faster; and once more.

    Returns how many candidates each call timed, and how many there are.
    """
    timed: list[float] = []
    autotunes, do_bench = _launch.autotunes, triton.testing.do_bench

    def bench(run: Any, **options: Any) -> float:
        run()
        timed.append(-len(timed))
        return timed[-1]

    _launch.autotunes, triton.testing.do_bench = lambda device: True, bench
    try:
        _kernels.divergence_rows(logits, target_logits, divergence="jsd", loss=loss, grad_logits=grad_logits)
        first, again = len(timed), torch.empty_like(loss)
        _kernels.divergence_rows(logits, target_logits, divergence="jsd", loss=again, grad_logits=grad_logits.clone())
    finally:
        _launch.autotunes, triton.testing.do_bench = autotunes, do_bench
    return first, len(timed) - first, len(_launch.head_candidates(_launch.head_parameters(logits.device)))
