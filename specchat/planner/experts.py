"""Predict how many experts a pass uses, how many of them the pool has, and the bytes that are missing."""

import math
from dataclasses import dataclass, replace
from functools import lru_cache

from specchat.models.sizes.geometry import held_bytes, read_bytes, sizes_beside_experts, slot_bytes
from specchat.records.model import Dtype, ModelSpec
from specchat.records.plan import ExpertForecast, ExpertSlots, Placement

# Rows of one tree use fewer experts than independent rows would: as many as rows^a of these, with
# a = _EXPONENT - _FALL log2(rows). Fitted to a synthetic router whose neighbouring tokens share experts as measured for
# trained ones (tests/support/routing.py): a is 0.85, 0.80, 0.76 and 0.69 at 2, 8, 16 and 64 rows.
_EXPONENT, _FALL = 0.885, 0.0325
_MOST_ROWS = 8192  # beyond which the fit would fall; a pass uses all experts long before


def used_share(active_share: float, rows: int) -> float:
    """Return the expected share of a layer's experts that a pass uses, if one row uses `active_share` of them."""
    doublings = math.log2(min(rows, _MOST_ROWS))
    return 1.0 - math.pow(1.0 - active_share, math.pow(2.0, doublings * (_EXPONENT - _FALL * doublings)))


def hit_rate(pool_share: float, used: float) -> float:
    """Return the expected share of a pass's experts that the pool has.

    The pool keeps the experts of the highest decayed number of uses. Fitted to simulated passes of 1 to 64 rows over
    128 experts, with an eighth, a quarter and half of them in the pool: within 0.05.

    Args:
        pool_share: share of a layer's experts that the pool keeps.
        used: share of a layer's experts that the pass uses.
    """
    return 1.0 - math.pow(1.0 - pool_share, 1.0 + 3.4 * math.pow(1.0 - used, 1.5))


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
    """

    num_layers: int
    num_experts: int
    per_row: int
    read_bytes: int
    quota: int
    num_cached: int

    def used(self, rows: int) -> float:
        """Return the expected experts of a layer that a pass uses."""
        return self.num_experts * used_share(self.per_row / self.num_experts, rows)

    def hit_rate(self, rows: int) -> float:
        """Return the expected share of these experts that are in their slots."""
        return hit_rate(self.quota / self.num_experts, self.used(rows) / self.num_experts)

    def missed_bytes(self, rows: int) -> float:
        """Return the expected bytes of experts that a pass reads."""
        return self.num_layers * self.read_bytes * self.used(rows) * (1.0 - self.hit_rate(rows))

    def cached(self, host_bytes: int) -> "ExpertTier":
        """Return the tier with as many layers in the page cache as fit."""
        return replace(self, num_cached=min(host_bytes // (self.num_experts * self.read_bytes), self.num_layers))

    def forecast(self, rows: int) -> ExpertForecast:
        """Return what is expected of a pass."""
        return ExpertForecast(
            num_layers=self.num_layers,
            num_experts=self.num_experts,
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
def expert_options(target: ModelSpec, dtype: Dtype) -> ExpertOptions | None:
    """Return the bytes of a model whose experts are read one by one; None without such experts."""
    experts = target.experts
    if experts is None:
        return None
    tier = ExpertTier(len(experts.layers), experts.num_experts, experts.per_row, read_bytes(experts, dtype), 0, 0)
    beside = sum(sizes_beside_experts(target, dtype)) + held_bytes(experts, dtype)
    return ExpertOptions(beside, slot_bytes(experts, dtype), experts.layers, tier)


def with_experts(placement: Placement, target: ModelSpec, dtype: Dtype, tier: ExpertTier) -> Placement:
    """Return the placement of resident layers whose experts are read one by one."""
    options = expert_options(target, dtype)
    assert options is not None
    slots = ExpertSlots(tier.quota, options.num_shared)
    return replace(placement, in_ram=options.layers[: tier.num_cached], experts=slots)
