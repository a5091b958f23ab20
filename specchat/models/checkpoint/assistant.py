"""Gemma 4's assistants on disk: what config.json says of them, and their tensors under the names of the modules."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from specchat.errors import CorruptCheckpointError
from specchat.models.checkpoint.json_file import read_json
from specchat.models.checkpoint.safetensors import Checkpoint

# Types of the files, and of the layers in them where the files do not say.
_TYPES = {"gemma4_assistant": "gemma4_text", "gemma4_unified_assistant": "gemma4_unified_text"}
# transformers' defaults of the files' values.
_CLUSTERS, _CHOSEN = 2048, 32
_EMBEDDINGS, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_REDOWNLOAD = "download the assistant's files again"


@dataclass(frozen=True)
class AssistantConfig:
    """What the files of an assistant say of it.

    Attributes:
        target_size: hidden width of the target.
        num_clusters: clusters of the vocabulary; 0 for an assistant that scores all tokens.
        num_chosen: clusters whose tokens are scored.
    """

    target_size: int
    num_clusters: int
    num_chosen: int


def is_assistant(folder: Path) -> bool:
    """Return whether a folder's config.json is that of an assistant of Gemma 4."""
    file = folder / "config.json"
    return file.is_file() and read_json(file).get("model_type") in _TYPES


def assistant_config(folder: Path) -> AssistantConfig:
    """Return what an assistant's config.json says.

    Raises:
        CorruptCheckpointError: a value that every assistant has is missing.
    """
    config = read_json(folder / "config.json")
    clusters = bool(config.get("use_ordered_embeddings"))
    return AssistantConfig(
        target_size=_count(folder, config, "backbone_hidden_size"),
        num_clusters=_count(folder, {"num_centroids": _CLUSTERS} | config, "num_centroids") if clusters else 0,
        num_chosen=_count(folder, {"centroid_intermediate_top_k": _CHOSEN} | config, "centroid_intermediate_top_k"),
    )


def layer_values(folder: Path) -> Mapping[str, Any]:
    """Return the configuration of an assistant's layers, as of layers with keys and values of their own.

    Raises:
        CorruptCheckpointError: config.json does not describe the layers.
    """
    config = read_json(folder / "config.json")
    values = config.get("text_config")
    if not isinstance(values, dict):
        raise CorruptCheckpointError(f"{folder / 'config.json'} has no valid text_config", hint=_REDOWNLOAD)
    return {"model_type": _TYPES[config["model_type"]], **values, "num_kv_shared_layers": 0}


def _count(folder: Path, values: Mapping[str, Any], name: str) -> int:
    found = values.get(name)
    if not isinstance(found, int) or found < 1:
        raise CorruptCheckpointError(f"{folder / 'config.json'} has no valid {name} of an assistant", hint=_REDOWNLOAD)
    return found


def with_module_names(checkpoint: Checkpoint) -> Checkpoint:
    """Return an assistant's tensors under the names of the modules: its embeddings only serve as its head.

    Raises:
        CorruptCheckpointError: there is no head.
    """
    found = dict(checkpoint.tensors)
    embeddings = found.pop(_EMBEDDINGS, None)
    head = found.get(_HEAD, embeddings)
    if head is None:
        raise CorruptCheckpointError(f"tensor '{_HEAD}' is missing from {checkpoint.folder}", hint=_REDOWNLOAD)
    found[_HEAD] = replace(head, key=_HEAD)
    return Checkpoint(checkpoint.folder, MappingProxyType(found))
