"""Predict how many experts a pass uses, how many of them the pool has, and the bytes that are missing."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache

from specchat.models.sizes.geometry import held_bytes, read_bytes, sizes_beside_experts, slot_bytes
from specchat.records.limits import EXPERT_WINDOW_BYTES, EXPERT_WINDOWS, READ_THREADS
from specchat.records.model import Dtype, ModelSpec
from specchat.records.plan import ExpertForecast, ExpertSlots, LedgerItem, Placement

# Rows of one tree use fewer experts than independent rows would: as many as rows^a of these, with
# a = _EXPONENT - _FALL log2(rows). Fitted to a synthetic router whose neighbouring tokens share experts as measured for
# trained ones (tests/support/routing.py): a is 0.85, 0.80, 0.76 and 0.69 at 2, 8, 16 and 64 rows.
_EXPONENT, _FALL = 0.885, 0.0325
# Seconds of a layer to find its missing experts, to begin reading them, and to take them over as they arrive. Measured
# with tests/benchmarks/expert_passes.py: 12 layers of 128 experts at 1 to 16 rows.
_FETCH_S = 500e-6
# Share of missing experts that the next layer's router names while a layer is computed: published measurements of
# trained models found 0.84 to 0.87 of the experts of a token, and the least sure ones are not read. Seconds of a layer
# to compute norm and router once more and to begin the reads: an estimate, of which tests/benchmarks/expert_fetch.py
# measured 60 to 100 us for the reads.
_KNOWN_AHEAD, _LOOK_AHEAD_S = 0.75, 250e-6
# Seconds of a layer on a GPU that no copy hides, because the host must know the experts of a layer before it queues
# them: the copy of the ids, finding missing experts and a table of addresses, and queueing the kernels of a layer. The
# first and the last are estimates: 20 us for a small copy, 0.9 ms for 700 calls of torch. The host's part in between
# was measured without a GPU: 50 to 150 us for 1 to 64 rows of 128 to 512 experts. A copy takes the host 10 us.
_IDS_S, _PLACE_S, _QUEUE_S, _COPY_S = 20e-6, 150e-6, 900e-6, 10e-6
# Seconds of a layer on a GPU to queue norm and router once more; an estimate.
_GPU_LOOK_AHEAD_S = 100e-6
_MOST_ROWS = 8192  # beyond which the fit would fall; a pass uses all experts long before


def used_share(active_share: float, rows: int) -> float:
    """Return the expected share of a layer's experts that a pass uses, if one row uses `active_share` of them."""
    doublings = math.log2(min(rows, _MOST_ROWS))
    return 1.0 - math.pow(1.0 - active_share, math.pow(2.0, doublings * (_EXPONENT - _FALL * doublings)))


def hit_rate(pool_share: float, used: float) -> float:
    """Return the expected share of a pass's experts that the pool has.

    The pool keeps the experts of the highest decayed number of uses. Fitted to simulated passes of 1 to 64 rows over 32
    to 512 experts, with an eighth to three quarters of them in the pool.

    Args:
        pool_share: share of a layer's experts that the pool keeps.
        used: share of a layer's experts that the pass uses.
    """
    exponent = 1.0 + 3.9 * math.pow(1.0 - used, 1.45) * (1.0 - 0.6 * pool_share)
    return 1.0 - math.pow(1.0 - pool_share, exponent)


def hit_rate_with_shared(num_layers: int, pool_share: float, used: float) -> float:
    """Return the expected share of a pass's experts that are in the pool, or still in the slots that layers share.

    The shared slots hold one layer's experts, those that were read last. They add to the pool of every layer if the
    misses of a whole pass fit, and nothing if a pass gives all of them away.

    Args:
        num_layers: number of layers that share these slots.
        pool_share: share of a layer's experts that the pool keeps.
        used: share of a layer's experts that the pass uses.
    """
    found = hit_rate(pool_share, used)
    for _ in range(3):  # what the shared slots have need not be read, so it leaves more of them
        missed = max(num_layers * used * (1.0 - found), 1e-9)
        left = min(max(1.1 * (1.0 / missed - 1.0), 0.0), 1.0)
        found = hit_rate(min(pool_share + left / num_layers, 1.0), used)
    return found


