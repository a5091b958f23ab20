"""EAGLE-3 heads on disk: what config.json says of them, and their tensors under the names of the modules.

Three kinds of files are read, which differ in words only: those of SpecForge and its relatives (`midlayer`, classes
such as `LlamaForCausalLMEagle3`), those of the first EAGLE-3 heads (a `draft_vocab_size`, and the name of a plain
model), and those of speculators (`layers.0`, the layer's values in `transformer_layer_config`).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from specchat.errors import CorruptCheckpointError, UnsupportedModelError
from specchat.models.checkpoint.json_file import read_json
from specchat.models.checkpoint.safetensors import Checkpoint, TensorInfo

_KIND = "eagle3"
_LAYER = re.compile(r"(?:midlayer|layers\.(?P<number>\d+))\.(?P<name>.+)")
# Tensors that say nothing more: which tokens the head knows, as flags, and tables of positions.
_UNUSED = re.compile(r"t2d|(?:.+\.)?rotary_emb\.inv_freq")
_DEFAULT_STATES = 3
# Layers of a target that has the usual layers, of which the last is this far from the end.
LEAST_LAYERS = 3
_REDOWNLOAD = "config.json and the weights do not match; download both again"


@dataclass(frozen=True)
class Eagle3Config:
    """What the files of an EAGLE-3 head say of it.

    Attributes:
        layers: layers of the target whose entering states the head reads; empty for the usual ones.
        num_states: number of these layers.
        target_size: hidden width of the target.
        num_tokens: number of tokens that the head scores.
        norm_before_residual: whether the residual stream goes on from the normed states.
        norm_output: whether children read the normed output, as in EAGLE-3.1.
        norm_states: whether each layer's states are normed before they are joined, as in EAGLE-3.1.
        has_bias: whether the matrix that joins them has a bias.
    """

    layers: tuple[int, ...]
    num_states: int
    target_size: int
    num_tokens: int
    norm_before_residual: bool
    norm_output: bool
    norm_states: bool
    has_bias: bool

    def tapped_layers(self, num_layers: int) -> tuple[int, ...]:
        """Return the layers of a target of `num_layers` layers whose entering states the head reads.

        Source: the usual layers are those of SafeAILab/EAGLE and vLLM.
        """
        return self.layers or (2, num_layers // 2, num_layers - LEAST_LAYERS)


def is_eagle3(folder: Path) -> bool:
    """Return whether a folder's config.json is that of an EAGLE-3 head."""
    file = folder / "config.json"
    if not file.is_file():
        return False
    config = read_json(file)
    named = [config.get("speculators_model_type"), *_architectures(config)]
    names = [str(name).lower().replace("-", "").replace("_", "") for name in named]
    return any(_KIND in name for name in names) or isinstance(config.get("draft_vocab_size"), int)


def _architectures(config: Mapping[str, Any]) -> list[Any]:
    found = config.get("architectures")
    return found if isinstance(found, list) else []


def layer_values(folder: Path) -> Mapping[str, Any]:
    """Return the configuration of the head's decoder layer, in transformers' words."""
    config = read_json(folder / "config.json")
    inner = config.get("transformer_layer_config")
    return inner if isinstance(inner, Mapping) else config


def target_width(folder: Path) -> int | None:
    """Return the hidden width of the target that a head was trained for, by config.json; None if it does not say."""
    config = read_json(folder / "config.json")
    widths = (config.get("target_hidden_size"), layer_values(folder).get("hidden_size"))
    return next((width for width in widths if isinstance(width, int)), None)


def chosen_layers(folder: Path) -> tuple[int, ...]:
    """Return the layers of the target that config.json names; empty without."""
    config = read_json(folder / "config.json")
    inner = config.get("eagle_config")
    for part in (config, inner if isinstance(inner, Mapping) else {}):
        found = part.get("eagle_aux_hidden_state_layer_ids")
        if isinstance(found, list) and found and all(isinstance(each, int) and each >= 0 for each in found):
            return tuple(found)
    return ()


def eagle3_config(folder: Path, tensors: Mapping[str, TensorInfo]) -> Eagle3Config:
    """Return what config.json and the tensors, under the names of `named_tensors`, say of a head.

    Raises:
        CorruptCheckpointError: tensors that every head has are missing.
    """
    config = read_json(folder / "config.json")
    inner = config.get("eagle_config")
    flags = {**config, **(inner if isinstance(inner, Mapping) else {})}
    missing = {"fc.weight", "lm_head.weight", "norm.weight"} - tensors.keys()
    if missing:
        raise CorruptCheckpointError(f"tensor '{min(missing)}' is missing from {folder}", hint=_REDOWNLOAD)
    layers = chosen_layers(folder)
    num_states = len(layers) or _DEFAULT_STATES
    head = Eagle3Config(
        layers=layers,
        num_states=num_states,
        target_size=tensors["fc.weight"].shape[-1] // num_states,
        num_tokens=tensors["lm_head.weight"].shape[0],
        norm_before_residual=bool(flags.get("norm_before_residual")),
        norm_output=bool(flags.get("norm_output")),
        norm_states="fc_norm.0.weight" in tensors,
        has_bias="fc.bias" in tensors,
    )
    vocab_size = layer_values(folder).get("vocab_size")
    if "d2t" not in tensors and head.num_tokens != vocab_size:
        raise CorruptCheckpointError(
            f"{folder} scores {head.num_tokens:,} of {vocab_size} tokens, but has no map d2t of them", hint=_REDOWNLOAD
        )
    return head


def named_tensors(checkpoint: Checkpoint) -> dict[str, TensorInfo]:
    """Return the tensors of a head by the names that they have in most files, the layer's as `layer.*`.

    Raises:
        UnsupportedModelError: the head has more than one layer.
    """
    named: dict[str, TensorInfo] = {}
    for key, info in checkpoint.tensors.items():
        name = key.removeprefix("model.")
        if _UNUSED.fullmatch(name):
            continue
        if match := _LAYER.fullmatch(name):
            if int(match["number"] or 0) > 0:
                raise UnsupportedModelError(
                    f"the EAGLE-3 head in {checkpoint.folder} has several layers, but heads of one layer are supported"
                )
            name = f"layer.{match['name']}"
        named[name] = info
    return named


def with_module_names(
    checkpoint: Checkpoint, tensors: Mapping[str, TensorInfo], layer: str, decoder: str
) -> Checkpoint:
    """Return a head's tensors under the names of the modules.

    Args:
        checkpoint: checkpoint of the head.
        tensors: result of `named_tensors`.
        layer: path of the layer in the model.
        decoder: path of the decoder in the model.
    """
    found: dict[str, TensorInfo] = {}
    for name, info in tensors.items():
        if name.startswith("layer."):
            full = f"{layer}.{name.removeprefix('layer.')}"
        elif name == "norm.weight":
            full = f"{decoder}.head_norm.weight"
        else:
            full = name if name.startswith("lm_head.") else f"{decoder}.{name}"
        found[full] = replace(info, key=full)
    return Checkpoint(checkpoint.folder, MappingProxyType(found))
