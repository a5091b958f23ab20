"""Times of a step and memory of the engine: clocks and counters, no decisions."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from specchat.engine.device import wait_for
from specchat.engine.model import TreeModel
from specchat.engine.relief import MemoryRelief
from specchat.engine.streaming.base import DeviceCounters, LayerStreamer, StreamCounters
from specchat.engine.tree import TokenTree
from specchat.errors import SpecchatError
from specchat.hardware.system import resident_set_bytes
from specchat.records.generation import DraftTree, FinishReason, SourceWork, Step
from specchat.records.plan import DevicePlan, Plan
from specchat.records.usage import DeviceUse, MemoryReport


def runtime_bytes() -> int:
    """Return the bytes of memory that this process holds before a model is loaded."""
    return resident_set_bytes()


def peak_resident_set_bytes() -> int:
    """Return the peak bytes of memory that this process has held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


class StepClock:
    """Splits the wall time of the steps of one pass into phases.

    Args:
        streamer: the target's streamer, whose counters give the waiting time of the pass.
        num_sharing: number of sequences of the pass.
        device: device of the pass.
    """

    def __init__(self, streamer: LayerStreamer, num_sharing: int, device: torch.device) -> None:
        self._streamer = streamer
        self._device = device
        self._num_sharing = num_sharing
        self._at_start = self._at_end = streamer.counters()
        self._experts_used = b""
        self._begin = time.perf_counter()
        self._pass_s = self._draft_s = self._verify_s = self._sample_s = 0.0
        self._beside_reads_s = 0.0  # of drafting

    @contextmanager
    def drafting(self) -> Iterator[None]:
        """Time the drafting of the tree, and the reads of the pass's first layers meanwhile."""
        begin, before = time.perf_counter(), self._streamer.counters()
        try:
            yield
        finally:
            self._beside_reads_s += _link_s(before, self._streamer.counters())
            self._draft_s += time.perf_counter() - begin

    @contextmanager
    def verifying(self) -> Iterator[None]:
        """Time the target pass, up to the end of its last kernel."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            wait_for(self._device)
            self._verify_s += time.perf_counter() - begin

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """Time head, processors and walk."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._sample_s += time.perf_counter() - begin

    def stop(self) -> None:
        """End the steps of the pass, which all take the same time."""
        self._at_end = self._streamer.counters()
        self._experts_used = self._streamer.experts_used()
        self._pass_s = time.perf_counter() - self._begin
        self._streamer.passed(self._pass_s)

    def step(
        self,
        tokens: tuple[int, ...],
        reason: FinishReason | None,
        new_rows: int,
        cached_rows: int,
        tree: TokenTree,
        path: Sequence[int],
        error: SpecchatError | None = None,
        work: Sequence[SourceWork] = (),
    ) -> Step:
        """Return the record of one sequence's step, after `stop`.

        Args:
            tokens: emitted tokens.
            reason: reason of the end of the answer, or None.
            new_rows: committed tokens that the pass computed.
            cached_rows: committed tokens that were in the KV cache.
            tree: verified tree.
            path: accepted nodes, root to leaf.
            error: reason of the finish reason "error".
            work: work of the sources of draft nodes.
        """
        wait_s = self._at_end.wait_s - self._at_start.wait_s
        return Step(
            token_ids=tokens,
            finish_reason=reason,
            new_rows=new_rows,
            cached_rows=cached_rows,
            tree_nodes=len(tree),
            accepted=max(len(tokens) - 1, 0),
            depth=max(tree.depths, default=0),
            pass_s=self._pass_s,
            draft_s=self._draft_s,
            # No more than the pass waited: a pass that never waits for layers could have begun earlier.
            draft_hidden_s=min(self._beside_reads_s, self._draft_s, wait_s),
            verify_s=self._verify_s,
            sample_s=self._sample_s,
            stream_wait_s=wait_s,
            streamed_bytes=self._at_end.num_bytes - self._at_start.num_bytes,
            expert_hits=self._at_end.expert_hits - self._at_start.expert_hits,
            expert_misses=self._at_end.expert_misses - self._at_start.expert_misses,
            useful_guesses=self._at_end.useful_guesses - self._at_start.useful_guesses,
            useless_guesses=self._at_end.useless_guesses - self._at_start.useless_guesses,
            experts_used=self._experts_used,
            guesses=tree.by_source(path, work),
            tree=DraftTree(tree.tokens, tree.parents, tuple(path)) if len(tree) else None,
            num_sharing=self._num_sharing,
            error=error,
        )


