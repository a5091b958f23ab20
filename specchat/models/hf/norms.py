"""RMS norms of a draft model as one kernel each, where transformers computes them by six or seven.

In a draft pass on a GPU most kernels are short, and norms are a third of them: 28 of 57 in a layer of Qwen3. The fused
kernel multiplies by the weight before it rounds to 16 bits. So its numbers differ in the last bit, which a draft may.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def fuse_norms(model: Any) -> int:
    """Let the RMS norms of a model compute by torch's own kernel, and return their number.

    Args:
        model: loaded model, whose numbers may change in their last bits.
    """
    known: dict[tuple[type, float], bool] = {}
    fused = 0
    for module in model.modules():
        eps = _eps_of(module)
        if eps is None:
            continue
        kind = type(module), eps
        if kind not in known:
            known[kind] = _is_plain(module, eps)
        if known[kind]:
            module.forward = partial(_normalised, module, eps)
            fused += 1
    return fused


def _normalised(module: Any, eps: float, hidden: Tensor) -> Tensor:
    return F.rms_norm(hidden, (hidden.shape[-1],), module.weight, eps)


def _eps_of(module: Any) -> float | None:
    """Return the epsilon of what may be an RMS norm; None for other modules."""
    if not type(module).__name__.endswith("RMSNorm") or [*dict(module.named_parameters())] != ["weight"]:
        return None
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return eps if isinstance(eps, float) and module.weight.dim() == 1 else None


@torch.inference_mode(False)
@torch.no_grad()
def _is_plain(module: Any, eps: float) -> bool:
    """Return whether a norm computes what torch's does: some add 1 to the weight, or need a gate beside the states."""
    own = copy.copy(module)
    generator, size = torch.Generator().manual_seed(0), module.weight.shape[0]
    weight = torch.nn.Parameter(torch.randn(size, generator=generator), requires_grad=False)
    own._parameters = {"weight": weight}
    hidden = torch.randn(3, size, generator=generator)
    try:
        found = own(hidden)
    except TypeError:  # more arguments
        return False
    return isinstance(found, Tensor) and torch.allclose(found, F.rms_norm(hidden, (size,), weight, eps), 1e-4, 1e-5)
