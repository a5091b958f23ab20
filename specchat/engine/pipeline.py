"""The microbatches of a pass on their way through layers of several devices.

transformers' decoder calls one layer after the other with all rows. So the calls of a stretch of layers are kept until
it is complete. Then each microbatch runs through the whole stretch and moves on to the next device, before the next
one follows. Until then the decoder is given rows that are not computed yet; it only hands them on to the next layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from specchat.records.microbatches import Stretch


@dataclass(frozen=True)
class Call:
    """A call of a layer.

    Attributes:
        index: index of the layer.
        forward: function of the layer.
        args: positional inputs besides the rows.
        kwargs: named inputs.
    """

    index: int
    forward: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Turn:
    """The place of a microbatch in its pass.

    Attributes:
        begin: number of the pass's rows before the microbatch.
        is_first: whether it is the first one, which waits for layers to arrive.
        is_last: whether it is the last one, after which the slot of a layer is free.
    """

    begin: int
    is_first: bool
    is_last: bool


# A pass in one piece.
WHOLE = Turn(0, is_first=True, is_last=True)


class Stage(Protocol):
    """What runs microbatches; see `model.TreeModel`."""

    def run_stretch(self, stretch: Stretch, calls: Sequence[Call], hidden: Tensor, turn: Turn) -> Tensor:
        """Run a microbatch through a stretch, and send it on to the next one."""


class Pipeline:
    """The microbatches of one pass.

    Args:
        stretches: stretches of all layers, in order.
        cuts: rows [begin, end) of each microbatch.
        stage: runs the microbatches.
    """

    def __init__(self, stretches: Sequence[Stretch], cuts: Sequence[tuple[int, int]], stage: Stage) -> None:
        self._stretches = list(stretches)
        self._cuts = cuts
        self._stage = stage
        self._calls = list[Call]()
        self._parts = list[Tensor]()

    def take(self, call: Call, hidden: Tensor) -> Tensor:
        """Take the next call of the decoder; return the rows to give to the decoder.

        Args:
            call: call of the layer behind that of the last call.
            hidden: rows that the decoder gives to the layer: those of the first layer, or what `take` has returned.

        Returns:
            The computed rows of the whole pass after the last layer, else `hidden`.
        """
        if not call.index:
            self._parts = [hidden[..., begin:end, :] for begin, end in self._cuts]
        self._calls.append(call)
        stretch = self._stretches[0]
        if call.index < stretch.last:
            return hidden
        calls, self._calls = self._calls, []
        last = len(self._cuts) - 1
        for number, (begin, _) in enumerate(self._cuts):
            turn = Turn(begin, is_first=number == 0, is_last=number == last)
            self._parts[number] = self._stage.run_stretch(stretch, calls, self._parts[number], turn)
        del self._stretches[0]
        return hidden if self._stretches else torch.cat(self._parts, dim=-2)
