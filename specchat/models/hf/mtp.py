"""MTP heads: one more decoder layer of the target, which reads its states and guesses the token after the next one.

Row t of the layer is `eh_proj [enorm(E x_{t+1}); hnorm(h_t)]`, with E the target's embeddings and h_t its state after
the last norm. The target's head scores the layer's normed output o_t, which guesses x_{t+2}. For later tokens, o_t
takes the place of the state (DeepSeek-V3, arXiv 2412.19437, section 2.2; checkpoints have the embedding's half first).

The head is the target's own class with a single layer, so that masks, rotary tables and experts are the target's.

Of several layers, layer k guesses one token further than layer k - 1: it reads the output of layer k - 1 in place of
the state, and the embedding of the token after the one that layer k - 1 read (equation 21 there). Each has a norm of
its own behind it.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch

from specchat.errors import UnsupportedModelError
from specchat.models.hf.attention import AttentionFunction
from specchat.models.hf.skeleton import Skeleton, build_skeleton, path_of, states_of

# Values that tell dense layers from mixtures of experts by their index, for mixtures.
_SPARSE = {"first_k_dense_replace": 0, "decoder_sparse_step": 1, "mlp_only_layers": [], "num_dense_layers": 0}


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


@dataclass(frozen=True)
class MtpStack(MtpSkeleton):
    """Several MTP layers, each with a norm of its own, that run one by one.

    Attributes:
        decoders: the decoder with one of the layers each, and without a norm.
    """

    decoders: tuple[Any, ...] = ()

    def join_at(self, index: int, embeddings: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """Return the input rows [S, D] of a layer, as `join`."""
        layer = self.layers[index]
        rows: torch.Tensor = layer.eh_proj(torch.cat([layer.enorm(embeddings), layer.hnorm(states)], dim=-1))
        return rows

    def hidden_at(self, index: int, rows: torch.Tensor, positions: torch.Tensor, cache: Any) -> torch.Tensor:
        """Compute normed outputs [S, D] of one layer, as `hidden_of`."""
        out = self.decoders[index](
            inputs_embeds=rows[None], position_ids=positions[None], past_key_values=cache, use_cache=True
        )
        hidden: torch.Tensor = self.layers[index].last_norm(out.last_hidden_state[0])
        return hidden


def build_mtp(
    config: Any,
    dtype: torch.dtype,
    attention: AttentionFunction | None = None,
    *,
    has_experts: bool,
    num_layers: int = 1,
) -> Skeleton:
    """Build the target's class with the head's layers, which can run alone until `without_shared` is called.

    Args:
        config: configuration of the target, not modified.
        dtype: dtype of the parameters.
        attention: attention function that the layers call; None for the architecture's own.
        has_experts: whether the head's layers are mixtures of experts.
        num_layers: number of the head's layers.
    """
    skeleton = build_skeleton(few_layers(config, num_layers, has_experts=has_experts), dtype, attention)
    norm, width = last_norm(skeleton), skeleton.config.hidden_size
    for layer in skeleton.layers:
        layer.enorm, layer.hnorm = copy.deepcopy(norm), copy.deepcopy(norm)
        layer.eh_proj = torch.nn.Linear(2 * width, width, bias=False, device="meta", dtype=dtype)
        if num_layers > 1:
            layer.last_norm = copy.deepcopy(norm)
        layer.requires_grad_(requires_grad=False)
    return skeleton


def norm_paths(skeleton: Skeleton) -> list[str]:
    """Return the path of each layer's last norm in a model of `build_mtp`."""
    if len(skeleton.layers) == 1:
        return [norm_path(skeleton)]
    return [f"{skeleton.layers_name}.{index}.last_norm" for index in range(len(skeleton.layers))]


def norm_path(skeleton: Skeleton) -> str:
    """Return the path of the last norm in the model."""
    return path_of(skeleton.model, last_norm(skeleton))


def without_shared(skeleton: Skeleton) -> MtpSkeleton:
    """Remove the embeddings and the head from a model of `build_mtp`; the target's serve both."""
    model = skeleton.model
    for shared in (model.get_input_embeddings(), model.get_output_embeddings()):
        parent, _, name = path_of(model, shared).rpartition(".")
        model.get_submodule(parent)._modules[name] = None
    if not hasattr(skeleton.layers[0], "last_norm"):
        return MtpSkeleton(skeleton.config, model, skeleton.decoder, skeleton.layers, skeleton.layers_name)
    norm = norm_path(skeleton).rpartition(".")[2]
    skeleton.decoder._modules[norm] = torch.nn.Identity()
    decoders = tuple(_with_layer(skeleton.decoder, layer) for layer in skeleton.layers)
    return MtpStack(skeleton.config, model, skeleton.decoder, skeleton.layers, skeleton.layers_name, decoders=decoders)


def _with_layer(decoder: Any, layer: Any) -> Any:
    """Return a decoder that shares all modules with another one, but has one of its layers alone."""
    twin = copy.copy(decoder)
    twin._modules = {
        name: torch.nn.ModuleList([layer]) if isinstance(child, torch.nn.ModuleList) and layer in list(child) else child
        for name, child in decoder._modules.items()
    }
    return twin


def one_layer(config: Any, *, has_experts: bool) -> Any:
    """Return a copy of a configuration for a model with a single layer of full attention."""
    return few_layers(config, 1, has_experts=has_experts)


def few_layers(config: Any, num_layers: int, *, has_experts: bool) -> Any:
    """Return a copy of a configuration for a model with some layers of one kind, of full attention."""
    one = copy.deepcopy(config)
    one.per_layer_config = getattr(config, "mtp_per_layer_config", None)
    if getattr(config, "layer_types", None) is not None:
        one.layer_types = list(getattr(config, "mtp_layer_types", None) or ["full_attention"])[:1] * num_layers
    if getattr(config, "mlp_layer_types", None) is not None:
        one.mlp_layer_types = ["sparse" if has_experts else "dense"] * num_layers
    dense = {
        "first_k_dense_replace": num_layers,
        "mlp_only_layers": [*range(num_layers)],
        "num_dense_layers": num_layers,
    }
    for name, value in (_SPARSE if has_experts else dense).items():
        if hasattr(config, name):
            setattr(one, name, copy.copy(value))
    one.num_hidden_layers = num_layers
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
