"""Gemma 4's assistants: layers without keys and values of their own, which read those of the target.

A row is `pre_projection [E x; h]`, with E the target's embeddings, and h the target's state before the token x. The
layers attend to the target's keys and values of the last layer of each kind that has any. So nothing is cached, and a
text is read in no time. The state after the last norm is scored by a head of the assistant's own, and
`post_projection` of it takes the place of h for the next token. All guesses are made for the position of the text's
last token (transformers' SinglePositionMultiTokenCandidateGenerator; vLLM, pull request 41745).

The small assistants score the tokens of a few clusters only, which are chosen by another small matrix.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from specchat.errors import UnsupportedModelError
from specchat.models.checkpoint.assistant import AssistantConfig
from specchat.models.hf.eagle3 import BELOW
from specchat.models.hf.skeleton import Skeleton

MaskRule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
_OWN_KEYS = ("k_proj", "v_proj", "k_norm", "v_norm")
_PARTS = ("q_proj", "o_proj", "layer_type", "head_dim", "is_kv_shared_layer")


@dataclass(frozen=True)
class AssistantSkeleton(Skeleton):
    """An assistant without embeddings, which are the target's.

    Attributes:
        settings: settings of the assistant's own files.
    """

    settings: AssistantConfig = field(kw_only=True)

    def join(self, embeddings: Tensor, states: Tensor) -> Tensor:
        """Return the input rows [S, d] from embeddings of tokens and states before them, both [S, D]."""
        rows: Tensor = self.model.pre_projection(torch.cat([embeddings, states], dim=-1))
        return rows

    def hidden_of(
        self, rows: Tensor, positions: Tensor, cache: Any, shared: Mapping[str, tuple[Tensor, Tensor]]
    ) -> Tensor:
        """Compute the normed states [S, d] of rows [S, d].

        Args:
            rows: input rows, from `join`.
            positions: positions of the rows, int64 [S].
            cache: cache that stays empty.
            shared: the target's keys and values [1, H_kv, length, D] for each kind of layer.
        """
        out = self.decoder(
            inputs_embeds=rows[None],
            position_ids=positions[None],
            past_key_values=cache,
            use_cache=False,
            shared_kv_states=dict(shared),
        )
        hidden: Tensor = out.last_hidden_state[0]
        return hidden

    def outputs_of(self, hidden: Tensor) -> Tensor:
        """Return what children read in place of the target's state, [S, D], of normed states [S, d]."""
        outputs: Tensor = self.model.post_projection(hidden)
        return outputs

    def scores(self, hidden: Tensor) -> Tensor:
        """Return the scores, float32 [S, V], of normed states [S, d]; tokens of other clusters come last."""
        scores: Tensor = self.model.get_output_embeddings()(hidden).float()
        if not self.settings.num_clusters:
            return scores
        clusters = self.model.masked_embedding
        chosen = clusters.centroids(hidden).topk(self.settings.num_chosen, dim=-1).indices
        tokens = clusters.token_ordering.view(self.settings.num_clusters, -1)[chosen].flatten(1)
        kept = scores.gather(-1, tokens)
        scores.copy_((kept.amin(-1, keepdim=True) - BELOW).expand_as(scores))
        return scores.scatter_(-1, tokens, kept)

    def rule_of(self, rule: MaskRule) -> MaskRule:
        """Return which of the target's rows a row sees, by the layers' own rule for rows in sequence.

        A row at position q sees the rows before q; in layers with a window, q - 1 and as many before it as the window
        is long. This is one row more than the target's own layers see, as in transformers.
        """
        zero, far = torch.zeros(1, dtype=torch.int64), torch.full((1,), 1 << 40)
        slides = not bool(rule(zero, zero, far, zero))
        return partial(_rows_before, self.config.sliding_window if slides else 1 << 40)


def _rows_before(window: int, _batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return (key < query) & (query - 1 - key <= window)


def shared_layers(config: Any) -> dict[str, int]:
    """Return the target's layer of each kind whose keys and values an assistant reads: the last one that has any.

    Args:
        config: configuration of the target.
    """
    num_own = config.num_hidden_layers - (getattr(config, "num_kv_shared_layers", None) or 0)
    return {kind: index for index, kind in enumerate((getattr(config, "layer_types", None) or [])[:num_own])}


def as_assistant(skeleton: Skeleton, settings: AssistantConfig) -> AssistantSkeleton:
    """Make an assistant of a causal LM with its layers.

    Args:
        skeleton: causal LM whose layers have keys and values of their own, changed in place.
        settings: settings of the assistant's own files.

    Raises:
        UnsupportedModelError: layers that cannot read the keys and values of others.
    """
    model, decoder, config = skeleton.model, skeleton.decoder, skeleton.config
    head = model.get_output_embeddings()
    for layer in skeleton.layers:
        attention: Any = getattr(layer, "self_attn", None)
        if not all(hasattr(attention, name) for name in _PARTS):
            raise UnsupportedModelError(f"'{config.model_type}' is not a kind of layer that assistants are read with")
        attention.is_kv_shared_layer, attention.store_full_length_kv = True, False
        for name in _OWN_KEYS:
            attention._modules.pop(name, None)
    decoder.embed_tokens = None
    width, dtype = config.hidden_size, head.weight.dtype
    linear = partial(torch.nn.Linear, bias=False, device="meta", dtype=dtype)
    model.pre_projection = linear(2 * settings.target_size, width)
    model.post_projection = linear(width, settings.target_size)
    if settings.num_clusters:
        if config.vocab_size % settings.num_clusters:
            raise UnsupportedModelError(
                f"{settings.num_clusters:,} clusters of equal size do not make a vocabulary of {config.vocab_size:,}"
            )
        model.masked_embedding = torch.nn.Module()
        model.masked_embedding.centroids = linear(width, settings.num_clusters)
        ordering = torch.zeros(config.vocab_size, dtype=torch.int64)
        model.masked_embedding.register_buffer("token_ordering", ordering)
    model.requires_grad_(requires_grad=False).eval()
    return AssistantSkeleton(config, model, decoder, skeleton.layers, skeleton.layers_name, settings=settings)
