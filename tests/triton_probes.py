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


def op_and_gradients(op: str, tensors: dict[str, Tensor], upstream: tuple[Tensor, ...], **options: Any) -> list[Tensor]:
    """What an op, named as module:name, and its backward pass return; tensors that require gradients are leaves."""
    module, _, name = op.partition(":")
    tensors = {key: each.detach().requires_grad_(each.requires_grad) for key, each in tensors.items()}
    found = getattr(import_module(module), name)(**tensors, **options)
    results = found if isinstance(found, tuple) else (found,)
    leaves = [each for each in tensors.values() if each.requires_grad]
    return [*(each.detach() for each in results), *torch.autograd.grad(results, leaves, upstream)]


def fused_model(model_name: str) -> tuple[str, list[Tensor], list[Tensor]]:
    """Which modules of a tiny model these kernels run; logits and gradient of the embedding, by them and by itself."""
    tiny_model = import_module("tiny_models").tiny_model
    decoder = import_module("cdas_fast.models.structure").inspect_decoder(tiny_model(model_name))
    fused = import_module("cdas_fast.models.fused").find_fused(decoder, "triton")
    ids = torch.arange(5, 21)[None]

    def results() -> list[Tensor]:
        embedded = decoder.model.get_input_embeddings()(ids).detach().requires_grad_()
        logits = decoder.model(inputs_embeds=embedded, use_cache=False).logits
        return [logits.detach(), *torch.autograd.grad(logits.square().mean(), embedded)]

    by_itself = results()
    with fused.applied():
        by_kernels = results()
    return f"{fused}, {fused.rotaries} rotary embeddings", by_kernels, by_itself
