"""Weights in NF4 to floating point: ours, bitsandbytes' and the reference, interleaved.

    python -m benchmarks.nf4 [--shapes 4096x14336 ...] [--dtypes float32 bfloat16] [--rounds 9] [--output DIR]

`auto` makes a new tensor, as bitsandbytes does; `out=` fills one that is there. GB/s counts what has to be read and
written once: the packed weight, its statistics and the result. Each round runs every variant; ratios are medians of
those within a round. Results are compared first, and a variant that differs in a bit is not timed.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from benchmarks.comparison import report
from cdas_fast.benchmark.report import aligned, machine
from cdas_fast.benchmark.timing import Distribution, interleave, median_ratio, timer_for
from cdas_fast.errors import InvalidInputError, MissingDependencyError, expected_got
from cdas_fast.ops.nf4 import DTYPES, Nf4Weight, dequantize_nf4

# A projection of SmolLM2-135M, and the widest of Qwen3-4B and of Llama-3.1-8B.
SHAPES = ("1536x576", "9728x2560", "14336x4096")
THEIRS = "bitsandbytes"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="OxI")
    names = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
    parser.add_argument("--dtypes", nargs="+", default=names, choices=names)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path, help="write nf4.txt and nf4.json there")
    return report("nf4", compare, parser.parse_args(arguments))


def compare(options: argparse.Namespace) -> tuple[list[str], dict[str, Any]]:
    """The table as lines, and everything as JSON values."""
    try:
        functional = importlib.import_module("bitsandbytes").functional
    except ImportError as error:
        raise MissingDependencyError("benchmarks.nf4 needs bitsandbytes: pip install 'cdas_fast[bnb]'") from error
    shapes, device = [parse(text) for text in options.shapes], torch.device(options.device)
    facts = {**machine(device), THEIRS: importlib.metadata.version(THEIRS)}
    rows: list[list[str]] = []
    results: list[dict[str, Any]] = []
    for shape in tqdm(shapes, disable=None, leave=False):
        values = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
        packed, state = functional.quantize_4bit(values, blocksize=64, compress_statistics=True, quant_type="nf4")
        inner = state.state2
        weight = Nf4Weight(packed, state.absmax, inner.absmax, inner.code, state.offset, shape)
        for name in options.dtypes:
            calls = variants(functional, weight, state, getattr(torch, name))
            seconds = interleave(calls, options.rounds, timer_for(device), fill=0.02)
            for variant, times in seconds.items():
                result = {
                    "shape": list(shape),
                    "dtype": name,
                    "variant": variant,
                    "seconds": times,
                    "elements_per_second": math.prod(shape) / (Distribution.of(times).p50 / 1e3),
                    "bytes_per_second": bytes_moved(weight, getattr(torch, name)) / (Distribution.of(times).p50 / 1e3),
                    "ratio": median_ratio(times, seconds[THEIRS]) if THEIRS in seconds else None,
                }
                results.append(result)
                rows.append(line(result))
    heads = ["weight", "dtype", "variant", "p20 ms", "p50 ms", "p80 ms", "G elements/s", "GB/s", f"x {THEIRS}"]
    header = [f"{name}: {value}" for name, value in facts.items()]
    return [*header, "", *aligned(heads, rows, 3)], {"machine": facts, "results": results}


def variants(functional: Any, weight: Nf4Weight, state: Any, dtype: torch.dtype) -> dict[str, Callable[[int], Tensor]]:
    """What is timed: every implementation that there is, without those that differ in a bit."""
    state.dtype = dtype
    out = torch.empty(weight.shape, dtype=dtype, device=weight.packed.device)
    calls: dict[str, Callable[[int], Tensor]] = {
        "auto": lambda _: dequantize_nf4(weight, dtype),
        "auto, out=": lambda _: dequantize_nf4(weight, dtype, out=out),
        "reference": lambda _: dequantize_nf4(weight, dtype, impl="reference"),
        THEIRS: lambda _: functional.dequantize_4bit(weight.packed, state),
    }
    expected = dequantize_nf4(weight, dtype, impl="reference")
    for name, call in list(calls.items()):
        if not torch.equal(call(0), expected):
            print(f"benchmarks.nf4: {name} gives other bits in {dtype} and is not timed", file=sys.stderr)
            del calls[name]
    return calls


def bytes_moved(weight: Nf4Weight, dtype: torch.dtype) -> int:
    """Bytes of the weight and of the result."""
    tensors = [getattr(weight, each.name) for each in fields(weight) if each.name != "shape"]
    return sum(tensor.nbytes for tensor in tensors) + math.prod(weight.shape) * dtype.itemsize


def line(result: dict[str, Any]) -> list[str]:
    """A row of the table."""
    times, ratio = Distribution.of(result["seconds"]), result["ratio"]
    return [
        "x".join(map(str, result["shape"])),
        result["dtype"],
        result["variant"],
        *(f"{milliseconds:.3f}" for milliseconds in (times.p20, times.p50, times.p80)),
        f"{result['elements_per_second'] / 1e9:.2f}",
        f"{result['bytes_per_second'] / 1e9:.1f}",
        "n/a" if ratio is None else f"{ratio:.3f}",
    ]


def parse(text: str) -> tuple[int, int]:
    """(O, I) from OxI."""
    numbers = text.split("x")
    if len(numbers) != 2 or not all(number.isdecimal() and int(number) for number in numbers):
        raise InvalidInputError(expected_got("--shapes", "OxI, such as 4096x14336", text))
    return int(numbers[0]), int(numbers[1])


if __name__ == "__main__":
    sys.exit(main())
