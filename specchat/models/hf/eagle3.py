"""EAGLE-3 heads: one decoder layer that reads the states between three of the target's layers.

Row t of the layer is `[input_layernorm(E x_{t+1}); hidden_norm(f_t)]`, with `f_t = fc [h^a_t; h^b_t; h^c_t]` of the
states that enter three of the target's layers. The residual stream goes on from f_t, or from its norm. The layer's
output u_t is normed and scored by a head of its own, which knows the frequent tokens only, and guesses x_{t+2}. For
later tokens, u_t takes the place of f_t (EAGLE-3, arXiv 2503.01840, section 3). EAGLE-3.1 norms each of the three
states before `fc`, and hands on the normed u_t (NVIDIA-NeMo/Automodel, pull request 2322).

The attention and the MLP are those of a class of transformers. Its decoder passes rows of one width from layer to
layer, so the rows here hold both halves: the embedding, which the layer leaves alone, and f_t or u_t.
"""

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from specchat.errors import CorruptCheckpointError, UnsupportedModelError
from specchat.models.checkpoint.eagle3 import Eagle3Config
from specchat.models.hf.attention import AttentionFunction
from specchat.models.hf.mtp import MtpSkeleton, last_norm, one_layer
from specchat.models.hf.skeleton import Skeleton, build_skeleton, norm_like, path_of

# Scores of tokens that a head does not score lie this far below its lowest score, so that they come last. They are
# finite, because other sources add to them.
BELOW = 10.0


@dataclass(frozen=True)
class Eagle3Skeleton(MtpSkeleton):
    """An EAGLE-3 head.

    Attributes:
        settings: settings of the head's own files.
    """

    settings: Eagle3Config = field(kw_only=True)

    @property
    def has_embeddings(self) -> bool:
        """Whether the head has input embeddings of its own."""
        return self.decoder.embed_tokens is not None

    def tapped_layers(self, num_layers: int) -> tuple[int, ...]:
        """Return the layers of a target of `num_layers` layers whose entering states the head reads."""
        return self.settings.tapped_layers(num_layers)

    def join(self, embeddings: Tensor, states: Tensor) -> Tensor:
        """Return the layer's input rows [S, 2 D] from embeddings of the next tokens and joined states, both [S, D]."""
        return torch.cat([embeddings, states], dim=-1)

    def hidden_of(self, rows: Tensor, positions: Tensor, cache: Any) -> Tensor:
        """Compute the outputs [S, D] that children read, of rows [S, 2 D] at positions [S]; append to the cache."""
        outputs = super().hidden_of(rows, positions, cache)[:, self.config.hidden_size :]
        return self._normed(outputs) if self.settings.norm_output else outputs

    def project(self, part: int, states: Tensor) -> Tensor:
        """Return the part [n, D] of the joined states that comes from the states [n, D_target] of one layer."""
        decoder = self.decoder
        if self.settings.norm_states:
            states = decoder.fc_norm[part](states)
        width = states.shape[-1]
        bias = decoder.fc.bias if part == 0 else None
        return F.linear(states, decoder.fc.weight[:, part * width : (part + 1) * width], bias)

    def scores(self, outputs: Tensor) -> Tensor:
        """Return the scores, float32 [n, V], of outputs [n, D]."""
        own = self.model.get_output_embeddings()(
            outputs if self.settings.norm_output else self._normed(outputs)
        ).float()
        scores = (own.amin(-1, keepdim=True) - BELOW).repeat(1, self.config.vocab_size)
        scores[:, self._token_ids()] = own
        return scores

    def check_vocabulary(self) -> None:
        """Check that all tokens of the head are tokens of the target.

        Raises:
            CorruptCheckpointError: the map of the vocabulary leads out of it.
        """
        ids = self._token_ids()
        if int(ids.min()) < 0 or int(ids.max()) >= self.config.vocab_size:
            raise CorruptCheckpointError(
                "the head's map d2t leads out of the vocabulary", hint="download the head's files again"
            )

    def _token_ids(self) -> Tensor:
        """Return the token of each of the head's scores, int64."""
        steps: Tensor = self.decoder.d2t
        return torch.arange(len(steps), device=steps.device) + steps

    def _normed(self, outputs: Tensor) -> Tensor:
        normed: Tensor = self.decoder.head_norm(outputs)
        return normed


