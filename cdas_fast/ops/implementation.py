"""Which implementation of an op runs: asked for by name, or chosen by the tensor's device."""

from __future__ import annotations

import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch

from cdas_fast.errors import InvalidInputError, MissingDependencyError, UnsupportedError, expected_got
from cdas_fast.ops import cpu_library

Implementation = Literal["auto", "reference", "cpp", "triton"]
ChosenImplementation = Literal["reference", "cpp", "triton"]
SUPPORTED_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def choose_implementation(
    op: str, impl: str, device: torch.device, dtype: torch.dtype = torch.float32, *, has_triton: bool = True
) -> ChosenImplementation:
    """Name the implementation of `op` that runs on `device` for maths in `dtype`.

    `auto` takes the fastest one that exists: `triton` on a GPU of NVIDIA or AMD (torch calls both cuda) if triton is
    installed, `cpp` on a CPU if the compiled library is there, `reference` otherwise, and for float64 on a GPU, whose
    kernels take the numbers of the formula as float32. One asked for by name runs or raises: nothing falls back
    silently. An op without a Triton kernel says so by `has_triton`; on a GPU `auto` then takes `reference`.
    """
    check_implementation(op, impl)
    match impl:
        case "auto":
            if has_triton and device.type == "cuda" and dtype != torch.float64 and _triton_is_installed():
                return "triton"
            if device.type == "cpu" and cpu_library.available():
                return "cpp"
            return "reference"
        case "cpp":
            if device.type != "cpu":
                others = "'triton', 'reference' or 'auto'" if has_triton else "'reference' or 'auto'"
                remedy = f"Move the tensors to the CPU, or use impl={others}."
                raise InvalidInputError(expected_got(f"{op}: impl='cpp'", "tensors on cpu", f"one on {device}", remedy))
            if not cpu_library.available():
                raise MissingDependencyError(f"{op}: impl='cpp': {cpu_library.why_not()}")
            return "cpp"
        case "triton":
            if not has_triton:
                remedy = "There is no Triton kernel of this op."
                raise UnsupportedError(expected_got(f"{op}: impl", "auto, reference or cpp", "'triton'", remedy))
            if device.type != "cuda" and not (device.type == "cpu" and _triton_interprets()):
                remedy = "Move the tensors to a GPU, or use impl='cpp', 'reference' or 'auto'."
                what = f"{op}: impl='triton'"
                raise InvalidInputError(expected_got(what, "tensors on cuda", f"one on {device}", remedy))
            if not _triton_is_installed():
                raise MissingDependencyError(f"{op}: impl='triton' needs triton: pip install 'cdas_fast[triton]'")
            return "triton"
        case _:
            return "reference"


def elementwise_functions(op: str, impl: str, like: torch.Tensor, reference: Any) -> Any:
    """What `op`, of those of csrc/elementwise.h and kernels/elementwise.py, runs by for a tensor such as `like`."""
    match choose_implementation(op, impl, like.device, math_dtype(like.dtype)):
        case "triton":
            from cdas_fast.ops import elementwise_triton

            return elementwise_triton
        case "cpp":
            from cdas_fast.ops import elementwise_cpp

            return elementwise_cpp
        case _:
            return reference


def check_implementation(op: str, impl: str) -> None:
    """Raise `InvalidInputError` unless `impl` is the name of an implementation."""
    if impl not in ("auto", "reference", "cpp", "triton"):
        raise InvalidInputError(expected_got(f"{op}: impl", "auto, reference, cpp or triton", repr(impl)))


def math_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the maths for inputs of `dtype`: float64 for float64, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A context in which no autocast lowers the dtype of the maths."""
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def require_floating(op: str, **tensors: torch.Tensor) -> None:
    """Raise `InvalidInputError` unless every tensor given is dense and floating point and all lie on one device."""
    device: torch.device | None = None
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise InvalidInputError(expected_got(f"{op}: {name}", "a torch.Tensor", type(tensor).__name__))
        if tensor.dtype not in SUPPORTED_DTYPES:
            quantised = tensor.is_floating_point() or tensor.is_quantized or tensor.dtype in (torch.uint8, torch.int8)
            wanted = "float16, bfloat16, float32 or float64" if tensor.is_floating_point() else "a floating-point dtype"
            remedy = "Dequantise it first." if quantised else "Cast it first."
            raise InvalidInputError(expected_got(f"{op}: {name}", wanted, tensor.dtype, remedy))
        if tensor.layout != torch.strided:
            raise InvalidInputError(expected_got(f"{op}: {name}", "a dense tensor", tensor.layout))
        if device is not None and tensor.device != device:
            raise InvalidInputError(expected_got(f"{op}: {name}", f"a tensor on {device}", f"one on {tensor.device}"))
        device = tensor.device


def _triton_is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def _triton_interprets() -> bool:
    """Whether triton was told to run kernels in Python, for which tensors on a CPU do."""
    return os.environ.get("TRITON_INTERPRET") == "1"
