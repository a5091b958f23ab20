"""Models whose layers are on several ranks: rank 0 runs the whole model, and other ranks run their layers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from specchat.engine.layout import PassLayout
from specchat.engine.model import PassCancelledError, TreeModel
from specchat.engine.taps import LayerTaps
from specchat.engine.workers.messages import RecordedCache, layout_values
from specchat.engine.workers.route import PassStoppedError, Route
from specchat.models.hf.hybrids import asks_for_caches, layer_output


class Announcer(Protocol):
    """Tells all workers about a pass; see `crew.Crew`."""

    def begin_pass(self, values: dict[str, Any], cancel: threading.Event | None) -> None:
        """Begin a pass on all workers."""

    def stop_pass(self) -> None:
        """Stop the pass on all workers before their next layer."""

    def close(self) -> None:
        """End the work of all workers."""


class RoutedModel(TreeModel):
    """A model of which this rank computes some layers; rows of the others come and go.

    Args:
        arguments: arguments of `TreeModel`.
        route: hops of this rank.
    """

    def __init__(self, *arguments: Any, route: Route) -> None:
        super().__init__(*arguments)
        self._route = route

    def _run_layer(self, index: int, forward: Callable[..., Any], hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        hidden = self._route.cross(index, hidden)
        if self._route.owns(index):
            return super()._run_layer(index, forward, hidden, *args, **kwargs)
        self.layers_done = index
        return layer_output(self.skeleton.config, hidden)


class CrewModel(RoutedModel):
    """The target on rank 0, with embeddings, norm and head.

    Args:
        arguments: arguments of `TreeModel`.
        route: hops of this rank.
        crew: the workers.
    """

    def __init__(self, *arguments: Any, route: Route, crew: Announcer) -> None:
        super().__init__(*arguments, route=route)
        self._crew = crew
        assert isinstance(self.cache, RecordedCache)
        self._changes = self.cache.take_changes

    def forward(
        self,
        token_ids: Sequence[int] | Tensor,
        layout: PassLayout,
        cancel: threading.Event | None = None,
        taps: LayerTaps | None = None,
    ) -> Tensor:
        """Compute the final hidden states of new rows on all ranks; see `TreeModel.forward`."""
        assert taps is None, "states between layers do not travel"
        self._crew.begin_pass({"layout": layout_values(layout), "changes": self._changes()}, cancel)
        self._route.begin(layout.num_rows)
        try:
            return super().forward(token_ids, layout, cancel)
        except BaseException:
            self._crew.stop_pass()
            self._route.finish()
            raise

    def _run_layer(self, index: int, forward: Callable[..., Any], hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        try:
            out = super()._run_layer(index, forward, hidden, *args, **kwargs)
            if index + 1 < len(self.skeleton.layers):
                return out
            if isinstance(out, tuple):
                return (self._route.cross(index + 1, out[0]), *out[1:])
            return self._route.cross(index + 1, out)
        except PassStoppedError as error:
            raise PassCancelledError from error

    def close(self) -> None:
        """Stop streaming, close the files, and end the work of the workers."""
        super().close()
        self._crew.close()


class PartModel(RoutedModel):
    """The layers of a worker: a pass ends with the last rows that leave it."""

    def compute(self, layout: PassLayout, cancel: threading.Event) -> None:
        """Take part in a pass, whether it is stopped or not.

        Args:
            layout: position and visibility of the rows.
            cancel: event that stops the pass before the next layer.
        """
        self._route.begin(layout.num_rows)
        try:
            self.forward(torch.zeros(layout.num_rows, dtype=torch.int64), layout, cancel)
        except (PassCancelledError, PassStoppedError):
            self._route.finish()

    def _decode(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        config = self.skeleton.config
        shape, dtype = (1, len(token_ids), config.hidden_size), next(self.skeleton.model.parameters()).dtype
        blank = torch.zeros(shape, dtype=dtype, device=self.device)
        try:
            self.skeleton.decoder(
                inputs_embeds=blank,
                position_ids=positions[None],
                past_key_values=self._hf_cache,
                use_cache=asks_for_caches(config),
            )
        except _PartDoneError:
            return blank[0]
        raise AssertionError("a pass ends with the last rows that leave a worker")

    def _run_layer(self, index: int, forward: Callable[..., Any], hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        out = super()._run_layer(index, forward, hidden, *args, **kwargs)
        if self._route.owns(index):
            self._route.cross(index + 1, out[0] if isinstance(out, tuple) else out)
        if self._route.is_done:
            raise _PartDoneError
        return out


class _PartDoneError(Exception):
    """All rows of a pass have left a worker."""
