"""Descriptions of models that were made before: a file for each in the cache folder, replaced whole or not at all.

A description follows from a configuration, from the libraries that build its modules, and from our own code. The key
has the first, the libraries' versions, and for our code a number that is raised when descriptions change.
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
from specchat.files import atomic_write_text
from specchat.models.checkpoint.safetensors import weight_files
from specchat.paths import cache_folder
from specchat.records.model import Activations, KvShape, ModelSource, ModelSpec, ParamSize, RowCost

# Of descriptions. Raise it when our code describes a model otherwise; a test tells, and how to go on.
SPEC_VERSION = 1
_LIBRARIES = ("torch", "transformers", "accelerate")
# Matrices that come quantized are described by the headers of the files they are in.
_QUANTIZED = (b"quantization_config", b"compression_config")
_MOST_FILES = 64

_remembered: dict[str, ModelSpec] = {}


def key_of(source: ModelSource, quant: str) -> str | None:
    """A name that changes whenever the description would; None if there is no configuration to describe.

    Args:
        source: local files.
        quant: what its matrices are to be stored in.
    """
    try:
        config = (source.path / "config.json").read_bytes()
        files = _stamps(source.path) if any(word in config for word in _QUANTIZED) else []
        facts = [hashlib.sha256(config).hexdigest(), quant, files, SPEC_VERSION, library_versions()]
    except (OSError, ModelError):  # describing it will say what is wrong
        return None
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def load(key: str | None, name: str) -> ModelSpec | None:
    """The description, under a name; None if there is none, or none that can be trusted.

    Args:
        key: from `key_of`.
        name: of the model now, which is not part of what it is.
    """
    if key is None:
        return None
    if key not in _remembered:
        try:
            found = json.loads(_file(key).read_bytes())
            if found["sha256"] != _digest(found["spec"]):
                return None
            _remembered[key] = _parsed(found["spec"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):  # absent, damaged, or not ours
            return None
    return replace(_remembered[key], name=name)


def save(key: str | None, spec: ModelSpec) -> None:
    """Keeps a description; where nothing can be written, until the process ends."""
    if key is None:
        return
    _remembered[key] = spec
    values = asdict(spec)
    with suppress(OSError):
        atomic_write_text(_file(key), json.dumps({"sha256": _digest(values), "spec": values}))
        _drop_oldest(_file(key).parent)


def _stamps(folder: Path) -> list[tuple[str, int, int]]:
    found = [(file.name, file.stat()) for file in weight_files(folder)]
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in found]


@cache
def library_versions() -> Mapping[str, str]:
    """Return the versions of the libraries that build modules."""
    return {name: version(name) for name in _LIBRARIES}


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _parsed(values: Mapping[str, Any]) -> ModelSpec:
    """The reverse of `asdict` through JSON."""
    return ModelSpec(
        **{
            **values,
            "layer_params": tuple(_params(layer) for layer in values["layer_params"]),
            "other_params": _params(values["other_params"]),
            "kv_shapes": tuple(KvShape(**shape) for shape in values["kv_shapes"]),
            "quant_shapes": tuple((rows, cols) for rows, cols in values["quant_shapes"]),
            "activations": {int(item_bytes): _costs(costs) for item_bytes, costs in values["activations"].items()},
        }
    )


def _params(sizes: Sequence[Mapping[str, Any]]) -> tuple[ParamSize, ...]:
    return tuple(ParamSize(**size) for size in sizes)


def _costs(values: Mapping[str, Any]) -> Activations:
    places = {name: tuple(RowCost(**c) for c in values[name]) for name in ("outside", "entry", "layer", "head")}
    return Activations(**places, num_masks=values["num_masks"])


def _file(key: str) -> Path:
    return cache_folder() / "specs" / f"{key}.json"


def _drop_oldest(folder: Path) -> None:
    """Descriptions by older versions are never asked for again."""
    files = sorted(folder.iterdir(), key=lambda file: file.stat().st_mtime_ns, reverse=True)
    for file in files[_MOST_FILES:]:
        file.unlink()
