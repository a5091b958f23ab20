"""Checks before plans and downloads: of the architecture, from config.json alone, and of a tokenizer that is here."""

from specchat.errors import ModelError
from specchat.models.checkpoint.safetensors import has_weights, weight_files
from specchat.models.sizes import cache
from specchat.records.model import ModelSource


def check_model(source: ModelSource) -> None:
    """Check that draft trees work on a model's architecture; a success is remembered between runs.

    Args:
        source: folder with at least config.json.

    Raises:
        UnsupportedModelError: tree scores differ from plain scores, or the modules cannot run.
        CorruptCheckpointError: an invalid config.json.
    """
    key = cache.key_of(source, "check")
    if cache.is_checked(key):
        return
    from specchat.engine.selfcheck import check_architecture  # imports torch

    check_architecture(source)
    cache.save_check(key)


def check_tokenizer(source: ModelSource) -> None:
    """Check that a model's tokenizer can be read, unless its files are not here yet; a success is remembered.

    Args:
        source: model whose answers need a tokenizer.

    Raises:
        ModelError, UsageError: a missing tokenizer, or one that cannot be read.
    """
    if source.is_toy or source.headers_only or not _is_here(source):
        return
    key = cache.tokenizer_key(source)
    if cache.is_checked(key):
        return
    from specchat.models.hf import tokenizer  # imports transformers

    tokenizer.check_tokenizer(source.path)
    cache.save_check(key)


def assumptions_about(source: ModelSource) -> tuple[str, ...]:
    """Return what a plan takes for granted about a model; nothing if the model's weights are here.

    Args:
        source: folder with at least config.json.
    """
    if source.is_toy or has_weights(source.path):
        return ()
    from specchat.models.weights.choose_recipe import assume_recipe  # imports torch
    from specchat.models.weights.recipe import AssumedRecipe

    recipe = assume_recipe(source, "none")
    matrices = ""
    if isinstance(recipe, AssumedRecipe):
        matrices = f", matrices with {recipe.bits} bits and a scale per 128 columns"
    return (f"weights of {source.name} as config.json describes them{matrices}; no weights are here",)


def _is_here(source: ModelSource) -> bool:
    try:
        return all(file.is_file() for file in weight_files(source.path))
    except ModelError:
        return False
