"""Tiny random models with an MTP layer in their checkpoint, in both layouts, and heads loaded from them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from specchat.engine import loading
from specchat.engine.attention import tree_attention
from specchat.engine.drafting.drafter import TreeDrafter, free_sources
from specchat.engine.drafting.head_check import HeadCheck
from specchat.engine.drafting.mtp import MtpHead, MtpModel
from specchat.engine.drafting.mtp_stack import MtpStackHead, MtpStackModel
from specchat.engine.drafting.paths import Paths
from specchat.engine.engine import Engine
from specchat.engine.model import TreeModel
from specchat.engine.sampling import Sampler
from specchat.engine.sequence import FinalStates, TokenSequence
from specchat.engine.tree import ROOT
from specchat.models.weights.open import open_weights
from specchat.records.generation import Sampling
from specchat.records.model import ModelSource, Quant
from specchat.records.plan import Placement, Workload
from support.engines import make_plan
from support.hybrids import random_hybrid
from support.loading import load_model
from support.tiny_models import BASE, VOCAB, make_config, random_model, save

HeadModel = TypeVar("HeadModel", bound=TreeModel)

CTX = 96
CPU = torch.device("cpu")
# Layout of the tensors, by architecture.
LAYOUTS = {"deepseek_v3": "layer", "glm4_moe": "layer", "qwen3_5_text": "mtp", "qwen3_next": "mtp", "qwen3": "mtp"}
# Names of Qwen's layout that llama.cpp's converter replaces.
_QWEN = {
    "mtp.fc.": "eh_proj.",
    "mtp.pre_fc_norm_embedding.": "enorm.",
    "mtp.pre_fc_norm_hidden.": "hnorm.",
    "mtp.norm.": "shared_head.norm.",
    "mtp.layers.0.": "",
}
_COUNTS = {"layer": "num_nextn_predict_layers", "mtp": "mtp_num_hidden_layers"}
_GLM: dict[str, Any] = {
    **BASE,
    "head_dim": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "use_qk_norm": True,
}


def random_target(architecture: str, seed: int = 0) -> Any:
    """A float32 target without its head."""
    if architecture == "glm4_moe":
        return random_model(hf.Glm4MoeConfig(**_GLM), seed)
    if architecture in {"qwen3_5_text", "qwen3_next"}:
        return random_hybrid(architecture, seed)
    return random_model(make_config(architecture), seed)


def save_with_mtp(model: Any, folder: Path, layout: str, seed: int = 5, num_layers: int = 1) -> ModelSource:
    """A checkpoint with MTP layers that are like the model's last layer with attention, and random elsewhere."""
    source = save(model, folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    last, width = model.config.num_hidden_layers, model.config.hidden_size
    generator = torch.Generator().manual_seed(seed)
    layers = [n for n in range(last) if any(f"model.layers.{n}.self_attn." in key for key in tensors)]
    prefix = f"model.layers.{layers[-1]}."
    own = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    head = dict[str, torch.Tensor]()
    for number in range(num_layers):
        layer = {name: _like(value, generator) for name, value in own.items()}
        norms = [0.1 * torch.randn(width, generator=generator) + (layout != "mtp") for _ in range(3)]
        join = torch.randn(width, 2 * width, generator=generator) * 0.1
        if layout == "mtp":
            outer = {"fc.weight": join, "pre_fc_norm_embedding.weight": norms[0], "pre_fc_norm_hidden.weight": norms[1]}
            head |= {f"mtp.layers.{number}.{name}": value for name, value in layer.items()}
            head |= {f"mtp.{name}": value for name, value in (outer | {"norm.weight": norms[2]}).items()}
        else:
            outer = {"eh_proj.weight": join, "enorm.weight": norms[0], "hnorm.weight": norms[1]}
            outer["shared_head.norm.weight"] = norms[2]
            outer["shared_head.head.weight"] = tensors["lm_head.weight"].clone()
            head |= {f"model.layers.{last + number}.{name}": value for name, value in (layer | outer).items()}
    save_file({**tensors, **{key: value.contiguous() for key, value in head.items()}}, file, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, _COUNTS[layout]: num_layers}))
    return source


def head_tensors(source: ModelSource, num_layers: int, num_heads: int = 1) -> dict[str, torch.Tensor]:
    """The tensors of saved MTP layers, numbered behind the last layer, with experts in stacks."""
    stored, found = load_file(source.path / "model.safetensors"), dict[str, torch.Tensor]()
    for number in range(num_heads):
        own, prefix = dict[str, torch.Tensor](), f"model.layers.{num_layers + number}."
        for key, value in stored.items():
            place = next((place for place in _QWEN if key.startswith(place)), None)
            if place is not None:
                own[_QWEN[place] + key.removeprefix(place)] = value
            elif key.startswith(prefix):
                own[key.removeprefix(prefix)] = value
        found |= {prefix + name: value for name, value in _with_stacks(own).items()}
    return found


