"""Describing a model: its modules are built without weights, measured and profiled."""

import math
from typing import Any

import torch

from specchat.errors import ModelError
from specchat.models.checkpoint.dtypes import STORED_DTYPES, short_name
from specchat.models.checkpoint.safetensors import Checkpoint, has_weights
from specchat.models.gguf.tensors import open_tensors
from specchat.models.hf.config import experts_per_row, load_config, max_positions, mlp_size, tiny_config
from specchat.models.hf.config_values import why_not_built
from specchat.models.hf.expert_tables import has_tile_forms
from specchat.models.hf.kv_shapes import nothing_cached, record_kv_shapes
from specchat.models.hf.refusals import CANNOT_SHRINK, refusing
from specchat.models.hf.skeleton import Skeleton, build_skeleton, lookup_embeddings
from specchat.models.hf.wrappers import wrapper_type
from specchat.models.quant.modules import quant_linears, segment_names
from specchat.models.sizes import activations
from specchat.models.weights.choose_recipe import assume_recipe, choose_recipe
from specchat.models.weights.experts import pooled_experts
from specchat.models.weights.heads import open_head
from specchat.models.weights.match import match_checkpoint
from specchat.models.weights.open import open_reader
from specchat.models.weights.recipe import Recipe, apply_recipe
from specchat.records.model import (
    HEAD_SUFFIXES,
    Activations,
    Dtype,
    ModelSource,
    ModelSpec,
    ParamSize,
    Quant,
    RoutedExperts,
)


def inspect_model(source: ModelSource, quant: Quant) -> ModelSpec:
    """Measure the sizes of a model; `describe` caches them.

    Args:
        source: local files.
        quant: requested quantization of the matrices.

    Raises:
        CorruptCheckpointError, UnsupportedModelError: faults that `load_config` and `choose_recipe` report.
        UsageError: a pre-quantized model with another quantization requested.
    """
    if source.is_head:
        return _inspect_head(source, quant)
    config, checkpoint = load_config(source.path), _checkpoint_here(source)
    with refusing(config.model_type, why_not_built(config)):
        if checkpoint is None:
            skeleton = activations.profiling_skeleton(config)
        else:
            skeleton, checkpoint = match_checkpoint(config, checkpoint, activations.profiling_skeleton)
        of_architecture = _measure(config, skeleton)  # before modules are replaced
        of_architecture["narrowed_bytes"] = _narrowed_bytes(config)
    if checkpoint is not None or has_weights(source.path):
        recipe: Recipe | None = choose_recipe(source, skeleton, quant, checkpoint)
    else:
        recipe = assume_recipe(source, quant)
    if recipe is not None:
        apply_recipe(skeleton, recipe)
    segments = segment_names(skeleton.model)
    within_layers = f"{skeleton.layers_name}.", *(f"{path}." for path in skeleton.shared_paths)
    table = _lookup_size(skeleton)
    return ModelSpec(
        **of_architecture,
        name=source.name,
        dtype=_checkpoint_dtype(config, checkpoint),
        layer_params=tuple(_param_sizes(layer) for layer in skeleton.layers),
        other_params=tuple(
            _param_size(parameter, name in segments)
            for name, parameter in skeleton.model.named_parameters()
            if not name.startswith(within_layers)
        ),
        quant=quant if recipe is None else recipe.name,
        quant_shapes=tuple(sorted({linear.shape for _, linear in quant_linears(skeleton.model)})),
        lookup_params=table.count,
        lookup_item_bytes=table.item_bytes,
        text_only=wrapper_type(config) is not None,
        layer_quant=_layer_quant(skeleton),
        shared_params=tuple(size for block in _shared_blocks(skeleton) for size in _param_sizes(block)),
        experts=_routed_experts(config, skeleton),
    )


def _inspect_head(source: ModelSource, quant: Quant) -> ModelSpec:
    """Measure the sizes of a head, without embeddings and scores that are the target's.

    Raises:
        UsageError: the model has no such head.
        CorruptCheckpointError: a tensor of the head is missing, or has another shape than the configuration says.
    """
    head = open_head(source, torch.float32, activations.profiling_attention)
    whole, checkpoint = head.whole, head.checkpoint
    config = whole.config
    narrow = open_head(source, torch.bfloat16, activations.profiling_attention).whole
    narrowed_bytes = _outer_buffer_bytes(whole) - _outer_buffer_bytes(narrow)
    held = {name: buffer.nbytes for name, buffer in whole.model.named_buffers()}  # profiling changes their dtype
    of_architecture = _measure(config, whole) | {"narrowed_bytes": narrowed_bytes}
    if not head.caches:
        of_architecture["kv_shapes"] = nothing_cached(whole)
    skeleton = head.finish(whole)
    of_architecture["architecture"] += HEAD_SUFFIXES[source.part]
    of_architecture["num_params"] = sum(p.numel() for p in skeleton.model.parameters())
    of_architecture["num_layer_params"] = sum(map(_num_params, skeleton.layers))
    buffers = skeleton.model.named_buffers()
    of_architecture["buffer_bytes"] = sum(held.get(name, buffer.nbytes) for name, buffer in buffers)
    recipe = choose_recipe(source, skeleton, quant, checkpoint)
    open_reader(skeleton, checkpoint, recipe).close()  # checks the tensors, and replaces the matrices
    outside = [p for name, p in skeleton.model.named_parameters() if not name.startswith(f"{skeleton.layers_name}.")]
    return ModelSpec(
        **of_architecture,
        name=source.name,
        dtype=_checkpoint_dtype(config, checkpoint),
        layer_params=tuple(_param_sizes(layer) for layer in skeleton.layers),
        other_params=tuple(_param_size(parameter, is_segment=False) for parameter in outside),
        target_size=head.target_size,
        quant=quant if recipe is None else recipe.name,
        quant_shapes=tuple(sorted({linear.shape for _, linear in quant_linears(skeleton.model)})),
        layer_quant=_layer_quant(skeleton),
    )


