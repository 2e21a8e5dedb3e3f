"""The Triton kernels, which lie in the folder kernels/ of a checkout and in this package once it is installed.

This file is what finds them in a checkout; an installation has the modules themselves here, and not this file.
"""

from pathlib import Path

__path__.append(str(Path(__file__).resolve().parents[2] / "kernels"))
