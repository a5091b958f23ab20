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
    from transformers.cache_utils import Cache

    from specchat.models.hf.layer_caches import Both, Rows, State, States

    make: dict[LayerKind, Callable[[Any], Any]] = {
        "rows": lambda kv: Rows(kv, layout),
        "both": lambda kv: Both(kv, layout),
        "state": lambda _: State(),
        "nothing": lambda _: State(),
    }
    of_layers: Sequence[LayerKind] = kinds or ["rows"] * len(layers)
    cache_class = Cache if {"rows", "both"} & set(of_layers) else States
    return cache_class(layers=[make[kind](kv) for kv, kind in zip(layers, of_layers, strict=True)])
