"""Attention for rows that form a tree: who sees whom, as a mask, and the product itself.

A pass appends rows to the cache: first committed tokens in sequence, then the nodes of a draft tree. A node sees the
committed tokens, its ancestors and itself. On top of that each architecture has its own rule (causal, sliding window,
chunks), given by transformers as a function of positions; it is evaluated on logical positions, so siblings share one.
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
    """Where the rows of one pass stand.

    Attributes:
        prefix: cache rows that every row of this pass sees.
        num_linear: new rows in sequence, each seeing the ones before it; 0 when tree rows are in the cache already.
        ancestors: bool [n, r + n], for n new tree rows after r earlier ones: the tree rows each sees, itself included.
        positions: int64 [num_linear + r + n], logical positions of the rows after the prefix.
        chunk: the new rows that are being computed now, [begin, end).
    """

    prefix: int
    num_linear: int
    ancestors: Tensor
    positions: Tensor
    chunk: tuple[int, int] = (0, 0)

    @property
    def num_rows(self) -> int:
        """New rows of this pass."""
        return self.num_linear + self.ancestors.shape[0]

    @property
    def num_earlier(self) -> int:
        """Tree rows that are in the cache already, r."""
        return self.ancestors.shape[1] - self.ancestors.shape[0]

    def visible(self, kv_length: int) -> Tensor:
        """Which cache rows the current chunk's rows see before the architecture's own rule: bool [rows, kv_length]."""
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
        """Logical positions of the current chunk's rows: int64 [rows]."""
        begin, end = self.chunk
        return self.positions[self.num_earlier + begin : self.num_earlier + end]

    def key_positions(self, kv_length: int) -> Tensor:
        """Logical positions of the first `kv_length` cache rows; whatever lies past the chunk is masked anyway."""
        tail = self.positions[: kv_length - self.prefix]
        out = torch.zeros(kv_length, dtype=torch.int64, device=self.positions.device)
        out[: self.prefix] = torch.arange(self.prefix, device=out.device)
        out[self.prefix : self.prefix + tail.shape[0]] = tail
        return out


def _causal(begin: int, end: int, device: torch.device) -> Tensor:
    """Rows begin..end of a causal triangle over `end` columns: bool [end - begin, end]."""
    return torch.ones(end - begin, end, dtype=torch.bool, device=device).tril(begin)


class RowMask:
    """The mask of one kind of layer (full, sliding, chunked) for one pass; stands where models expect a mask tensor.

    Models hand it through to the attention untouched. The additive tensor is made on first use and kept for the chunk,
    because every layer of the kind asks for the same one.
    """

    def __init__(self, layout: RowLayout, mask_function: MaskFunction) -> None:
        self._layout = layout
        self._function = mask_function
        self._key: tuple[Any, ...] | None = None
        self._tensor: Tensor | None = None

    def additive(self, kv_length: int, dtype: torch.dtype) -> Tensor:
        """0 where a row may look and -inf elsewhere: [1, 1, rows, kv_length]."""
        key = (*self._layout.chunk, kv_length, dtype)
        if self._tensor is None or key != self._key:
            self._tensor = None  # the last chunk's makes room
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
    """Attention of the current rows over the cache, in the calling convention of transformers.

    Args:
        module: the attention module (unused; part of the convention).
        query: [1, H, rows, D].
        key: [1, H_kv, kv_length, D].
        value: [1, H_kv, kv_length, D_v].
        attention_mask: the pass's mask for this kind of layer.
        scaling: factor on the scores; D^-0.5 if None.
        softcap: scores are squashed to +-softcap by tanh (Gemma 2).
        s_aux: one learnt extra logit per head that takes probability and gives nothing (attention sinks, gpt-oss).

    Returns:
        The mixed values [1, rows, H, D_v], and None where transformers would have the weights.
    """
    num_heads, num_kv_heads = query.shape[1], key.shape[1]
    # The group moves into the heads and H_kv into the batch, so that K and V are shared by stride and never repeated.
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
