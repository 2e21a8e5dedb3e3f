"""The compiled CPU kernels of csrc/: finding and loading the library, and its structures.

It is a plain shared library, called through ctypes: it knows neither Python nor torch, borrows the threads of torch's
OpenMP runtime, and picks the kernels for the machine's instruction set when it is loaded. The environment variable
`CDAS_FAST_CPU` names another one (see `instruction_sets`).
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import threading
from ctypes import POINTER, c_bool, c_char_p, c_double, c_int, c_int32, c_int64, c_void_p

import torch

from cdas_fast.errors import InvalidInputError, expected_got

ENVIRONMENT_VARIABLE = "CDAS_FAST_CPU"
KEPT_BYTES = 128 * 2**20
_kept = threading.local()
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
ACTIVATIONS = {"silu": 0, "gelu_tanh": 1}
DIVERGENCES = {"jsd": 0, "forward_kl": 1, "reverse_kl": 2, "logprob": 3}


class Matrix(ctypes.Structure):
    """`CdasMatrix` of csrc/kernels.h."""

    _fields_ = (("data", c_void_p), ("row_stride", c_int64), ("column_stride", c_int64), ("dtype", c_int32))

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Matrix:
        """The matrix that a tensor (rows, columns) is."""
        return cls(tensor.data_ptr(), tensor.stride(0), tensor.stride(1), DTYPES[tensor.dtype])


class HeadLoss(ctypes.Structure):
    """`CdasHeadLoss` of csrc/kernels.h."""

    _fields_ = (
        *((name, c_int64) for name in ("rows", "vocabulary", "width", "target_width")),
        *((name, Matrix) for name in ("hidden", "target_hidden", "weight", "target_weight")),
        *((name, c_void_p) for name in ("bias", "target_bias", "labels", "loss", "gradient", "workspace")),
        *((name, c_double) for name in ("softcap", "scale", "temperature", "beta")),
        *((name, c_int32) for name in ("gradient_dtype", "divergence", "threads")),
    )


class Clamp(ctypes.Structure):
    """`CdasClamp` of csrc/kernels.h."""

    _fields_ = (
        *((name, c_int64) for name in ("rows", "width", "rank", "concepts", "rows_per_sequence")),
        *((name, c_void_p) for name in ("hidden", "grad_out")),
        *((name, c_int64) for name in ("hidden_stride", "grad_out_stride")),
        *((name, c_void_p) for name in ("direction", "value", "concept_of", "mask", "out", "grad_hidden")),
        *((name, c_void_p) for name in ("grad_value", "grad_direction", "workspace")),
        *((name, c_int32) for name in ("dtype", "threads")),
    )


class Heads(ctypes.Structure):
    """`CdasHeads` of csrc/kernels.h."""

    _fields_ = (("data", c_void_p), ("token_stride", c_int64), ("head_stride", c_int64))

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Heads:
        """A tensor (tokens, heads, width) whose last stride is 1."""
        return cls(tensor.data_ptr(), tensor.stride(0), tensor.stride(1))


class PackedAttention(ctypes.Structure):
    """`CdasPackedAttention` of csrc/kernels.h."""

    _fields_ = (
        *((name, c_int64) for name in ("rows", "heads", "groups", "width", "value_width", "prefix", "window")),
        ("starts", c_void_p),
        *((name, Heads) for name in ("query", "key", "value", "prefix_key", "prefix_value", "grad_out")),
        *((name, c_void_p) for name in ("out", "log_sum", "grad_query", "grad_key", "grad_value", "workspace")),
        *((name, c_double) for name in ("scale", "softcap")),
        *((name, c_int32) for name in ("dtype", "threads")),
    )


class Rows(ctypes.Structure):
    """`CdasRows` of csrc/kernels.h."""

    _fields_ = (("data", c_void_p), *((name, c_int64) for name in ("inner", "inner_stride", "outer_stride")))


class RmsNorm(ctypes.Structure):
    """`CdasRmsNorm` of csrc/kernels.h."""

    _fields_ = (
        *((name, c_int64) for name in ("rows", "width")),
        *((name, Rows) for name in ("x", "grad_out")),
        *((name, c_void_p) for name in ("factor", "out")),
        ("eps", c_double),
        *((name, c_int32) for name in ("round_normalized", "dtype", "threads")),
    )


class GatedActivation(ctypes.Structure):
    """`CdasGatedActivation` of csrc/kernels.h."""

    _fields_ = (
        *((name, c_int64) for name in ("rows", "width")),
        *((name, Rows) for name in ("gate", "up", "grad_out")),
        *((name, c_void_p) for name in ("out", "grad_gate", "grad_up")),
        *((name, c_int32) for name in ("activation", "dtype", "threads")),
    )


class Rotary(ctypes.Structure):
    """`CdasRotary` of csrc/kernels.h."""

    _fields_ = (
        *((name, c_int64) for name in ("rows", "heads", "width")),
        ("x", Rows),
        ("head_stride", c_int64),
        *((name, Rows) for name in ("cos", "sin")),
        ("out", c_void_p),
        *((name, c_int32) for name in ("dtype", "threads")),
    )


class Nf4(ctypes.Structure):
    """`CdasNf4` of csrc/kernels.h."""

    _fields_ = (
        ("count", c_int64),
        *((name, c_void_p) for name in ("packed", "absmax", "nested_absmax", "nested_code", "offset", "out")),
        *((name, c_int32) for name in ("dtype", "threads")),
    )


def available() -> bool:
    """Whether the library was built and can be loaded."""
    return _file() is not None


def why_not() -> str:
    """What is missing where `available` is False, and what to do about it."""
    return (
        "the C++ kernels were not built when cdas_fast was installed, most likely for want of a C++ compiler. "
        "Install g++ 9 or clang 13, or newer, and reinstall: pip install --force-reinstall --no-deps cdas_fast."
    )


def instruction_set() -> str:
    """The instruction set whose kernels are in use."""
    return str(load().cdas_instruction_set().decode())


def instruction_sets() -> list[str]:
    """Those that this build has kernels for and this machine can run, the best first."""
    names: list[str] = []
    while (name := load().cdas_supported_instruction_set(len(names))) is not None:
        names.append(name.decode())
    return names


def has_threads() -> bool:
    """Whether the kernels share the threads of torch; else they run on one."""
    return _openmp() is not None


@functools.cache
def load() -> ctypes.CDLL:
    """The library, with the kernels for this machine in use.

    Raises:
        InvalidInputError: CDAS_FAST_CPU names an instruction set that this machine cannot run.
    """
    path = _file()
    assert path is not None, "choose_implementation has asked"
    library = ctypes.CDLL(path)
    for name, restype, argtypes in (
        ("cdas_use_instruction_set", c_bool, (c_char_p,)),
        ("cdas_instruction_set", c_char_p, ()),
        ("cdas_supported_instruction_set", c_char_p, (c_int,)),
        ("cdas_use_openmp", None, (c_void_p,)),
        ("cdas_use_huge_pages", None, (c_void_p, c_int64)),
        ("cdas_head_loss_rows", c_int64, (c_int32,)),
        ("cdas_head_loss_workspace", c_int64, (POINTER(HeadLoss),)),
        ("cdas_head_loss", None, (POINTER(HeadLoss),)),
        ("cdas_clamp_workspace", c_int64, (POINTER(Clamp),)),
        ("cdas_clamp_forward", None, (POINTER(Clamp),)),
        ("cdas_clamp_backward", None, (POINTER(Clamp),)),
        ("cdas_packed_attention_workspace", c_int64, (POINTER(PackedAttention),)),
        ("cdas_packed_attention_forward", None, (POINTER(PackedAttention),)),
        ("cdas_packed_attention_backward", None, (POINTER(PackedAttention),)),
        ("cdas_rms_norm_forward", None, (POINTER(RmsNorm),)),
        ("cdas_rms_norm_backward", None, (POINTER(RmsNorm),)),
        ("cdas_gated_activation_forward", None, (POINTER(GatedActivation),)),
        ("cdas_gated_activation_backward", None, (POINTER(GatedActivation),)),
        ("cdas_rotary", None, (POINTER(Rotary),)),
        ("cdas_dequantize_nf4", None, (POINTER(Nf4),)),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = restype, argtypes
    wanted = os.environ.get(ENVIRONMENT_VARIABLE) or None
    library.cdas_use_instruction_set(None)
    if wanted is not None and not library.cdas_use_instruction_set(wanted.encode()):
        supported: list[str] = []
        while (name := library.cdas_supported_instruction_set(len(supported))) is not None:
            supported.append(name.decode())
        raise InvalidInputError(expected_got(ENVIRONMENT_VARIABLE, f"one of {', '.join(supported)}", repr(wanted)))
    library.cdas_use_openmp(_openmp())
    return library


def workspace(size: int) -> torch.Tensor:
    """At least `size` uninitialised bytes, aligned for the widest vectors, for one call of this thread.

    They are kept for the next call (see `release_workspace`): to get 64 MiB from the system anew, page by page, costs a
    call of `linear_jsd` some percent of its time. More than `KEPT_BYTES` are not kept.
    """
    kept: torch.Tensor | None = getattr(_kept, "workspace", None)
    if kept is not None and kept.numel() >= size:
        return kept
    _kept.workspace = None  # before there are two
    new = in_huge_pages(torch.empty(size, dtype=torch.uint8))
    if size <= KEPT_BYTES:
        _kept.workspace = new
    return new


def release_workspace() -> None:
    """Give the memory that this thread keeps for the next call back."""
    _kept.workspace = None


def in_huge_pages(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, just allocated, whose memory is to come in large pages where the system grants them."""
    load().cdas_use_huge_pages(tensor.data_ptr(), tensor.numel() * tensor.element_size())
    return tensor


@functools.cache
def _file() -> str | None:
    spec = importlib.util.find_spec("cdas_fast._cpu_kernels")
    return None if spec is None else spec.origin


@functools.cache
def _openmp() -> int | None:
    """The entry point of the OpenMP runtime that torch has loaded, as compiled OpenMP code calls it."""
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, c_void_p).value
    except AttributeError:
        return None
