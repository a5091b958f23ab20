"""Tiny random EAGLE-3 heads in the layouts in which they are published, and the equations, computed from scratch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from specchat.engine.drafting.eagle3 import Eagle3Head, Eagle3Model
from specchat.engine.drafting.head_check import HeadCheck
from specchat.engine.engine import Engine
from specchat.engine.layout import PassLayout, linear_layout
from specchat.engine.sequence import FinalStates
from specchat.records.model import ModelSource
from support.heads import CPU, CTX, Follower, engine_beside, load_head_model
from support.loading import load_model
from support.tiny_models import VOCAB

HEADS, KV_HEADS, HEAD_DIM, INNER, EPS, THETA = 4, 2, 16, 96, 1e-6, 10000.0


@dataclass(frozen=True)
class Kind:
    """A kind of head.

    Attributes:
        style: words of the files: "specforge" or "speculators".
        width: hidden width of the head.
        num_tokens: tokens that the head scores.
        layers: layers that config.json names; empty for the usual ones.
        own_embeddings: whether the files have embeddings.
        before: whether the residual stream goes on from the norm.
        version: "3" or "3.1".
    """

    style: str = "specforge"
    width: int = 64
    num_tokens: int = 120
    layers: tuple[int, ...] = ()
    own_embeddings: bool = False
    before: bool = False
    version: str = "3"


KINDS = {
    "specforge": Kind(),
    "speculators": Kind("speculators", 48, 90, (1, 2, 4), own_embeddings=True, before=True),
    "3.1": Kind(version="3.1", num_tokens=VOCAB, layers=(0, 2, 3)),
}


@dataclass(frozen=True)
class Saved:
    """A head's files and tensors, the latter under SpecForge's names."""

    source: ModelSource
    kind: Kind
    tensors: dict[str, Tensor]


def save_eagle3(target_width: int, folder: Path, kind: Kind, seed: int = 7) -> Saved:
    """A random head in a folder."""
    generator = torch.Generator().manual_seed(seed)
    width = kind.width

    def matrix(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator) * columns**-0.5

    def norm(size: int) -> Tensor:
        return 1 + 0.2 * torch.randn(size, generator=generator)

    queries, keys = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    layer = {
        "self_attn.q_proj.weight": matrix(queries, 2 * width),
        "self_attn.k_proj.weight": matrix(keys, 2 * width),
        "self_attn.v_proj.weight": matrix(keys, 2 * width),
        "self_attn.o_proj.weight": matrix(width, queries),
        "mlp.gate_proj.weight": matrix(INNER, width),
        "mlp.up_proj.weight": matrix(INNER, width),
        "mlp.down_proj.weight": matrix(width, INNER),
        "input_layernorm.weight": norm(width),
        "hidden_norm.weight": norm(width),
        "post_attention_layernorm.weight": norm(width),
    }
    tensors = {f"midlayer.{name}": value for name, value in layer.items()}
    tensors |= {"fc.weight": matrix(width, 3 * target_width), "norm.weight": norm(width)}
    tensors["lm_head.weight"] = 3 * matrix(kind.num_tokens, width)
    if kind.num_tokens < VOCAB:
        known = torch.randperm(VOCAB, generator=generator)[: kind.num_tokens].sort().values
        tensors["d2t"] = known - torch.arange(kind.num_tokens)
        tensors["t2d"] = torch.zeros(VOCAB, dtype=torch.bool).index_fill(0, known, True)
    if kind.own_embeddings:
        tensors["embed_tokens.weight"] = torch.randn(VOCAB, width, generator=generator)
    if kind.version == "3.1":
        tensors |= {f"fc_norm.{part}.weight": norm(target_width) for part in range(3)}
    folder.mkdir(parents=True)
    save_file(_renamed(tensors, kind), folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(_config(target_width, kind)))
    return Saved(ModelSource(f"./{folder.name}", folder, part="eagle3"), kind, tensors)


def _renamed(tensors: dict[str, Tensor], kind: Kind) -> dict[str, Tensor]:
    if kind.style == "specforge":
        return tensors
    return {name.replace("midlayer.", "layers.0."): value for name, value in tensors.items()}


def _config(target_width: int, kind: Kind) -> dict[str, Any]:
    layer: dict[str, Any] = {
        "model_type": "llama",
        "hidden_size": kind.width,
        "intermediate_size": INNER,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "num_hidden_layers": 1,
        "vocab_size": VOCAB,
        "max_position_embeddings": 512,
        "rms_norm_eps": EPS,
        "rope_theta": THETA,
    }
    own: dict[str, Any] = {"draft_vocab_size": kind.num_tokens}
    if kind.style == "speculators":
        own |= {"norm_before_residual": kind.before, "target_hidden_size": target_width}
        own |= {"eagle_aux_hidden_state_layer_ids": list(kind.layers), "speculators_model_type": "eagle3"}
        return {"architectures": ["Eagle3Speculator"], "transformer_layer_config": layer, **own}
    if kind.version == "3.1":
        own |= {"fc_norm": True, "norm_output": True}
    if kind.layers:
        own["eagle_config"] = {"eagle_aux_hidden_state_layer_ids": list(kind.layers)}
    return {"architectures": ["LlamaForCausalLMEagle3"], **layer, **own}


# --- the equations, from scratch -------------------------------------------------------------------------------------


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * (x.pow(2).mean(-1, keepdim=True) + EPS).rsqrt() * weight


def _turned(x: Tensor) -> Tensor:
    """Heads [rows, heads, D] with rotary positions from 0 on."""
    half = HEAD_DIM // 2
    angles = torch.arange(len(x))[:, None] * THETA ** (-torch.arange(half) / half)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    return torch.cat([x[..., :half] * cos - x[..., half:] * sin, x[..., half:] * cos + x[..., :half] * sin], -1)


@torch.no_grad()
def slow_chain(model: Any, saved: Saved, text: list[int], chain: list[int]) -> Tensor:
    """Scores after a text and after each token of a chain, of the tokens that the head knows, [1 + n, num_tokens]."""
    t, kind = saved.tensors, saved.kind
    num_layers = model.config.num_hidden_layers
    states = model.model(torch.tensor([text[:-1]]), output_hidden_states=True).hidden_states
    layers = kind.layers or (2, num_layers // 2, num_layers - 3)
    assert max(layers) < num_layers or layers[-1] == num_layers
    entering = [states[layer][0] if layer < num_layers else last_output(model, text[:-1]) for layer in layers]
    if kind.version == "3.1":
        entering = [_norm(each, t[f"fc_norm.{part}.weight"]) for part, each in enumerate(entering)]
    given = torch.cat(entering, -1) @ t["fc.weight"].T
    table = t.get("embed_tokens.weight", model.model.embed_tokens.weight)
    scores = []
    for depth in range(len(chain) + 1):
        out = _layer(t, kind, table[torch.tensor([*text[1:], *chain[:depth]])], given)[-1]
        normed = _norm(out, t["norm.weight"])
        scores.append(normed @ t["lm_head.weight"].T)
        given = torch.cat([given, (normed if kind.version == "3.1" else out)[None]])
    return torch.stack(scores)


def last_output(model: Any, tokens: list[int]) -> Tensor:
    """What the last layer returns, [rows, hidden]."""
    found = list[Any]()
    hook = model.model.layers[-1].register_forward_hook(lambda _module, _given, out: found.append(out))
    model.model(torch.tensor([tokens]))
    hook.remove()
    out: Tensor = found[0][0] if isinstance(found[0], tuple) else found[0]
    return out[0] if out.ndim == 3 else out


def _layer(t: dict[str, Tensor], kind: Kind, embeddings: Tensor, given: Tensor) -> Tensor:
    w = {name.removeprefix("midlayer."): value for name, value in t.items() if name.startswith("midlayer.")}
    normed = _norm(given, w["hidden_norm.weight"])
    both = torch.cat([_norm(embeddings, w["input_layernorm.weight"]), normed], -1)
    q, k, v = ((both @ w[f"self_attn.{name}_proj.weight"].T).unflatten(-1, (-1, HEAD_DIM)) for name in "qkv")
    q, k = _turned(q), _turned(k)
    k, v = (each.repeat_interleave(HEADS // KV_HEADS, 1) for each in (k, v))
    weights = torch.einsum("qhd,khd->hqk", q, k) * HEAD_DIM**-0.5
    weights = weights.masked_fill(torch.ones(len(q), len(q)).triu(1).bool(), -torch.inf).softmax(-1)
    mixed = torch.einsum("hqk,khd->qhd", weights, v).flatten(1)
    out = (normed if kind.before else given) + mixed @ w["self_attn.o_proj.weight"].T
    inner = _norm(out, w["post_attention_layernorm.weight"])
    gate, up = inner @ w["mlp.gate_proj.weight"].T, inner @ w["mlp.up_proj.weight"].T
    return out + (F.silu(gate) * up) @ w["mlp.down_proj.weight"].T


def known_tokens(saved: Saved) -> Tensor:
    """Token of each score of a head."""
    steps = saved.tensors.get("d2t", torch.zeros(saved.kind.num_tokens, dtype=torch.int64))
    return torch.arange(saved.kind.num_tokens) + steps


# --- loading ---------------------------------------------------------------------------------------------------------


def load_eagle3(source: ModelSource, **sizes: Any) -> Eagle3Model:
    """The modules of a head, resident in float32; `sizes` are those of `load_head_model`."""
    return load_head_model(source, Eagle3Model, **sizes)


def engine_with_eagle3(target: ModelSource, head: ModelSource, num_layers: int, **settings: Any) -> Engine:
    """An engine with an EAGLE-3 head; its settings are those of `engine_beside`."""
    return engine_beside(target, head, num_layers, partial(load_eagle3, head), Eagle3Head, **settings)


class Eagle3Follower(Follower):
    """A target that reads tokens in sequence, and an EAGLE-3 head that is told of them."""

    def __init__(
        self,
        target: ModelSource,
        head: ModelSource,
        chunk_rows: int = 512,
        check: HeadCheck | None = None,
        quant: str = "none",
    ) -> None:
        self.source = target
        self.target = load_model(target, cache_rows=CTX, chunk_rows=chunk_rows)
        self.model = load_eagle3(head, cache_rows=CTX, chunk_rows=chunk_rows, quant=quant)
        self.head = Eagle3Head(self.model, self.target, max_rows=32, check=check)
        self.tokens = []

    def read(self, tokens: list[int], following: int) -> None:
        """Let the target read tokens, and draw the one after them."""
        first, taps = len(self.tokens), self.head.taps
        assert taps is not None
        layout = PassLayout.single(linear_layout(first, len(tokens), CPU))
        hidden = self.target.forward(tokens, layout, taps=taps)
        self.tokens += tokens
        self.head.receive(0, FinalStates([*self.tokens, following], first, hidden, taps.take()))
