"""Models whose layers can be on several machines, where only hidden states travel from layer to layer."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch

from specchat.models.hf.attention import cache_for, row_scope
from specchat.models.hf.hybrids import asks_for_caches, layer_kinds, layer_output
from specchat.models.hf.skeleton import Skeleton
from specchat.records.model import KvShape


def why_not_apart(skeleton: Skeleton, kv_shapes: tuple[KvShape, ...]) -> str | None:
    """Return why the layers of a model cannot be on several machines, as a predicate; None if they can.

    A worker runs the decoder without embeddings. So its layers must be given the same as with them: positions, masks
    and nothing that needs other weights. The decoder runs once with layers that compute nothing, in both ways.

    Args:
        skeleton: modules without weights, whose layers are not wrapped yet.
        kv_shapes: shape of each cached layer, without a state for layers of rows.
    """
    if skeleton.shared_blocks:
        return "has blocks that several layers share"
    if any(shape.state is not None for shape in kv_shapes):
        return "has recurrent layers, whose states stay on one machine"
    if any(not shape.heads for shape in kv_shapes):
        return "has layers that read the keys and values of other layers"
    try:
        with_ids, with_rows = (_given(skeleton, with_ids=each) for each in (True, False))
    except Exception as error:  # noqa: BLE001  whatever modules raise without weights
        reason = str(error).partition("\n")[0]
        return f"computes with further weights before its layers ({type(error).__name__}: {reason})"
    return None if with_ids == with_rows else "gives its layers more than rows, positions and masks"


@torch.inference_mode()
def _given(skeleton: Skeleton, *, with_ids: bool) -> list[tuple[Any, ...]]:
    """Return what each layer is given in a pass over one row: names and shapes."""
    config, found = skeleton.config, list[tuple[Any, ...]]()
    blank = torch.zeros(1, 1, config.hidden_size, dtype=next(skeleton.model.parameters()).dtype)
    embeddings = skeleton.model.get_input_embeddings()
    with ExitStack() as stack:
        for index, layer in enumerate(skeleton.layers):
            is_last = index + 1 == len(skeleton.layers)
            stack.enter_context(_forward(layer, partial(_record, config, found, is_last)))
        stack.enter_context(_forward(embeddings, lambda *_, **__: blank))
        stack.enter_context(row_scope(lambda _: "mask"))
        rows = {"input_ids": torch.zeros(1, 1, dtype=torch.int64)} if with_ids else {"inputs_embeds": blank}
        cache = cache_for([_Empty()] * len(skeleton.layers), kinds=layer_kinds(config))
        try:
            skeleton.decoder(
                **rows,
                position_ids=torch.zeros(1, 1, dtype=torch.int64),
                past_key_values=cache,
                use_cache=asks_for_caches(config),
            )
        except _LastLayerError:
            return found
    raise AssertionError("a decoder runs all of its layers")


class _LastLayerError(Exception):
    """The last layer was reached."""


class _Empty:
    """A layer's cache without rows."""

    length, capacity = 0, 1


def _record(
    config: Any, found: list[tuple[Any, ...]], is_last: bool, hidden: torch.Tensor, *args: Any, **kwargs: Any
) -> Any:
    if hidden.is_meta or hidden.ndim != 3:
        raise ValueError("rows of another form")
    found.append((_form(args), {name: _form(value) for name, value in kwargs.items()}))
    if is_last:
        raise _LastLayerError
    return layer_output(config, hidden)


def _form(value: Any) -> Any:
    """Return the form of a layer's input: shapes instead of tensors; other values become their type."""
    if isinstance(value, tuple | list):
        return tuple(map(_form, value))
    if isinstance(value, dict):
        return {key: _form(each) for key, each in value.items()}
    if isinstance(value, torch.Tensor):
        if value.is_meta:
            raise ValueError("inputs that need weights")
        return tuple(value.shape)
    return type(value).__name__


@contextmanager
def _forward(module: Any, forward: Callable[..., Any]) -> Iterator[None]:
    """Replace the forward of a module within the block."""
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
