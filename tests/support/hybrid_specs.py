"""Records the sizes of the known hybrids: `PYTHONPATH=.:tests python -m support.hybrid_specs`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from specchat.models.catalog.known_models import KnownModel, known_models
from specchat.models.hf.config import load_config
from specchat.models.hf.skeleton import build_skeleton
from specchat.models.sizes.hybrid_specs import BY_LAYER, FILE
from specchat.models.sizes.inspect import inspect_model
from specchat.models.sizes.known_specs import is_hybrid
from specchat.records.model import QUANTS, ModelSource

_KINDS = {"granitemoehybrid": ("attention", "mamba"), "lfm2": ("full_attention", "conv")}
_KINDS["lfm2_moe"] = _KINDS["lfm2"]


def known_hybrids() -> list[KnownModel]:
    return [model for model in known_models().values() if is_hybrid(model)]


def config_values(model: KnownModel) -> dict[str, Any]:
    """What the model's config.json says about sizes."""
    values = dict(model.config)
    if "attention_layers" in values:
        attention, other = _KINDS[values["model_type"]]
        with_attention = values.pop("attention_layers")
        layers = range(values["num_hidden_layers"])
        values["layer_types"] = [attention if layer in with_attention else other for layer in layers]
    return values


def record(model: KnownModel, quants: tuple[str, ...] = QUANTS) -> dict[str, Any]:
    """The sizes of a model as the file holds them."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(config_values(model)))
        source = ModelSource(model.id, folder)
        found = {quant: compact(json.loads(json.dumps(asdict(inspect_model(source, quant))))) for quant in quants}
        return {"active_params": _active_params(folder), "quants": found}


def compact(values: dict[str, Any]) -> dict[str, Any]:
    if values["lookup_item_bytes"] is None:  # plain embeddings, the default
        del values["lookup_item_bytes"]
    for name in BY_LAYER:
        entries = list({json.dumps(entry): entry for entry in values[name]}.values())
        values[name] = {"entries": entries, "layers": [entries.index(entry) for entry in values[name]]}
    layers = values["layer_params"]
    layers["entries"] = [_runs([[size["count"], size["item_bytes"]] for size in layer]) for layer in layers["entries"]]
    return values


def _runs(items: list[Any]) -> list[Any]:
    """Patterns of at most 8 items with the number of their repetitions, which make up the items."""
    runs, begin = [], 0
    while begin < len(items):
        best, most = 1, 1
        for period in range(1, 9):
            pattern, times = items[begin : begin + period], 1
            while items[begin + times * period : begin + (times + 1) * period] == pattern:
                times += 1
            if period * (times - 1) > best * (most - 1):
                best, most = period, times
        runs.append([items[begin : begin + best], most])
        begin += best * most
    return runs


def _active_params(folder: Path) -> int:
    """The number of weights that a token uses: of the experts, those that its router chooses."""
    config = load_config(folder)
    per_token = getattr(config, "num_experts_per_tok", None) or getattr(config, "top_k_experts", 0)
    active = 0
    for name, parameter in build_skeleton(config, torch.bfloat16).model.named_parameters():
        is_stack = ".experts." in name
        active += parameter.numel() * per_token // parameter.shape[0] if is_stack else parameter.numel()
    return active


def main() -> None:
    recorded = {model.id: record(model) for model in known_hybrids()}
    FILE.write_text(json.dumps(recorded, separators=(",", ":")) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
