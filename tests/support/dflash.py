"""Tiny random DFlash heads: transformers' assistant of this kind, saved under the names of published heads."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import save_file

from specchat.engine import loading
from specchat.engine.attention import tree_attention
from specchat.engine.drafting.dflash import DFlashHead, DFlashModel
from specchat.engine.drafting.drafter import TreeDrafter, free_sources
from specchat.engine.drafting.head_check import HeadCheck
from specchat.engine.engine import Engine
from specchat.models.weights.open import open_weights
from specchat.records.model import ModelSource
from specchat.records.plan import Placement, Workload
from support.engines import make_plan
from support.heads import CTX
from support.loading import load_model
from support.tiny_models import VOCAB

WIDTH, BLOCK, MASK = 64, 6, VOCAB - 1
LAYERS = (0, 1, 2)  # transformers hands over the last layer with its norm


@dataclass(frozen=True)
class Saved:
    """A head's files, and the module of transformers that computes the same."""

    source: ModelSource
    module: Any


def save_dflash(folder: Path, *, sliding: bool = False, seed: int = 3) -> Saved:
    """A random head in a folder."""
    if not hasattr(hf, "MuseGlimmerAssistantConfig"):
        pytest.skip("this version of transformers has no head that guesses in blocks")
    values: dict[str, Any] = {
        "hidden_size": WIDTH,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "layer_types": ["sliding_attention" if sliding else "full_attention", "full_attention"],
        "sliding_window": 500,
    }
    own = {"block_size": BLOCK, "mask_token_id": MASK, "target_layer_ids": list(LAYERS)}
    config = hf.MuseGlimmerAssistantConfig(**values, **own, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    config._attn_implementation = "eager"
    module = hf.AutoModel.from_config(config).float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 1.5 * parameter.shape[-1] ** -0.5, generator=generator)
            else:
                assert "norm" in name
                parameter.normal_(1.0, 0.2, generator=generator)
    tensors = {
        name.replace("encoder.fc", "fc").replace("encoder.output_norm_enc", "hidden_norm"): value.clone()
        for name, value in module.state_dict().items()
    }
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    dflash = {"mask_token_id": MASK, "target_layer_ids": list(LAYERS), "causal": False}
    written = {
        "architectures": ["DFlashDraftModel"],
        "model_type": "qwen3",
        "vocab_size": VOCAB,
        **values,
        "use_sliding_window": sliding,
        "block_size": BLOCK,
        "num_target_layers": 4,
        "dflash_config": dflash,
    }
    (folder / "config.json").write_text(json.dumps(written))
    return Saved(ModelSource(f"./{folder.name}", folder, part="dflash"), module)


def load_dflash(source: ModelSource, *, cache_rows: int, chunk_rows: int = 512, seats: int = 1) -> DFlashModel:
    """The modules of a head, resident in float32."""
    weights = open_weights(source, "fp32", "none", tree_attention)
    work = Workload("cpu", "fp32", cache_rows, 0, 0, chunk_rows, seats=seats)
    placement = Placement(2, (0, 1))
    model = loading.load_model(weights, work, placement, cache_rows=cache_rows, model_class=DFlashModel)
    assert isinstance(model, DFlashModel)
    return model


def engine_with_dflash(
    target: ModelSource,
    head: ModelSource,
    num_layers: int,
    *,
    budget: int,
    resident: Iterable[int] | None = None,
    chunk_rows: int = 512,
    ctx: int = 256,
    seats: int = 1,
    retrieval: bool = False,
    check: HeadCheck | None = None,
) -> Engine:
    """An engine whose head is not checked, because a random one agrees by chance only."""
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
    small = load_dflash(head, cache_rows=ctx + rows, chunk_rows=chunk_rows, seats=seats)
    source = DFlashHead(small, model, max_rows=rows, check=check)
    return Engine(plan, model, TreeDrafter(source, free_sources(seats) if retrieval else ()))


def load_pair(
    target: ModelSource, head: ModelSource, chunk_rows: int = 512, check: HeadCheck | None = None
) -> DFlashHead:
    """A head beside a resident target."""
    model = load_model(target, cache_rows=CTX, chunk_rows=chunk_rows)
    return DFlashHead(load_dflash(head, cache_rows=CTX, chunk_rows=chunk_rows), model, max_rows=CTX - 64, check=check)
