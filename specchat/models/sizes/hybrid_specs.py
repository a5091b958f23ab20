"""Sizes of known hybrids, recorded from the modules that transformers builds for their configurations.

Layers of hybrids differ in kind, and so do their states and activations. So their sizes are data, not arithmetic as
those of other known models. Tests build the modules again and compare. Nothing here imports torch.
"""

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from specchat.models.sizes.cache import parsed
from specchat.records.model import ModelSpec

FILE = Path(__file__).with_suffix(".json")
# Fields with an entry for each layer. The file holds different entries once, and for each layer the index of its entry.
# Parameters of a layer are runs: a few parameters, and how often they follow on each other, as those of experts do.
BY_LAYER = ("layer_params", "kv_shapes")


def hybrid_spec(model_id: str, quant: str) -> ModelSpec:
    """Return the recorded sizes of a known hybrid in one of `QUANTS`."""
    return unfolded(_recorded()[model_id]["quants"][quant])


def unfolded(values: Mapping[str, Any]) -> ModelSpec:
    """Return a description from its recorded form, which holds equal layers once."""
    layer_params = _by_layer(values["layer_params"], [_unrolled(runs) for runs in values["layer_params"]["entries"]])
    kv_shapes = _by_layer(values["kv_shapes"], values["kv_shapes"]["entries"])
    return parsed({**values, "layer_params": layer_params, "kv_shapes": kv_shapes})


def active_hybrid_params(model_id: str) -> int:
    """Return the number of weights of a known hybrid that one token uses."""
    active: int = _recorded()[model_id]["active_params"]
    return active


def _by_layer(field: Mapping[str, Any], entries: Sequence[Any]) -> list[Any]:
    return [entries[index] for index in field["layers"]]


def _unrolled(runs: Sequence[tuple[Sequence[tuple[int, int | None]], int]]) -> list[dict[str, int | None]]:
    params = (param for pattern, times in runs for _ in range(times) for param in pattern)
    return [{"count": count, "item_bytes": item_bytes} for count, item_bytes in params]


@cache
def _recorded() -> Mapping[str, Any]:
    recorded: Mapping[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    return recorded
