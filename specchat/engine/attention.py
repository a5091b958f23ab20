"""Attention for rows that form trees: the masks of visible rows, and the attention function.

Each architecture adds its own rule of visibility (causal, sliding window, chunks), which transformers provides as a
function of positions. The rule is evaluated on logical positions, which siblings share.

Each part of a pass attends to its own region of the cache. A mask over all regions would be exact, too, but its cost
grows with the square of the number of sequences: for ten sequences of 17 rows and 1,024 keys each, attention takes 26
ms by parts and 234 ms with one mask (one core).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from specchat.engine.layout import Part, PassLayout, RowLayout
from specchat.models.hf.attention import explicit_attention
from specchat.records.limits import padded_rows

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class RowMask:
    """The mask of one kind of layer (full, sliding, chunked) for one part of a pass.

    The additive tensor is built on first use and kept for the chunk, because all layers of one kind share it. It is
    built where the layout is, and moved once to each other device that has such layers.
    """

    def __init__(self, layout: RowLayout, mask_function: MaskFunction) -> None:
        self._layout = layout
        self._function = mask_function
        self._key: tuple[Any, ...] | None = None
        self._tensor: Tensor | None = None
        self._elsewhere: dict[torch.device, Tensor] = {}

    def additive(self, kv_length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return the additive mask [1, 1, rows, kv_length]: 0 for visible rows, -inf for all others."""
        key = (*self._layout.chunk, kv_length, dtype)
        if self._tensor is None or key != self._key:
            self._tensor = None  # free the last chunk's mask first
            self._elsewhere.clear()
            self._key, self._tensor = key, self._build(kv_length, dtype)
        if self._tensor.device == device:
            return self._tensor
        if device not in self._elsewhere:
            self._elsewhere[device] = self._tensor.to(device)
        return self._elsewhere[device]

    def _build(self, kv_length: int, dtype: torch.dtype) -> Tensor:
        allowed = self._allowed(kv_length)
        return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(~allowed, float("-inf"))

    def _allowed(self, kv_length: int) -> Tensor:
        """Return which cache rows the chunk's rows see, bool [1, 1, rows, kv_length]."""
        layout = self._layout
        zero = torch.zeros(1, 1, 1, 1, dtype=torch.int64, device=layout.positions.device)
        allowed = self._function(
            zero,
            zero,
            layout.query_positions()[None, None, :, None],
            layout.key_positions(kv_length)[None, None, None, :],
        )
        return allowed & layout.visible(kv_length)


class PassMask:
    """The masks of one kind of layer for all parts of a pass, passed where models expect a mask tensor.

    Models pass it to the attention function untouched.

    Args:
        layout: parts of the pass.
        capacity: rows of a seat in the cache.
        mask_function: transformers' rule for this kind of layer.
    """

    def __init__(self, layout: PassLayout, capacity: int, mask_function: MaskFunction) -> None:
        self._layout = layout
        self._capacity = capacity
        self._function = mask_function
        self._chunk: tuple[int, int] | None = None
        self._current: list[tuple[slice, slice, RowMask]] = []
        self._kept: dict[tuple[int, int], list[tuple[slice, slice, RowMask]]] = {}

    def __getitem__(self, _: Any) -> PassMask:
        return self  # layers that reuse an earlier layer's keys cut masks to the number of keys

    def current(self) -> list[tuple[slice, slice, RowMask]]:
        """Return, for each part of the current chunk, its rows, its region of the keys, and its mask."""
        chunk = self._layout.chunk
        if self._chunk != chunk:  # masks of other chunks are freed here, unless the chunks come again
            self._chunk = chunk
            if (found := self._kept.get(chunk)) is None:
                current = self._layout.current
                found = [(rows, self._region(part), self._mask(part.layout)) for part, rows in current]
            if chunk in self._layout.kept:
                self._kept[chunk] = found
            self._current = found
        return self._current

    def _mask(self, layout: RowLayout) -> RowMask:
        """Return the mask of one part."""
        return RowMask(layout, self._function)

    def _region(self, part: Part) -> slice:
        """Return the part's rows among the keys, which begin with the lowest seat of the pass."""
        begin = (part.seat - self._layout.first_seat) * self._capacity
        return slice(begin, begin + padded_rows(part.layout.length))


def tree_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: PassMask,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Compute attention of the current rows over the cache, with the signature that transformers expects.

    Args:
        module: attention module (unused; part of the signature).
        query: queries [1, H, rows, D].
        key: keys [1, H_kv, kv_length, D] of all seats of the pass.
        value: values [1, H_kv, kv_length, D_v] of all seats of the pass.
        attention_mask: masks of the pass for this kind of layer.
        scaling: factor on the scores; D^-0.5 if None.
        softcap: bound of the scores, applied as softcap * tanh(score / softcap) (Gemma 2); None for no bound.
        s_aux: learnt extra logit of each head that takes probability but has no value (attention sinks, gpt-oss).

    Returns:
        The attention output [1, rows, H, D_v], and None in place of the attention weights.
    """
    parts = attention_mask.current()
    if len(parts) == 1:
        _rows, region, mask = parts[0]
        out = _attend(query[0], key[0, :, region], value[0, :, region], mask, scaling, softcap, s_aux)
        return out[None].contiguous(), None
    outs = query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])
    for rows, region, mask in parts:
        outs[0, rows] = _attend(
            query[0, :, rows], key[0, :, region], value[0, :, region], mask, scaling, softcap, s_aux
        )
    return outs, None


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    row_mask: RowMask,
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Return the output [rows, H, D_v] of one part: queries [H, rows, D], keys and values [H_kv, kv_length, ...]."""
    num_heads, num_kv_heads = query.shape[0], key.shape[0]
    # Treat H_kv as the batch and the query group as the heads: K and V are expanded by stride and never copied.
    q = query.unflatten(0, (num_kv_heads, num_heads // num_kv_heads))  # [H_kv, G, rows, D]
    mask = row_mask.additive(key.shape[1], query.dtype, query.device)
    if softcap is None and sinks is None:
        if query.shape[1] == 1 and query.device.type == "cpu":
            # A CPU prepares K and V once for each head, so a group becomes the rows of one head. In bfloat16, a row of
            # 16 heads in groups of 4 takes 25 instead of 160 us over 64 keys, and 63 instead of 697 over 256 (Zen 5).
            q = q.transpose(1, 2)
        k = key[:, None].expand(-1, q.shape[1], -1, -1)
        v = value[:, None].expand(-1, q.shape[1], -1, -1)
        mask = mask.expand(*q.shape[:3], -1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling)
    else:
        out = explicit_attention(q, key, value, mask, scaling, softcap, sinks)
    return out.reshape(num_heads, query.shape[1], -1).transpose(0, 1)
