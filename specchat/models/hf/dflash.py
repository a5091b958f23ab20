"""DFlash heads: layers that guess several tokens in one pass, from the target's states of the text before.

The text's rows are `c_t = hidden_norm(fc [h^1_t; ..; h^n_t])`, of the outputs of n of the target's layers. No layer
computes them: each layer makes keys and values of them. A block holds the embeddings of the text's last token and of
masks. Its rows see the whole text and each other, and the state behind each mask guesses the token in its place. The
embeddings and the head are the target's (z-lab/dflash, DFlash; transformers' MuseGlimmerAssistantModel is one of them).

The layers are those of a class of transformers, so that attention, norms and MLP are its own.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from specchat.errors import UnsupportedModelError
from specchat.models.checkpoint.dflash import DFlashConfig, SecondConfig
from specchat.models.hf.dflash2 import add_second_parts
from specchat.models.hf.eagle3 import BELOW
from specchat.models.hf.mtp import last_norm, without_shared
from specchat.models.hf.skeleton import Skeleton, norm_like, path_of, states_of

MaskRule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
_PROJECTIONS = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True)
class DFlashSkeleton(Skeleton):
    """A DFlash head without embeddings and head, which are the target's.

    Attributes:
        settings: settings of the head's own files.
    """

    settings: DFlashConfig = field(kw_only=True)

    def project(self, part: int, states: Tensor) -> Tensor:
        """Return the part [n, D] of the joined states that comes from the states [n, D] of one layer."""
        width = states.shape[-1]
        return F.linear(states, self.decoder.fc.weight[:, part * width : (part + 1) * width])

    def keys_and_values(self, states: Tensor, positions: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield each layer's keys and values [1, H_kv, n, D] of joined states [n, D] at positions [n] (int64)."""
        rows = self.decoder.hidden_norm(states)[None]
        cos, sin = self.decoder.rotary_emb(rows, position_ids=positions[None])
        for layer in self.layers:
            attention = layer.self_attn
            keys, values = (
                each(rows).unflatten(-1, (-1, attention.head_dim)) for each in (attention.k_proj, attention.v_proj)
            )
            if hasattr(attention, "k_norm"):
                keys = attention.k_norm(keys)
            keys = keys.transpose(1, 2)
            turn = sys.modules[type(attention).__module__].apply_rotary_pos_emb
            yield turn(keys, keys, cos, sin)[1], values.transpose(1, 2)

    def scores(self, logits: Tensor, states: Tensor, parents: Tensor) -> Tensor:
        """Return the scores of the tokens below nodes, float32 [n, V].

        Args:
            logits: the target's scores of the states of the nodes' next level, float32 [n, V]; may be overwritten.
            states: states [n, D] behind these scores.
            parents: tokens of the nodes, int64 [n]; only a DFlash2 head reads them.
        """
        return logits

    def embedded(self, embeddings: Tensor) -> Tensor:
        """Return the rows of blocks from the embeddings of their tokens, both [S, D]."""
        return embeddings

    def use_blocks(self, num_rows: int) -> None:
        """Prepare for passes over blocks of `num_rows` rows each."""

    def hidden_of(self, rows: Tensor, positions: Tensor, cache: Any) -> Tensor:
        """Compute the normed states [S, D] of a block's rows [S, D] at positions [S]; append to the cache."""
        return states_of(self.decoder, rows, positions, cache)

    def rule_of(self, rule: MaskRule) -> MaskRule:
        """Return which rows a block's rows see, by the layers' own rule for rows in sequence."""
        zero, far = torch.zeros(1, dtype=torch.int64), torch.full((1,), 1 << 40)
        slides = not bool(rule(zero, zero, far, zero))
        return rule if slides and self.settings.sliding_is_causal else _in_both_directions(rule)


@dataclass(frozen=True)
class DFlash2Skeleton(DFlashSkeleton):
    """A DFlash2 head: its layers mix neighbouring rows, and its scores depend on the parent's token."""

    @property
    def _second(self) -> SecondConfig:
        assert self.settings.second is not None
        return self.settings.second

    def scores(self, logits: Tensor, states: Tensor, parents: Tensor) -> Tensor:
        """Return the scores of the tokens below nodes, as `DFlashSkeleton.scores`; those of no candidates come last."""
        second = self._second
        selected, candidates = logits.topk(min(second.num_candidates, logits.shape[-1]), dim=-1)
        selected = selected * second.output_scale
        if second.softcap > 0:
            selected = second.softcap * torch.tanh(selected / second.softcap)
        selected = selected + self.decoder.candidate_selector(states, parents, candidates)
        logits.copy_((selected.amin(-1, keepdim=True) - BELOW).expand_as(logits))
        return logits.scatter_(-1, candidates, selected)

    def embedded(self, embeddings: Tensor) -> Tensor:
        """Return the rows of blocks from the embeddings of their tokens, both [S, D]."""
        return embeddings * self._second.embedding_scale

    def use_blocks(self, num_rows: int) -> None:
        """Prepare for passes over blocks of `num_rows` rows each."""
        for layer in self.layers:
            layer.attention_conv.block_rows = layer.mlp_conv.block_rows = num_rows


def _in_both_directions(rule: MaskRule) -> MaskRule:
    """Return a rule by which rows see later rows, too, as far as these see them."""
    return lambda batch, head, query, key: rule(batch, head, torch.maximum(query, key), torch.minimum(query, key))


def as_dflash(skeleton: Skeleton, settings: DFlashConfig) -> DFlashSkeleton:
    """Make a DFlash head of a causal LM with the head's layers.

    Args:
        skeleton: causal LM, changed in place.
        settings: settings of the head's own files.

    Raises:
        UnsupportedModelError: layers without plain queries, keys and values.
    """
    decoder, config = skeleton.decoder, skeleton.config
    norm = last_norm(skeleton)
    attention = getattr(skeleton.layers[0], "self_attn", None)
    has_turn = hasattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb")
    has_parts = all(hasattr(attention, name) for name in (*_PROJECTIONS, "head_dim"))
    if path_of(decoder, norm) != "norm" or not has_turn or not has_parts or not hasattr(decoder, "rotary_emb"):
        raise UnsupportedModelError(f"'{config.model_type}' is not a kind of layer that DFlash heads are read with")
    columns = len(settings.layers) * settings.target_size
    dtype = norm.weight.dtype
    decoder.fc = torch.nn.Linear(columns, config.hidden_size, bias=False, device="meta", dtype=dtype)
    decoder.hidden_norm = norm_like(norm, config.hidden_size)
    if settings.second is not None:
        add_second_parts(skeleton, settings.second, dtype)
    skeleton.model.requires_grad_(requires_grad=False).eval()
    bare = without_shared(skeleton)
    kind = DFlashSkeleton if settings.second is None else DFlash2Skeleton
    return kind(config, bare.model, bare.decoder, bare.layers, bare.layers_name, settings=settings)
