"""Versions of what the GPU's paths need, and what this machine lacks.

PYTHONPATH=.:tests python -m gpu.versions
"""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version

NAMES = ("torch", "transformers", "triton", "bitsandbytes", "accelerate", "safetensors", "huggingface_hub", "pytest")


def show() -> None:
    for name in NAMES:
        try:
            print(f"{name} {version(name)}")
        except PackageNotFoundError:
            print(f"{name}: MISSING")
    for name in ("specchat.engine.engine", "specchat.cli.app", "support.engines", "gpu.facts"):
        try:
            importlib.import_module(name)
        except Exception as error:  # noqa: BLE001  the other modules are worth trying
            print(f"cannot import {name}: {type(error).__name__}: {error}")
    import torch

    from specchat.compiler import can_build_modules
    from specchat.models.quant.kernels.bnb import fused_product

    print(f"CUDA {torch.version.cuda}, {torch.cuda.device_count()} GPUs, can build modules: {can_build_modules()}")
    print(f"fused products of 4 bits: {fused_product() is not None}")


if __name__ == "__main__":
    show()
