"""How large a model is, from its configuration alone: bytes per layer and per token, before any weight is read."""

from collections.abc import Iterable
from typing import Any

import torch

from specchat.config import Activations, Dtype, ModelSource, ModelSpec, ParamSize, Quant
from specchat.models import activations, hf_compat
from specchat.models.formats.protocol import scratch_bytes
from specchat.models.quantization import apply_recipe
from specchat.models.quantized import quant_linears, segment_names
from specchat.models.recipes import choose_recipe

# Tensors start at multiples of this within a layer's blob, as matrix kernels like it; layers at multiples of a page.
TENSOR_ALIGNMENT = 256
LAYER_ALIGNMENT = 4096

TORCH_DTYPE: dict[Dtype, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def aligned(num_bytes: int, alignment: int) -> int:
    """`num_bytes` rounded up to a multiple of `alignment`."""
    return -(-num_bytes // alignment) * alignment


def blob_offsets(tensor_bytes: Iterable[int]) -> tuple[list[int], int]:
    """Where each tensor starts in a layer's contiguous blob, and the blob's length, in bytes."""
    offsets, end = [], 0
    for nbytes in tensor_bytes:
        offsets.append(aligned(end, TENSOR_ALIGNMENT))
        end = offsets[-1] + nbytes
    return offsets, aligned(end, LAYER_ALIGNMENT)


def layer_bytes(spec: ModelSpec, layer: int, dtype: Dtype) -> int:
    """Bytes of one decoder layer's blob, which is what it takes in device memory, in a slot and over the link."""
    return blob_offsets(size.nbytes(dtype) for size in spec.layer_params[layer])[1]


def weight_bytes(spec: ModelSpec, dtype: Dtype) -> int:
    """Bytes of all layers, and of everything beside them."""
    rest = sum(size.nbytes(dtype) for size in spec.other_params) + spec.buffer_bytes
    return rest + sum(layer_bytes(spec, layer, dtype) for layer in range(spec.num_layers))


def dequantize_bytes(spec: ModelSpec, dtype: Dtype, device: str) -> int:
    """Memory that one quantized matrix after the other is dequantized into."""
    place = torch.device(device)
    return max((scratch_bytes(shape, TORCH_DTYPE[dtype], place) for shape in spec.quant_shapes), default=0)


def describe(source: ModelSource, quant: Quant = "none") -> ModelSpec:
    """The sizes of a model.

    Args:
        source: local files.
        quant: what its matrices are to be stored in.

    Raises:
        CorruptCheckpointError, UnsupportedModelError: as `hf_compat.load_config`; UsageError: as `choose_recipe`.
    """
    config = hf_compat.load_config(source.path)
    dtype = _checkpoint_dtype(config)  # building modules overwrites it
    skeleton = activations.rehearsal_skeleton(config)
    num_params = sum(p.numel() for p in skeleton.model.parameters())
    buffer_bytes = sum(b.nbytes for b in skeleton.model.buffers())
    rehearsed = _rehearsed(skeleton)  # before modules are replaced: their own workspace is `dequantize_bytes`
    if (recipe := choose_recipe(source, skeleton, quant)) is not None:
        apply_recipe(skeleton, recipe)
    segments = segment_names(skeleton.model)
    layers_prefix = f"{skeleton.layers_name}."
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
        num_params=num_params,
        layer_params=tuple(_param_sizes(layer) for layer in skeleton.layers),
        other_params=tuple(
            _param_size(parameter, name in segments)
            for name, parameter in skeleton.model.named_parameters()
            if not name.startswith(layers_prefix)
        ),
        buffer_bytes=buffer_bytes,
        kv_shapes=hf_compat.kv_shapes(config),
        quant=quant if recipe is None else recipe.name,
        quant_shapes=tuple(sorted({linear.shape for _, linear in quant_linears(skeleton.model)})),
        narrowed_bytes=_narrowed_bytes(config),
        activations=rehearsed,
    )


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


def _param_sizes(module: Any) -> tuple[ParamSize, ...]:
    segments = segment_names(module)
    return tuple(_param_size(parameter, name in segments) for name, parameter in module.named_parameters())


def _param_size(parameter: torch.Tensor, is_segment: bool) -> ParamSize:
    return ParamSize(parameter.numel(), parameter.dtype.itemsize if is_segment else None)


def _checkpoint_dtype(config: Any) -> Dtype:
    names: dict[torch.dtype, Dtype] = {dtype: name for name, dtype in TORCH_DTYPE.items()}
    return names.get(getattr(config, "dtype", None) or torch.float32, "fp32")