def _measure(config: Any, skeleton: Skeleton) -> dict[str, Any]:
    """Return the fields of a description that do not depend on the quantization, and move the skeleton to meta."""
    return {
        "architecture": type(skeleton.model).__name__,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_layers": len(skeleton.layers),
        "mlp_size": mlp_size(config),
        "num_heads": config.num_attention_heads,
        "max_positions": max_positions(config),
        "num_params": _num_params(skeleton.model),
        "num_layer_params": sum(map(_num_params, skeleton.layers)) + _num_shared_params(skeleton),
        "buffer_bytes": _buffer_bytes(skeleton),
        "kv_shapes": record_kv_shapes(skeleton),
        "activations": _profiled(skeleton),  # `dequantize_bytes` covers the scratch memory of quantized modules
    }


def _routed_experts(config: Any, skeleton: Skeleton) -> RoutedExperts | None:
    """Measure the experts that can be read one by one; None without any."""
    pooled = pooled_experts(skeleton)
    if not pooled:
        return None
    first = pooled[0]
    pieces = (_param_size(tensor, not first.is_stacked(name)) for name, tensor in first.pieces.items())
    layers = tuple(each.layer for each in pooled)
    return RoutedExperts(layers, first.num_experts, experts_per_row(config), tuple(pieces), has_tile_forms(first))


def _layer_quant(skeleton: Skeleton) -> tuple[int, ...]:
    """Return the number of weights of each layer in quantized matrices; empty without any."""
    found = tuple(sum(math.prod(each.shape) for _, each in quant_linears(layer)) for layer in skeleton.layers)
    return found if any(found) else ()


def _shared_blocks(skeleton: Skeleton) -> list[Any]:
    return [skeleton.model.get_submodule(path) for path in skeleton.shared_paths]


def _num_shared_params(skeleton: Skeleton) -> int:
    """Return the number of weights of shared blocks, each as often as layers use it."""
    uses = [len(block.uses) for block in skeleton.shared_blocks]
    return sum(num * _num_params(block) for num, block in zip(uses, _shared_blocks(skeleton), strict=True))


def _buffer_bytes(skeleton: Skeleton) -> int:
    return sum(buffer.nbytes for buffer in skeleton.model.buffers())


def _num_params(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _narrowed_bytes(config: Any) -> int:
    """Return the bytes that 16-bit buffers save over 32-bit ones, measured on a tiny model, which builds quickly."""
    with refusing(config.model_type, CANNOT_SHRINK):
        tiny = tiny_config(config)
        wide, narrow = (build_skeleton(tiny, dtype) for dtype in (torch.float32, torch.bfloat16))
    return _outer_buffer_bytes(wide) - _outer_buffer_bytes(narrow)


def _outer_buffer_bytes(skeleton: Skeleton) -> int:
    """Return the bytes of the buffers outside the layers."""
    layers = {id(buffer) for layer in skeleton.layers for buffer in layer.buffers()}
    return sum(buffer.nbytes for buffer in skeleton.model.buffers() if id(buffer) not in layers)


def _profiled(skeleton: Skeleton) -> dict[int, Activations]:
    found = {
        dtype.itemsize: activations.profile_activations(skeleton, dtype) for dtype in (torch.float32, torch.bfloat16)
    }
    return {itemsize: costs for itemsize, costs in found.items() if costs is not None}


def _lookup_size(skeleton: Skeleton) -> ParamSize:
    """Return the size of untied input embeddings."""
    embeddings = lookup_embeddings(skeleton)
    return ParamSize(0) if embeddings is None else _param_sizes(embeddings)[0]


def _param_sizes(module: Any) -> tuple[ParamSize, ...]:
    segments = segment_names(module)
    return tuple(_param_size(parameter, name in segments) for name, parameter in module.named_parameters())


def _param_size(parameter: torch.Tensor, is_segment: bool) -> ParamSize:
    return ParamSize(parameter.numel(), parameter.dtype.itemsize if is_segment else None)


def _checkpoint_here(source: ModelSource) -> Checkpoint | None:
    """Return the opened checkpoint; None if not all weights are here, as before a download."""
    try:
        return open_tensors(source.path)
    except ModelError:  # loading the model reports the error
        return None


def _checkpoint_dtype(config: Any, checkpoint: Checkpoint | None) -> Dtype:
    """Return the dtype that config.json names, or else that of the first tensor of real numbers, as transformers."""
    if getattr(config, "dtype", None) is not None or checkpoint is None:
        return short_name(str(getattr(config, "dtype", None))) or "fp32"
    names = (STORED_DTYPES[info.dtype].torch_name for info in checkpoint.tensors.values())
    return short_name(next((name for name in names if "float" in name), "float32")) or "fp32"
