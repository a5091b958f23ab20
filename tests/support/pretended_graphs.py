"""CUDA graphs of a pretended GPU: operations are recorded with the memory that they use, and computed again.

As on a GPU, recording computes nothing: what recorded operations have changed is put back, and what they have made is
NaN until a replay. Memory that was taken before the recording is used by its address. If it was freed since, a replay
would read or write whatever is there now, so it raises here. Copies over the link and waits of the host refuse to be
recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_map_only


class StaleGraphError(RuntimeError):
    """A replay that uses memory which was freed since it was recorded."""


class CaptureError(RuntimeError):
    """Something that a GPU cannot record."""


@dataclass(frozen=True)
class _Address:
    """A tensor that was there before the recording: a graph does not keep it."""

    storage: StorageWeakRef
    pointer: int
    like: tuple[torch.dtype, tuple[int, ...], tuple[int, ...], int]

    @classmethod
    def of(cls, tensor: Tensor) -> _Address:
        like = tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.storage_offset()
        storage = tensor.untyped_storage()
        return cls(StorageWeakRef(storage), storage.data_ptr(), like)

    def tensor(self) -> Tensor:
        """The tensor, if its memory still is what it was."""
        storage = torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)
        if storage is None or storage.data_ptr() != self.pointer:
            raise StaleGraphError("a graph uses memory that was freed")
        dtype, shape, stride, offset = self.like
        return torch.empty(0, dtype=dtype).set_(storage, offset, shape, stride)


@dataclass(frozen=True)
class _Operation:
    """An operation, its arguments, and the tensors that it fills; None where arguments are changed in place."""

    call: Callable[..., Any]
    given: tuple[Any, dict[str, Any]]
    made: Any


class PretendedGraph:
    """What replaces `torch.cuda.CUDAGraph`.

    Args:
        note: receives each launch.
        silent: scope in which nothing is counted or refused.
    """

    def __init__(self, note: Callable[..., None], silent: Callable[[], Any]) -> None:
        self._note = note
        self._silent = silent
        self._operations = list[_Operation]()
        self._own = dict[int, Tensor]()  # what was made while recording, by storage
        self._before = dict[int, tuple[Tensor, Tensor]]()  # what was there, and a copy of it
        self.is_complete = False

    def replay(self) -> None:
        """Compute all operations again: one launch of the host."""
        assert self.is_complete, "an empty graph"
        with torch.inference_mode(), self._silent():
            for each in self._operations:
                args, kwargs = tree_map_only(_Address, _Address.tensor, each.given)
                found = each.call(*args, **kwargs)
                if each.made is not None:
                    for old, new in zip(_tensors(each.made), _tensors(found), strict=True):
                        old.copy_(new)
        self._note("kernel", "graph")

    def keep(self, func: Any, args: Any, kwargs: Any) -> None:
        """Remember what an operation is going to change."""
        named = zip(func._schema.arguments, args, strict=False)
        changed = [value for place, value in named if place.alias_info is not None and place.alias_info.is_write]
        changed += [kwargs[place.name] for place in func._schema.arguments if place.is_out and place.name in kwargs]
        for tensor in _tensors(changed):
            storage = tensor.untyped_storage()
            if storage._cdata not in self._own and storage._cdata not in self._before:
                whole = torch.empty(0, dtype=torch.uint8).set_(storage)
                self._before[storage._cdata] = whole, whole.clone()

    def add(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Record an operation that was computed."""
        known = {tensor.untyped_storage()._cdata for tensor in _tensors((args, kwargs))}
        made = [tensor for tensor in _tensors(out) if tensor.untyped_storage()._cdata not in known]
        for tensor in made:
            self._own[tensor.untyped_storage()._cdata] = tensor
        if made or func._schema.is_mutable:
            given = tree_map_only(Tensor, self._held, (args, kwargs))
            self._operations.append(_Operation(func, given, out if made else None))

    def add_made(self, make: Callable[[], Any], out: Any) -> None:
        """Record the making of tensors from nothing, such as zeros."""
        for tensor in _tensors(out):
            self._own[tensor.untyped_storage()._cdata] = tensor
        self._operations.append(_Operation(make, ((), {}), out))

    def _held(self, tensor: Tensor) -> Tensor | _Address:
        return tensor if tensor.untyped_storage()._cdata in self._own else _Address.of(tensor)

    def end(self) -> None:
        """Undo what recording has computed."""
        for whole, copy in self._before.values():
            whole.copy_(copy)
        for tensor in self._own.values():
            if tensor.is_floating_point():
                tensor.fill_(torch.nan)
        self._before.clear()
        self.is_complete = True


@contextmanager
def recording(gpu: Any, graph: PretendedGraph, **_: Any) -> Iterator[None]:
    """What replaces `torch.cuda.graph`."""
    assert gpu.recording is None
    gpu.recording = graph
    try:
        yield
    finally:
        gpu.recording = None
    with gpu.silent():
        graph.end()


def _tensors(values: Any) -> list[Tensor]:
    found = list[Tensor]()
    tree_map_only(Tensor, found.append, values)
    return found
