"""Correctness, then speed, on a GPU of NVIDIA or AMD.

    python -m benchmarks.gpu [--output DIR] [--device cuda:N] [--repeats K] [--overwrite]

First the Triton implementation of every op is compared with the formula in float64 on the device. If any comparison
fails, no speed is measured. Then `cdas-fast bench loss` on all its shapes and `cdas-fast bench interchange` run, and
everything goes to DIR/NAME.json and DIR/NAME.txt, NAME being the device's.

A result is right if its error is at most twice that of plain torch at the same dtype, or for losses, which are made
from logits in float32, in float32; plus a rounding band.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from cdas_fast.benchmark.intervention import bench_interchange
from cdas_fast.benchmark.loss import SHAPES, bench_loss
from cdas_fast.benchmark.loss_variants import eager_divergence
from cdas_fast.benchmark.report import shown
from cdas_fast.benchmark.runner import check_settings, on_device
from cdas_fast.errors import CDASError, InvalidInputError, expected_got
from cdas_fast.ops import clamp, interchange, linear_jsd, linear_kl, linear_logprob
from cdas_fast.ops.gated_activation import gated_activation
from cdas_fast.ops.rms_norm import rms_norm
from cdas_fast.ops.rotary_embedding import rotary_embedding
from cdas_fast.storage import write_json, write_text

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OPTIONS: dict[str, dict[str, float]] = {
    "plain": {},
    "all options": {"logit_softcap": 3.0, "logit_scale": 0.7, "temperature": 1.7},
}
HEADS = {
    "aligned": (32, 64, 128),
    "ragged": (31, 67, 1001),
    "one row": (1, 13, 37),
    "real vocabulary": (17, 64, 128256),
}


@dataclass(frozen=True)
class Check:
    """One result against the truth: the largest error beyond twice that of plain torch, and the rounding band."""

    name: str
    error: float
    plain_error: float
    band: float

    @property
    def passed(self) -> bool:
        """Whether the error is within its bound; NaN is not."""
        return self.error <= 2 * self.plain_error + self.band


def compare(name: str, ours: Tensor, plain: Tensor, truth: Tensor, scale: float = 1.0) -> Check:
    """The largest errors; the band is rounding in float32 of numbers of the size `scale`, and to the result's dtype."""
    largest = float(truth.abs().max())
    band = 16 * torch.finfo(torch.float32).eps * scale + torch.finfo(ours.dtype).eps * largest
    error, plain_error = (float((each.double() - truth).abs().max()) for each in (ours, plain))
    return Check(name, error, plain_error, band)


def loss_checks(device: torch.device, impl: Any) -> Iterator[Check]:
    """Loss and gradient of every head loss."""
    ops: dict[str, Callable[..., Tensor]] = {
        "jsd": lambda *tensors, **options: linear_jsd(*tensors, reduction="none", impl=impl, **options),
        "forward_kl": lambda *tensors, **options: linear_kl(*tensors, reduction="none", impl=impl, **options),
        "reverse_kl": lambda *tensors, **options: linear_kl(
            *tensors, direction="reverse", reduction="none", impl=impl, **options
        ),
        "logprob": lambda *tensors, **options: linear_logprob(*tensors, impl=impl, **options),
    }
    for op, function in ops.items():
        for dtype in DTYPES:
            for head, sizes in HEADS.items():
                for options_name, options in OPTIONS.items():
                    name = f"{op}, {str(dtype).removeprefix('torch.')}, {head}, {options_name}"
                    yield from _loss_checks(name, op, function, sizes, dtype, device, options)


