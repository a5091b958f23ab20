"""A lean Llama in plain PyTorch, with the parameter names of transformers' LlamaForCausalLM.

The code is short and avoids branches that would keep `torch.compile` from fusing operations.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEAD_DIM = 64
NORM_EPS = 1e-5


@dataclass(frozen=True)
class Shape:
    """The sizes of a model, with the names of transformers' config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int = HEAD_DIM
    max_position_embeddings: int = 1024
    rope_theta: float = 10000.0

    @classmethod
    def of_width(cls, hidden_size: int, layers: int, vocab_size: int) -> "Shape":
        """Return a shape with the pair's proportions: an MLP of 2.75 times the width and half as many key heads.

        Args:
            hidden_size: width, a multiple of 64.
            layers: number of blocks.
            vocab_size: number of tokens in the vocabulary.
        """
        assert hidden_size % HEAD_DIM == 0, f"the width must be a multiple of {HEAD_DIM}"
        heads, mlp = hidden_size // HEAD_DIM, -(-hidden_size * 11 // 4 // 32) * 32
        return cls(vocab_size, hidden_size, mlp, layers, heads, max(1, heads // 2))


class KeyValueCache:
    """Keys and values of the positions read so far, for decoding token by token.

    Args:
        model: model that fills the cache.
        batch: number of rows decoded together.
        capacity: positions per row.
    """

    def __init__(self, model: "Llama", batch: int, capacity: int) -> None:
        shape = model.shape
        size = (shape.num_hidden_layers, batch, shape.num_key_value_heads, capacity, shape.head_dim)
        self.keys = model.model.embed_tokens.weight.new_zeros(size)
        self.values = torch.zeros_like(self.keys)
        self.length = 0

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append a layer's new keys and values, [batch, kv_heads, new, head_dim] each, and return all so far."""
        end = self.length + keys.shape[2]
        self.keys[layer, :, :, self.length : end] = keys
        self.values[layer, :, :, self.length : end] = values
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


class RMSNorm(nn.Module):
    """RMS normalization, computed in float32 for every input dtype."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, hidden: Tensor) -> Tensor:
        """Normalize [..., size]; keep shape and dtype."""
        wide = hidden.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + NORM_EPS)
        return (wide * self.weight).to(hidden.dtype)


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary position embedding to [batch, heads, positions, head_dim]; tables: [positions, head_dim / 2]."""
    first, second = heads.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class Attention(nn.Module):
    """Causal attention with grouped keys and values."""

    def __init__(self, shape: Shape, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, shape.head_dim
        self.group = shape.num_attention_heads // shape.num_key_value_heads
        query_size, key_size = shape.num_attention_heads * self.head_dim, shape.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(shape.hidden_size, query_size, bias=False)
        self.k_proj = nn.Linear(shape.hidden_size, key_size, bias=False)
        self.v_proj = nn.Linear(shape.hidden_size, key_size, bias=False)
        self.o_proj = nn.Linear(query_size, shape.hidden_size, bias=False)

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor, cache: KeyValueCache | None) -> Tensor:
        """Attend within [batch, positions, hidden]; keep the shape."""
        queries = rotate(self._heads(self.q_proj(hidden)), cos, sin)
        keys = rotate(self._heads(self.k_proj(hidden)), cos, sin)
        values = self._heads(self.v_proj(hidden))
        if cache is not None:
            keys, values = cache.extend(self.layer, keys, values)
        mixed = self._attend(queries, keys, values)
        joined: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(2))
        return joined

    def _attend(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        if queries.shape[2] == 1:
            # Treat the query heads of a group as positions, so that no keys are copied. One token needs no mask.
            grouped = queries.reshape(queries.shape[0], -1, self.group, self.head_dim)
            return F.scaled_dot_product_attention(grouped, keys, values).flatten(1, 2).unsqueeze(2)
        # No enable_gqa: not all fused kernels take it, and copying the keys costs less than leaving the fused kernels.
        keys, values = (tensor.repeat_interleave(self.group, dim=1) for tensor in (keys, values))
        return F.scaled_dot_product_attention(queries, keys, values, is_causal=True)

    def _heads(self, flat: Tensor) -> Tensor:
        return flat.view(flat.shape[0], flat.shape[1], -1, self.head_dim).transpose(1, 2)


class MLP(nn.Module):
    """The gated feed-forward network of a block."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """Transform [..., hidden]; keep the shape."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(hidden)) * self.up_proj(hidden))
        return out


class Block(nn.Module):
    """Attention and MLP, each after a norm and with a residual connection."""

    def __init__(self, shape: Shape, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(shape, layer)
        self.mlp = MLP(shape)
        self.input_layernorm = RMSNorm(shape.hidden_size)
        self.post_attention_layernorm = RMSNorm(shape.hidden_size)

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor, cache: KeyValueCache | None) -> Tensor:
        """Transform [batch, positions, hidden]; keep the shape."""
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), cos, sin, cache)
        out: Tensor = hidden + self.mlp(self.post_attention_layernorm(hidden))
        return out


class Body(nn.Module):
    """All parts but the output layer, for the parameter names (`model.layers.0...`)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Block(shape, layer) for layer in range(shape.num_hidden_layers))
        self.norm = RMSNorm(shape.hidden_size)


class Llama(nn.Module):
    """A small Llama with tied embeddings and random weights."""

    cos: Tensor
    sin: Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.model = Body(shape)
        frequencies = shape.rope_theta ** (-torch.arange(0, shape.head_dim, 2).float() / shape.head_dim)
        angles = torch.outer(torch.arange(shape.max_position_embeddings).float(), frequencies)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        self._initialise()

    def forward(self, ids: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """Return the logits after each token, [batch, positions, vocabulary].

        Args:
            ids: token ids, int64 [batch, positions].
            cache: keys and values of earlier tokens, or None. Only an empty cache takes several positions at once.
        """
        start = 0 if cache is None else cache.length
        assert start == 0 or ids.shape[1] == 1, "a filled cache takes one token at a time"
        hidden = self.model.embed_tokens(ids)
        kind = hidden.device.type
        if torch.is_autocast_enabled(kind):
            # Autocast does not convert embeddings, and a float32 residual stream would undo most of its gain.
            hidden = hidden.to(torch.get_autocast_dtype(kind))
        cos, sin = (table[start : start + ids.shape[1]].to(hidden.dtype) for table in (self.cos, self.sin))
        for block in self.model.layers:
            hidden = block(hidden, cos, sin, cache)
        if cache is not None:
            cache.length += ids.shape[1]
        return F.linear(self.model.norm(hidden), self.model.embed_tokens.weight)

    def _initialise(self) -> None:
        for name, weight in self.named_parameters():
            if weight.dim() < 2:
                continue
            std = 0.02 if "embed" in name else weight.shape[1] ** -0.5
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                # Each block adds to the residual stream twice: keep the size of the sum independent of the depth.
                std *= 0.5 / self.shape.num_hidden_layers**0.5
            nn.init.normal_(weight, std=std)