def _with_stacks(own: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a layer, with experts in stacks."""
    experts = sorted({int(match[1]) for name in own if (match := re.match(r"mlp\.experts\.(\d+)\.", name))})

    def stacked(name: str) -> torch.Tensor:
        return torch.stack([own.pop(f"mlp.experts.{expert}.{name}.weight") for expert in experts])

    if experts:
        gates, ups = stacked("gate_proj"), stacked("up_proj")
        own |= {"mlp.experts.gate_up_proj": torch.cat([gates, ups], 1), "mlp.experts.down_proj": stacked("down_proj")}
    return own


def _like(value: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return value + 0.05 * torch.randn(value.shape, generator=generator).to(value.dtype)


def head_of(target: ModelSource) -> ModelSource:
    """The MTP head in a target's files."""
    return replace(target, name="mtp", part="mtp")


def load_head_model(
    source: ModelSource,
    model_class: type[HeadModel],
    num_layers: int = 1,
    *,
    cache_rows: int,
    chunk_rows: int = 512,
    seats: int = 1,
    quant: Quant = "none",
) -> HeadModel:
    """The modules of a head of any kind, resident in float32."""
    weights = open_weights(source, "fp32", quant, tree_attention)
    work = Workload("cpu", "fp32", cache_rows, 0, 0, chunk_rows, seats=seats)
    placement = Placement(num_layers, tuple(range(num_layers)))
    model = loading.load_model(weights, work, placement, cache_rows=cache_rows, model_class=model_class)
    assert isinstance(model, model_class)
    return model


def load_head(target: ModelSource, **sizes: int) -> MtpModel:
    """The modules of the MTP head in a target's files."""
    return load_head_model(head_of(target), MtpModel, **sizes)


def load_stack(target: ModelSource, num_layers: int, **sizes: int) -> MtpStackModel:
    """The modules of several MTP layers in a target's files."""
    return load_head_model(head_of(target), MtpStackModel, num_layers, **sizes)


def engine_beside(
    target: ModelSource,
    head: ModelSource,
    num_layers: int,
    load: Callable[..., HeadModel],
    make: Callable[..., Any],
    *,
    budget: int,
    resident: Iterable[int] | None = None,
    chunk_rows: int = 512,
    ctx: int = 256,
    seats: int = 1,
    retrieval: bool = False,
    check: HeadCheck | None = None,
) -> Engine:
    """An engine whose head is not checked, because a random one agrees by chance only.

    Args:
        target, head: their files.
        num_layers: number of the target's layers.
        load: function that loads the head's modules, with the sizes of `load_head_model`.
        make: function from these modules and the target to a source of draft nodes.
        budget: nodes of a tree.
        resident, chunk_rows, ctx, seats, retrieval: as in `make_plan`.
        check: check of the head's guesses; None for no check.
    """
    plan = make_plan(
        target,
        head,
        num_layers=num_layers,
        resident=resident,
        ctx=ctx,
        tree_budget=budget,
        chunk_rows=chunk_rows,
        seats=seats,
        retrieval=retrieval,
    )
    weights = open_weights(target, "fp32", "none", tree_attention)
    model = loading.load_model(weights, plan.work, plan.placement, cache_rows=ctx + budget)
    rows = 2 * budget
    source = make(load(cache_rows=ctx + rows, chunk_rows=chunk_rows, seats=seats), model, max_rows=rows, check=check)
    return Engine(plan, model, TreeDrafter(source, free_sources(seats) if retrieval else ()))


def engine_with_head(target: ModelSource, num_layers: int, **settings: Any) -> Engine:
    """An engine with the MTP head in the target's files."""
    return engine_beside(target, head_of(target), num_layers, partial(load_head, target), MtpHead, **settings)


def engine_with_stack(target: ModelSource, num_layers: int, num_heads: int, **settings: Any) -> Engine:
    """An engine with several MTP layers in the target's files."""
    load = partial(load_stack, target, num_heads)
    return engine_beside(target, head_of(target), num_layers, load, MtpStackHead, **settings)


class Follower:
    """A target that reads tokens in sequence, and a head that is told of them."""

    def __init__(self, source: ModelSource, chunk_rows: int = 512, num_layers: int = 1) -> None:
        self.source = source
        self.target: TreeModel = load_model(source, cache_rows=CTX, chunk_rows=chunk_rows)
        self.head: MtpHead
        self.model: MtpModel
        if num_layers > 1:
            stack = load_stack(source, num_layers, cache_rows=CTX, chunk_rows=chunk_rows)
            self.model, self.head = stack, MtpStackHead(stack, self.target, max_rows=32, check=None)
        else:
            self.model = load_head(source, cache_rows=CTX, chunk_rows=chunk_rows)
            self.head = MtpHead(self.model, self.target, max_rows=32, check=None)
        self.tokens: list[int] = []

    def read(self, tokens: list[int], following: int) -> None:
        """Let the target read tokens, and draw the one after them."""
        first = len(self.tokens)
        hidden = self.target.append(tokens)
        self.tokens += tokens
        self.head.receive(0, FinalStates([*self.tokens, following], first, hidden))

    def sequence(self, following: int) -> TokenSequence:
        text = [*self.tokens, following]
        sampler = Sampler(Sampling(), VOCAB, CPU)
        return TokenSequence(0, 0, text, len(text) - 1, sampler, frozenset(), CTX, "length")

    def chain(self, following: int, tokens: list[int]) -> torch.Tensor:
        """Scores after the last token, and after each token of a chain below it, [1 + n, V]."""
        scores, _ = self.head.begin([self.sequence(following)], None)
        rows, paths = [scores], Paths.empty()
        for depth, token in enumerate(tokens):
            parent = torch.tensor([ROOT if depth == 0 else depth - 1])
            weight = torch.full((1, 1), -0.1, dtype=torch.float64)
            paths = paths.with_children(torch.zeros(1, dtype=torch.int64), parent, weight, torch.tensor([[token]]), 64)
            rows.append(self.head.expand(paths, torch.tensor([depth]), None))
        self.head.commit(0, [], [])
        return torch.cat(rows)
