"""Shapes of what the layers cache, recorded from a pass of the model's own modules on the meta device."""

import copy
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from specchat.errors import UnsupportedModelError
from specchat.models.hf.attention import cache_for, row_scope
from specchat.models.hf.config import kv_shapes
from specchat.models.hf.hybrids import LayerKind, asks_for_caches, layer_kinds, layer_output
from specchat.models.hf.mixers import bind_mixers, mixers_of
from specchat.models.hf.refusals import CANNOT_RUN, HINT
from specchat.models.hf.skeleton import Skeleton
from specchat.records.model import KvShape, StateShape

_NOTHING = KvShape(0, 0, 0)  # of a layer that attends to the keys and values of an earlier layer


def record_kv_shapes(skeleton: Skeleton) -> tuple[KvShape, ...]:
    """Return what each layer caches, from a pass that ends in each layer at its attention or its scan.

    Args:
        skeleton: skeleton with an attention function of specchat; not modified.

    Returns:
        Shapes by layer, or the shapes that the configuration names if the modules cannot run without values.

    Raises:
        UnsupportedModelError: recurrent layers that cannot run without values, so that their states have no known size.
    """
    records = [_Record(kind) for kind in layer_kinds(skeleton.config)]
    try:
        _run(skeleton, records)
    except Exception as error:  # models fail in any way without values; the self-check covers their shapes
        if any(record.has_state for record in records):
            raise UnsupportedModelError(f"'{skeleton.config.model_type}' {CANNOT_RUN}", HINT) from error
        return kv_shapes(skeleton.config)
    return tuple(record.shape for record in records)


def nothing_cached(skeleton: Skeleton) -> tuple[KvShape, ...]:
    """Return the shapes of layers that cache nothing."""
    return (_NOTHING,) * len(skeleton.layers)


class _Record:
    """A layer's cache that holds nothing but the shapes of what it received.

    Args:
        kind: kind of the layer.
    """

    def __init__(self, kind: LayerKind) -> None:
        self.has_state = kind in ("state", "both")
        self.length, self.capacity = 0, 1
        self._rows = _NOTHING
        self._state: StateShape | None = None

    @property
    def lacks_state(self) -> bool:
        """Whether a recurrent layer's mixer has not run."""
        return self.has_state and self._state is None

    @property
    def shape(self) -> KvShape:
        """Shape of what the layer caches."""
        assert not self.lacks_state, "a recurrent layer has a state"
        return replace(self._rows, state=self._state)

    def append(self, _layout: None, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Record the shape of keys [1, H_kv, rows, D] and values [1, H_kv, rows, D_v], and return both."""
        self._rows = KvShape(keys.shape[1], keys.shape[3], values.shape[3])
        return keys, values

    def convolve(self, x: torch.Tensor, weight: torch.Tensor, _bias: torch.Tensor | None) -> torch.Tensor:
        """Record the shape of a convolution with weights [C, taps]."""
        self._state = StateShape(*weight.shape)
        return x

    def scan(
        self, _q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, _beta: torch.Tensor, *, delta: bool
    ) -> torch.Tensor:
        """Record the shape of a recurrence over keys [rows, H_k, D] and values [rows, H, D_v]."""
        assert self._state is not None, "a recurrence follows on a convolution"
        decays = 1 if g.ndim == 2 else g.shape[2]
        self._state = replace(
            self._state,
            key_heads=k.shape[1],
            heads=v.shape[1],
            key_dim=k.shape[2],
            value_dim=v.shape[2],
            decays=decays,
        )
        return v.float()

    def scan_channels(
        self, _q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, _steps: torch.Tensor, rates: torch.Tensor
    ) -> torch.Tensor:
        """Record the shape of a recurrence over keys [rows, D] and values [rows, H]."""
        assert self._state is not None, "a recurrence follows on a convolution"
        self._state = replace(
            self._state, key_heads=1, heads=v.shape[1], key_dim=k.shape[1], value_dim=1, rates=rates.shape[1]
        )
        return v.float()


class _AtAttentionError(Exception):
    """A layer has reached its attention function, or the end of its only mixer."""


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
    config = skeleton.config
    kinds = layer_kinds(config)
    model = copy.deepcopy(skeleton.model).to(device="meta")
    layers = model.get_submodule(skeleton.layers_name)
    bind_mixers(layers, [record if record.has_state else None for record in records])
    for layer, kind in zip(layers, kinds, strict=True):
        for mixer in mixers_of(layer) if kind == "state" else ():
            mixer.forward = partial(_then_end, mixer.forward)
        layer.forward = partial(_until_mixer, config, None if kind == "nothing" else layer.forward)
    ids, positions = (torch.empty(1, 1, dtype=torch.int64, device="meta") for _ in range(2))
    cache = cache_for(records, kinds=kinds)
    with row_scope(_Mask):
        model(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=asks_for_caches(config))
    hidden = torch.empty(1, 1, config.hidden_size, dtype=next(model.parameters()).dtype, device="meta")
    for layer, record in zip(layers, records, strict=True):
        for mixer in mixers_of(layer) if record.lacks_state else ():  # it comes after attention, as in Zamba 2
            mixer(hidden)


def _then_end(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    forward(*args, **kwargs)
    raise _AtAttentionError


def _until_mixer(
    config: Any, forward: Callable[..., Any] | None, hidden: torch.Tensor, *args: Any, **kwargs: Any
) -> Any:
    if forward is not None:
        with suppress(_AtAttentionError):
            forward(hidden, *args, **kwargs)
    return layer_output(config, hidden)
