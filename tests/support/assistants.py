"""Tiny random assistants of Gemma 4, saved as transformers saves them, and targets that they fit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from specchat.engine.drafting.assistant import Assistant, AssistantModel
from specchat.engine.drafting.head_check import HeadCheck
from specchat.engine.drafting.paths import Paths
from specchat.engine.engine import Engine
from specchat.engine.sampling import Sampler
from specchat.engine.sequence import FinalStates, TokenSequence
from specchat.engine.tree import ROOT
from specchat.records.generation import Sampling
from specchat.records.model import ModelSource
from support.dflash import Saved
from support.heads import CPU, CTX, engine_beside, load_head_model
from support.loading import load_model
from support.tiny_models import VOCAB, make_config

WINDOW = 6  # shorter than the texts
LAYERS = 2


def save_assistant(
    folder: Path,
    target: str = "gemma4_shared",
    *,
    clusters: int = 0,
    unified: bool = False,
    vocab_size: int = VOCAB,
    seed: int = 3,
) -> Saved:
    """A random assistant for a tiny target."""
    kind = "Gemma4UnifiedAssistant" if unified else "Gemma4Assistant"
    if not hasattr(hf, f"{kind}Config"):
        pytest.skip("this version of transformers has no assistants of Gemma 4")
    ours = make_config(target)
    values = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": ours.per_layer_config[0].head_dim,
        "global_head_dim": ours.per_layer_config[1].head_dim,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": WINDOW,
        "max_position_embeddings": 512,
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": 0,
        "num_kv_shared_layers": LAYERS,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    text = hf.Gemma4UnifiedTextConfig(**values) if unified else hf.Gemma4TextConfig(**values)
    own: dict[str, Any] = {"backbone_hidden_size": ours.hidden_size}
    if clusters:
        own |= {"use_ordered_embeddings": True, "num_centroids": clusters, "centroid_intermediate_top_k": clusters // 4}
    config = getattr(hf, f"{kind}Config")(text_config=text, **own)
    config._attn_implementation = "eager"
    with _all_shared(type(text)):
        module = getattr(hf, f"{kind}ForCausalLM")._from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 1.5 * parameter.shape[-1] ** -0.5, generator=generator)
            else:
                parameter.normal_(1.0, 0.2, generator=generator)
        if clusters:
            module.masked_embedding.token_ordering.copy_(torch.randperm(vocab_size, generator=generator))
    module.save_pretrained(folder)
    return Saved(ModelSource(f"./{folder.name}", folder, part="assistant"), module)


@contextmanager
def _all_shared(config_class: type) -> Iterator[None]:
    """Let all layers read the keys of others: transformers 5.23 looks for the layer that has keys among them."""
    found = getattr(config_class, "kv_sharing_modes", None)
    if found is None:  # older versions do not look
        yield
        return

    def modes(config: Any) -> list[str | None]:
        is_assistant = config.num_kv_shared_layers == config.num_hidden_layers
        return ["reuse"] * config.num_hidden_layers if is_assistant else found.fget(config)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config_class, "kv_sharing_modes", property(modes))
        yield


def load_assistant(source: ModelSource, **sizes: Any) -> AssistantModel:
    """The modules of an assistant, resident in float32."""
    return load_head_model(source, AssistantModel, LAYERS, **sizes)


def engine_with_assistant(target: ModelSource, head: ModelSource, num_layers: int, **settings: Any) -> Engine:
    """An engine with an assistant; its settings are those of `engine_beside`."""
    return engine_beside(target, head, num_layers, partial(load_assistant, head), Assistant, **settings)


class Reader:
    """A target that reads tokens in sequence, and an assistant that is told of them."""

    def __init__(
        self, target: ModelSource, head: ModelSource, chunk_rows: int = 512, check: HeadCheck | None = None
    ) -> None:
        self.target = load_model(target, cache_rows=CTX, chunk_rows=chunk_rows)
        model = load_assistant(head, cache_rows=CTX, chunk_rows=chunk_rows)
        self.head = Assistant(model, self.target, max_rows=32, check=check)
        self.tokens: list[int] = []

    def read(self, tokens: list[int], following: int) -> None:
        first = len(self.tokens)
        hidden = self.target.append(tokens)
        self.tokens += tokens
        self.head.receive(0, FinalStates([*self.tokens, following], first, hidden))

    def sequence(self, following: int) -> TokenSequence:
        text = [*self.tokens, following]
        return TokenSequence(0, 0, text, len(text) - 1, Sampler(Sampling(), VOCAB, CPU), frozenset(), CTX, "length")

    def chain(self, following: int, tokens: list[int]) -> torch.Tensor:
        """Scores after the last token, and after each token of a chain below it, [1 + n, V]."""
        scores, rows = self.head.begin([self.sequence(following)], None)
        assert rows == 1
        found, paths = [scores], Paths.empty()
        for depth, token in enumerate(tokens):
            parent = torch.tensor([ROOT if depth == 0 else depth - 1])
            weight = torch.full((1, 1), -0.1, dtype=torch.float64)
            paths = paths.with_children(torch.zeros(1, dtype=torch.int64), parent, weight, torch.tensor([[token]]), 64)
            found.append(self.head.expand(paths, torch.tensor([depth]), None))
        self.head.end()
        self.head.commit(0, [], [])
        return torch.cat(found)
