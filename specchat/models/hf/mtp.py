"""MTP heads: one more decoder layer of the target, which reads its states and guesses the token after the next one.

Row t of the layer is `eh_proj [enorm(E x_{t+1}); hnorm(h_t)]`, with E the target's embeddings and h_t its state after
the last norm. The target's head scores the layer's normed output o_t, which guesses x_{t+2}. For later tokens, o_t
takes the place of the state (DeepSeek-V3, arXiv 2412.19437, section 2.2; checkpoints have the embedding's half first).

The head is the target's own class with a single layer, so that masks, rotary tables and experts are the target's.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch

from specchat.errors import UnsupportedModelError
from specchat.models.hf.attention import AttentionFunction
from specchat.models.hf.skeleton import Skeleton, build_skeleton, path_of, states_of

# Values that tell dense layers from mixtures of experts by their index; the head's layer has index 0.
_SPARSE = {"first_k_dense_replace": 0, "decoder_sparse_step": 1, "mlp_only_layers": [], "num_dense_layers": 0}
_DENSE = {"first_k_dense_replace": 1, "mlp_only_layers": [0], "num_dense_layers": 1}


@dataclass(frozen=True)
class MtpSkeleton(Skeleton):
    """An MTP head without embeddings and head, which are the target's."""

    def join(self, embeddings: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """Return the layer's input rows [S, D] from embeddings of the next tokens and states, both [S, D]."""
        layer = self.layers[0]
        rows: torch.Tensor = layer.eh_proj(torch.cat([layer.enorm(embeddings), layer.hnorm(states)], dim=-1))
        return rows

    def hidden_of(self, rows: torch.Tensor, positions: torch.Tensor, cache: Any) -> torch.Tensor:
        """Compute normed outputs [S, D] of input rows [S, D] at positions [S] (int64); append to the cache."""
        return states_of(self.decoder, rows, positions, cache)


def build_mtp(
    config: Any, dtype: torch.dtype, attention: AttentionFunction | None = None, *, has_experts: bool
) -> Skeleton:
    """Build the target's class with the head's single layer, which can run alone until `without_shared` is called.

    Args:
        config: configuration of the target, not modified.
        dtype: dtype of the parameters.
        attention: attention function that the layer calls; None for the architecture's own.
        has_experts: whether the head's layer is a mixture of experts.
    """
    skeleton = build_skeleton(one_layer(config, has_experts=has_experts), dtype, attention)
    layer, norm = skeleton.layers[0], last_norm(skeleton)
    layer.enorm, layer.hnorm = copy.deepcopy(norm), copy.deepcopy(norm)
    width = skeleton.config.hidden_size
    layer.eh_proj = torch.nn.Linear(2 * width, width, bias=False, device="meta", dtype=dtype)
    layer.requires_grad_(requires_grad=False)
    return skeleton


def norm_path(skeleton: Skeleton) -> str:
    """Return the path of the last norm in the model."""
    return path_of(skeleton.model, last_norm(skeleton))


def without_shared(skeleton: Skeleton) -> MtpSkeleton:
    """Remove the embeddings and the head from a model of `build_mtp`; the target's serve both."""
    model = skeleton.model
    for shared in (model.get_input_embeddings(), model.get_output_embeddings()):
        parent, _, name = path_of(model, shared).rpartition(".")
        model.get_submodule(parent)._modules[name] = None
    return MtpSkeleton(skeleton.config, model, skeleton.decoder, skeleton.layers, skeleton.layers_name)


def one_layer(config: Any, *, has_experts: bool) -> Any:
    """Return a copy of a configuration for a model with a single layer of full attention."""
    one = copy.deepcopy(config)
    one.per_layer_config = getattr(config, "mtp_per_layer_config", None)
    if getattr(config, "layer_types", None) is not None:
        one.layer_types = list(getattr(config, "mtp_layer_types", None) or ["full_attention"])[:1]
    if getattr(config, "mlp_layer_types", None) is not None:
        one.mlp_layer_types = ["sparse" if has_experts else "dense"]
    for name, value in (_SPARSE if has_experts else _DENSE).items():
        if hasattr(config, name):
            setattr(one, name, copy.copy(value))
    one.num_hidden_layers = 1
    one.tie_word_embeddings = False
    return one


def last_norm(skeleton: Skeleton) -> Any:
    """Return the norm after the last layer.

    Raises:
        UnsupportedModelError: there is none, or more than one.
    """
    norms = [child for name, child in skeleton.decoder.named_children() if "norm" in name]
    if len(norms) != 1:
        raise UnsupportedModelError(f"'{skeleton.config.model_type}' has no single norm after its last layer")
    return norms[0]