class Eagle3Layer(torch.nn.Module):
    """The layer of an EAGLE-3 head, made of the parts of a decoder layer; its rows are [embedding; f or u].

    Args:
        layer: decoder layer of transformers, whose parts are taken over.
        settings: settings of the head's own files.
    """

    def __init__(self, layer: Any, settings: Eagle3Config) -> None:
        super().__init__()
        self.self_attn, self.mlp = layer.self_attn, layer.mlp
        self.input_layernorm, self.post_attention_layernorm = layer.input_layernorm, layer.post_attention_layernorm
        self.hidden_norm = copy.deepcopy(layer.input_layernorm)
        self._norm_before_residual = settings.norm_before_residual
        for name in ("q_proj", "k_proj", "v_proj"):
            setattr(self.self_attn, name, _twice_as_wide(getattr(self.self_attn, name)))

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """Compute rows [1, S, 2 D], with the decoder's keywords."""
        embeddings, states = hidden_states.chunk(2, dim=-1)
        out = self._attended(embeddings, states, kwargs)
        out = out + self.mlp(self.post_attention_layernorm(out))
        return torch.cat([embeddings, out], dim=-1)

    def _attended(self, embeddings: Tensor, states: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Return the residual stream after attention; what it needs is freed before the MLP."""
        normed = self.hidden_norm(states)
        both = torch.cat([self.input_layernorm(embeddings), normed], dim=-1)
        mixed: Tensor = self.self_attn(hidden_states=both, **kwargs)[0]
        return (normed if self._norm_before_residual else states) + mixed


def build_plain(config: Any, dtype: torch.dtype, attention: AttentionFunction | None = None) -> Skeleton:
    """Build the causal LM of the head's layer, which can run alone until `as_eagle3` is called.

    Args:
        config: configuration of the layer, not modified.
        dtype: dtype of the parameters.
        attention: attention function that the layer calls; None for the architecture's own.
    """
    return build_skeleton(one_layer(config, has_experts=False), dtype, attention)


def as_eagle3(skeleton: Skeleton, settings: Eagle3Config, *, has_embeddings: bool) -> Eagle3Skeleton:
    """Make an EAGLE-3 head of a model of `build_plain`.

    Args:
        skeleton: model with one layer, changed in place.
        settings: settings of the head's own files.
        has_embeddings: whether the head has input embeddings of its own.

    Raises:
        UnsupportedModelError: a layer without plain queries, keys and values.
    """
    model, decoder, config = skeleton.model, skeleton.decoder, skeleton.config
    norm, embeddings = last_norm(skeleton), model.get_input_embeddings()
    plain = path_of(decoder, norm), path_of(decoder, embeddings), path_of(model, model.get_output_embeddings())
    parts = ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm")
    if plain != ("norm", "embed_tokens", "lm_head") or not all(hasattr(skeleton.layers[0], each) for each in parts):
        raise UnsupportedModelError(f"'{config.model_type}' is not a kind of layer that EAGLE-3 heads are read with")
    dtype = norm.weight.dtype
    skeleton.layers[0] = Eagle3Layer(skeleton.layers[0], settings)
    width = config.hidden_size
    decoder.norm, decoder.head_norm = torch.nn.Identity(), norm
    decoder.fc = _linear(settings.num_states * settings.target_size, width, has_bias=settings.has_bias, dtype=dtype)
    if settings.norm_states:
        decoder.fc_norm = torch.nn.ModuleList(norm_like(norm, settings.target_size) for _ in range(settings.num_states))
    if not has_embeddings:
        decoder.embed_tokens = None
    model.lm_head = _linear(width, settings.num_tokens, has_bias=False, dtype=dtype)
    decoder.register_buffer("d2t", torch.zeros(settings.num_tokens, dtype=torch.int64))
    model.requires_grad_(requires_grad=False).eval()
    return Eagle3Skeleton(config, model, decoder, skeleton.layers, skeleton.layers_name, settings=settings)


def _twice_as_wide(linear: Any) -> torch.nn.Linear:
    has_bias = linear.bias is not None
    return _linear(2 * linear.in_features, linear.out_features, has_bias=has_bias, dtype=linear.weight.dtype)


def _linear(columns: int, rows: int, *, has_bias: bool, dtype: torch.dtype) -> torch.nn.Linear:
    return torch.nn.Linear(columns, rows, bias=has_bias, device="meta", dtype=dtype)
