"""Our attention, masks and caches behind transformers' registries."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

ATTENTION = "tree"

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


def use_attention(function: Callable[..., Any]) -> None:
    """Names the attention that skeletons are built with; called once, by the engine."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, function)


def register_attention(name: str, function: Callable[..., Any]) -> None:
    """Another attention that skeletons can be built with; its masks are made by `row_scope`, too."""
    from transformers import AttentionInterface

    AttentionInterface.register(name, function)
    register_masks(name)


def register_masks(name: str) -> None:
    """Let `row_scope` make the masks of an attention."""
    from transformers import AttentionMaskInterface

    def make_mask(*, mask_function: Any, **_: Any) -> Any:
        return _row_layout.get()(mask_function)

    AttentionMaskInterface.register(name, make_mask)


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
