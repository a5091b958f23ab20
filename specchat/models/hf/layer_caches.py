"""specchat's buffers of keys, values and states as caches of transformers.

Importing this module imports transformers' caches, which takes time: import it inside functions.
"""

from collections.abc import Callable
from typing import Any

from transformers.cache_utils import Cache, CacheLayerMixin, LinearAttentionCacheLayerMixin


class Rows(CacheLayerMixin):
    """A layer that keeps rows of keys and values.

    Args:
        kv: buffers of the layer, with `length`, `capacity` and `append`.
        layout: function that returns the layout of the current pass, which `append` receives.
    """

    is_sliding = False

    def __init__(self, kv: Any, layout: Callable[[], Any]) -> None:
        super().__init__()
        self.kv, self._layout = kv, layout
        self.is_initialized = True

    def lazy_initialization(self, key_states: Any, value_states: Any) -> None:
        """Never called: buffers are allocated before the first pass."""
        raise AssertionError("buffers are allocated before the first pass")

    def update(self, key_states: Any, value_states: Any, *_: Any, **__: Any) -> tuple[Any, Any]:
        """Append the rows of a pass, and return all keys and values that it sees."""
        keys, values = self.kv.append(self._layout(), key_states, value_states)
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of keys that a pass sees, and the position of the first."""
        return self.kv.length + query_length, 0

    def get_seq_length(self) -> int:
        """Return the number of rows."""
        return int(self.kv.length)

    def get_max_length(self) -> int:
        """Return the number of rows that have room."""
        return int(self.kv.capacity)


class State(LinearAttentionCacheLayerMixin):
    """A layer without a state, so that mixers take their branch for many rows; specchat's scans have the state."""

    def lazy_initialization(self, *_: Any, **__: Any) -> None:
        """Never called: states are allocated before the first pass."""
        raise AssertionError("states are allocated before the first pass")

    def update_conv_state(self, conv_states: Any, state_idx: int = 0, **_: Any) -> Any:
        """Return the inputs of the convolution, which keeps its own window."""
        assert state_idx == 0, "a mixer has one convolution"
        return conv_states

    def update_recurrent_state(self, recurrent_states: Any, state_idx: int = 0, **_: Any) -> Any:
        """Return the empty state that specchat's scans leave to transformers."""
        assert not recurrent_states.numel(), "a mixer has called a scan that is not specchat's"
        return recurrent_states


class Both(State, Rows):
    """A layer with a recurrent mixer beside attention."""

    is_croppable = False

    def __init__(self, kv: Any, layout: Callable[[], Any]) -> None:
        State.__init__(self)
        Rows.__init__(self, kv, layout)

    get_max_length = Rows.get_max_length


class States(Cache):
    """A cache without rows of keys, whose length transformers cannot ask of any layer."""

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return 0: positions are always given."""
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Return the sizes of a mask over the rows of a pass alone."""
        return query_length, 0
