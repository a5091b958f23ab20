"""The sizes of a model from its configuration, cached between runs.

Torch is imported only for a model that was never described before, so most plans can be shown at once.
"""

from specchat.models.sizes import cache
from specchat.records.model import ModelSource, ModelSpec, Quant


def describe(source: ModelSource, quant: Quant = "none") -> ModelSpec:
    """Return the sizes of a model, cached because inspecting a model takes seconds.

    Args:
        source: local files.
        quant: requested quantization of the matrices.

    Raises:
        CorruptCheckpointError, UnsupportedModelError, UsageError: faults that `inspect_model` reports.
    """
    key = cache.key_of(source, quant)
    known = cache.load(key, source.name)
    if known is not None:
        return known
    from specchat.models.sizes.inspect import inspect_model  # imports torch and transformers

    spec = inspect_model(source, quant)
    cache.save(key, spec)
    return spec
