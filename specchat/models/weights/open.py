"""Opening a model's weights: modules, recipe and reader are built once and then passed on."""

from dataclasses import dataclass
from functools import partial

import torch

from specchat.closing import Closeable
from specchat.models.checkpoint.dtypes import torch_dtype
from specchat.models.checkpoint.safetensors import Checkpoint
from specchat.models.gguf.tensors import open_tensors
from specchat.models.hf.attention import AttentionFunction
from specchat.models.hf.config import load_config
from specchat.models.hf.config_values import why_not_built
from specchat.models.hf.kv_shapes import nothing_cached, record_kv_shapes
from specchat.models.hf.refusals import refusing
from specchat.models.hf.skeleton import Skeleton, build_skeleton
from specchat.models.weights.checkpoint_recipe import CheckpointRecipe
from specchat.models.weights.choose_recipe import choose_recipe
from specchat.models.weights.heads import open_head
from specchat.models.weights.match import match_checkpoint
from specchat.models.weights.prequantized import PrequantizedFiller
from specchat.models.weights.quantizing import QuantizingFiller
from specchat.models.weights.reader import WeightReader
from specchat.models.weights.recipe import QuantizeRecipe, apply_recipe
from specchat.records.model import Dtype, KvShape, ModelSource


@dataclass(frozen=True)
class ModelWeights(Closeable):
    """A model's modules, and the reader of its weights.

    Attributes:
        source: local files.
        dtype: dtype that passes compute in.
        skeleton: modules without weights; the matrices that `recipe` names have been replaced.
        checkpoint: tensors of `source`.
        recipe: storage of the matrices; None leaves them plain.
        reader: reader of `checkpoint`.
        kv_shapes: KV cache shape of each layer.
    """

    source: ModelSource
    dtype: Dtype
    skeleton: Skeleton
    checkpoint: Checkpoint
    recipe: QuantizeRecipe | CheckpointRecipe | None
    reader: WeightReader
    kv_shapes: tuple[KvShape, ...]

    def close(self) -> None:
        """Close the files."""
        self.reader.close()


def open_weights(
    source: ModelSource,
    dtype: Dtype,
    quant: str,
    attention: AttentionFunction | None = None,
    kv_shapes: tuple[KvShape, ...] = (),
) -> ModelWeights:
    """Build a model's modules without weights and open its checkpoint; headers are read, tensors are not.

    Args:
        source: local files.
        dtype: dtype that passes compute in.
        quant: requested quantization, or a plan's name for the one of a pre-quantized model.
        attention: attention function that the layers call; None for the architecture's own, without trees.
        kv_shapes: KV cache shape of each layer from the model's saved description; empty to record the shapes, which
            takes a second of imports.

    Raises:
        CorruptCheckpointError: a parameter has no tensor, or one of another shape.
        UnsupportedModelError: an architecture or quantization that specchat does not read.
        UsageError: a pre-quantized model with another quantization requested, or a model without the part.
    """
    head = open_head(source, torch_dtype(dtype), attention) if source.is_head else None
    if head is not None:
        skeleton, checkpoint = head.whole, head.checkpoint
    else:
        skeleton, checkpoint = _open_whole(source, torch_dtype(dtype), attention)
    if attention is not None and len(kv_shapes) != len(skeleton.layers):
        caches = head is None or head.caches
        # before modules are replaced
        kv_shapes = record_kv_shapes(skeleton) if caches else nothing_cached(skeleton)
    if head is not None:
        skeleton = head.finish(skeleton)
    recipe = choose_recipe(source, skeleton, quant, checkpoint)
    reader = open_reader(skeleton, checkpoint, recipe)
    return ModelWeights(source, dtype, skeleton, checkpoint, recipe, reader, kv_shapes)


def _open_whole(
    source: ModelSource, dtype: torch.dtype, attention: AttentionFunction | None
) -> tuple[Skeleton, Checkpoint]:
    """Return the modules of a whole model, and its checkpoint under keys that belong to them."""
    config, checkpoint = load_config(source.path), open_tensors(source.path)
    build = partial(build_skeleton, dtype=dtype, attention=attention)
    with refusing(config.model_type, why_not_built(config)):
        return match_checkpoint(config, checkpoint, build)


def open_reader(
    skeleton: Skeleton, checkpoint: Checkpoint, recipe: QuantizeRecipe | CheckpointRecipe | None = None
) -> WeightReader:
    """Open the reader of a checkpoint, and replace the skeleton's matrices as the recipe demands.

    Raises:
        CorruptCheckpointError: a parameter has no tensor, or one of another shape.
    """
    match recipe:
        case QuantizeRecipe() if _has_segments(checkpoint):
            apply_recipe(skeleton, recipe)
            return WeightReader(skeleton, checkpoint)
        case QuantizeRecipe():
            reader = WeightReader(skeleton, checkpoint)  # checks the checkpoint against the plain modules
            reader.fill_matrices_with(QuantizingFiller(skeleton, recipe, apply_recipe(skeleton, recipe)))
            return reader
        case CheckpointRecipe():
            filler = PrequantizedFiller(skeleton, checkpoint, recipe, apply_recipe(skeleton, recipe))
            return WeightReader(skeleton, recipe.without_quantized(checkpoint), filler)
        case None:
            return WeightReader(skeleton, checkpoint)


def _has_segments(checkpoint: Checkpoint) -> bool:
    """Return whether the files hold segments instead of matrices, as a quantized synthetic model does."""
    return any(key.endswith(".codes") for key in checkpoint.tensors)
