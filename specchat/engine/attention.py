"""Attention for rows that form a tree: the mask of visible rows, and the attention function.

A pass appends rows to the cache: first committed tokens in sequence, then the nodes of a draft tree. A node sees the
committed tokens, its ancestors and itself. Each architecture adds its own rule (causal, sliding window, chunks), which
transformers provides as a function of positions. The rule is evaluated on logical positions, which siblings share.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from specchat.models.hf.attention import explicit_attention

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass
class RowLayout:
    """Positions and visibility of the rows of one pass.

    Attributes:
        prefix: number of cache rows that every row of this pass sees.
        num_linear: number of new rows in sequence; each sees the rows before; 0 if tree rows are in the cache already.
        ancestors: tree rows that each new tree row sees, itself included; bool [n, r + n] for r earlier and n new ones.
        positions: logical positions of the rows after the prefix, int64 [num_linear + r + n].
        chunk: range [begin, end) of the new rows that are computed now.
    """

    prefix: int
    num_linear: int
    ancestors: Tensor
    positions: Tensor
    chunk: tuple[int, int] = (0, 0)

    @property
    def num_rows(self) -> int:
        """Number of new rows in this pass."""
        return self.num_linear + self.ancestors.shape[0]

    @property
    def num_earlier(self) -> int:
        """Number of tree rows that are in the cache already, r."""
        return self.ancestors.shape[1] - self.ancestors.shape[0]

    def visible(self, kv_length: int) -> Tensor:
        """Return which cache rows the chunk's rows see, before the architecture's rule: bool [rows, kv_length]."""
        begin, end = self.chunk
        after = self.prefix + self.num_linear  # first tree row's index in the cache
        out = torch.zeros(end - begin, kv_length, dtype=torch.bool, device=self.positions.device)
        out[:, : self.prefix] = True
        split = min(max(self.num_linear, begin), end)  # rows [begin, split) are in sequence, [split, end) are nodes
        if begin < split:
            out[: split - begin, self.prefix : self.prefix + split] = _causal(begin, split, self.positions.device)
        if split < end:
            first, last = split - self.num_linear, end - self.num_linear
            num_seen = self.num_earlier + last
            out[split - begin :, self.prefix : after] = True
            out[split - begin :, after : after + num_seen] = self.ancestors[first:last, :num_seen]
        return out

    def query_positions(self) -> Tensor:
        """Return the logical positions of the current chunk's rows, int64 [rows]."""
        begin, end = self.chunk
        return self.positions[self.num_earlier + begin : self.num_earlier + end]

    def key_positions(self, kv_length: int) -> Tensor:
        """Return the logical positions of the first `kv_length` cache rows; rows past the chunk are masked anyway."""
        tail = self.positions[: kv_length - self.prefix]
        out = torch.zeros(kv_length, dtype=torch.int64, device=self.positions.device)
        out[: self.prefix] = torch.arange(self.prefix, device=out.device)
        out[self.prefix : self.prefix + tail.shape[0]] = tail
        return out


def _causal(begin: int, end: int, device: torch.device) -> Tensor:
    """Return rows begin..end of a causal mask over `end` columns, bool [end - begin, end]."""
    return torch.ones(end - begin, end, dtype=torch.bool, device=device).tril(begin)


class RowMask:
    """The mask of one kind of layer (full, sliding, chunked) for one pass, passed where models expect a mask tensor.

    Models pass it to the attention function untouched. The additive tensor is built on first use and kept for the
    chunk, because all layers of one kind share it.
    """

    def __init__(self, layout: RowLayout, mask_function: MaskFunction) -> None:
        self._layout = layout
        self._function = mask_function
        self._key: tuple[Any, ...] | None = None
        self._tensor: Tensor | None = None

    def __getitem__(self, _: Any) -> RowMask:
        return self  # layers that reuse an earlier layer's keys cut masks to the number of keys

    def additive(self, kv_length: int, dtype: torch.dtype) -> Tensor:
        """Return the additive mask [1, 1, rows, kv_length]: 0 for visible rows, -inf for all others."""
        key = (*self._layout.chunk, kv_length, dtype)
        if self._tensor is None or key != self._key:
            self._tensor = None  # free the last chunk's mask first
            self._key, self._tensor = key, self._build(kv_length, dtype)
        return self._tensor

    def _build(self, kv_length: int, dtype: torch.dtype) -> Tensor:
        layout = self._layout
        zero = torch.zeros(1, 1, 1, 1, dtype=torch.int64, device=layout.positions.device)
        allowed = self._function(
            zero,
            zero,
            layout.query_positions()[None, None, :, None],
            layout.key_positions(kv_length)[None, None, None, :],
        )
        allowed = allowed & layout.visible(kv_length)
        return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(~allowed, float("-inf"))


def tree_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: RowMask,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Compute attention of the current rows over the cache, with the signature that transformers expects.

    Args:
        module: attention module (unused; part of the signature).
        query: queries [1, H, rows, D].
        key: keys [1, H_kv, kv_length, D].
        value: values [1, H_kv, kv_length, D_v].
        attention_mask: mask of the pass for this kind of layer.
        scaling: factor on the scores; D^-0.5 if None.
        softcap: bound of the scores, applied as softcap * tanh(score / softcap) (Gemma 2); None for no bound.
        s_aux: learnt extra logit of each head that takes probability but has no value (attention sinks, gpt-oss).

    Returns:
        The attention output [1, rows, H, D_v], and None in place of the attention weights.
    """
    num_heads, num_kv_heads = query.shape[1], key.shape[1]
    # Treat H_kv as the batch and the query group as the heads: K and V are expanded by stride and never copied.
    q = query[0].unflatten(0, (num_kv_heads, num_heads // num_kv_heads))  # [H_kv, G, rows, D]
    mask = attention_mask.additive(key.shape[2], query.dtype)
    if softcap is None and s_aux is None:
        k = key[0][:, None].expand(-1, q.shape[1], -1, -1)
        v = value[0][:, None].expand(-1, q.shape[1], -1, -1)
        mask = mask.expand(q.shape[0], q.shape[1], -1, -1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling)
    else:
        out = explicit_attention(q, key[0], value[0], mask, scaling, softcap, s_aux)
    return out.flatten(0, 1).transpose(0, 1)[None].contiguous(), None
