"""Activation profiling: the memory of a pass besides weights and caches, from a pass on the meta device.

The model's own modules run on torch's meta device, which only computes shapes, while every allocation is counted. The
live bytes after an operation are `a + b rows + c keys + d rows keys`, so profiles at four sizes give the formula for
any size. So the ledger follows the architecture (grouped heads, latent attention, windows, experts), also in later
versions of transformers.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from specchat.models.hf.attention import cache_for, explicit_attention, row_scope
from specchat.models.hf.hybrids import layer_kinds, layer_output
from specchat.models.hf.mixers import bind_mixers, release_mixers
from specchat.models.hf.skeleton import Skeleton, build_skeleton
from specchat.models.sizes.scans import ScanAllocations
from specchat.records.limits import MASK_FLAG_BYTES, MASK_POSITION_BYTES
from specchat.records.model import Activations, RowCost

# Multiples of the caches' alignment, far enough apart to tell the terms of the formula apart.
_SIZES = ((16, 128), (48, 128), (16, 320), (48, 320))  # rows, keys

_Place = Literal["outside", "entry", "layer"]


def profiling_skeleton(config: Any) -> Skeleton:
    """Build the modules of `config` for `profile_activations`, in float32."""
    return build_skeleton(config, torch.float32, profiling_attention)


def profile_activations(skeleton: Skeleton, dtype: torch.dtype) -> Activations | None:
    """Profile the activations of passes over a model.

    Args:
        skeleton: skeleton from `profiling_skeleton`; moved to the meta device and to `dtype`.
        dtype: dtype of weights and activations.

    Returns:
        Formulas; None for a model whose control flow depends on values, so that it cannot run on meta.
    """
    skeleton.model.to(device="meta", dtype=dtype)
    try:
        with _few_layers(skeleton), torch.inference_mode():
            logs = [_pass(skeleton, rows, keys) for rows, keys in _SIZES]
            heads = [_head(skeleton, rows, dtype) for rows, _ in _SIZES]
    except Exception:  # noqa: BLE001  models fail in any way without values; the ledger then assumes
        return None
    if len({tuple(log.places) for log in logs}) > 1 or len({len(head.places) for head in heads}) > 1:
        return None  # the operations depend on the size, so no formula holds
    return Activations(
        outside=_formulas(logs, "outside"),
        entry=_formulas(logs, "entry"),
        layer=_formulas(logs, "layer"),
        head=_formulas(heads, "outside"),
        num_masks=logs[0].num_masks,
    )


class _Log(TorchDispatchMode):
    """A log of the live bytes of tensors that operations have created, after each operation.

    Attributes:
        live: live bytes now.
        places: place of each entry: outside the layers, at the entry of a layer, or inside a layer.
        values: bytes of each entry; inside a layer, the bytes above those at its entry.
        num_masks: kinds of masks that the model requested.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self.places: list[_Place] = []
        self.values: list[int] = []
        self.num_masks = 0
        self._at_entry: int | None = None
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # On meta this operator exists for 16 bits only, but its result has the same shape for every dtype.
        is_grouped = func is torch.ops.aten._grouped_mm.default
        out = args[0].new_empty(args[0].shape[0], args[1].shape[-1]) if is_grouped else func(*args, **kwargs)
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._count(tensor, given)
        self.note()
        return out

    def note(self, more: int = 0) -> None:
        """Log the live bytes plus `more`."""
        inside = self._at_entry is not None
        self.places.append("layer" if inside else "outside")
        self.values.append(self.live + more - (self._at_entry or 0))

    @contextmanager
    def in_layer(self) -> Iterator[None]:
        """Count tensors that are created within the scope for a layer."""
        self.places.append("entry")
        self.values.append(self.live)
        self._at_entry = self.live
        try:
            yield
        finally:
            self._at_entry = None

    def _count(self, tensor: Tensor, given: set[int]) -> None:
        storage = tensor.untyped_storage()
        key, nbytes = storage._cdata, storage.nbytes()
        if key in given or key in self._seen:
            return
        self._seen.add(key)
        self.live += nbytes
        weakref.finalize(storage, self._forget, key, nbytes)

    def _forget(self, key: int, nbytes: int) -> None:
        self._seen.discard(key)
        self.live -= nbytes


class _Rows:
    """A replacement of the attention mask that gives attention functions access to the log."""

    def __init__(self, log: _Log, _mask_function: Any) -> None:
        self.log = log
        log.num_masks += 1

    def __getitem__(self, _: Any) -> _Rows:
        return self


