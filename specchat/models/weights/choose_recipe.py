"""What becomes of a model's matrices: what its checkpoint has them in, or else what was asked for."""

from specchat.errors import UsageError
from specchat.models.checkpoint.json_file import read_json
from specchat.models.checkpoint.safetensors import open_checkpoint
from specchat.models.hf.skeleton import Skeleton
from specchat.models.quant.schemes.registry import scheme_of
from specchat.models.weights.checkpoint_recipe import CheckpointRecipe
from specchat.models.weights.recipe import QuantizeRecipe, recipe_for
from specchat.records.model import ModelSource

_AS_STORED = "none"


def is_prequantized(source: ModelSource) -> bool:
    """Whether a checkpoint's own matrices are quantized; only config.json is read.

    Raises:
        UnsupportedModelError: in a way that specchat does not read.
        CorruptCheckpointError: the configuration contradicts itself.
    """
    return scheme_of(read_json(source.path / "config.json")) is not None


def choose_recipe(source: ModelSource, skeleton: Skeleton, quant: str) -> QuantizeRecipe | CheckpointRecipe | None:
    """The recipe for a model; None where its matrices stay numbers of the compute dtype.

    Args:
        source: local files; if they are quantized, the weights' headers are read too.
        skeleton: of the model, before anything is replaced.
        quant: what was asked for, or what a plan says of a model that comes quantized.

    Raises:
        UsageError: the model comes quantized, and was to be quantized otherwise.
        UnsupportedModelError: it is quantized in a way that specchat does not read.
        CorruptCheckpointError: what is quantized cannot be as it is described.
    """
    scheme = scheme_of(read_json(source.path / "config.json"))
    if scheme is None:
        return recipe_for(quant)
    if quant not in {_AS_STORED, scheme.name}:
        raise UsageError(
            f"{source.name} comes quantized ({scheme.name}) and cannot be quantized again", hint="leave out --quant"
        )
    return CheckpointRecipe(scheme, skeleton, open_checkpoint(source.path))
