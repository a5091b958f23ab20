"""The choice of a recipe: the checkpoint's own quantization, or else the requested one."""

from specchat.errors import UsageError
from specchat.models.checkpoint.json_file import read_json
from specchat.models.checkpoint.safetensors import Checkpoint, open_checkpoint
from specchat.models.hf.skeleton import Skeleton
from specchat.models.quant.schemes.registry import scheme_of
from specchat.models.weights.checkpoint_recipe import CheckpointRecipe
from specchat.models.weights.recipe import QuantizeRecipe, recipe_for
from specchat.records.model import ModelSource

_AS_STORED = "none"


def is_prequantized(source: ModelSource) -> bool:
    """Return whether a checkpoint is pre-quantized; only config.json is read.

    Raises:
        UnsupportedModelError: a quantization that specchat does not read.
        CorruptCheckpointError: a configuration that contradicts itself.
    """
    return scheme_of(read_json(source.path / "config.json")) is not None


def choose_recipe(
    source: ModelSource, skeleton: Skeleton, quant: str, checkpoint: Checkpoint | None = None
) -> QuantizeRecipe | CheckpointRecipe | None:
    """Return the recipe for a model; None if its matrices stay plain.

    Args:
        source: local files; the headers of a pre-quantized checkpoint are read too.
        skeleton: skeleton of the model, before modules are replaced.
        quant: requested quantization, or a plan's name for the one of a pre-quantized model.
        checkpoint: opened checkpoint; None opens it if it is pre-quantized.

    Raises:
        UsageError: a pre-quantized model with another quantization requested.
        UnsupportedModelError: a quantization that specchat does not read.
        CorruptCheckpointError: quantized tensors that contradict their description.
    """
    scheme = scheme_of(read_json(source.path / "config.json"))
    if scheme is None:
        return recipe_for(quant)
    if quant not in {_AS_STORED, scheme.name}:
        raise UsageError(
            f"{source.name} is pre-quantized ({scheme.name}) and cannot be quantized again", hint="leave out --quant"
        )
    return CheckpointRecipe(scheme, skeleton, open_checkpoint(source.path) if checkpoint is None else checkpoint)
