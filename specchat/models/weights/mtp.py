"""The MTP head of a model: the layer's modules, and its tensors under their names."""

import torch

from specchat.errors import UsageError
from specchat.models.checkpoint.mtp import with_names
from specchat.models.checkpoint.safetensors import Checkpoint
from specchat.models.gguf.heads import find_head
from specchat.models.hf.attention import AttentionFunction
from specchat.models.hf.config import load_config
from specchat.models.hf.config_values import why_not_built
from specchat.models.hf.mtp import build_mtp, norm_path
from specchat.models.hf.refusals import refusing
from specchat.models.hf.skeleton import Skeleton
from specchat.records.model import ModelSource


def open_mtp(
    source: ModelSource, dtype: torch.dtype, attention: AttentionFunction | None
) -> tuple[Skeleton, Checkpoint]:
    """Return a model with the MTP layer alone, and the layer's tensors under this model's names.

    Args:
        source: files of the target.
        dtype: dtype of the parameters.
        attention: attention function that the layer calls; None for the architecture's own.

    Raises:
        UsageError: the model has no MTP layer.
        CorruptCheckpointError, UnsupportedModelError: faults that `load_config` and `find_head` report.
    """
    config, part = load_config(source.path), find_head(source.path)
    if part is None:
        raise UsageError(f"{source.path} has no MTP layer", hint="use --draft MODEL or --draft retrieval")
    with refusing(config.model_type, why_not_built(config)):
        skeleton = build_mtp(config, dtype, attention, has_experts=part.has_experts)
    return skeleton, with_names(part, f"{skeleton.layers_name}.0", norm_path(skeleton))
