"""Tiny random DFlash heads: transformers' assistant of this kind, saved under the names of published heads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import save_file

from specchat.engine.drafting.dflash import DFlashHead, DFlashModel
from specchat.engine.drafting.head_check import HeadCheck
from specchat.engine.drafting.paths import Paths
from specchat.engine.engine import Engine
from specchat.engine.layout import PassLayout, linear_layout
from specchat.engine.sampling import Sampler
from specchat.engine.sequence import FinalStates, TokenSequence
from specchat.engine.tree import ROOT
from specchat.records.generation import Sampling
from specchat.records.model import ModelSource
from support.heads import CPU, CTX, engine_beside, load_head_model
from support.loading import load_model
from support.tiny_models import BASE, VOCAB, randomize

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


def save_muse(folder: Path) -> Saved:
    """The same head in the files that transformers writes of Muse's assistant."""
    saved = save_dflash(folder)
    saved.module.save_pretrained(folder)
    return saved


def random_muse() -> Any:
    """A tiny Muse, whose embeddings have a norm."""
    text = hf.MuseGlimmerTextConfig(
        **BASE,
        head_dim=16,
        layer_types=["sliding_attention", "full_attention"] * 2,
        layer_rope_theta=[10000.0, 0] * 2,
        sliding_window=500,
    )
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"patch_size": 4, "pos_emb_height": 4, "pos_emb_width": 4, "layer_types": ["full_attention"]}
    config = hf.MuseGlimmerConfig(text_config=text.to_dict(), vision_config=vision)
    return randomize(hf.AutoModelForMultimodalLM.from_config(config, dtype=torch.float32).eval())


def load_dflash(source: ModelSource, **sizes: int) -> DFlashModel:
    """The modules of a head, resident in float32."""
    return load_head_model(source, DFlashModel, 2, **sizes)


def engine_with_dflash(target: ModelSource, head: ModelSource, num_layers: int, **settings: Any) -> Engine:
    """An engine with a DFlash head; its settings are those of `engine_beside`."""
    return engine_beside(target, head, num_layers, partial(load_dflash, head), DFlashHead, **settings)


def load_pair(
    target: ModelSource, head: ModelSource, chunk_rows: int = 512, check: HeadCheck | None = None
) -> DFlashHead:
    """A head beside a resident target."""
    model = load_model(target, cache_rows=CTX, chunk_rows=chunk_rows)
    return DFlashHead(load_dflash(head, cache_rows=CTX, chunk_rows=chunk_rows), model, max_rows=CTX - 64, check=check)


class Reader:
    """A target that reads tokens in sequence, and a head that is told of them."""

    def __init__(self, head: DFlashHead) -> None:
        self.head = head
        self.tokens: list[int] = []

    def read(self, tokens: list[int], following: int) -> None:
        target, taps, first = self.head._target, self.head.taps, len(self.tokens)
        assert taps is not None
        hidden = target.forward(tokens, PassLayout.single(linear_layout(first, len(tokens), CPU)), taps=taps)
        self.tokens += tokens
        self.head.receive(0, FinalStates([*self.tokens, following], first, hidden, taps.take()))

    def sequence(self, following: int) -> TokenSequence:
        text = [*self.tokens, following]
        return TokenSequence(0, 0, text, len(text) - 1, Sampler(Sampling(), VOCAB, CPU), frozenset(), CTX, "length")

    def levels(self, following: int, chain: Sequence[int] = (7,) * (BLOCK - 2)) -> torch.Tensor:
        """Scores of all levels below the last token, [levels, V], asked along a chain of nodes."""
        first, rows = self.head.begin([self.sequence(following)], None)
        assert rows == BLOCK
        scores, paths = [first], Paths.empty()
        for depth, token in enumerate(chain):
            parent = torch.tensor([ROOT if depth == 0 else depth - 1])
            weight = torch.full((1, 1), -0.1, dtype=torch.float64)
            paths = paths.with_children(torch.zeros(1, dtype=torch.int64), parent, weight, torch.tensor([[token]]), 64)
            scores.append(self.head.expand(paths, torch.tensor([depth]), None))
        self.head.end()
        self.head.commit(0, [], [])
        return torch.cat(scores)
