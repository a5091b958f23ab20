"""Our attention, masks and caches behind transformers' registries, and attention as textbooks have it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

# Takes what transformers gives its attention functions, but for the mask: that is what `row_scope` makes.
AttentionFunction = Callable[..., tuple[Tensor, None]]

_row_layout: ContextVar[Any] = ContextVar("row_layout")


@contextmanager
def row_scope(make_mask: Callable[[Any], Any]) -> Iterator[None]:
    """While it lasts, masks are made by `make_mask(mask_function)`, once per kind of layer and pass.

    The mask function is transformers' own rule for the kind (causal, sliding, chunked): (batch, head, query position,
    key position) -> bool, broadcast over tensors.
    """
    token = _row_layout.set(make_mask)
    try:
        yield
    finally:
        _row_layout.reset(token)


def register_attention(function: AttentionFunction) -> str:
    """Make transformers know an attention function, whose masks `row_scope` makes; again is the same as once.

    Returns:
        The name that transformers knows the function by: the function's own, with its module's.

    Raises:
        ValueError: another function has the same name, and modules that were built with it would change.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    name = f"{function.__module__}.{function.__qualname__}"
    if AttentionInterface().get(name, function) is not function:
        raise ValueError(f"two attention functions are called {name}")
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, _make_mask)
    return name


def _make_mask(*, mask_function: Any, **_: Any) -> Any:
    return _row_layout.get()(mask_function)


def explicit_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scaling: float | None, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """Compute the textbook product, for what fused kernels lack: caps on scores, and attention sinks.

    Args:
        q: [H_kv, G, rows, D].
        k: [H_kv, kv_length, D].
        v: [H_kv, kv_length, D_v].
        mask: added to the scores; broadcast to [H_kv, G, rows, kv_length].
        scaling: factor on the scores; D^-0.5 if None.
        softcap: bound that tanh squashes the scores to.
        sinks: one extra logit per head that takes probability and gives nothing, [H_kv * G].

    Returns:
        The mixed values [H_kv, G, rows, D_v].
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


def cache_for(layers: Sequence[Any]) -> Any:
    """Presents key-value buffers (with `length`, `capacity` and `append`) as a transformers cache."""
    from transformers.cache_utils import Cache, CacheLayerMixin

    class Layer(CacheLayerMixin):
        is_sliding = False

        def __init__(self, kv: Any) -> None:
            super().__init__()
            self.kv = kv
            self.is_initialized = True

        def lazy_initialization(self, key_states: Any, value_states: Any) -> None:
            raise AssertionError("buffers are made before the first pass")

        def update(self, key_states: Any, value_states: Any, *_: Any, **__: Any) -> tuple[Any, Any]:
            keys, values = self.kv.append(key_states, value_states)
            return keys, values

        def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
            return self.kv.length + query_length, 0

        def get_seq_length(self) -> int:
            return int(self.kv.length)

        def get_max_length(self) -> int:
            return int(self.kv.capacity)

    return Cache(layers=[Layer(kv) for kv in layers])
