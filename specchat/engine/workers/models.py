"""Models whose layers are on several ranks: rank 0 runs the whole model, and other ranks run their layers."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from specchat.engine.hops import Hops
from specchat.engine.layout import PassLayout
from specchat.engine.model import PassCancelledError, TreeModel
from specchat.engine.pipeline import Call, Pipeline, Turn
from specchat.engine.streaming.base import DeviceCounters
from specchat.engine.taps import LayerTaps
from specchat.engine.workers.messages import RecordedCache, layout_values
from specchat.engine.workers.route import PassStoppedError, Route
from specchat.models.hf.hybrids import asks_for_caches
from specchat.records.microbatches import Stretch, cuts_of


class Announcer(Protocol):
    """Tells all workers about a pass; see `crew.Crew`."""

    def begin_pass(self, values: dict[str, Any], cancel: threading.Event | None) -> None:
        """Begin a pass on all workers."""

    def stop_pass(self) -> None:
        """Stop the pass on all workers before their next layer."""

    def check(self) -> None:
        """Check that no worker was lost since the last pass."""

    def counters(self) -> tuple[DeviceCounters, ...]:
        """Return the totals of each worker, as it has told them with its last pass."""

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
        self._count = 1
        self._clock = Hops([0] * len(self.skeleton.layers), [self.device])

    def _begin_pass(self, layout: PassLayout, count: int) -> None:
        """Prepare for a pass over the layers of all ranks in some microbatches."""
        self._count = count
        self._clock.begin()
        self._route.begin([end - begin for begin, end in cuts_of(layout.num_rows, count)])

    def _pipeline_for(self, layout: PassLayout) -> Pipeline:
        return self._cut(layout, self._route.owner, self._count)

    def own_counters(self) -> DeviceCounters:
        """Return the totals of this rank."""
        on_gpu = self.device.type == "cuda"
        return DeviceCounters(
            streamed=self.streamer.counters(),
            compute_s=self._clock.busy_s()[0],
            row_wait_s=self._route.wait_s,
            sent_bytes=self._route.sent_bytes,
            peak_bytes=torch.cuda.max_memory_allocated(self.device) if on_gpu else None,
        )

    def _run_chunks(self, *arguments: Any) -> Any:
        with self._clock.computing(0):
            return super()._run_chunks(*arguments)

    def run_stretch(self, stretch: Stretch, calls: Sequence[Call], hidden: Tensor, turn: Turn) -> Tensor:
        """Run a microbatch through a stretch of this rank, and send it on to the next rank."""
        hidden = self._route.cross(stretch.first, hidden)
        is_own = self._route.owns(stretch.first)
        if is_own:
            hidden = self._compute_all(calls, hidden, turn)
        if is_own or stretch.last + 1 == len(self.skeleton.layers):  # where rows come back to rank 0
            hidden = self._route.cross(stretch.last + 1, hidden)
        return hidden


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
        count = self.microbatches.count(layout.num_rows)
        values = {"layout": layout_values(layout), "changes": self._changes(), "microbatches": count}
        self._crew.begin_pass(values, cancel)
        self._begin_pass(layout, count)
        try:
            return super().forward(token_ids, layout, cancel)
        except PassStoppedError as error:
            self._stop()
            raise PassCancelledError from error
        except BaseException:
            self._stop()
            raise

    def _stop(self) -> None:
        self._crew.stop_pass()
        self._route.finish()

    def device_counters(self) -> tuple[DeviceCounters, ...]:
        """Return the totals of all ranks."""
        return (self.own_counters(), *self._crew.counters())

    def check(self) -> None:
        """Check between passes that no worker was lost.

        Raises:
            LostWorkerError: a worker was lost.
        """
        self._crew.check()

    def close(self) -> None:
        """Stop streaming, close the files, and end the work of the workers."""
        super().close()
        self._crew.close()


class PartModel(RoutedModel):
    """The layers of a worker: a pass ends with the last rows that leave it."""

    def take_part(self, layout: PassLayout, count: int, cancel: threading.Event) -> None:
        """Take part in a pass, whether it is stopped or not.

        Args:
            layout: position and visibility of the rows.
            count: number of microbatches.
            cancel: event that stops the pass before the next layer.
        """
        self._begin_pass(layout, count)
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

    def run_stretch(self, stretch: Stretch, calls: Sequence[Call], hidden: Tensor, turn: Turn) -> Tensor:
        """Run a microbatch through a stretch; the pass ends with the last rows that leave this rank."""
        hidden = super().run_stretch(stretch, calls, hidden, turn)
        if self._route.is_done:
            raise _PartDoneError
        return hidden


class _PartDoneError(Exception):
    """All rows of a pass have left a worker."""
