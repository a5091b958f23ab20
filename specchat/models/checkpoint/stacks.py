"""Stacks of packed experts, as gpt-oss stores them: a layer has one tensor of blocks and one of scales."""

from dataclasses import replace
from types import MappingProxyType

from specchat.models.checkpoint.safetensors import Checkpoint, TensorInfo

_SUFFIXES = ("_blocks", "_scales")


def unstack_experts(checkpoint: Checkpoint) -> Checkpoint:
    """Return a checkpoint with a tensor per expert: "gate_up_proj_blocks" becomes "gate_up_proj.0.blocks", ..."""
    tensors: dict[str, TensorInfo] = {}
    for key, info in checkpoint.tensors.items():
        module, _, suffix = key.rpartition("_")
        if key.endswith(_SUFFIXES) and all(f"{module}{each}" in checkpoint.tensors for each in _SUFFIXES):
            tensors |= _experts(info, module, suffix)
        else:
            tensors[key] = info
    return Checkpoint(checkpoint.folder, MappingProxyType(tensors))


def _experts(info: TensorInfo, module: str, suffix: str) -> dict[str, TensorInfo]:
    num_experts, *shape = info.shape or (1,)
    nbytes = info.nbytes // max(num_experts, 1)
    return {
        f"{module}.{expert}.{suffix}": replace(
            info,
            key=f"{module}.{expert}.{suffix}",
            shape=tuple(shape),
            offset=info.offset + expert * nbytes,
            nbytes=nbytes,
        )
        for expert in range(num_experts)
    }
