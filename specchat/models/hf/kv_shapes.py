"""Key-value shapes of the layers, recorded from a pass of the model's own modules on the meta device."""

import copy
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import torch

from specchat.models.hf.attention import cache_for, row_scope
from specchat.models.hf.config import kv_shapes
from specchat.models.hf.skeleton import Skeleton
from specchat.records.model import KvShape

_NOTHING = KvShape(0, 0, 0)  # of a layer that attends to the keys and values of an earlier layer


def record_kv_shapes(skeleton: Skeleton) -> tuple[KvShape, ...]:
    """Return the KV cache entry of each layer per token, from a pass that ends in each layer at its attention.

    Args:
        skeleton: skeleton with an attention function of specchat; not modified.

    Returns:
        Shapes by layer, or the shapes that the configuration names if the modules cannot run without values.
    """
    records = [_Record() for _ in skeleton.layers]
    try:
        _run(skeleton, records)
    except Exception:  # noqa: BLE001  models fail in any way without values; the self-check covers their shapes
        return kv_shapes(skeleton.config)
    return tuple(record.shape for record in records)


class _Record:
    """A layer's cache that holds nothing but the shape of what it received."""

    def __init__(self) -> None:
        self.shape = _NOTHING
        self.length, self.capacity = 0, 1

    def append(self, _layout: None, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Record the shape of keys [1, H_kv, rows, D] and values [1, H_kv, rows, D_v], and return both."""
        self.shape = KvShape(keys.shape[1], keys.shape[3], values.shape[3])
        return keys, values


class _AtAttentionError(Exception):
    """A layer has reached its attention function."""


class _Mask:
    """A replacement of the attention mask that ends a layer when its attention function uses the mask."""

    def __init__(self, _mask_function: Any) -> None:
        pass

    def __getitem__(self, _: Any) -> "_Mask":
        return self

    def __getattr__(self, _: str) -> Any:
        raise _AtAttentionError


@torch.inference_mode()
def _run(skeleton: Skeleton, records: list[_Record]) -> None:
    model = copy.deepcopy(skeleton.model).to(device="meta")
    layers = model.get_submodule(skeleton.layers_name)
    for layer in layers:
        layer.forward = partial(_until_attention, layer.forward)
    ids, positions = (torch.empty(1, 1, dtype=torch.int64, device="meta") for _ in range(2))
    with row_scope(_Mask):
        model(input_ids=ids, position_ids=positions, past_key_values=cache_for(records), use_cache=True)


def _until_attention(forward: Callable[..., Any], hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    with suppress(_AtAttentionError):
        forward(hidden, *args, **kwargs)
    return hidden
