"""How large a model is, from its configuration alone: bytes per layer and per token, before any weight is read."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from specchat.config import DTYPE_BYTES, Activations, Dtype, ModelSource, ModelSpec
from specchat.models import activations, hf_compat

# Tensors start at multiples of this within a layer's blob, as matrix kernels like it; layers at multiples of a page.
TENSOR_ALIGNMENT = 256
LAYER_ALIGNMENT = 4096

TORCH_DTYPE: dict[Dtype, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def aligned(num_bytes: int, alignment: int) -> int:
    """`num_bytes` rounded up to a multiple of `alignment`."""
    return -(-num_bytes // alignment) * alignment


def blob_offsets(num_elements: Sequence[int], element_bytes: int) -> tuple[list[int], int]:
    """Where each tensor starts in a layer's contiguous blob, and the blob's length, in bytes."""
    offsets, end = [], 0
    for count in num_elements:
        offsets.append(aligned(end, TENSOR_ALIGNMENT))
        end = offsets[-1] + count * element_bytes
    return offsets, aligned(end, LAYER_ALIGNMENT)


def layer_bytes(spec: ModelSpec, layer: int, dtype: Dtype) -> int:
    """Bytes of one decoder layer's blob, which is what it takes in device memory, in a slot and over the link."""
    return blob_offsets(spec.layer_params[layer], DTYPE_BYTES[dtype])[1]


def num_params(spec: ModelSpec) -> int:
    """Parameters of the whole model, tied ones once."""
    return sum(map(sum, spec.layer_params)) + sum(spec.other_params)


def describe(source: ModelSource) -> ModelSpec:
    """The sizes of a model.

    Raises:
        CorruptCheckpointError, UnsupportedModelError: as `hf_compat.load_config`.
    """
    config = hf_compat.load_config(source.path)
    dtype = _checkpoint_dtype(config)  # building modules overwrites it
    skeleton = activations.rehearsal_skeleton(config)
    in_layers = {id(p) for layer in skeleton.layers for p in layer.parameters()}
    other = tuple(p.numel() for p in skeleton.model.parameters() if id(p) not in in_layers)
    spec = ModelSpec(
        name=source.name,
        architecture=type(skeleton.model).__name__,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_layers=len(skeleton.layers),
        mlp_size=hf_compat.mlp_size(config),
        num_heads=config.num_attention_heads,
        max_positions=hf_compat.max_positions(config),
        dtype=dtype,
        layer_params=tuple(tuple(p.numel() for p in layer.parameters()) for layer in skeleton.layers),
        other_params=other,
        buffer_bytes=sum(b.nbytes for b in skeleton.model.buffers()),
        kv_shapes=hf_compat.kv_shapes(config),
    )
    return replace(spec, narrowed_bytes=_narrowed_bytes(config), activations=_rehearsed(skeleton))


def _narrowed_bytes(config: Any) -> int:
    """What is saved by buffers that follow the dtype of the model; told by a small one, for building takes its time."""
    tiny = hf_compat.tiny_config(config)
    wide, narrow = (
        hf_compat.build_skeleton(tiny, dtype, attention="eager") for dtype in (torch.float32, torch.bfloat16)
    )
    layers = {id(b) for skeleton in (wide, narrow) for layer in skeleton.layers for b in layer.buffers()}
    sums = [sum(b.nbytes for b in skeleton.model.buffers() if id(b) not in layers) for skeleton in (wide, narrow)]
    return int(sums[0] - sums[1])


def _rehearsed(skeleton: hf_compat.Skeleton) -> dict[int, Activations]:
    found = {dtype.itemsize: activations.rehearse(skeleton, dtype) for dtype in (torch.float32, torch.bfloat16)}
    return {itemsize: costs for itemsize, costs in found.items() if costs is not None}


def _checkpoint_dtype(config: Any) -> Dtype:
    names: dict[torch.dtype, Dtype] = {dtype: name for name, dtype in TORCH_DTYPE.items()}
    return names.get(getattr(config, "dtype", None) or torch.float32, "fp32")
