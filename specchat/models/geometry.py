"""How large a model is, from its configuration alone: bytes per layer and per token, before any weight is read."""

from collections.abc import Sequence
from typing import Any

import torch

from specchat.config import DTYPE_BYTES, Dtype, ModelSource, ModelSpec
from specchat.models import hf_compat

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
    skeleton = hf_compat.build_skeleton(config, torch.float32, attention="eager")
    in_layers = {id(p) for layer in skeleton.layers for p in layer.parameters()}
    other = tuple(p.numel() for p in skeleton.model.parameters() if id(p) not in in_layers)
    return ModelSpec(
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


def _checkpoint_dtype(config: Any) -> Dtype:
    names: dict[torch.dtype, Dtype] = {dtype: name for name, dtype in TORCH_DTYPE.items()}
    return names.get(getattr(config, "dtype", None) or torch.float32, "fp32")
