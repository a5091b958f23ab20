"""Multi-token prediction (MTP) layers in a checkpoint: where they are, and their tensors under the model's own names.

Two layouts are known. Qwen keeps the layer apart: `mtp.fc`, two norms of its inputs, `mtp.layers.0` and `mtp.norm`.
DeepSeek and GLM number it behind the last layer: `model.layers.L`, with `eh_proj`, `enorm`, `hnorm` and
`shared_head.norm` among the layer's tensors. Other drafters use the same places (the `mtp.*` of DSpark has a
`markov_head`, and the same count in config.json), so a count alone never announces a head.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from specchat.models.checkpoint.json_file import read_json
from specchat.models.checkpoint.safetensors import MTP_FILE, Checkpoint, TensorInfo, open_checkpoint, open_single

# Keys of config.json that count the layers, at the top or in the text half.
_COUNTS = ("mtp_num_hidden_layers", "num_nextn_predict_layers", "num_mtp_layers")
# Model types whose config.json may leave the count out.
_UNCOUNTED = frozenset({"qwen3_next"})
_QWEN_MARK = re.compile(r"(?P<prefix>(?:.+\.)?mtp\.)pre_fc_norm_hidden\.weight")
_QWEN_NAMES = {"fc.": "eh_proj.", "pre_fc_norm_embedding.": "enorm.", "pre_fc_norm_hidden.": "hnorm."}
_LAYER_MARK = re.compile(r"(?P<prefix>(?:.+\.)?layers\.(?P<layer>\d+)\.)hnorm\.weight")
# Copies of the target's embeddings and head, which the head shares with the target.
_SHARED = ("embed_tokens.", "shared_head.head.")


@dataclass(frozen=True)
class MtpPart:
    """The first MTP layer among a model's files.

    Attributes:
        checkpoint: checkpoint that has the layer.
        names: name of each tensor within the layer, or "norm.weight" for the last norm, by key in the checkpoint.
    """

    checkpoint: Checkpoint
    names: Mapping[str, str]

    @property
    def has_experts(self) -> bool:
        """Whether the layer is a mixture of experts."""
        return any(".experts." in name or name.startswith("mlp.gate.") for name in self.names.values())


def find_mtp(folder: Path) -> MtpPart | None:
    """Return the MTP layer of a model: one in a file of its own, else one that config.json announces; None without.

    Only config.json and headers are read, and headers only if config.json announces the layer. The layer of a GGUF file
    is found by `models.gguf.heads`.

    Raises:
        CorruptCheckpointError, UnsupportedModelError: faults of headers.
    """
    own = folder / MTP_FILE
    if own.is_file():
        checkpoint, num_layers = open_single(own), 0
    else:
        if not announces_mtp(folder):
            return None
        config = read_json(folder / "config.json")
        checkpoint, num_layers = open_checkpoint(folder, with_head=True), _num_layers(config)
    names = layer_names(checkpoint.tensors, num_layers)
    return None if names is None else MtpPart(checkpoint, names)


def announces_mtp(folder: Path) -> bool:
    """Return whether config.json speaks of MTP layers that are read; only the tensors tell whether they are here."""
    config = read_json(folder / "config.json")
    counts = [part[key] for part in _parts(config) for key in _COUNTS if part.get(key) is not None]
    if not counts:
        return any(part.get("model_type") in _UNCOUNTED for part in _parts(config))
    return any(isinstance(count, int) and count > 0 for count in counts)


def _num_layers(config: Mapping[str, Any]) -> int:
    counts = [part["num_hidden_layers"] for part in _parts(config) if "num_hidden_layers" in part]
    return counts[-1] if counts and isinstance(counts[-1], int) else -1


def _parts(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return config.json, and the configuration of the text half in it."""
    text = config.get("text_config")
    return [config, text] if isinstance(text, Mapping) else [config]


def layer_names(keys: Iterable[str], num_layers: int) -> Mapping[str, str] | None:
    """Return the names of the tensors of an MTP layer, as in `MtpPart`; None if the keys have none.

    Args:
        keys: keys of all tensors.
        num_layers: number of decoder layers of the target.
    """
    found = list(keys)
    for key in found:
        if match := _QWEN_MARK.fullmatch(key):
            return _complete(_qwen_names(found, match["prefix"]))
        if (match := _LAYER_MARK.fullmatch(key)) and int(match["layer"]) == num_layers:
            return _complete(_numbered_names(found, match["prefix"]))
    return None


def _qwen_names(keys: Iterable[str], prefix: str) -> dict[str, str]:
    names = {}
    for key in keys:
        inner = key.removeprefix(prefix)
        if inner == key:
            continue
        if inner.startswith("layers.0."):
            names[key] = inner.removeprefix("layers.0.")
        elif inner == "norm.weight":
            names[key] = inner
        elif own := next((each for each in _QWEN_NAMES if inner.startswith(each)), None):
            names[key] = _QWEN_NAMES[own] + inner.removeprefix(own)
    return names


def _numbered_names(keys: Iterable[str], prefix: str) -> dict[str, str]:
    names = {key: key.removeprefix(prefix) for key in keys if key.startswith(prefix)}
    kept = {key: name for key, name in names.items() if not name.startswith(_SHARED)}
    return {key: "norm.weight" if name == "shared_head.norm.weight" else name for key, name in kept.items()}


def _complete(names: Mapping[str, str]) -> Mapping[str, str] | None:
    """Return the names, or None without a projection and all norms: then something else uses the place."""
    has_all = {"norm.weight", "enorm.weight", "hnorm.weight"} <= set(names.values())
    return names if has_all and any(name.startswith("eh_proj.") for name in names.values()) else None


def qwen_name(name: str) -> str:
    """Return the key in Qwen's layout of a tensor of the layer, or of "norm.weight"."""
    own = next((each for each, inner in _QWEN_NAMES.items() if name.startswith(inner)), None)
    if own is not None:
        return f"mtp.{own}{name.removeprefix(_QWEN_NAMES[own])}"
    return f"mtp.{name}" if name == "norm.weight" else f"mtp.layers.0.{name}"


def with_names(part: MtpPart, layer: str, norm: str) -> Checkpoint:
    """Return the tensors of an MTP layer alone, under the names of a model with this one layer.

    Args:
        part: tensors of the layer.
        layer: path of the layer in the model.
        norm: path of the last norm in the model.
    """
    tensors: dict[str, TensorInfo] = {}
    for key, name in part.names.items():
        full = f"{norm}.weight" if name == "norm.weight" else f"{layer}.{name}"
        tensors[full] = replace(part.checkpoint.tensors[key], key=full)
    return Checkpoint(part.checkpoint.folder, MappingProxyType(tensors))
