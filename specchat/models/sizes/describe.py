"""The sizes of a model from its configuration, remembered between runs.

Torch is imported only for a model that was never described before: so a plan can be shown at once.
"""

from specchat.models.sizes import cache
from specchat.records.model import ModelSource, ModelSpec, Quant


def describe(source: ModelSource, quant: Quant = "none") -> ModelSpec:
    """The sizes of a model; remembered, since finding them out takes seconds.

    Args:
        source: local files.
        quant: what its matrices are to be stored in.

    Raises:
        CorruptCheckpointError, UnsupportedModelError: as `load_config`; UsageError: as `choose_recipe`.
    """
    key = cache.key_of(source, quant)
    known = cache.load(key, source.name)
    if known is not None:
        return known
    from specchat.models.sizes.inspect import inspect_model  # with torch and transformers

    spec = inspect_model(source, quant)
    cache.save(key, spec)
    return spec
