"""Heads of a target: the modules of each kind, and their tensors under the names of the modules."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from specchat.models.checkpoint import assistant, dflash, eagle3
from specchat.models.checkpoint.json_file import read_json
from specchat.models.checkpoint.safetensors import Checkpoint, open_checkpoint
from specchat.models.gguf.draft_tensors import open_draft_tensors
from specchat.models.hf.assistant import as_assistant
from specchat.models.hf.attention import AttentionFunction
from specchat.models.hf.config import without_quantization
from specchat.models.hf.config_values import make_config, why_not_built
from specchat.models.hf.dflash import as_dflash
from specchat.models.hf.eagle3 import as_eagle3, build_plain
from specchat.models.hf.mtp import without_shared
from specchat.models.hf.refusals import refusing
from specchat.models.hf.skeleton import Skeleton, build_skeleton, path_of
from specchat.models.weights.mtp import open_mtp
from specchat.records.model import ModelSource


@dataclass(frozen=True)
class OpenHead:
    """A head before its modules take their final form.

    Attributes:
        whole: causal LM with the head's layer, which can run alone, to be measured; `finish` changes it in place.
        checkpoint: tensors of the head under the names of the finished modules.
        finish: function that makes the head's modules of `whole`.
        caches: whether the layers of the finished head cache keys and values as those of `whole` do; else nothing.
        target_size: width of the target's states, if it is not that of the layers; else 0.
    """

    whole: Skeleton
    checkpoint: Checkpoint
    finish: Callable[[Skeleton], Skeleton]
    caches: bool = True
    target_size: int = 0


def open_head(source: ModelSource, dtype: torch.dtype, attention: AttentionFunction | None) -> OpenHead:
    """Build the modules of a head, and read the headers of its tensors.

    Args:
        source: files of the head.
        dtype: dtype of the parameters.
        attention: attention function that the layer calls; None for the architecture's own.

    Raises:
        UsageError: the model has no such head.
        CorruptCheckpointError, UnsupportedModelError: faults of the configuration and of the headers.
    """
    if source.part == "mtp":
        return OpenHead(*open_mtp(source, dtype, attention), without_shared)
    if source.part == "dflash":
        return _open_dflash(source, dtype, attention)
    if source.part == "assistant":
        return _open_assistant(source, dtype, attention)
    checkpoint = open_draft_tensors(source.path)
    tensors = eagle3.named_tensors(checkpoint)
    settings = eagle3.eagle3_config(source.path, tensors)
    config = without_quantization(make_config(source.path / "config.json", eagle3.layer_values(source.path)))
    with refusing(config.model_type, why_not_built(config)):
        whole = build_plain(config, dtype, attention)
    decoder = path_of(whole.model, whole.decoder)
    named = eagle3.with_module_names(checkpoint, tensors, f"{whole.layers_name}.0", decoder)
    has_embeddings = "embed_tokens.weight" in tensors
    return OpenHead(whole, named, partial(as_eagle3, settings=settings, has_embeddings=has_embeddings))


def _open_dflash(source: ModelSource, dtype: torch.dtype, attention: AttentionFunction | None) -> OpenHead:
    settings = dflash.dflash_config(source.path)
    file = source.path / "config.json"
    given = make_config(file, read_json(file))
    values = dflash.layer_values(source.path, given.to_dict())
    config = given if values["model_type"] == given.model_type else make_config(file, values)
    config = without_quantization(config)
    config.tie_word_embeddings = False
    with refusing(config.model_type, why_not_built(config)):
        whole = build_skeleton(config, dtype, attention)
    decoder = path_of(whole.model, whole.decoder)
    named = dflash.with_module_names(open_draft_tensors(source.path), whole.layers_name, decoder)
    return OpenHead(whole, named, partial(as_dflash, settings=settings))


def _open_assistant(source: ModelSource, dtype: torch.dtype, attention: AttentionFunction | None) -> OpenHead:
    settings = assistant.assistant_config(source.path)
    config = make_config(source.path / "config.json", assistant.layer_values(source.path))
    config = without_quantization(config)
    config.tie_word_embeddings = False
    with refusing(config.model_type, why_not_built(config)):
        whole = build_skeleton(config, dtype, attention)
    named = assistant.with_module_names(open_checkpoint(source.path))
    finish = partial(as_assistant, settings=settings)
    return OpenHead(whole, named, finish, caches=False, target_size=settings.target_size)