@dataclass(frozen=True, eq=False)
class LearntExperts:
    """What earlier passes of a model have shown about its experts.

    Attributes:
        uses: share of the passes that used each expert, by layer with experts.
        factors: ratios of used and of missed experts to the predicted ones, by rows of the passes, ascending.
    """

    uses: tuple[tuple[float, ...], ...] = ()
    factors: Mapping[float, tuple[float, float]] = field(default_factory=dict)

    def factor(self, rows: int) -> tuple[float, float]:
        """Return the factors for a number of rows, interpolated between learned ones; 1 if none were learned."""
        known = list(self.factors.items())
        if not known:
            return 1.0, 1.0
        above = next((i for i, (each, _) in enumerate(known) if each >= rows), len(known))
        if above in (0, len(known)):
            return known[min(above, len(known) - 1)][1]
        (low, less), (high, more) = known[above - 1 : above + 1]
        share = math.log(rows / low) / math.log(high / low)
        used, missed = (math.pow(a, 1.0 - share) * math.pow(b, share) for a, b in zip(less, more, strict=True))
        return used, missed


NOTHING_LEARNT = LearntExperts()


@dataclass(frozen=True)
class ExpertTier:
    """Experts that are read one by one: the part of a placement that determines pass times.

    Attributes:
        num_layers: number of layers with such experts.
        num_experts: experts of each layer, N.
        per_row: experts that one row uses, k.
        read_bytes: bytes that are read for one expert.
        quota: slots of each layer.
        num_cached: layers whose experts stay in the page cache.
        looks_ahead: whether likely experts of the next layer are read while a layer is computed.
        learnt: uses and ratios that earlier passes have shown.
        on_gpu: whether the slots are in a GPU's memory.
        num_in_host: experts of each layer that stay in pinned host memory, which a GPU's slots are filled from.
        slot_bytes: bytes of a slot, and of an expert in pinned host memory.
    """

    num_layers: int
    num_experts: int
    per_row: int
    read_bytes: int
    quota: int
    num_cached: int
    looks_ahead: bool = False
    learnt: LearntExperts = NOTHING_LEARNT
    on_gpu: bool = False
    num_in_host: int = 0
    slot_bytes: int = 0

    @property
    def reads_disk(self) -> bool:
        """Whether some experts stay in no host memory."""
        return self.num_in_host < self.num_experts if self.on_gpu else self.num_cached < self.num_layers

    @property
    def disk_share(self) -> float:
        """Expected share of missing experts that are read from the disk.

        Host memory of a GPU keeps the most used experts beside those that fill the pool. Before anything was learned,
        these are any experts.
        """
        if not self.on_gpu:
            return 1 - self.num_cached / self.num_layers
        if not self.learnt.uses:
            return 1 - self.num_in_host / self.num_experts
        beside = self.num_experts - self.quota
        return max(beside - self.num_in_host, 0) / beside

    def used(self, rows: int) -> float:
        """Return the expected experts of a layer that a pass uses."""
        share = used_share(self.per_row / self.num_experts, rows)
        return self.num_experts * min(share * self.learnt.factor(rows)[0], 1.0)

    def missed(self, rows: int) -> float:
        """Return the expected experts of a layer that a pass reads."""
        share = used_share(self.per_row / self.num_experts, rows)
        missed = share * (1.0 - hit_rate_with_shared(self.num_layers, self.quota / self.num_experts, share))
        return min(self.num_experts * missed * self.learnt.factor(rows)[1], self.used(rows))

    def hit_rate(self, rows: int) -> float:
        """Return the expected share of these experts that are in their slots."""
        return 1.0 - self.missed(rows) / self.used(rows)

    def missed_bytes(self, rows: int) -> float:
        """Return the expected bytes of experts that a pass reads."""
        return self.num_layers * self.read_bytes * self.missed(rows)

    def waited_s(self, rows: int, missing_s: float, computed_s: float, experts_s: float) -> float:
        """Return the seconds of a pass in which nothing is computed: waits for experts, and their bookkeeping.

        Experts that are known ahead are read while a whole layer is computed, others only beside other experts. A GPU
        computes all experts of a layer together, so it waits for the others.

        Args:
            rows: rows of the pass.
            missing_s: seconds of reading the missing experts.
            computed_s: seconds of computing all layers.
            experts_s: part of `computed_s` for the experts.
        """
        if self.on_gpu:
            host_s = self.num_layers * (_IDS_S + _PLACE_S + _QUEUE_S + _COPY_S * self.missed(rows))
            if not self.looks_ahead:
                return missing_s + host_s
            host_s += self.num_layers * _GPU_LOOK_AHEAD_S
            known_s = _KNOWN_AHEAD * missing_s
            return missing_s - known_s + max(known_s - computed_s - host_s, 0.0) + host_s
        if not self.looks_ahead:
            return max(missing_s - experts_s, 0.0) + self.num_layers * _FETCH_S
        unknown_s = (1.0 - _KNOWN_AHEAD) * missing_s
        waited_s = max(unknown_s - experts_s, missing_s - computed_s, 0.0)
        return waited_s + self.num_layers * (_FETCH_S + _LOOK_AHEAD_S)

    def kept(self, host_bytes: int) -> "ExpertTier":
        """Return the tier with as much in host memory as fits: layers in the page cache, or experts for a GPU."""
        if self.on_gpu:
            most = host_bytes // (self.num_layers * self.slot_bytes)
            return replace(self, num_in_host=min(most, self.num_experts))
        return replace(self, num_cached=min(host_bytes // (self.num_experts * self.read_bytes), self.num_layers))

    @property
    def host_items(self) -> tuple[LedgerItem, ...]:
        """Items of host memory: experts that stay, and windows to read the others into."""
        if self.on_gpu:
            kept = LedgerItem("pinned experts", self.num_layers * self.num_in_host * self.slot_bytes)
            windows = LedgerItem("pinned windows", EXPERT_WINDOWS * EXPERT_WINDOW_BYTES)
        else:
            kept = LedgerItem("experts in the page cache", self.num_cached * self.num_experts * self.read_bytes)
            windows = LedgerItem("reading", READ_THREADS * EXPERT_WINDOW_BYTES)
        return (kept, windows) if self.reads_disk else (kept,)

    def forecast(self, rows: int) -> ExpertForecast:
        """Return what is expected of a pass."""
        return ExpertForecast(
            num_layers=self.num_layers,
            num_experts=self.num_experts,
            per_row=self.per_row,
            expert_bytes=self.read_bytes,
            rows=rows,
            used=self.used(rows),
            hit_rate=self.hit_rate(rows),
            missed_bytes=round(self.missed_bytes(rows)),
        )

    @property
    def all_bytes(self) -> int:
        """Bytes of all experts, which a pass would read without a pool."""
        return self.num_layers * self.num_experts * self.read_bytes


@dataclass(frozen=True)
class ExpertOptions:
    """Bytes of a model whose experts are read one by one.

    Attributes:
        beside_bytes: bytes of all layers without their experts, and of the experts' small parameters: all resident.
        slot_bytes: bytes of a slot.
        layers: layers with such experts.
        tier: the experts without a pool.
    """

    beside_bytes: int
    slot_bytes: int
    layers: tuple[int, ...]
    tier: ExpertTier

    @property
    def num_shared(self) -> int:
        """Slots that all layers share: the experts of one layer, so that no pass reads an expert twice."""
        return self.tier.num_experts

    @property
    def least_bytes(self) -> int:
        """Bytes with no slots but the shared ones."""
        return self.nbytes(0)

    def nbytes(self, quota: int) -> int:
        """Return the bytes of resident layers and slots."""
        return self.beside_bytes + (len(self.layers) * quota + self.num_shared) * self.slot_bytes

    def fit(self, room: int) -> ExpertTier | None:
        """Return the tier with most slots of each layer that fit.

        Returns:
            Tier; None if not even the shared slots fit, and if all experts do: then all layers are resident.
        """
        quota = (room - self.least_bytes) // (len(self.layers) * self.slot_bytes)
        return replace(self.tier, quota=quota) if 0 <= quota < self.tier.num_experts else None


@lru_cache(maxsize=512)
def expert_options(
    target: ModelSpec, dtype: Dtype, learnt: LearntExperts = NOTHING_LEARNT, *, on_gpu: bool = False
) -> ExpertOptions | None:
    """Return the bytes of a model whose experts are read one by one.

    Args:
        target: sizes of the model.
        dtype: dtype of weights and activations.
        learnt: uses and ratios that earlier passes have shown.
        on_gpu: whether the experts are computed on a GPU.

    Returns:
        Bytes; None without such experts, and on a GPU whose kernel for many experts cannot read them: one by one, they
        would take the host longer than the link.
    """
    experts = target.experts
    if experts is None or (on_gpu and not experts.has_kernel):
        return None
    slot = slot_bytes(experts, dtype)
    tier = ExpertTier(
        len(experts.layers),
        experts.num_experts,
        experts.per_row,
        read_bytes(experts, dtype),
        quota=0,
        num_cached=0,
        learnt=learnt,
        on_gpu=on_gpu,
        slot_bytes=slot,
    )
    beside = sum(sizes_beside_experts(target, dtype)) + held_bytes(experts, dtype)
    return ExpertOptions(beside, slot, experts.layers, tier)


def with_experts(placement: Placement, target: ModelSpec, dtype: Dtype, tier: ExpertTier) -> Placement:
    """Return the placement of resident layers whose experts are read one by one."""
    options = expert_options(target, dtype)
    assert options is not None
    is_known = [len(own) for own in tier.learnt.uses] == [tier.num_experts] * tier.num_layers
    uses = tier.learnt.uses if is_known else ()
    slots = ExpertSlots(tier.quota, options.num_shared, uses, tier.looks_ahead, tier.num_in_host)
    return replace(placement, in_ram=options.layers[: tier.num_cached], experts=slots)
