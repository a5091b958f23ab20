"""A cache of model descriptions and checks: one file each in the cache folder, replaced atomically.

A description depends on the configuration, on the headers of the weight files (a head of its own, a dtype that
config.json does not name), on the libraries that build the modules, and on specchat's code. The key contains the
configuration's hash, the files' sizes and times, the libraries' versions, and a number that is raised when specchat's
code changes descriptions.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from specchat.errors import ModelError
from specchat.files import atomic_write_text, read_regular
from specchat.models.checkpoint.json_file import MODELOPT_FILE
from specchat.models.checkpoint.safetensors import weight_files
from specchat.paths import cache_folder
from specchat.records.model import (
    Activations,
    KvShape,
    ModelSource,
    ModelSpec,
    ParamSize,
    RoutedExperts,
    RowCost,
    StateShape,
)

# Version of descriptions. Raise it when descriptions change; a test fails then and says how to proceed.
SPEC_VERSION = 10
_LIBRARIES = ("torch", "transformers", "accelerate")
# The sizes of pre-quantized matrices follow from the headers of the weight files.
_QUANTIZED = (b"quantization_config", b"compression_config")
_MOST_FILES = 64

_remembered: dict[str, ModelSpec] = {}
_checked: set[str] = set()


def key_of(source: ModelSource, quant: str) -> str | None:
    """Return the key of a description, which changes with the description; None without a readable configuration.

    Args:
        source: local files.
        quant: requested quantization of the matrices, or "check" for the key of the architecture's check.
    """
    try:
        config = read_regular(source.path / "config.json")
        is_quantized = any(word in config for word in _QUANTIZED) or (source.path / MODELOPT_FILE).is_file()
        files = [] if quant == "check" else _stamps(source, needed=is_quantized)
        part = [source.part] if source.part else []
        facts = [hashlib.sha256(config).hexdigest(), quant, files, SPEC_VERSION, library_versions(), *part]
    except (OSError, ModelError):  # describing the model reports the error
        return None
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def tokenizer_key(source: ModelSource) -> str | None:
    """Return the key of a tokenizer's check, which changes with the small files; None if none can be read."""
    try:
        files = sorted(file for file in source.path.iterdir() if file.suffix != ".safetensors" and file.is_file())
        stamps = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    except OSError:  # reading the tokenizer reports the error
        return None
    facts = [stamps, library_versions(), version("tokenizers")]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def load(key: str | None, name: str) -> ModelSpec | None:
    """Return a description with the given name; None if the cache holds no intact one.

    Args:
        key: key from `key_of`.
        name: current name of the model, which the key does not cover.
    """
    if key is None:
        return None
    if key not in _remembered:
        try:
            found = json.loads(read_regular(_file(key)))
            if found["sha256"] != _digest(found["spec"]):
                return None
            _remembered[key] = parsed(found["spec"])
        except (
            OSError,
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            RecursionError,
        ):  # missing, damaged, or written by another program
            return None
    return replace(_remembered[key], name=name)


def save(key: str | None, spec: ModelSpec) -> None:
    """Save a description; if the folder is not writable, keep it until the process ends."""
    if key is None:
        return
    _remembered[key] = spec
    values = asdict(spec)
    with suppress(OSError):
        atomic_write_text(_file(key), json.dumps({"sha256": _digest(values), "spec": values}))
        _drop_oldest(_file(key).parent)


def is_checked(key: str | None) -> bool:
    """Return whether an architecture has passed its check; refusals are not kept, so newer versions try again."""
    return key is not None and (key in _checked or _check_file(key).is_file())


def save_check(key: str | None) -> None:
    """Save that an architecture has passed its check; if the folder is not writable, until the process ends."""
    if key is None:
        return
    _checked.add(key)
    with suppress(OSError):
        atomic_write_text(_check_file(key), "true")
        _drop_oldest(_check_file(key).parent)


def _stamps(source: ModelSource, *, needed: bool) -> list[tuple[str, int, int]]:
    """Return name, size and time of each weight file; empty before a download, unless they are needed."""
    try:
        # A head may be in a file beside those of the model.
        files = sorted(source.path.glob("*.safetensors")) if source.part else weight_files(source.path)
        found = [(file.name, file.stat()) for file in files]
    except (OSError, ModelError):
        if needed:
            raise
        return []
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in found]


@cache
def library_versions() -> Mapping[str, str]:
    """Return the versions of the libraries that build modules."""
    return {name: version(name) for name in _LIBRARIES}


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def parsed(values: Mapping[str, Any]) -> ModelSpec:
    """Restore a description from `asdict` and JSON."""
    return ModelSpec(
        **{
            **values,
            "layer_params": tuple(_params(layer) for layer in values["layer_params"]),
            "other_params": _params(values["other_params"]),
            "shared_params": _params(values["shared_params"]),
            "kv_shapes": tuple(_kv_shape(**shape) for shape in values["kv_shapes"]),
            "quant_shapes": tuple((rows, cols) for rows, cols in values["quant_shapes"]),
            "experts": _experts(values["experts"]),
            "layer_quant": tuple(values.get("layer_quant", ())),
            "activations": {int(item_bytes): _costs(costs) for item_bytes, costs in values["activations"].items()},
        }
    )


def _experts(values: Mapping[str, Any] | None) -> RoutedExperts | None:
    if values is None:
        return None
    return RoutedExperts(
        **{
            **values,
            "layers": tuple(values["layers"]),
            "params": _params(values["params"]),
        }
    )


def _kv_shape(state: Mapping[str, Any] | None, **rows: int) -> KvShape:
    return KvShape(**rows, state=None if state is None else StateShape(**state))


def _params(sizes: Sequence[Mapping[str, Any]]) -> tuple[ParamSize, ...]:
    return tuple(ParamSize(**size) for size in sizes)


def _costs(values: Mapping[str, Any]) -> Activations:
    places = {name: tuple(RowCost(**c) for c in values[name]) for name in ("outside", "entry", "layer", "head")}
    return Activations(**places, num_masks=values["num_masks"])


def _file(key: str) -> Path:
    return cache_folder() / "specs" / f"{key}.json"


def _check_file(key: str) -> Path:
    return cache_folder() / "checks" / f"{key}.json"


def _drop_oldest(folder: Path) -> None:
    """Delete the oldest files, which are mostly descriptions by older versions."""
    files = sorted(folder.iterdir(), key=lambda file: file.stat().st_mtime_ns, reverse=True)
    for file in files[_MOST_FILES:]:
        file.unlink()
