"""Compile the Triton kernels for GPUs that need not be there, and tabulate what the compilers make of them.

    python -m benchmarks.compile_matrix

writes benchmarks/compile_matrix.md. Nothing is run and nothing is measured. The launchers of `cdas_fast.kernels` choose
kernels, launch parameters and specialisations as they would on the GPU: they are called with tensors that have no
memory, and what they launch is compiled instead.
"""

from __future__ import annotations

import argparse
import importlib
import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

KIB = 1024
VOCABULARY, ROWS = 128256, 64  # Llama 3's, and a chunk of it
TABLE = Path(__file__).with_suffix(".md")


@dataclass(frozen=True)
class Part:
    """What limits the programs on a multiprocessor (compute unit)."""

    example: str
    multiprocessors: int
    warps: int
    programs: int
    shared_per_program: int
    shared: int
    warp_size: int = 32


PARTS = {
    "sm_80": Part("A100", 108, 64, 32, 163 * KIB, 164 * KIB),
    "sm_86": Part("A40", 84, 48, 16, 99 * KIB, 100 * KIB),
    "sm_89": Part("RTX 4090", 128, 48, 24, 99 * KIB, 100 * KIB),
    "sm_90": Part("H100", 132, 64, 32, 227 * KIB, 228 * KIB),
    "sm_100": Part("B200", 148, 64, 32, 227 * KIB, 228 * KIB),
    "sm_120": Part("RTX 5090", 170, 48, 24, 99 * KIB, 100 * KIB),
    "gfx942": Part("MI300X", 304, 32, 16, 64 * KIB, 64 * KIB, warp_size=64),
}


@dataclass(frozen=True)
class Compiled:
    """A kernel as compiled for an architecture."""

    kernel: str
    num_warps: int
    registers: int
    spilled: int  # bytes a thread
    shared: int  # bytes a program
    programs: int  # that fit on a multiprocessor
    counted_on: int  # programs, that a launcher splits the work for; 0 if it does not
    occupancy: float  # of the multiprocessor's warps
    assembly: str
    key: str = field(compare=False)  # of triton's cache: kernels of another key are compiled again


def head(
    loss: str,
    grad_dtype: torch.dtype | None,
    dtype: torch.dtype = torch.float32,
    every_option: bool = False,
    rows: int = ROWS,
) -> None:
    kernels = importlib.import_module("cdas_fast.kernels.linear_head")
    logits = absent(rows, VOCABULARY, dtype=dtype)
    options: dict[str, Any] = {"loss": absent(rows, dtype=dtype)}
    if grad_dtype is not None:
        options["grad_logits"] = absent(rows, VOCABULARY, dtype=grad_dtype)
    if every_option:
        bias = absent(VOCABULARY, dtype=torch.bfloat16)
        options |= {"bias": bias, "logit_softcap": 30.0, "logit_scale": 0.5, "temperature": 2.0}
    if loss == "logprob":
        kernels.logprob_rows(logits, absent(rows, dtype=torch.int64), **options)
        return
    if every_option:
        options |= {"target_bias": options["bias"], "beta": 0.3}
    kernels.divergence_rows(logits, logits, divergence=loss, **options)


def subspace(
    width: int, rank: int, dtype: torch.dtype, concepts: int | None = None, sequences: int = 30, count: int = 100
) -> None:
    kernels = importlib.import_module("cdas_fast.kernels.interchange")
    maths = torch.float64 if dtype == torch.float64 else torch.float32
    hidden, value = absent(sequences * count, width, dtype=dtype), absent(sequences, rank, dtype=maths)
    shape = (rank, width) if concepts is None else (concepts, rank, width)
    direction = absent(*shape, dtype=maths)
    index = None if concepts is None else absent(sequences, dtype=torch.int64)
    mask = absent(sequences * count, dtype=torch.bool)
    place = {"mask": mask, "direction_index": index, "rows_per_sequence": count}
    kernels.clamp_forward(hidden, value, direction, out=torch.empty_like(hidden), **place)
    gradients = {"grad_value": torch.empty_like(value), "grad_direction": torch.empty_like(direction)}
    kernels.clamp_backward(hidden, hidden, value, direction, grad_hidden=torch.empty_like(hidden), **gradients, **place)
    kernels.project(hidden[::count], direction, index, value)


