"""specchat's attention, masks and caches behind transformers' registries, and unfused attention."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from specchat.models.hf.hybrids import LayerKind

# Takes the arguments of transformers' attention functions; `row_scope` makes the mask.
AttentionFunction = Callable[..., tuple[Tensor, None]]

_row_layout: ContextVar[Any] = ContextVar("row_layout")


@contextmanager
def row_scope(make_mask: Callable[[Any], Any]) -> Iterator[None]:
    """Make every mask by `make_mask(mask_function)` within the scope, once per kind of layer and pass.

    The mask function is transformers' own rule for the kind (causal, sliding, chunked): (batch, head, query position,
    key position) -> bool, broadcast over tensors.
    """
    token = _row_layout.set(make_mask)
    try:
        yield
    finally:
        _row_layout.reset(token)


def register_attention(function: AttentionFunction) -> str:
    """Register an attention function with transformers, with masks from `row_scope`; a second call changes nothing.

    Returns:
        Name of the function in transformers: module and qualified name.

    Raises:
        ValueError: another function of the same name; replacing it would change modules that were built with it.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    name = f"{function.__module__}.{function.__qualname__}"
    if AttentionInterface().get(name, function) is not function:
        raise ValueError(f"two attention functions have the name {name}")
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, _make_mask)
    return name


def _make_mask(*, mask_function: Any, **_: Any) -> Any:
    return _row_layout.get()(mask_function)


def explicit_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scaling: float | None, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """Compute unfused attention, for features that fused kernels lack: score caps and attention sinks.

    Args:
        q: queries [H_kv, G, rows, D].
        k: keys [H_kv, kv_length, D].
        v: values [H_kv, kv_length, D_v].
        mask: additive mask, broadcast to [H_kv, G, rows, kv_length].
        scaling: factor on the scores; D^-0.5 if None.
        softcap: bound that tanh squashes the scores to.
        sinks: one extra logit per head that takes probability but adds no value, [H_kv * G].

    Returns:
        Attention output [H_kv, G, rows, D_v].
    """
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    scores = torch.matmul(q.flatten(1, 2), k.transpose(1, 2)).unflatten(1, q.shape[1:3]) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores + mask
    if sinks is not None:
        column = sinks.reshape(q.shape[0], -1, 1, 1).expand(-1, -1, q.shape[2], 1)
        scores = torch.cat([scores, column.to(scores.dtype)], dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(v.dtype)
    if sinks is not None:
        weights = weights[..., :-1]
    mixed: Tensor = torch.matmul(weights.flatten(1, 2), v).unflatten(1, q.shape[1:3])
    return mixed


def cache_for(layers: Sequence[Any], layout: Callable[[], Any] = lambda: None, kinds: Sequence[LayerKind] = ()) -> Any:
    """Wrap key-value buffers (with `length`, `capacity` and `append`) as a transformers cache.

    Args:
        layers: buffers of each layer.
        layout: function that returns the layout of the current pass, which `append` receives.
        kinds: kind of each layer; empty if all layers keep rows.
    """
    from transformers.cache_utils import Cache, CacheLayerMixin, LinearAttentionCacheLayerMixin

    class Rows(CacheLayerMixin):
        is_sliding = False

        def __init__(self, kv: Any) -> None:
            super().__init__()
            self.kv = kv
            self.is_initialized = True

        def lazy_initialization(self, key_states: Any, value_states: Any) -> None:
            raise AssertionError("buffers are allocated before the first pass")

        def update(self, key_states: Any, value_states: Any, *_: Any, **__: Any) -> tuple[Any, Any]:
            keys, values = self.kv.append(layout(), key_states, value_states)
            return keys, values

        def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
            return self.kv.length + query_length, 0

        def get_seq_length(self) -> int:
            return int(self.kv.length)

        def get_max_length(self) -> int:
            return int(self.kv.capacity)

    class State(LinearAttentionCacheLayerMixin):
        """A layer without a state, so that mixers take their branch for many rows; specchat's scans have the state."""

        def lazy_initialization(self, *_: Any, **__: Any) -> None:
            raise AssertionError("states are allocated before the first pass")

        def update_conv_state(self, conv_states: Any, state_idx: int = 0, **_: Any) -> Any:
            assert state_idx == 0, "a mixer has one convolution"
            return conv_states

        def update_recurrent_state(self, recurrent_states: Any, state_idx: int = 0, **_: Any) -> Any:
            assert not recurrent_states.numel(), "a mixer has called a scan that is not specchat's"
            return recurrent_states

    class Both(State, Rows):
        is_croppable = False

        def __init__(self, kv: Any) -> None:
            State.__init__(self)
            Rows.__init__(self, kv)

        get_max_length = Rows.get_max_length

    class States(Cache):
        """A cache without rows of keys, whose length transformers cannot ask of any layer."""

        def get_seq_length(self, layer_idx: int = 0) -> int:
            return 0  # positions are always given

        def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
            return query_length, 0

    make: dict[LayerKind, Callable[[Any], Any]] = {
        "rows": Rows,
        "both": Both,
        "state": lambda _: State(),
        "nothing": lambda _: State(),
    }
    of_layers: Sequence[LayerKind] = kinds or ["rows"] * len(layers)
    cache_class = Cache if {"rows", "both"} & set(of_layers) else States
    return cache_class(layers=[make[kind](kv) for kv, kind in zip(layers, of_layers, strict=True)])
