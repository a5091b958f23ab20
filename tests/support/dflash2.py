"""Tiny random DFlash2 heads, and their equations, computed from scratch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from specchat.records.model import ModelSource
from support.dflash import BLOCK, LAYERS, MASK, WIDTH, save_dflash
from support.tiny_models import VOCAB

HEADS, KV_HEADS, HEAD_DIM, EPS, THETA = 4, 2, 16, 1e-6, 10000.0
TAPS, GROUP, RANK, TOP, SCALE, MULTIPLIER, CAP = 2, 16, 12, 5, 1.3, 0.9, 20.0


@dataclass(frozen=True)
class Saved:
    """A head's files and tensors."""

    source: ModelSource
    tensors: dict[str, Tensor]


def save_dflash2(folder: Path, *, sliding: bool = False, seed: int = 11) -> Saved:
    """A random head in a folder: a DFlash head with the further parts."""
    source = save_dflash(folder, sliding=sliding).source
    generator = torch.Generator().manual_seed(seed)
    file = folder / "model.safetensors"

    def matrix(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * shape[-1] ** -0.5

    tensors = load_file(file)
    for layer in range(2):
        for conv in ("attention_conv", "mlp_conv"):
            path = f"layers.{layer}.{conv}"
            one = torch.tensor([1.0, 0.4])[None, :, None]
            tensors[f"{path}.base_kernel"] = one + 0.2 * torch.randn(2, TAPS, WIDTH, generator=generator)
            tensors[f"{path}.kernel_projection.weight"] = 0.2 * matrix(2 * TAPS * WIDTH // GROUP, WIDTH)
    for codebook in ("predecessor_codebook", "successor_codebook"):
        tensors[f"candidate_selector.{codebook}"] = 2 * torch.randn(VOCAB, RANK, generator=generator)
    tensors["candidate_selector.hidden_projection.weight"] = matrix(RANK, WIDTH)
    save_file(tensors, file, {"format": "pt"})
    written = folder / "config.json"
    config = json.loads(written.read_text())
    own = {"selector_rank": RANK, "selector_top_k": TOP, "conv_kernel_size": TAPS, "conv_group_size": GROUP}
    own |= {"input_embedding_scale": SCALE, "output_multiplier": MULTIPLIER, "final_logit_softcapping": CAP}
    changed = {"architectures": ["DFlash2DraftModel"], "dflash_config": config["dflash_config"] | own}
    written.write_text(json.dumps(config | changed))
    return Saved(source, tensors)


# --- the equations, from scratch -------------------------------------------------------------------------------------


@torch.no_grad()
def slow_levels(model: Any, saved: Saved, text: list[int]) -> list[tuple[Tensor, Tensor]]:
    """Each level's scores by the target [V], and its state [D], behind a text."""
    t = saved.tensors
    states = model.model(torch.tensor([text[:-1]]), output_hidden_states=True).hidden_states
    known = torch.cat([states[layer + 1][0] for layer in LAYERS], -1) @ t["fc.weight"].T
    known = _norm(known, t["hidden_norm.weight"])
    rows = SCALE * model.model.embed_tokens.weight[torch.tensor([text[-1], *[MASK] * (BLOCK - 1)])]
    for layer in range(2):
        w = {n.removeprefix(f"layers.{layer}."): v for n, v in t.items() if n.startswith(f"layers.{layer}.")}
        rows = _layer(w, known, rows)
    out = _norm(rows, t["norm.weight"])[1:]
    return list(zip(model.lm_head(out), out, strict=True))


def slow_scores(saved: Saved, level: tuple[Tensor, Tensor], parent: int) -> dict[int, float]:
    """The scores of a level's candidates below a parent's token."""
    logits, state = level
    a, b = (saved.tensors[f"candidate_selector.{side}_codebook"] for side in ("predecessor", "successor"))
    projected = saved.tensors["candidate_selector.hidden_projection.weight"] @ state
    found = {}
    for token in logits.topk(TOP).indices.tolist():
        pair = sum(float(a[parent, r]) * float(projected[r]) * float(b[token, r]) for r in range(RANK))
        found[token] = CAP * float(torch.tanh(MULTIPLIER * logits[token] / CAP)) + pair
    return found


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * (x.pow(2).mean(-1, keepdim=True) + EPS).rsqrt() * weight


def _turned(x: Tensor, first: int) -> Tensor:
    """Heads [rows, heads, D] with rotary positions from `first` on."""
    half = HEAD_DIM // 2
    angles = torch.arange(first, first + len(x))[:, None] * THETA ** (-torch.arange(half) / half)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    return torch.cat([x[..., :half] * cos - x[..., half:] * sin, x[..., half:] * cos + x[..., :half] * sin], -1)


def _layer(w: dict[str, Tensor], known: Tensor, rows: Tensor) -> Tensor:
    given = _norm(rows, w["input_layernorm.weight"])
    mixed = _mixed(w, "attention_conv", given, given, 0)
    rows = rows + _mixed(w, "attention_conv", given, _attended(w, known, mixed), 1)
    given = _norm(rows, w["post_attention_layernorm.weight"])
    inner = _mixed(w, "mlp_conv", given, given, 0)
    gate, up = inner @ w["mlp.gate_proj.weight"].T, inner @ w["mlp.up_proj.weight"].T
    return rows + _mixed(w, "mlp_conv", given, (F.silu(gate) * up) @ w["mlp.down_proj.weight"].T, 1)


def _mixed(w: dict[str, Tensor], conv: str, given: Tensor, rows: Tensor, side: int) -> Tensor:
    """A convolution, row by row; `given` are the sublayer's input rows, which tell the coefficients."""
    out = []
    for j in range(len(rows)):
        told = (w[f"{conv}.kernel_projection.weight"] @ given[j]).view(2, TAPS, WIDTH // GROUP)[side]
        total = torch.zeros(WIDTH)
        for tap in range(min(TAPS, j + 1)):
            for column in range(WIDTH):
                k = w[f"{conv}.base_kernel"][side, tap, column] + told[tap, column // GROUP]
                total[column] += k * rows[j - tap, column]
        out.append(total)
    return torch.stack(out)


def _attended(w: dict[str, Tensor], known: Tensor, rows: Tensor) -> Tensor:
    def heads(x: Tensor, name: str) -> Tensor:
        out = (x @ w[f"self_attn.{name}_proj.weight"].T).unflatten(-1, (-1, HEAD_DIM))
        return out if name == "v" else _norm(out, w[f"self_attn.{name}_norm.weight"])

    q = _turned(heads(rows, "q"), len(known))
    k = _turned(torch.cat([heads(known, "k"), heads(rows, "k")]), 0).repeat_interleave(HEADS // KV_HEADS, 1)
    v = torch.cat([heads(known, "v"), heads(rows, "v")]).repeat_interleave(HEADS // KV_HEADS, 1)
    weights = (torch.einsum("qhd,khd->hqk", q, k) * HEAD_DIM**-0.5).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v).flatten(1) @ w["self_attn.o_proj.weight"].T