def nf4(dtype: torch.dtype, nested: bool = True) -> None:
    kernels = importlib.import_module("cdas_fast.kernels.nf4")
    rows, width = 4096, 14336
    packed, blocks = absent(rows * width // 2, dtype=torch.uint8), rows * width // 64
    statistics: tuple[Tensor | None, ...] = (absent(blocks, dtype=torch.float32), None, None, None)
    if nested:
        floats = [absent(size, dtype=torch.float32) for size in (blocks // 256, 256, 1)]
        statistics = (absent(blocks, dtype=torch.uint8), *floats)
    kernels.dequantize(packed, *statistics, absent(rows, width, dtype=dtype))


def norm(width: int, dtype: torch.dtype, round_normalized: bool = True, rows: int = 3000) -> None:
    kernels = importlib.import_module("cdas_fast.kernels.elementwise")
    x, maths = absent(rows, width, dtype=dtype), torch.float64 if dtype == torch.float64 else torch.float32
    factor = absent(width, dtype=maths)
    for grad_out in (None, x):
        kernels.rms_norm(x, grad_out, factor, 1e-5, round_normalized, torch.empty_like(x))


def gated(activation: str, dtype: torch.dtype, rows: int = 3000) -> None:
    kernels = importlib.import_module("cdas_fast.kernels.elementwise")
    gate, up, out, other = (absent(rows, 14336, dtype=dtype) for _ in range(4))
    kernels.gated_activation(gate, up, activation, out)
    kernels.gated_activation_backward(out, gate, up, activation, grad_gate=other, grad_up=torch.empty_like(out))


def rotary(heads: int, dtype: torch.dtype, tokens: int = 300) -> None:
    kernels = importlib.import_module("cdas_fast.kernels.elementwise")
    x, table = absent(10, tokens, heads, 128, dtype=dtype), absent(1, tokens, 128, dtype=dtype)
    kernels.rotate(x.transpose(1, 2), table, table, torch.empty_like(x))


def absent(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


FLOATS = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
CALLS: dict[str, Callable[[], None]] = {
    **{
        f"{loss}, gradient {name}": partial(head, loss, dtype)
        for loss in ("jsd", "forward_kl", "reverse_kl", "logprob")
        for name, dtype in FLOATS.items()
    },
    "jsd, loss alone": partial(head, "jsd", None),
    "jsd, every option": partial(head, "jsd", torch.bfloat16, every_option=True),
    "logprob, every option": partial(head, "logprob", torch.bfloat16, every_option=True),
    "jsd, float64": partial(head, "jsd", torch.float64, torch.float64),
    "D 576, R 1, bfloat16": partial(subspace, 576, 1, torch.bfloat16),
    "D 4096, R 1, bfloat16": partial(subspace, 4096, 1, torch.bfloat16),
    "D 4096, R 6 of 3 concepts, bfloat16": partial(subspace, 4096, 6, torch.bfloat16, 3),
    "D 8192, R 1, float16": partial(subspace, 8192, 1, torch.float16),
    "D 8192, R 16 of 3 concepts, float32": partial(subspace, 8192, 16, torch.float32, 3),
    "D 16384, R 6, bfloat16": partial(subspace, 16384, 6, torch.bfloat16),
    "D 4096, R 6, float64": partial(subspace, 4096, 6, torch.float64),
    **{f"NF4 to {name}": partial(nf4, dtype) for name, dtype in FLOATS.items()},
    "NF4, statistics not quantised, to bfloat16": partial(nf4, torch.bfloat16, nested=False),
    "norm of 128, bfloat16": partial(norm, 128, torch.bfloat16),
    "norm of 4096, bfloat16": partial(norm, 4096, torch.bfloat16),
    "norm of 4096, not rounded, float32": partial(norm, 4096, torch.float32, round_normalized=False),
    "norm of 8192, bfloat16": partial(norm, 8192, torch.bfloat16),
    "norm of 16384, float16": partial(norm, 16384, torch.float16),
    "norm of 4096, float64": partial(norm, 4096, torch.float64),
    "SiLU, bfloat16": partial(gated, "silu", torch.bfloat16),
    "SiLU, float32": partial(gated, "silu", torch.float32),
    "GELU, bfloat16": partial(gated, "gelu_tanh", torch.bfloat16),
    "GELU, float64": partial(gated, "gelu_tanh", torch.float64),
    "rotation of 32 heads, bfloat16": partial(rotary, 32, torch.bfloat16),
    "rotation of 8 heads, float32": partial(rotary, 8, torch.float32),
}


class AbsentDriver:
    """As much of a triton driver as compiling asks for."""

    def __init__(self, architecture: str) -> None:
        from triton.backends.compiler import GPUTarget

        part = PARTS[architecture]
        self.device = list(PARTS).index(architecture)
        kind, _, number = architecture.rpartition("_")
        self.target = GPUTarget("cuda", int(number), 32) if kind else GPUTarget("hip", architecture, part.warp_size)

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self.target


def compile_call(architecture: str, call: str, **changes: int) -> list[Compiled]:
    """What a call launches, compiled. From then on, this process cannot launch a kernel on a GPU."""
    import triton

    launch = importlib.import_module("cdas_fast.kernels.launch")
    part, kernels = PARTS[architecture], []
    described = launch.Architecture(architecture, part.warp_size, part.multiprocessors)

    def start(kernel: Any, grid: Any, device: Any, arguments: tuple[Any, ...], constants: dict[str, Any]) -> None:
        compiled = kernel.warmup(*arguments, grid=grid, **constants)
        single = "BLOCK_V" in constants and arguments[0].dtype == torch.float32
        counted_on = launch.head_parameters(device).programs if single else 0
        kernels.append(_examine(kernel.__name__, compiled, constants["num_warps"], counted_on, part))

    triton.runtime.driver.set_active(AbsentDriver(architecture))
    real = launch.architecture, launch._start
    launch.architecture, launch._start = lambda device: described, start
    try:
        CALLS[call](**changes)
    finally:
        launch.architecture, launch._start = real
    return kernels


def _examine(name: str, compiled: Any, num_warps: int, counted_on: int, part: Part) -> Compiled:
    if "cubin" in compiled.asm:
        found, assembly = _cubin_usage(compiled.asm["cubin"]), compiled.asm["ptx"]
        registers, spilled = found["REG"], found["STACK"] + found["LOCAL"]
        shared = found["SHARED"] + compiled.metadata.shared
        # A quarter of a multiprocessor hands 16384 registers to its warps, 256 at a time.
        warps = 4 * (16384 // (-(-registers * 32 // 256) * 256))
    else:
        assembly = compiled.asm["amdgcn"]
        found = {key: int(number) for key, number in re.findall(r"\.(\w+): +(\d+)", assembly)}
        registers, spilled = found["vgpr_count"] + found["agpr_count"], found["private_segment_fixed_size"]
        spilled += 4 * (found["vgpr_spill_count"] + found["sgpr_spill_count"])
        shared = found["group_segment_fixed_size"] + compiled.metadata.shared
        # Each of the 4 SIMDs of a compute unit has 512 registers for its waves, handed out 8 at a time.
        warps = 4 * (512 // (-(-registers // 8) * 8))
    programs = min(part.programs, min(warps, part.warps) // num_warps, part.shared // max(shared, 1))
    usage = (registers, spilled, shared, programs, counted_on, programs * num_warps / part.warps)
    return Compiled(name, num_warps, *usage, assembly, compiled.metadata.hash)


def _cubin_usage(cubin: bytes) -> dict[str, int]:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {key: int(number) for key, number in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", report)}


def table() -> str:
    """The report in Markdown."""
    import triton

    header = f"""# What the compilers make of the Triton kernels

Compiled, not measured: no kernel of this table has run on the GPU it was compiled for. Written by
`python -m benchmarks.compile_matrix` with triton {triton.__version__}.

Logits are {ROWS} x {VOCABULARY}, hidden is 3000 x D, a weight in NF4 is 4096 x 14336, gates are 3000 x 14336,
heads 3000 x 128. Registers and spilled bytes are
those of a thread, shared bytes those of a program. Programs and occupancy: how many programs fit on a multiprocessor
at once, and which part of its warps they are, an upper bound from registers, shared memory and warps. A kernel that
several calls share is listed once.
"""
    return "\n".join([header, *map(section, PARTS)])


def section(architecture: str) -> str:
    lines = [
        f"## {architecture} ({PARTS[architecture].example})",
        "",
        "| kernel | call | warps | registers | spilled B | shared B | programs | occupancy |",
        "|---|---|---|---|---|---|---|---|",
    ]
    seen = set()
    for call in CALLS:
        for each in compile_call(architecture, call):
            if each not in seen:
                seen.add(each)
                numbers = (each.num_warps, each.registers, each.spilled, each.shared, each.programs)
                row = " | ".join([f"`{each.kernel}`", call, *map(str, numbers), f"{each.occupancy:.0%}"])
                lines.append(f"| {row} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=TABLE)
    arguments = parser.parse_args()
    arguments.output.write_text(table())


if __name__ == "__main__":
    main()