class _Kv:
    """A layer's cache without contents, whose number of keys and values is fixed."""

    def __init__(self, rows: int, keys: int) -> None:
        self.length, self.capacity = keys - rows, keys
        self._stored: tuple[Tensor, Tensor] | None = None

    def append(self, _layout: None, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values of the whole cache, not logged: the ledger counts the cache separately."""
        with _uncounted():
            return tuple(x.new_empty(1, x.shape[1], self.capacity, x.shape[3]) for x in (keys, values))  # type: ignore[return-value]


def _uncounted() -> Any:
    from torch.utils._python_dispatch import _disable_current_modes

    return _disable_current_modes()


def _pass(skeleton: Skeleton, rows: int, keys: int) -> _Log:
    """Log the allocations of a pass of `rows` new rows that ends with `keys` keys in the cache."""
    kinds = layer_kinds(skeleton.config)
    cache = cache_for([_Kv(rows, keys) for _ in kinds], kinds=kinds)
    ids, positions = (torch.empty(rows, dtype=torch.int64, device="meta") for _ in range(2))
    log = _Log()
    forwards = [layer.forward for layer in skeleton.layers]
    try:
        for layer, forward in zip(skeleton.layers, forwards, strict=True):
            layer.forward = partial(_logged, log, forward)
        bind_mixers(skeleton.layers, [ScanAllocations() if kind in ("state", "both") else None for kind in kinds])
        with row_scope(partial(_Rows, log)), log:
            hidden = skeleton.hidden(ids, positions, cache)
        del hidden
    finally:
        release_mixers(skeleton.layers)
        for layer, forward in zip(skeleton.layers, forwards, strict=True):
            layer.forward = forward
    return log


def _logged(log: _Log, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with log.in_layer():
        return forward(*args, **kwargs)


def _head(skeleton: Skeleton, rows: int, dtype: torch.dtype) -> _Log:
    """Log the allocations of the head when it scores `rows` hidden states in float32."""
    hidden = torch.empty(rows, skeleton.config.hidden_size, dtype=dtype, device="meta")
    log = _Log()
    with log:
        scores = skeleton.head(hidden).float()
    del scores
    return log


@contextmanager
def _few_layers(skeleton: Skeleton) -> Iterator[None]:
    """Skip all but the last two layers of each kind within the scope: the others would allocate equally.

    Later layers may reuse the keys and values of the last layer of a kind.
    """
    kinds = getattr(skeleton.config, "layer_types", None) or [""] * len(skeleton.layers)
    counts: dict[Any, int] = {}
    skipped = []
    for layer, kind in reversed(list(zip(skeleton.layers, kinds, strict=True))):
        key = (kind, tuple(tuple(p.shape) for p in layer.parameters()))
        counts[key] = counts.get(key, 0) + 1
        if counts[key] > 2:
            skipped.append(layer)
    forwards = [layer.forward for layer in skipped]
    try:
        for layer in skipped:
            layer.forward = partial(_unchanged, skeleton.config)
        yield
    finally:
        for layer, forward in zip(skipped, forwards, strict=True):
            layer.forward = forward


def _unchanged(config: Any, hidden: Tensor, *_: Any, **__: Any) -> Any:
    return layer_output(config, hidden)


def profiling_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: _Rows,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Allocate the memory that the engine's tree attention allocates; a test compares the two."""
    num_heads, num_kv_heads, rows = query.shape[1], key.shape[1], query.shape[2]
    attention_mask.log.note((MASK_FLAG_BYTES * rows + MASK_POSITION_BYTES) * key.shape[2])
    q = query[0].unflatten(0, (num_kv_heads, num_heads // num_kv_heads))  # [H_kv, G, rows, D]
    if softcap is None and s_aux is None:
        if key.shape[-1] == value.shape[-1]:
            out = q.new_empty(*q.shape[:3], value.shape[-1])  # fused kernels never store the scores
        else:
            k, v = (x[0][:, None].expand(-1, q.shape[1], -1, -1) for x in (key, value))
            mask = q.new_empty(1, 1, 1, 1).expand(*q.shape[:3], key.shape[2])
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling)
    else:
        with _uncounted():  # the ledger counts masks separately
            mask = q.new_empty(1, 1, 1, 1)
        out = explicit_attention(q, key[0], value[0], mask, scaling, softcap, s_aux)
    return out.flatten(0, 1).transpose(0, 1)[None].contiguous(), None


# --- from log entries to formulas --------------------------------------------------------------------------------


def _formulas(logs: Sequence[_Log], place: _Place) -> tuple[RowCost, ...]:
    """Return the formulas of all entries at a place, without those that another formula dominates."""
    at = [i for i, found in enumerate(logs[0].places) if found == place]
    found = sorted({_formula([log.values[i] for log in logs]) for i in at}, key=_terms, reverse=True)
    kept: list[RowCost] = []
    for cost in found:
        if not any(all(a >= b for a, b in zip(_terms(other), _terms(cost), strict=True)) for other in kept):
            kept.append(cost)
    return tuple(kept)


def _formula(values: Sequence[int]) -> RowCost:
    """Fit `a + b rows + c keys + d rows keys` to the values at the four `_SIZES`."""
    (r0, k0), (r1, _), (_, k1), _ = _SIZES
    few, many, few_far, many_far = values  # in the order of `_SIZES`: few and many rows, then the same with more keys
    slope = (many - few) / (r1 - r0)
    slope_far = (many_far - few_far) / (r1 - r0)
    both = (slope_far - slope) / (k1 - k0)
    per_row = slope - both * k0
    per_key = (few_far - few) / (k1 - k0) - both * r0
    return RowCost(few - per_row * r0 - per_key * k0 - both * r0 * k0, per_row, per_key, both)


def _terms(cost: RowCost) -> tuple[float, float, float, float]:
    return cost.per_row_key, cost.per_row, cost.per_key, cost.fixed
