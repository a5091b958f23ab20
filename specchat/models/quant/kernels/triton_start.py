"""Starting a Triton kernel, which the machine may be unable to compile."""

import subprocess
from collections.abc import Callable

import torch
from torch import Tensor
from triton.errors import TritonError

from specchat.models.quant.kernels.refusals import is_refused, refuse

# Errors of a compiler that is missing, too old or failing. Triton asserts that it finds the driver's library.
_FAILURES = (TritonError, RuntimeError, NotImplementedError, AssertionError, OSError, subprocess.SubprocessError)


def start(kernel: str, x: Tensor, call: Callable[[], object]) -> bool:
    """Start a kernel and return True; return False if it does not compile, which is tried once for each device.

    Args:
        kernel: name of the kernel.
        x: any of its tensors, all on one device.
        call: starts the kernel.
    """
    if is_refused(x.device, kernel):
        return False
    try:
        with torch.cuda.device_of(x):
            call()
    except _FAILURES as error:
        refuse(x.device, kernel, error)
        return False
    return True