def _loss_checks(
    name: str,
    op: str,
    function: Callable[..., Tensor],
    sizes: tuple[int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    options: dict[str, float],
) -> Iterator[Check]:
    rows, width, vocabulary = sizes
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    hidden, weight, bias = normal(rows, width), normal(vocabulary, width) / 2, normal(vocabulary)
    target = normal(rows, width)
    if op == "logprob":
        target = torch.randint(vocabulary, (rows,), generator=generator, device=device)
    upstream = torch.rand(rows, generator=generator, device=device) + 0.5

    def log_softmax(activations: Tensor, maths: torch.dtype) -> Tensor:
        logits = (activations @ weight.to(activations.dtype).T + bias.to(activations.dtype)).to(maths)
        logits = logits * options.get("logit_scale", 1.0)
        if "logit_softcap" in options:
            logits = options["logit_softcap"] * torch.tanh(logits / options["logit_softcap"])
        return (logits / options.get("temperature", 1.0)).log_softmax(-1)

    def formula(leaf: Tensor, maths: torch.dtype) -> Tensor:
        log_p = log_softmax(leaf, maths)
        if op == "logprob":
            return log_p.gather(-1, target[:, None])[:, 0]
        return eager_divergence(log_p, log_softmax(target.to(leaf.dtype), maths), op)

    def result(compute: Callable[[Tensor], Tensor], at: torch.dtype) -> tuple[Tensor, Tensor]:
        leaf = hidden.to(at).requires_grad_()
        loss = compute(leaf)
        (gradient,) = torch.autograd.grad(loss, leaf, upstream.to(loss.dtype))
        return loss.detach(), gradient

    ours = result(lambda leaf: function(leaf, target, weight, bias=bias, **options), dtype)
    plain = result(lambda leaf: formula(leaf, torch.float32), dtype)
    exact_logits = result(lambda leaf: formula(leaf, torch.float32), torch.float32)
    truth = result(lambda leaf: formula(leaf, torch.float64), torch.float64)
    largest = float(truth[0].abs().max().clamp(min=1))
    # Losses are made from logits in float32 whatever the dtype of the inputs.
    yield compare(f"{name}: loss", ours[0], exact_logits[0], truth[0], scale=largest)
    yield compare(f"{name}: gradient", ours[1], plain[1], truth[1], scale=largest * float(weight.abs().max()))


def intervention_checks(device: torch.device, impl: Any) -> Iterator[Check]:
    """Result and gradients of interchange and clamp: one direction or several, batches or packed rows, with a mask."""
    for dtype in DTYPES:
        for rank, width, concepts in ((1, 64, 0), (3, 67, 0), (2, 130, 3)):
            for packed in (False, True):
                kind = f"{'packed' if packed else 'batch'}, rank {rank}, {concepts or 'no'} concepts"
                name = f"{str(dtype).removeprefix('torch.')}, {kind}"
                yield from _intervention_checks(name, dtype, rank, width, concepts, packed, device, impl)


def _intervention_checks(
    name: str, dtype: torch.dtype, rank: int, width: int, concepts: int, packed: bool, device: torch.device, impl: Any
) -> Iterator[Check]:
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    places = (11,) if packed else (5, 7)
    hidden, source, grad_out = normal(*places, width), normal(places[0], width), normal(*places, width)
    direction = normal(max(concepts, 1), rank, width) / width**0.5
    index = torch.arange(places[0], device=device) % max(concepts, 1)
    mask = torch.rand(places, generator=generator, device=device) > 0.3
    given = {"mask": mask, "impl": impl} | ({"direction_index": index} if concepts else {})

    def formula(hidden: Tensor, source: Tensor, direction: Tensor) -> Tensor:
        rows = direction[index]  # (B, R, D)
        value = (rows @ source[..., None])[..., 0]
        base = hidden[:, None] if packed else hidden
        out = base + (value[:, None] - base @ rows.mT) @ rows
        return torch.where(mask[..., None], out[:, 0] if packed else out, hidden)

    def ours(hidden: Tensor, source: Tensor, direction: Tensor) -> Tensor:
        return interchange(hidden, source, direction if concepts else direction[0], **given)

    def clamped(hidden: Tensor, source: Tensor, direction: Tensor) -> Tensor:
        value = (direction[index].float() @ source.float()[..., None])[..., 0]
        return clamp(hidden, value, direction if concepts else direction[0], **given)

    def results(function: Callable[..., Tensor], at: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [tensor.to(at).requires_grad_() for tensor in (hidden, source, direction)]
        out = function(*leaves)
        return out.detach(), *torch.autograd.grad(out, leaves, grad_out.to(at))

    plain, truth = results(formula, dtype), results(formula, torch.float64)
    for op, function in (("interchange", ours), ("clamp", clamped)):
        parts = zip(("result", "grad hidden", "grad source", "grad direction"), results(function, dtype), strict=True)
        for number, (part, found) in enumerate(parts):
            scale = float(truth[number].abs().max().clamp(min=1))
            yield compare(f"{op}, {name}: {part}", found, plain[number], truth[number], scale=4 * scale)


def elementwise_checks(device: torch.device, impl: Any) -> Iterator[Check]:
    """Results and gradients of what a layer does beside attention and linear maps."""
    generator = torch.Generator(device).manual_seed(0)
    for dtype in DTYPES:
        for rows, width in ((33, 64), (7, 130), (3, 20000)):
            x, y, grad_out = (
                torch.randn(rows, width, generator=generator, device=device).to(dtype) * size for size in (3, 1, 1)
            )
            weight = torch.randn(width, generator=generator, device=device).to(dtype)
            name = f"{str(dtype).removeprefix('torch.')}, {rows} x {width}"

            def norm(x: Tensor, weight: Tensor = weight) -> Tensor:
                return rms_norm(x, weight, 1e-5, offset=1.0, round_normalized=False, impl=impl)

            def plain_norm(x: Tensor, weight: Tensor = weight) -> Tensor:
                maths = x.to(torch.promote_types(x.dtype, torch.float32))
                n = maths * torch.rsqrt(maths.square().mean(-1, keepdim=True) + 1e-5)
                return ((1.0 + weight.to(maths.dtype)) * n).to(x.dtype)

            yield from _elementwise_checks(f"rms_norm, {name}", norm, plain_norm, (x,), grad_out)
            for activation, plain in (("silu", functional.silu), ("gelu_tanh", _gelu)):

                def gated(gate: Tensor, up: Tensor, activation: Any = activation) -> Tensor:
                    return gated_activation(gate, up, activation=activation, impl=impl)

                def plain_gated(gate: Tensor, up: Tensor, plain: Any = plain) -> Tensor:
                    product: Tensor = plain(gate) * up
                    return product

                checked = f"gated_activation, {activation}, {name}"
                yield from _elementwise_checks(checked, gated, plain_gated, (x, y), grad_out)
            if width % 2 == 0 and width <= 130:
                cos, sin = (torch.rand(1, rows, width, generator=generator, device=device).to(dtype) for _ in range(2))
                query = torch.stack([x, y])[None]  # (1, 2, T, E)

                def rotated(query: Tensor, cos: Tensor = cos, sin: Tensor = sin) -> Tensor:
                    return rotary_embedding(query, query[:, :1], cos, sin, impl=impl)[0]

                def plain_rotated(query: Tensor, cos: Tensor = cos, sin: Tensor = sin) -> Tensor:
                    first, second = query.chunk(2, -1)
                    return query * cos.to(query) + torch.cat([-second, first], -1) * sin.to(query)

                upstream = torch.stack([grad_out, grad_out])[None]
                yield from _elementwise_checks(f"rotary_embedding, {name}", rotated, plain_rotated, (query,), upstream)


def _gelu(gate: Tensor) -> Tensor:
    return functional.gelu(gate, approximate="tanh")


def _elementwise_checks(
    name: str, ours: Callable[..., Tensor], formula: Callable[..., Tensor], inputs: tuple[Tensor, ...], grad_out: Tensor
) -> Iterator[Check]:
    def results(function: Callable[..., Tensor], at: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [tensor.detach().to(at).requires_grad_() for tensor in inputs]
        out = function(*leaves)
        return out.detach(), *torch.autograd.grad(out, leaves, grad_out.to(at))

    dtype = grad_out.dtype
    found, plain, truth = results(ours, dtype), results(formula, dtype), results(formula, torch.float64)
    for number, part in enumerate(("result", "grad first", "grad second")[: len(found)]):
        scale = float(truth[number].abs().max().clamp(min=1))
        yield compare(f"{name}: {part}", found[number], plain[number], truth[number], scale=scale)


def run_checks(device: torch.device, impl: str) -> list[Check]:
    """All comparisons, those that fail named on standard error."""
    checks = [*loss_checks(device, impl), *intervention_checks(device, impl), *elementwise_checks(device, impl)]
    for check in checks:
        if not check.passed:
            bound = 2 * check.plain_error + check.band
            print(f"WRONG {check.name}: error {check.error:.3g}, allowed {bound:.3g}", file=sys.stderr)
    return checks


def file_stem(device_name: str) -> str:
    """A device's name as a file's: `NVIDIA H100 80GB HBM3` gives `nvidia-h100-80gb-hbm3`."""
    return re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run everything; 0 if the kernels are right and were timed, 1 without a GPU or if they are wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), metavar="DIR")
    parser.add_argument("--device", default="cuda", help="cuda or cuda:N")
    parser.add_argument("--repeats", type=int, default=20, metavar="K", help="rounds of each benchmark")
    parser.add_argument("--overwrite", action="store_true", help="replace the results of this device")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("benchmarks.gpu: torch finds no GPU of NVIDIA or AMD here; nothing was measured", file=sys.stderr)
        return 1
    try:
        device = check_settings([], options.device, options.repeats, None, [], {})
        if device.type != "cuda":
            raise InvalidInputError(expected_got("--device", "cuda or cuda:N", repr(options.device)))
        return measure(device, options.output, options.repeats, options.overwrite)
    except CDASError as error:
        print(f"benchmarks.gpu: error: {error}", file=sys.stderr)
        return error.exit_code


def measure(device: torch.device, output: Path, repeats: int, overwrite: bool) -> int:
    """Check, time and write."""
    name = torch.cuda.get_device_name(device)
    results, text = (output / f"{file_stem(name)}.{kind}" for kind in ("json", "txt"))
    if not overwrite and (results.exists() or text.exists()):
        raise InvalidInputError(expected_got(str(results), "no earlier result", "one", "Pass --overwrite."))
    torch.set_float32_matmul_precision("highest")
    with on_device(device, None):
        checks = run_checks(device, "triton")
    wrong = sum(not check.passed for check in checks)
    verdict = f"{name}: {len(checks) - wrong} of {len(checks)} results are right"
    print(f"{verdict}\n")
    if wrong:
        print("benchmarks.gpu: the kernels are wrong on this device; their speed is not measured", file=sys.stderr)
        return 1
    loss = bench_loss(list(SHAPES.values()), device=device, repeats=repeats, watch=shown(None))
    print(f"\n{loss.footer()}\n")
    intervention = bench_interchange(device=device, repeats=repeats, watch=shown(None))
    print(f"\n{intervention.footer()}\n")
    reports = {"loss": loss.as_json(), "interchange": intervention.as_json()}
    write_json(results, {"device": name, "checks": [asdict(check) for check in checks], **reports})
    write_text(text, f"{verdict}\n\n{loss.table()}\n{intervention.table()}")
    print(f"Written: {results}, {text}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
