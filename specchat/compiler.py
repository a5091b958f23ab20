"""Whether Triton can build its launcher, a small C module for this Python.

torch's own compiler of kernels (`torch.cuda._compile_kernel`, torch 2.13) is no way around: it asks for setuptools and
for CUDA's toolkit, which machines without a C compiler rarely have.
"""

import os
import shutil
import sysconfig
from functools import cache
from pathlib import Path


@cache
def can_build_modules() -> bool:
    """Return whether there is a C compiler, and Python's headers: systems often come without either."""
    has_compiler = bool(os.environ.get("CC")) or any(shutil.which(name) for name in ("gcc", "clang"))
    # Debian's own Python has its headers where those of the scheme "posix_prefix" are.
    scheme = "posix_prefix" if sysconfig.get_default_scheme() == "posix_local" else sysconfig.get_default_scheme()
    return has_compiler and (Path(sysconfig.get_paths(scheme)["include"]) / "Python.h").exists()
