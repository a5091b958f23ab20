"""DFlash heads on disk: what config.json says of them, and their tensors under the names of the modules."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from specchat.errors import CorruptCheckpointError, UnsupportedModelError
from specchat.models.checkpoint.json_file import read_json
from specchat.models.checkpoint.safetensors import Checkpoint, TensorInfo

_CLASS, _SECOND = "DFlashDraftModel", "DFlash2DraftModel"
# transformers' name of a DFlash head, whose files name two tensors differently.
_ASSISTANT = "MuseGlimmerAssistantModel"
_NAMES = {"encoder.fc.": "fc.", "encoder.output_norm_enc.": "hidden_norm."}
# Other heads in files of their own, by class: a relative with more parts.
_OTHERS = {"DSparkDraftModel": "a DSpark head"}
_OWN, _SELECTOR = ("fc.", "hidden_norm."), "candidate_selector."
# Vocabularies are padded to multiples of this.
_PADDING = 1024
_REDOWNLOAD = "config.json and the weights do not match; download both again"


@dataclass(frozen=True)
class SecondConfig:
    """What the files of a DFlash2 head say of its further parts.

    Attributes:
        taps: rows that a convolution reads: a row, and those before it in its block.
        group_size: columns that share a coefficient of a convolution.
        rank: width of the codebooks of predecessors and successors.
        num_candidates: tokens of each level that may become nodes.
        embedding_scale: factor of the embeddings of a block.
        output_scale: factor of the target's scores.
        softcap: bound of the scores; 0 for none.
    """

    taps: int
    group_size: int
    rank: int
    num_candidates: int
    embedding_scale: float
    output_scale: float
    softcap: float


@dataclass(frozen=True)
class DFlashConfig:
    """What the files of a DFlash head say of it.

    Attributes:
        layers: layers of the target whose outputs the head reads.
        target_size: hidden width of the target.
        mask_token: token of the places that are guessed.
        block_size: rows of a block: the last token of the text, and the places to guess.
        target_layers: number of layers of the target; None if config.json does not say.
        sliding_is_causal: whether a row of a block sees only earlier rows, in layers with sliding windows.
        second: further parts of a DFlash2 head; None for DFlash.
        plain_embeddings: whether a block holds embeddings without the norm that the target has after them.
    """

    layers: tuple[int, ...]
    target_size: int
    mask_token: int
    block_size: int
    target_layers: int | None
    sliding_is_causal: bool
    second: SecondConfig | None = None
    plain_embeddings: bool = False


def is_dflash(folder: Path) -> bool:
    """Return whether a folder's config.json is that of a DFlash head, a DFlash2 head, or Muse's assistant.

    Raises:
        UnsupportedModelError: a head of another kind, which is not read.
    """
    file = folder / "config.json"
    if not file.is_file():
        return False
    classes = _classes(read_json(file))
    other = next((_OTHERS[each] for each in classes if each in _OTHERS), None)
    if other is not None:
        raise UnsupportedModelError(
            f"{folder} is {other}, but only EAGLE-3 and DFlash heads and Gemma 4's assistants are supported"
        )
    return not {_CLASS, _SECOND, _ASSISTANT}.isdisjoint(classes)


def _classes(config: Mapping[str, Any]) -> list[Any]:
    found = config.get("architectures")
    return found if isinstance(found, list) else []


def dflash_config(folder: Path) -> DFlashConfig:
    """Return what a head's config.json says.

    Raises:
        CorruptCheckpointError: a value that every head has is missing.
    """
    config = read_json(folder / "config.json")
    own = config.get("dflash_config")
    values: Mapping[str, Any] = {**config, **(own if isinstance(own, Mapping) else {})}
    layers, target_layers = values.get("target_layer_ids"), values.get("num_target_layers")
    is_assistant = _ASSISTANT in _classes(config)
    if not isinstance(layers, list) or not layers or not all(isinstance(each, int) and each >= 0 for each in layers):
        raise _lacks(folder, "target_layer_ids")
    return DFlashConfig(
        layers=tuple(layers),
        target_size=_count(folder, values, "hidden_size", 1),  # embeddings are the target's, so both have one width
        mask_token=_count(folder, values, "mask_token_id", 0),
        block_size=_count(folder, values, "block_size", 2),
        target_layers=target_layers if isinstance(target_layers, int) else None,
        sliding_is_causal=bool(values.get("causal", values.get("is_causal", not is_assistant))),
        plain_embeddings=is_assistant,
        second=_second(folder, values) if _SECOND in _classes(config) else None,
    )


def _second(folder: Path, values: Mapping[str, Any]) -> SecondConfig:
    group_size = _count(folder, values, "conv_group_size", 1)
    if values["hidden_size"] % group_size:
        raise _lacks(folder, "conv_group_size")
    return SecondConfig(
        taps=_count(folder, values, "conv_kernel_size", 1),
        group_size=group_size,
        rank=_count(folder, values, "selector_rank", 1),
        num_candidates=_count(folder, values, "selector_top_k", 1),
        embedding_scale=_number(folder, values, "input_embedding_scale", 1.0),
        output_scale=_number(folder, values, "output_multiplier", 1.0),
        softcap=_number(folder, values, "final_logit_softcapping", 0.0),
    )


def _number(folder: Path, values: Mapping[str, Any], name: str, default: float) -> float:
    found = values.get(name)
    if found is None:
        return default
    if not isinstance(found, int | float):
        raise _lacks(folder, name)
    return float(found)


def layer_values(folder: Path, values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the configuration of the head's layers, which are those of Qwen 3.

    Args:
        folder: folder of the head.
        values: config.json, with the defaults of its model type.
    """
    if _ASSISTANT not in _classes(read_json(folder / "config.json")):
        return values
    # The files name no size of the vocabulary, but the mask's token is among the last ones.
    known = {key: value for key, value in values.items() if key not in ("model_type", "architectures")}
    vocab_size = -(-(_count(folder, values, "mask_token_id", 0) + 1) // _PADDING) * _PADDING
    return {"vocab_size": vocab_size, **known, "model_type": "qwen3", "use_sliding_window": True}


def _count(folder: Path, values: Mapping[str, Any], name: str, least: int) -> int:
    found = values.get(name)
    if not isinstance(found, int) or found < least:
        raise _lacks(folder, name)
    return found


def _lacks(folder: Path, name: str) -> CorruptCheckpointError:
    return CorruptCheckpointError(
        f"{folder / 'config.json'} has no valid {name} of a DFlash head", hint="download the head's files again"
    )


def with_module_names(checkpoint: Checkpoint, layers: str, decoder: str) -> Checkpoint:
    """Return a head's tensors under the names of the modules.

    Args:
        checkpoint: checkpoint of the head.
        layers: path of the layers in the model.
        decoder: path of the decoder in the model.

    Raises:
        CorruptCheckpointError: tensors that every head has are missing.
    """
    found: dict[str, TensorInfo] = {}
    for key, info in checkpoint.tensors.items():
        name = key.removeprefix("model.")
        own = next((each for each in _NAMES if name.startswith(each)), None)
        name = name if own is None else _NAMES[own] + name.removeprefix(own)
        if name.startswith("layers."):
            full = f"{layers}.{name.removeprefix('layers.')}"
        elif name.startswith((*_OWN, "norm.", _SELECTOR)):
            full = f"{decoder}.{name}"
        else:
            continue  # copies of the target's embeddings and head
        found[full] = replace(info, key=full)
    missing = {f"{decoder}.{name}weight" for name in _OWN} - found.keys()
    if missing:
        raise CorruptCheckpointError(f"tensor '{min(missing)}' is missing from {checkpoint.folder}", hint=_REDOWNLOAD)
    return Checkpoint(checkpoint.folder, MappingProxyType(found))
