"""The MTP head of a model: the modules of its layers, and their tensors under their names."""

from typing import Any

import torch

from specchat.errors import UsageError
from specchat.models.checkpoint.mtp import MtpPart, with_names
from specchat.models.checkpoint.safetensors import Checkpoint
from specchat.models.gguf.heads import find_head
from specchat.models.hf.attention import AttentionFunction
from specchat.models.hf.config import load_config
from specchat.models.hf.config_values import why_not_built
from specchat.models.hf.mtp import build_mtp, norm_paths
from specchat.models.hf.refusals import refusing
from specchat.models.hf.skeleton import Skeleton
from specchat.records.model import ModelSource


def open_mtp(
    source: ModelSource, dtype: torch.dtype, attention: AttentionFunction | None
) -> tuple[Skeleton, Checkpoint]:
    """Return a model with the MTP layers alone, and their tensors under this model's names.

    Args:
        source: files of the target.
        dtype: dtype of the parameters.
        attention: attention function that the layers call; None for the architecture's own.

    Raises:
        UsageError: the model has no MTP layer.
        CorruptCheckpointError, UnsupportedModelError: faults that `load_config` and `find_head` report.
    """
    config, part = load_config(source.path), find_head(source.path)
    if part is None:
        raise UsageError(f"{source.path} has no MTP layer", hint="use --draft MODEL or --draft retrieval")
    with refusing(config.model_type, why_not_built(config)):
        skeleton = build_mtp(
            config, dtype, attention, has_experts=part.has_experts, num_layers=_num_layers(config, part)
        )
    paths = [f"{skeleton.layers_name}.{index}" for index in range(len(skeleton.layers))]
    return skeleton, with_names(part, paths, norm_paths(skeleton))


def _num_layers(config: Any, part: MtpPart) -> int:
    """Return the number of layers in use: one alone where they attend in different ways."""
    kinds = getattr(config, "mtp_layer_types", None) or []
    return 1 if len(set(kinds)) > 1 else len(part.layers)
