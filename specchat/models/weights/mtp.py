"""The MTP head of a model: the layer's modules, and its tensors among those of the target's checkpoint."""

from typing import Any

import torch

from specchat.errors import UsageError
from specchat.models.checkpoint.json_file import read_json
from specchat.models.checkpoint.mtp import MtpPart, announces_mtp, find_mtp, with_names
from specchat.models.checkpoint.safetensors import Checkpoint
from specchat.models.gguf.tensors import open_tensors
from specchat.models.hf.attention import AttentionFunction
from specchat.models.hf.config import load_config
from specchat.models.hf.config_values import why_not_built
from specchat.models.hf.mtp import build_mtp, norm_path
from specchat.models.hf.refusals import refusing
from specchat.models.hf.skeleton import Skeleton
from specchat.records.model import ModelSource


def open_mtp(
    source: ModelSource, dtype: torch.dtype, attention: AttentionFunction | None
) -> tuple[Any, Skeleton, Checkpoint]:
    """Return the target's configuration, a model with the MTP layer alone, and a checkpoint under this model's names.

    Args:
        source: files of the target.
        dtype: dtype of the parameters.
        attention: attention function that the layer calls; None for the architecture's own.

    Raises:
        UsageError: the model has no MTP layer.
        CorruptCheckpointError, UnsupportedModelError: faults that `load_config` and `open_tensors` report.
    """
    config, checkpoint = load_config(source.path), open_tensors(source.path)
    part = _part_of(source, config, checkpoint)
    with refusing(config.model_type, why_not_built(config)):
        skeleton = build_mtp(config, dtype, attention, has_experts=part.has_experts)
    named = with_names(checkpoint, part, f"{skeleton.layers_name}.0", norm_path(skeleton))
    return config, skeleton, named


def _part_of(source: ModelSource, config: Any, checkpoint: Checkpoint) -> MtpPart:
    is_announced = announces_mtp(read_json(source.path / "config.json"))
    part = find_mtp(checkpoint.tensors, config.num_hidden_layers) if is_announced else None
    if part is None:
        raise UsageError(
            f"{source.path} has no MTP layer that specchat knows",
            hint="use --draft MODEL or --draft retrieval; quantized copies of a model often leave the layer out",
        )
    return part
