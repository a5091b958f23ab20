"""The routers of a model's experts, and the states that they read: they name likely experts one layer ahead.

transformers calls the parts of a layer by names of their own in every architecture. So the router of a layer is found
by the identity of tensors in the first pass: it is the module that returned the ids which the experts are given. The
norm before it is the module that returned what the router read. Each pair must choose the same experts again before it
is used.

What a layer's norm reads differs little from what the next layer's norm will read, because each layer only adds to the
residual stream. So the next layer's norm and router name most of its experts while this layer is computed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from specchat.models.hf.experts import LayerExperts, uses_interface


@dataclass(frozen=True)
class _Route:
    """How a layer chooses its experts.

    Attributes:
        modules: norm and router, or the router alone if it reads the residual stream.
        output: position of the ids among the router's outputs.
        is_flat: whether the router reads rows [rows, width].
    """

    modules: tuple[Any, ...]
    output: int
    is_flat: bool

    def choose(self, states: Tensor) -> Tensor:
        """Return experts of rows, int64 [rows, k], from what the first module reads."""
        *norms, router = self.modules
        for norm in norms:
            states = norm.forward(states)
        found = router.forward(states.reshape(-1, states.shape[-1]) if self.is_flat else states)
        ids: Tensor = (found if isinstance(found, tuple) else (found,))[self.output]
        return ids.reshape(-1, ids.shape[-1])


@dataclass(frozen=True)
class _Call:
    """A call of a module: what it read, and the addresses and ids of what it returned."""

    module: Any
    read: Tensor
    returned: tuple[Any, ...]


class Routers:
    """The routers of layers with experts; found in the first pass over each layer.

    Args:
        layers: decoder layers of the model.
        experts: experts of the layers that take part, ascending.
    """

    def __init__(self, layers: Sequence[Any], experts: Sequence[LayerExperts]) -> None:
        self._routes: list[_Route | None] = [None] * len(experts)
        self._states: list[Tensor | None] = [None] * len(experts)
        self._calls: list[list[_Call]] = [[] for _ in experts]
        self._hooks: list[list[Any]] = []
        for position, each in enumerate(experts):
            inside = {id(module) for module in each.module.modules()}
            modules = [module for module in layers[each.layer].modules() if id(module) not in inside]
            record = partial(self._record, position)
            self._hooks.append([module.register_forward_hook(record, with_kwargs=True) for module in modules])

    @property
    def num_found(self) -> int:
        """Number of layers whose router is known."""
        return sum(route is not None for route in self._routes)

    def saw(self, position: int, ids: Tensor) -> None:
        """Find the router of a layer when its experts are given their ids for the first time.

        Args:
            position: position of the layer among those with experts.
            ids: experts of each row, int64 [rows, k].
        """
        if not self._hooks[position]:
            return
        for hook in self._hooks[position]:
            hook.remove()
        calls, self._calls[position], self._hooks[position] = self._calls[position], [], []
        route = _find(calls, ids)
        if route is not None:
            self._routes[position] = route
            route.modules[0].register_forward_pre_hook(partial(self._keep, position), with_kwargs=True)

    def likely(self, position: int) -> Tensor | None:
        """Return the experts that a layer would choose now, int64 [rows, k], while the layer before it is computed.

        Returns:
            Experts; None if the router of the layer, or what the layer before it has read, is unknown.
        """
        route, states = self._routes[position], self._states[position - 1]
        if position == 0 or route is None or states is None:
            return None
        self._states[position - 1] = None
        return route.choose(states)

    def _record(self, position: int, module: Any, args: Any, kwargs: Any, returned: Any) -> None:
        """Record a call that may be one of a norm or of a router."""
        read = _first_tensor(args, kwargs)
        outputs = returned if isinstance(returned, tuple) else (returned,)
        if read is None or uses_interface(module):
            return
        is_norm = isinstance(outputs[0], Tensor) and outputs[0].shape == read.shape
        if is_norm or any(_are_ids(each) for each in outputs):
            kept = [each if _are_ids(each) else each.data_ptr() if isinstance(each, Tensor) else 0 for each in outputs]
            self._calls[position].append(_Call(module, read, tuple(kept)))

    def _keep(self, position: int, _: Any, args: Any, kwargs: Any) -> None:
        self._states[position] = _first_tensor(args, kwargs)


def _find(calls: Sequence[_Call], ids: Tensor) -> _Route | None:
    """Return the router that returned these ids, with the norm before it; None unless both choose them again."""
    chosen = ((call, i) for call in reversed(calls) for i, each in enumerate(call.returned) if _is_same(each, ids))
    router, output = next(chosen, (None, 0))
    if router is None:
        return None
    address, width = router.read.data_ptr(), router.read.shape[-1]
    before = [call for call in calls if call.returned[0] == address and call.read.shape[-1] == width]
    for norm in (*before[:-2:-1], None):  # memory of other states may have been used again
        modules = (router.module,) if norm is None else (norm.module, router.module)
        route = _Route(modules, output, router.read.ndim == 2)
        if torch.equal(route.choose(router.read if norm is None else norm.read), ids):
            return route
    return None


def _first_tensor(args: Any, kwargs: Any) -> Tensor | None:
    return next((each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)), None)


def _are_ids(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.int64 and value.ndim == 2


def _is_same(value: Any, ids: Tensor) -> bool:
    return isinstance(value, Tensor) and value.data_ptr() == ids.data_ptr() and value.shape == ids.shape
