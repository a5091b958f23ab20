"""The choice of a recipe: the checkpoint's own quantization, or else the requested one."""

from typing import Any

from specchat.errors import UsageError
from specchat.models.checkpoint.json_file import MODELOPT_FILE, read_json
from specchat.models.checkpoint.safetensors import Checkpoint
from specchat.models.gguf.tensors import open_tensors
from specchat.models.hf.skeleton import Skeleton
from specchat.models.quant.schemes.base import CheckpointScheme
from specchat.models.quant.schemes.registry import CONFIG_KEYS, scheme_of
from specchat.models.weights.checkpoint_recipe import CheckpointRecipe
from specchat.models.weights.recipe import AssumedRecipe, QuantizeRecipe, recipe_for
from specchat.records.model import ModelSource

_AS_STORED = "none"


def is_prequantized(source: ModelSource) -> bool:
    """Return whether a checkpoint is pre-quantized; only config.json is read.

    Raises:
        UnsupportedModelError: a quantization that specchat does not read.
        CorruptCheckpointError: a configuration that contradicts itself.
    """
    return scheme_of(_config(source)) is not None


def _config(source: ModelSource) -> dict[str, Any]:
    """Return config.json, with the quantization that older exports of modelopt describe in a file of their own."""
    config, own = read_json(source.path / "config.json"), source.path / MODELOPT_FILE
    if any(key in config for key in CONFIG_KEYS) or not own.is_file():
        return config
    described = read_json(own).get("quantization")
    return {
        **config,
        CONFIG_KEYS[0]: {**(described if isinstance(described, dict) else {}), "quant_method": "modelopt"},
    }


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
    scheme = _own_scheme(source, quant)
    if scheme is None:
        return recipe_for(quant)
    return CheckpointRecipe(scheme, skeleton, open_tensors(source.path) if checkpoint is None else checkpoint)


def assume_recipe(source: ModelSource, quant: str) -> QuantizeRecipe | AssumedRecipe | None:
    """Return the recipe that a plan assumes for a model whose weights are not here; None if its matrices stay plain.

    Args:
        source: folder with config.json.
        quant: requested quantization.

    Raises:
        UsageError: a pre-quantized model with another quantization requested.
        UnsupportedModelError: a quantization that specchat does not read.
    """
    scheme = _own_scheme(source, quant)
    return recipe_for(quant) if scheme is None else AssumedRecipe(scheme.name)


def _own_scheme(source: ModelSource, quant: str) -> CheckpointScheme | None:
    """Return the scheme of a pre-quantized checkpoint; None for others."""
    scheme = scheme_of(_config(source))
    if scheme is not None and quant not in {_AS_STORED, scheme.name}:
        raise UsageError(
            f"{source.name} is pre-quantized ({scheme.name}) and cannot be quantized again", hint="leave out --quant"
        )
    return scheme
