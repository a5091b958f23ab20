"""Check architectures before plans and downloads; config.json is all that a check needs."""

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
