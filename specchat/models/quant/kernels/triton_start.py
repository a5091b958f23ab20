"""Starting a Triton kernel, which the machine may be unable to compile."""

import subprocess
import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from triton.errors import TritonError

# Errors of a compiler that is missing, too old or failing. Triton asserts that it finds the driver's library.
_FAILURES = (TritonError, RuntimeError, NotImplementedError, AssertionError, OSError, subprocess.SubprocessError)

_refused: set[tuple[torch.device, str]] = set()


def start(kernel: str, x: Tensor, call: Callable[[], object]) -> bool:
    """Start a kernel and return True; return False if it does not compile, which is tried once for each device.

    Args:
        kernel: name of the kernel.
        x: any of its tensors, all on one device.
        call: starts the kernel.
    """
    if (x.device, kernel) in _refused:
        return False
    try:
        with torch.cuda.device_of(x):
            call()
    except _FAILURES as error:
        _refused.add((x.device, kernel))
        warnings.warn(f"Triton fails on {x.device}, so torch computes: {error}", RuntimeWarning, stacklevel=3)
        return False
    return True
