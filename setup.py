"""Builds the CPU kernels of csrc/ as a plain shared library beside the package; everything else is in pyproject.toml.

The library needs no header of Python or torch, so that an isolated build downloads neither. Each instruction set is a
source file compiled for it; which one runs is decided when the library is loaded.
"""

from __future__ import annotations

import os
import platform
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

X86 = platform.machine().lower() in ("x86_64", "amd64")
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"]
FLAGS = {
    "csrc/library.cpp": [],
    "csrc/isa_portable.cpp": [],
    **(
        {
            "csrc/isa_avx2.cpp": ["-mavx2", "-mfma", "-mf16c"],
            "csrc/isa_avx512.cpp": AVX512,
            "csrc/isa_avx512_bf16.cpp": [*AVX512, "-mavx512bf16"],
        }
        if X86
        else {}
    ),
}
COMMON = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-Wno-psabi",  # vectors are passed between functions of one file only
    "-Wno-uninitialized",  # GCC 12 finds its own AVX-512 intrinsics wanting
    "-Wno-maybe-uninitialized",
]


class BuildKernels(build_ext):
    """Compile every source with the flags of its instruction set, and link them into one library.

    A machine that cannot compile them still gets the package; `impl="cpp"` then says what is missing.
    """

    def build_extension(self, extension: Extension) -> None:
        """See `build_ext`."""
        target = Path(self.get_ext_fullpath(extension.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = [name for names in pool.map(self._compile, FLAGS) for name in names]
        self.compiler.link_shared_object(objects, str(target), target_lang="c++")

    def _compile(self, source: str) -> list[str]:
        return self.compiler.compile(
            [source],
            output_dir=self.build_temp,
            macros=[("CDAS_X86", None)] if X86 else [],
            extra_postargs=[*COMMON, *FLAGS[source]],
        )


setup(
    ext_modules=[
        Extension(
            "cdas_fast._cpu_kernels",
            sources=list(FLAGS),
            depends=[str(path) for pattern in ("*.h", "*.inc") for path in sorted(Path("csrc").glob(pattern))],
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildKernels},
)
