"""What this installation consists of."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

from cdas_fast.ops import cpu_library
from cdas_fast.ops.implementation import choose_implementation


def versions() -> dict[str, str]:
    """Versions of the program and of what its results depend on."""
    found = {"python": platform.python_version()}
    for name in ("cdas_fast", "torch", "transformers", "safetensors"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def show_config() -> str:
    """Versions, devices, and the implementation that `impl="auto"` takes for each op on each device, as text."""
    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    lines = [f"{name} {version}" for name, version in versions().items()]
    lines.append(f"threads {torch.get_num_threads()}, CPU capability {torch.backends.cpu.get_cpu_capability()}")
    lines.append(f"C++ kernels: {_cpu_kernels()}")
    for device in devices:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU"
        lines.append(f"{device}: {name}")
        lines += [
            f"  {op}: auto takes {choose_implementation(op, 'auto', device)}"
            for op in ("linear_jsd", "linear_kl", "linear_logprob", "interchange", "clamp")
        ]
    return "\n".join(lines)


def _cpu_kernels() -> str:
    if not cpu_library.available():
        return cpu_library.why_not()
    shared = "torch's threads" if cpu_library.has_threads() else "one thread: no OpenMP runtime of torch's was found"
    return f"{cpu_library.instruction_set()}, on {shared}"
