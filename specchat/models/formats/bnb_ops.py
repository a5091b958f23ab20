"""bitsandbytes' operators, imported when first needed: its import costs a second and may ask the network."""

import logging
import os
from functools import cache
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor


@cache
def bnb() -> Any:
    """The operators under `torch.ops.bitsandbytes`, ready for CPU and CUDA."""
    offline = os.environ.get("HF_HUB_OFFLINE")
    os.environ["HF_HUB_OFFLINE"] = "1"  # the import fetches kernels where the package of that name is installed
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns of every kernel that it did not find
    try:
        import bitsandbytes  # noqa: F401  registers the operators
    finally:
        logger.setLevel(level)
        if offline is None:
            del os.environ["HF_HUB_OFFLINE"]
        else:
            os.environ["HF_HUB_OFFLINE"] = offline
    return torch.ops.bitsandbytes


def bnb_version() -> str:
    """The installed version, without importing it."""
    return version("bitsandbytes")


@cache
def dynamic_map(device: torch.device) -> Tensor:
    """The 256 numbers, float32, that nested absmax codes stand for."""
    bnb()
    from bitsandbytes.functional import create_dynamic_map

    with torch.inference_mode(False):
        codes: Tensor = create_dynamic_map().to(device)  # type: ignore[no-untyped-call]
    return codes
