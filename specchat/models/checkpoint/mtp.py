"""Multi-token prediction (MTP) layers in a checkpoint: where they are, and their tensors under the model's own names.

Two layouts are known. Qwen keeps the layer apart: `mtp.fc`, two norms of its inputs, `mtp.layers.0` and `mtp.norm`.
DeepSeek and GLM number it behind the last layer: `model.layers.L`, with `eh_proj`, `enorm`, `hnorm` and
`shared_head.norm` among the layer's tensors. Of several layers, each guesses one token further: DeepSeek's have the
next numbers, Qwen's share all that is outside `mtp.layers`. Other drafters use the same places (the `mtp.*` of DSpark
has a `markov_head`, and the same count in config.json), so a count alone never announces a head.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
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
# Where Step 3.7 keeps the decoder layer among the tensors of an MTP layer.
_BLOCK = "transformer_block."


@dataclass(frozen=True)
class MtpPart:
    """The MTP layers among a model's files.

    Attributes:
        checkpoint: checkpoint that has the layers.
        layers: names of each layer's tensors, "norm.weight" for its last norm, by key in the checkpoint.
    """

    checkpoint: Checkpoint
    layers: tuple[Mapping[str, str], ...]

    @property
    def names(self) -> Mapping[str, str]:
        """Names of the first layer's tensors."""
        return self.layers[0]

    @property
    def has_experts(self) -> bool:
        """Whether the layers are mixtures of experts."""
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
    layers = layer_names(checkpoint.tensors, num_layers)
    return MtpPart(checkpoint, layers) if layers else None


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


def layer_names(keys: Iterable[str], num_layers: int) -> tuple[Mapping[str, str], ...]:
    """Return the names of the tensors of each MTP layer, as in `MtpPart`; nothing if the keys have none.

    Layers count up to the first one that is missing, incomplete, or unlike the first.

    Args:
        keys: keys of all tensors.
        num_layers: number of decoder layers of the target.
    """
    found = list(keys)
    marks = [match for key in found if (match := _LAYER_MARK.fullmatch(key)) and int(match["layer"]) == num_layers]
    for key in found:
        if match := _QWEN_MARK.fullmatch(key):
            return _alike(_qwen_names(found, match["prefix"], number) for number in count())
    if not marks:
        return ()
    before = marks[0]["prefix"].removesuffix(f"{num_layers}.")
    return _alike(_numbered_names(found, f"{before}{num_layers + number}.") for number in count())


def _alike(layers: Iterable[Mapping[str, str]]) -> tuple[Mapping[str, str], ...]:
    """Return the leading layers that are complete, and whose tensors have the same names."""
    first: set[str] = set()
    kept = list[Mapping[str, str]]()
    for names in layers:
        inner = set(names.values())
        first = first or inner
        if inner != first or not _is_complete(names):
            break
        kept.append(names)
    return tuple(kept)


def _qwen_names(keys: Iterable[str], prefix: str, number: int) -> dict[str, str]:
    names = {}
    for key in keys:
        inner = key.removeprefix(prefix)
        if inner == key:
            continue
        if inner.startswith(f"layers.{number}."):
            names[key] = inner.removeprefix(f"layers.{number}.")
        elif inner == "norm.weight":
            names[key] = inner
        elif own := next((each for each in _QWEN_NAMES if inner.startswith(each)), None):
            names[key] = _QWEN_NAMES[own] + inner.removeprefix(own)
    return names


def _numbered_names(keys: Iterable[str], prefix: str) -> dict[str, str]:
    names = {key: key.removeprefix(prefix).removeprefix(_BLOCK) for key in keys if key.startswith(prefix)}
    kept = {key: name for key, name in names.items() if not name.startswith(_SHARED)}
    return {key: "norm.weight" if name == "shared_head.norm.weight" else name for key, name in kept.items()}


def _is_complete(names: Mapping[str, str]) -> bool:
    """Return whether there are a projection and all norms, and a layer; else something else uses the place."""
    inner = set(names.values())
    has_all = inner >= {"norm.weight", "enorm.weight", "hnorm.weight", "input_layernorm.weight"}
    return has_all and any(name.startswith("eh_proj.") for name in inner)


def qwen_name(name: str) -> str:
    """Return the key in Qwen's layout of a tensor of the layer, or of "norm.weight"."""
    own = next((each for each, inner in _QWEN_NAMES.items() if name.startswith(inner)), None)
    if own is not None:
        return f"mtp.{own}{name.removeprefix(_QWEN_NAMES[own])}"
    return f"mtp.{name}" if name == "norm.weight" else f"mtp.layers.0.{name}"


def with_names(part: MtpPart, paths: Sequence[str], norms: Sequence[str]) -> Checkpoint:
    """Return the tensors of MTP layers alone, under the names of a model with these layers.

    Args:
        part: tensors of the layers.
        paths: path of each layer in the model.
        norms: path of each layer's last norm in the model.
    """
    tensors: dict[str, TensorInfo] = {}
    for names, path, norm in zip(part.layers, paths, norms, strict=False):
        for key, name in names.items():
            full = f"{norm}.weight" if name == "norm.weight" else f"{path}.{name}"
            tensors[full] = replace(part.checkpoint.tensors[key], key=full)
    return Checkpoint(part.checkpoint.folder, MappingProxyType(tensors))
