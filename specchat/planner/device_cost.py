"""Predict the time of a step whose layers are dealt to several devices.

A pass takes as long as the slowest link, or as computing all layers one after the other, whichever is longer:

    pass = max(max over devices (streamed bytes / link rate), sum over devices (layers x time of one) + hops)

With microbatches, devices compute at the same time, and the second term is that of pipelining.py.
"""

from collections.abc import Sequence
from dataclasses import replace

from specchat.planner.acceptance import Acceptance
from specchat.planner.compute import compute_times
from specchat.planner.cost import CostModel, Prediction, StepCosts
from specchat.planner.link_queue import LinkQueue
from specchat.planner.pipelining import Hop, best_count, choose_microbatches, pipelined_s
from specchat.planner.placement import Share, TierSizes
from specchat.planner.rates import Rates
from specchat.planner.request import Peer
from specchat.records.microbatches import WHOLE_PASSES, Microbatches, Stretch
from specchat.records.model import DTYPE_BYTES, Dtype, ModelSpec

# Fixed time of a hop: a copy between GPUs, and the other device's stream that waits for it. Not measured on GPUs yet.
_HOP_S = 50e-6
# The same between machines, besides the network: threads that hand rows over, and a head before them. Measured between
# two processes of one machine with tests/benchmarks/workers.py: 0.50 ms where the network alone takes 0.08 ms.
_HANDING_OVER_S = 4e-4


class DevicesCost(CostModel):
    """Prediction of steps whose layers are dealt to several devices.

    Args:
        target: sizes of the target.
        draft: sizes of the draft, or None.
        dtype: dtype of weights and activations.
        devices: names of the devices.
        rates: rates of each device.
        acceptance: acceptance of the pair.
        seats: number of sequences of every pass.
        retrieval: whether draft nodes may come from the text itself.
        peers: ways to the machines of the devices; None for those of this machine.
    """

    def __init__(
        self,
        target: ModelSpec,
        draft: ModelSpec | None,
        dtype: Dtype,
        devices: Sequence[str],
        rates: Sequence[Rates],
        acceptance: Acceptance,
        seats: int,
        *,
        retrieval: bool,
        peers: Sequence[Peer | None] = (),
    ) -> None:
        super().__init__(target, draft, dtype, devices[0], rates[0], acceptance, seats, retrieval=retrieval)
        named = zip(devices, rates, strict=True)
        self._of_devices = [compute_times(target, dtype, each, on_cpu=name == "cpu") for name, each in named]
        self.links = [
            each.disk.per_s if name == "cpu" else each.host.per_s for name, each in zip(devices, rates, strict=True)
        ]
        self._peers = [peer for peer in peers if peer is not None]
        row_bytes, fixed_s, rate = target.hidden_size * DTYPE_BYTES[dtype], _HOP_S, min(self.links)
        if self._peers:
            fixed_s = max(peer.hop_s for peer in self._peers) + _HANDING_OVER_S
            rate = min(peer.bytes_per_s for peer in self._peers)
        self._hop = Hop(fixed_s, row_bytes / rate)
        self._pipelined: dict[tuple[tuple[Stretch, ...], int, int], float] = {}

    def compute_s(self, number: int, share: Share, rows: int) -> float:
        """Return the seconds that a device computes its layers in a pass."""
        layer_s = self._of_devices[number].layer_s
        kept_s, passed_s = layer_s(rows, resident=True), layer_s(rows, resident=False)
        return share.num_resident * kept_s + share.num_streamed * passed_s

    def dealt_s(self, placement: TierSizes, nodes: int) -> float:
        """Return the seconds of a step with these shares and a tree of some nodes."""
        return self._pass_s(placement, self._queue(placement), self._costs(placement, nodes, nodes))

    def _pass_s(self, placement: TierSizes, queue: LinkQueue, costs: StepCosts) -> float:
        del queue  # each device has its own
        _, linked_s, computed_s = self._sides(placement, costs)
        return costs.outside_s + max(computed_s, linked_s)

    def _sides(self, placement: TierSizes, costs: StepCosts) -> tuple[float, float, float]:
        """Return seconds of a step: the slowest link alone, until its last layer is computed, and computing all."""
        layer_bytes = (placement.ram_bytes + placement.disk_bytes) / max(placement.num_streamed, 1)
        busy_s, linked_s, computed_s = 0.0, 0.0, placement.num_hops * (self._hop.fixed_s + costs.rows * self._hop.row_s)
        for number, share in enumerate(placement.shares):
            own_s = self.compute_s(number, share, costs.rows)
            computed_s += own_s
            if share.num_streamed:
                arrival_s = layer_bytes / self.links[number]
                each = LinkQueue(share.num_layers, share.num_streamed, arrival_s, placement.slots)
                busy_s = max(busy_s, share.num_streamed * arrival_s)
                linked_s = max(linked_s, each.linked_s(own_s / share.num_layers, costs.outside_s))
        # All devices of one machine read from one disk.
        disk_s = 0.0 if self._peers else placement.disk_bytes / self._rates.disk.per_s
        linked_s = max(linked_s, disk_s)
        if computed_s > linked_s and placement.stretches:

            def seconds(count: int) -> float:
                return max(linked_s, self._pipelined_s(placement, costs.rows, count) if count > 1 else computed_s)

            computed_s = seconds(best_count(seconds, costs.rows))
        return max(busy_s, disk_s), linked_s, computed_s

    def microbatches(self, placement: TierSizes, tree_budget: int, most_rows: int) -> Microbatches:
        """Return the numbers of microbatches with which passes take least time.

        Args:
            placement: tier sizes of the target's layers.
            tree_budget: most nodes of a pass.
            most_rows: most rows of a pass.
        """
        if not placement.stretches:
            return WHOLE_PASSES
        whole = replace(placement, stretches=())

        def seconds(rows: int, count: int) -> float:
            nodes = min(max(rows - self._seats, 0), tree_budget)
            costs = replace(self._costs(whole, nodes, tree_budget), rows=rows)
            _, linked_s, computed_s = self._sides(whole, costs)
            return max(linked_s, self._pipelined_s(placement, rows, count) if count > 1 else computed_s)

        return choose_microbatches(seconds, most_rows)

    def _pipelined_s(self, placement: TierSizes, rows: int, count: int) -> float:
        """Return the seconds of computing a pass in microbatches; cached, because plans differ little."""
        key = placement.stretches, rows, count
        if key not in self._pipelined:
            found = pipelined_s(placement.stretches, self._stretch_s, self._hop, rows, count)
            launched_s = 0.0 if self._peers else count * placement.num_layers * self._rates.layer_s
            self._pipelined[key] = max(found, launched_s)  # one process launches the kernels of all devices
        return self._pipelined[key]

    def _stretch_s(self, stretch: Stretch, rows: int) -> float:
        share = Share(stretch.num_layers - stretch.num_streamed, stretch.num_streamed)
        return self.compute_s(stretch.device, share, rows)

    def _step(self, placement: TierSizes, nodes: int, tree_budget: int) -> Prediction:
        costs = self._costs(placement, nodes, tree_budget)
        busy_s, linked_s, computed_s = self._sides(placement, costs)
        pass_s = costs.outside_s + max(computed_s, linked_s)
        return Prediction(
            pass_s=pass_s,
            link_s=busy_s,
            compute_s=computed_s,
            draft_s=costs.draft_s,
            tokens_per_step=costs.tokens,
            tree_nodes=nodes,
            tok_per_s=costs.tokens / pass_s,
            bound="link" if linked_s > computed_s else "draft" if costs.draft_s > computed_s else "compute",
            basis=self._basis(placement, nodes),
        )
