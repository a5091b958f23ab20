"""The sizes of a model from its configuration, cached between runs.

Torch is imported only for a model that was never described before, so most plans can be shown at once.
"""

from dataclasses import replace

from specchat.models.sizes import cache
from specchat.records.model import COPY_SUFFIX, ModelSource, ModelSpec, Quant


def describe(source: ModelSource, quant: Quant = "none") -> ModelSpec:
    """Return the sizes of a model, cached because inspecting a model takes seconds.

    Args:
        source: local files.
        quant: requested quantization of the matrices.

    Raises:
        CorruptCheckpointError, UnsupportedModelError, UsageError: faults that `inspect_model` reports.
    """
    if source.is_copy:
        return as_copy(describe(replace(source, part=""), quant), source.name)
    key = cache.key_of(source, quant)
    known = cache.load(key, source.name)
    if known is not None:
        return known
    from specchat.models.sizes.inspect import inspect_model  # imports torch and transformers

    spec = inspect_model(source, quant)
    cache.save(key, spec)
    return spec


def as_copy(spec: ModelSpec, name: str) -> ModelSpec:
    """Return the sizes of a model's low-bit copy: its layers alone, in the precision of the description."""
    return replace(
        spec,
        name=name,
        architecture=spec.architecture + COPY_SUFFIX,
        num_params=spec.num_layer_params,
        other_params=(),
        shared_params=(),
        buffer_bytes=0,
        narrowed_bytes=0,
        lookup_params=0,
        quant_shapes=tuple(shape for shape in spec.quant_shapes if shape[0] != spec.vocab_size),
    )