def _link_s(before: StreamCounters, after: StreamCounters) -> float:
    """Return the seconds in which the busiest link was busy between two counts."""
    links = zip(before.by_device or (before,), after.by_device or (after,), strict=True)
    return max(later.link_s - earlier.link_s for earlier, later in links)


class MemoryMeter:
    """Measures the memory that the engine holds.

    Args:
        models: target and draft models.
        runtime_bytes: memory of the process before loading, in bytes.
    """

    def __init__(self, models: Sequence[TreeModel], runtime_bytes: int) -> None:
        self._models = models
        self._runtime_bytes = runtime_bytes
        self._largest_pass_bytes = 0

    def saw_pass(self, hidden: Tensor) -> None:
        """Record the hidden rows of a pass; two copies live at once, a layer's input and output."""
        self._largest_pass_bytes = max(self._largest_pass_bytes, 2 * hidden.nbytes)

    def report(self, plan: Plan, relief: MemoryRelief) -> MemoryReport:
        """Return the totals so far; on the CPU the device peak is a sum of weights, slots, caches and hidden rows.

        Args:
            plan: plan with the budget, the predicted memory and the present places of layers.
            relief: knows the layers that were given back.
        """
        if plan.work.device == "cpu":
            device_peak = sum(model.nbytes for model in self._models) + self._largest_pass_bytes
        else:
            device_peak = torch.cuda.max_memory_allocated(plan.work.device)
        streamed = self._models[0].streamer.counters()
        num_streamed = len(self._models[0].streamed)
        return MemoryReport(
            device_budget_bytes=plan.vram_bytes,
            device_peak_bytes=device_peak,
            predicted_device_bytes=plan.device_bytes,
            host_peak_bytes=peak_resident_set_bytes(),
            runtime_bytes=self._runtime_bytes,
            resident_layers=plan.placement.num_layers - num_streamed,
            streamed_layers=num_streamed,
            streamed_bytes_per_step=plan.streamed_bytes_per_step,
            given_back_layers=len(relief.layers),
            given_back_bytes=relief.num_bytes,
            expert_hits=streamed.expert_hits,
            expert_misses=streamed.expert_misses,
            useful_guesses=streamed.useful_guesses,
            useless_guesses=streamed.useless_guesses,
            devices=_uses(self._models[0], plan),
        )


def _uses(model: TreeModel, plan: Plan) -> tuple[DeviceUse, ...]:
    """Return the measured use of each device; empty if a model runs on one."""
    counters = model.device_counters()
    if not counters:
        return ()
    steps_s = max(model.streamer.steps_s, 1e-9)
    return tuple(
        DeviceUse(
            device=device.device,
            device_budget_bytes=device.vram_bytes,
            device_peak_bytes=_peak_of(device, used),
            predicted_device_bytes=device.num_bytes,
            streamed_bytes=used.streamed.num_bytes,
            wait_s=used.streamed.wait_s,
            link_busy=min(used.streamed.link_s / steps_s, 1.0),
            compute_busy=min(used.compute_s / steps_s, 1.0),
            row_wait_s=used.row_wait_s,
            sent_bytes=used.sent_bytes,
        )
        for device, used in zip(plan.devices, counters, strict=True)
    )


def _peak_of(device: DevicePlan, used: DeviceCounters) -> int:
    """Return the most memory in use; on a CPU, whose memory the system shares out, the sum of the ledger."""
    if used.peak_bytes is not None:
        return used.peak_bytes
    return torch.cuda.max_memory_allocated(device.device) if device.device.startswith("cuda") else device.num_bytes
