"""Values of config.json: corrected where transformers would fail on a harmless one, refused by name where it must."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from specchat.errors import CorruptCheckpointError, SpecchatError, UnsupportedModelError, is_lack_of_memory
from specchat.models.checkpoint.json_file import shown
from specchat.models.hf.refusals import CANNOT_BUILD

_HINT = "config.json is damaged or was written for other software; download it again"
_DTYPES = ("dtype", "torch_dtype")
# Labels of classifiers. transformers makes one entry for each of `num_labels`.
_LABELS = ("num_labels", "id2label", "label2id")
_ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function")
# transformers builds modules one by one, and tables of positions in memory, so absurd numbers would never end.
_MODULES = re.compile(r"(num_hidden|num_kv_shared|num_nextn_predict|num|n|decoder|encoder)_layers?|\w*_experts")
_WIDTHS = re.compile(r"\w*(?<!window)(?<!chunk)_(size|dim|rank|heads)|n_embd|n_inner|n_head")  # windows may be -1
_MOST_MODULES, _LARGEST_WIDTH, _LARGEST = 1 << 14, 1 << 24, 1 << 40


def make_config(file: Path, values: Mapping[str, Any]) -> Any:
    """Return transformers' configuration of the values in a config.json.

    Args:
        file: path of the file, for messages.
        values: object in the file.

    Raises:
        CorruptCheckpointError: a value that transformers does not accept.
        UnsupportedModelError: a model type that transformers does not know.
    """
    from transformers import CONFIG_MAPPING

    kind = values.get("model_type")
    if not isinstance(kind, str):
        raise CorruptCheckpointError(f"{file} names no model_type", hint=_HINT)
    if kind not in CONFIG_MAPPING:
        raise UnsupportedModelError(
            f"model type '{kind}' is not supported", hint="specchat runs no code from model folders"
        )
    if kind == "mistral" and "layer_types" in values:  # as in transformers' AutoConfig
        kind = "ministral"
    config_class = CONFIG_MAPPING[kind]
    corrected = _corrected(file, values)
    try:
        return _configuration(config_class, corrected)
    except Exception as error:
        if isinstance(error, SpecchatError) or is_lack_of_memory(error):
            raise
        raise CorruptCheckpointError(f"{file}: {_reason(config_class, corrected, error)}", hint=_HINT) from error


def _configuration(config_class: Any, values: Mapping[str, Any]) -> Any:
    """Return a configuration; the values are copied, because transformers adds to nested objects."""
    return config_class.from_dict(config_class._decode_special_floats(values))  # infinities, which JSON lacks


def why_not_built(config: Any) -> str:
    """Return the reason for a configuration from which transformers cannot build modules, as a predicate."""
    from transformers.activations import ACT2FN
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    for name in _ACTIVATIONS:
        if isinstance(known := getattr(config, name, None), str) and known not in ACT2FN:
            return f"has the {name} {shown(known)}, which transformers does not know"
    for rope in _ropes(config):
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind not in (*ROPE_INIT_FUNCTIONS, "default", getattr(config, "default_rope_type", None)):
            return f"has rotary positions of the type {shown(kind)}, which transformers does not know"
        if not isinstance(rope.get("rope_theta", 1.0), int | float):
            return f"has rotary positions with rope_theta {shown(rope['rope_theta'])}, which is not a number"
    return CANNOT_BUILD


def _ropes(config: Any) -> Iterator[Mapping[str, Any]]:
    """Yield the rotary parameters of a configuration, of each kind of layer if they differ."""
    rope = getattr(config, "rope_parameters", None)
    if not isinstance(rope, dict):
        return
    nested = [each for each in rope.values() if isinstance(each, dict)]
    yield from nested or [rope]


def _corrected(file: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of the values, also of nested configurations, with harmless ones corrected."""
    corrected = {name: value for name, value in values.items() if name not in _LABELS}
    for name, value in values.items():
        if name.endswith("_config") and isinstance(value, dict):
            corrected[name] = _corrected(file, value)
        elif name in _DTYPES:
            corrected[name] = _dtype(file, name, value)
        elif type(value) is int:
            _check_size(file, name, value)
    pad, vocabulary = values.get("pad_token_id"), values.get("vocab_size")
    if type(pad) is int and type(vocabulary) is int and not -vocabulary <= pad < vocabulary:
        corrected["pad_token_id"] = None  # chats are never padded, but torch refuses the id
    return corrected


def _check_size(file: Path, name: str, value: int) -> None:
    least, most = -_LARGEST, _LARGEST
    if _MODULES.fullmatch(name):
        least, most = 0, _MOST_MODULES
    elif _WIDTHS.fullmatch(name):
        least, most = 0, _LARGEST_WIDTH
    if not least <= value <= most:
        limit = f"at least {least:,}" if value < least else f"at most {most:,}"
        raise CorruptCheckpointError(f"{file}: {name} is {shown(value)}, but must be {limit}", hint=_HINT)


def _dtype(file: Path, name: str, value: object) -> str | None:
    """Return torch's name of a dtype; None leaves the dtype to the stored tensors."""
    if value is None or value == "auto":
        return None
    known = value.removeprefix("torch.") if isinstance(value, str) else ""
    if not isinstance(getattr(torch, known, None), torch.dtype):
        raise CorruptCheckpointError(f"{file}: {name} is {shown(value)}, which is not a dtype of torch", hint=_HINT)
    return known


def _reason(config_class: Any, values: Mapping[str, Any], error: Exception) -> str:
    """Name the value without which transformers accepts the others; else quote transformers."""
    for name in values:
        others = {key: value for key, value in values.items() if key != name}
        try:
            _configuration(config_class, others)
        except Exception:  # noqa: BLE001  the other values are not the only reason
            continue
        return f"{name} is {shown(values[name])}, which transformers does not accept"
    cause = error.__cause__ or error
    return " ".join(str(cause).split()) if isinstance(cause, ValueError) else "transformers does not accept its values"
