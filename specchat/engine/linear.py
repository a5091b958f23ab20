"""The matrix products of float32 models on a CPU, by the faster of torch's two libraries.

torch computes a float32 `linear` with MKL, which is slow on processors that Intel did not make, and 16-bit ones with
oneDNN, which is not. Measured on two cores of an AMD EPYC (Zen 4), a 7168 x 2048 matrix, milliseconds by MKL and by
oneDNN: 1 row 3.3 and 2.3, 8 rows 7.8 and 3.3, 64 rows 17.0 and 10.3, 160 rows 44 and 25. Both sum in float32.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from specchat.hardware.cpu import is_intel

# A call of oneDNN takes some microseconds more, which a smaller matrix does not earn back.
MIN_NUMBERS = 1 << 20


def use_fast_products(model: nn.Module) -> None:
    """Makes the model's large linear maps compute with oneDNN where that is faster.

    Args:
        model: parameters may still be on meta; only plain `nn.Linear` in float32 are changed.
    """
    if not _is_worthwhile():
        return
    for module in model.modules():
        if type(module) is nn.Linear and module.weight.dtype == torch.float32 and module.weight.numel() >= MIN_NUMBERS:
            module.forward = partial(product, module)  # type: ignore[method-assign]


def product(module: nn.Linear, rows: Tensor) -> Tensor:
    """What `module` computes of `rows` [..., in]: [..., out], by oneDNN."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise(rows, module.weight, module.bias, "none", [], "")
    return out


def _is_worthwhile() -> bool:
    operators: Any = torch.ops.mkldnn
    return torch.backends.mkl.is_available() and not is_intel() and hasattr(operators, "_linear_pointwise")
