"""The Triton kernels compiled for GPUs that are not there, with the launch parameters that they would have."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from triton_worker import ROOT, Worker, worker

MODULE = "benchmarks.compile_matrix"


def load(path: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


matrix = load(ROOT / "benchmarks" / "compile_matrix.py", MODULE)
IN_FLOAT32 = [call for call in matrix.CALLS if "float64" not in call]
architectures = pytest.mark.parametrize("architecture", matrix.PARTS)


@pytest.fixture(scope="module")
def compiler() -> Iterator[Worker]:
    with worker(interpret=False) as process:
        yield process


def compiled(compiler: Worker, architecture: str, call: str, **changes: int) -> list[Any]:
    kernels: list[Any] = compiler.call(f"{MODULE}:compile_call", architecture, call, **changes)["return"]
    assert kernels
    return kernels


@pytest.mark.parametrize("call", matrix.CALLS)
@architectures
def test_fits_the_gpu(architecture: str, call: str, compiler: Worker) -> None:
    for kernel in compiled(compiler, architecture, call):
        assert kernel.spilled == 0, kernel.kernel
        assert kernel.shared <= matrix.PARTS[architecture].shared_per_program, kernel.kernel
        assert kernel.programs >= max(1, kernel.counted_on), kernel.kernel


@architectures
def test_memory_is_read_and_written_many_bytes_at_a_time(architecture: str, compiler: Worker) -> None:
    """Which takes alignment that the compiler can see: of rows, of what splits begin with, of masks."""
    read_16_bytes, write_2_bytes = r"\bld\.global[\w.]*\.v4\.b32\b", r"\bst\.global[\w.]*\.b16\b"
    if architecture.startswith("gfx"):
        read_16_bytes, write_2_bytes = r"_load_dwordx4\b", r"_store_short"
    for call in IN_FLOAT32:
        for kernel in compiled(compiler, architecture, call):
            if kernel.kernel not in ("_divergence_kernel", "_label_kernel"):  # which read a few numbers
                assert re.search(read_16_bytes, kernel.assembly), (call, kernel.kernel)
                assert not re.search(write_2_bytes, kernel.assembly), (call, kernel.kernel)


@architectures
def test_no_float64_in_float32_maths_and_no_atomics(architecture: str, compiler: Worker) -> None:
    """One number of Python's that is promoted makes a kernel several times slower, and nothing else shows it."""
    float64, atomic = r"\.f64\b", r"\b(atom|red)\.(global|shared)\b"
    if architecture.startswith("gfx"):
        float64, atomic = r"\bv_\w*_f64", r"_atomic_"
    for call in IN_FLOAT32:
        for kernel in compiled(compiler, architecture, call):
            assert not re.search(float64, kernel.assembly), (call, kernel.kernel)
            assert not re.search(atomic, kernel.assembly), (call, kernel.kernel)
    searched = compiled(compiler, architecture, "jsd, float64")[0].assembly
    assert re.search(float64, searched), "the pattern finds what it looks for"


@pytest.mark.parametrize(
    ("call", "changes"),
    [
        *(
            (f"{loss}, gradient bfloat16", {"rows": rows})
            for loss in ("jsd", "forward_kl")
            for rows in (1, 16, 37, 500)
        ),
        ("logprob, gradient bfloat16", {"rows": 37}),
        ("D 4096, R 6 of 3 concepts, bfloat16", {"sequences": 32, "count": 16}),
        ("D 4096, R 6 of 3 concepts, bfloat16", {"sequences": 7, "count": 33}),
        ("D 4096, R 1, bfloat16", {"sequences": 41, "count": 1}),
        *((call, {"rows": rows}) for call in ("norm of 4096, bfloat16", "SiLU, bfloat16") for rows in (1, 16, 37)),
        *(("rotation of 32 heads, bfloat16", {"tokens": tokens}) for tokens in (16, 37)),
    ],
    ids=lambda value: "_".join(map(str, sum(value.items(), ()))) if isinstance(value, dict) else value,
)
def test_other_numbers_of_rows_compile_nothing_new(call: str, changes: dict[str, int], compiler: Worker) -> None:
    """As the last chunk of a batch has, or each batch."""
    usual, other = (compiled(compiler, "sm_90", call, **each) for each in ({}, changes))
    assert [each.key for each in other] == [each.key for each in usual]


@architectures
def test_table_is_that_of_these_kernels(architecture: str, compiler: Worker) -> None:
    text = matrix.TABLE.read_text()
    version = importlib.metadata.version("triton")
    if f"with triton {version}." not in text:
        pytest.skip(f"{matrix.TABLE.name} was made with another triton than {version}")
    section = compiler.call(f"{MODULE}:section", architecture)["return"]
    assert section in text, "repeat python -m benchmarks.compile_matrix"


def test_tensors_on_a_cpu_are_refused(compiler: Worker) -> None:
    logits = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"^expected tensors on a GPU, or TRITON_INTERPRET=1 .*, got cpu$"):
        compiler.call(
            "cdas_fast.kernels.linear_head:divergence_rows", logits, logits, divergence="jsd", loss=logits[:, 0].clone()
        )
