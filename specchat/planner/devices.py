"""Plans for several devices of one machine: each holds some layers with their caches, and streams others.

The first device also has embeddings, head and draft. Layers are dealt so that all links end together (dealing.py).
Shared blocks are needed by layers on every device, and a copy of the target by the first one alone, so such targets and
drafts run on one device. Experts are not read one by one, and chats have no stages.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from specchat.errors import DoesNotFitError, SpecchatError, UnsupportedModelError
from specchat.hardware.machine import Machine
from specchat.models.sizes.geometry import dequantize_bytes, layer_sizes
from specchat.planner.candidate import Candidate, preference
from specchat.planner.candidates import Candidates
from specchat.planner.dealing import Deal, Room, best_shares, deal
from specchat.planner.device_cost import DevicesCost
from specchat.planner.memory import (
    ancestors_bytes,
    build_host_ledger,
    build_ledger,
    host_embedding_bytes,
    host_embeddings,
    kv_bytes,
    layer_items,
    retrieval_items,
    target_passes,
)
from specchat.planner.placement import SLOTS, Share, TierSizes, keep_in_ram, pinnable_ram
from specchat.planner.request import DeviceInputs, PlanInputs, PlanRequest
from specchat.planner.states import restore_items, state_items, state_memory
from specchat.planner.workload import CUDA_RESERVE_BYTES, default_budget, layer_host_bytes
from specchat.records.microbatches import Microbatches, stretches_of
from specchat.records.model import LOWER_QUANTS, ModelSpec
from specchat.records.plan import DevicePlan, LedgerItem, Placement, Plan, PlanChoices, Workload
from specchat.units import format_bytes

# Nodes of the tree for which adaptive plans deal their layers.
_USUAL_NODES = 64
# Attempts to deal layers whose exact ledger exceeds a budget, because layers are not all alike.
_MOST_ATTEMPTS = 4


@dataclass(frozen=True)
class DevicesCandidate(Candidate):
    """A configuration whose layers are dealt to several devices.

    Attributes:
        dealt: owner and place of each layer.
        machines: machine of each device.
        budgets: memory budget of each device in bytes.
        in_ram: indices of the streamed layers that stay in host memory.
        names: names of the devices.
        apart: whether each device belongs to another machine.
    """

    dealt: Deal = field(default_factory=lambda: Deal((), ()))
    machines: tuple[Machine, ...] = ()
    budgets: tuple[int, ...] = ()
    in_ram: tuple[int, ...] = ()
    names: tuple[str, ...] = ()
    apart: bool = False

    @property
    def devices(self) -> tuple[str, ...]:
        """Names of the devices."""
        return self.names

    @cached_property
    def microbatches(self) -> Microbatches:
        """Numbers of microbatches of passes."""
        assert isinstance(self.model, DevicesCost)
        return self.model.microbatches(self.sizes, self.work.tree_budget, self.work.prompt_rows)

    def plan(self, choices: PlanChoices, machine: Machine) -> Plan:
        """Build the plan, with the placement and the ledgers of all devices."""
        target, draft, work = self.target, self.draft, self.work
        sizes, stays = layer_sizes(target, work.dtype), set(self.dealt.resident)
        streamed = {index: size for index, size in enumerate(sizes) if index not in stays}
        placement = Placement(
            target.num_layers,
            self.dealt.resident,
            self.in_ram,
            self.slots,
            devices=self.devices,
            owner=self.dealt.owner,
            apart=self.apart,
            microbatches=self.microbatches,
        )
        work = replace(work, draft_rows=0) if draft is None else work
        points = restore_items(target, draft, work)
        beside = (*host_embeddings(target, work), *points, *retrieval_items(work, used=self.retrieval))
        devices = tuple(self._devices(work, streamed))
        slots = self.slots * sum(each.streamed > 0 for each in devices[: 1 if self.apart else None])
        owner = self.dealt.owner
        here = {index: size for index, size in streamed.items() if not self.apart or owner[index] == 0}
        in_ram = tuple(index for index in self.in_ram if index in here)
        host_bytes = layer_host_bytes(here, in_ram, slots) + host_embedding_bytes(target, work)
        on_cpu = sum(each.num_bytes for each in devices if each.device == "cpu")
        return Plan(
            target=target.name,
            draft=None if draft is None else draft.name,
            quant=target.quant,
            work=work,
            placement=placement,
            ledger=devices[0].ledger,
            vram_bytes=self.budgets[0],
            host_bytes=host_bytes + on_cpu + sum(item.bytes for item in points),
            streamed_bytes_per_step=sum(streamed.values()),
            adaptive=self.adaptive,
            draft_quant="none" if draft is None else draft.quant,
            text_only=target.text_only,
            retrieval=self.retrieval,
            lowered_from=target.dtype if choices.quant == "auto" and target.quant in LOWER_QUANTS else None,
            host_ledger=build_host_ledger(here, in_ram, slots, machine.device, beside),
            expected=self.model.expectation(self.sizes, work.tree_budget) if self.adaptive else None,
            states=state_memory(target, draft, work, kv_bytes(target, work, work.tree_rows)),
            devices=devices,
        )

    def _devices(self, work: Workload, streamed: Mapping[int, int]) -> Iterator[DevicePlan]:
        assert isinstance(self.model, DevicesCost)
        rows = work.seats + self.prediction.tree_nodes
        for number, share in enumerate(self.sizes.shares):
            nbytes = sum(size for index, size in streamed.items() if self.dealt.owner[index] == number)
            yield DevicePlan(
                device=self.devices[number],
                resident=share.num_resident,
                streamed=share.num_streamed,
                ledger=device_ledger(
                    self.target, self.draft, work, self.dealt, number, self.machines[number].device, self.slots
                ),
                vram_bytes=self.budgets[number],
                streamed_bytes=nbytes,
                link_bytes_per_s=self.model.links[number],
                link_s=nbytes / self.model.links[number],
                compute_s=self.model.compute_s(number, share, rows),
            )


def device_ledger(
    target: ModelSpec, draft: ModelSpec | None, work: Workload, dealt: Deal, number: int, device: str, slots: int
) -> tuple[LedgerItem, ...]:
    """Return every item that occupies the memory of one device.

    Args:
        target: sizes of the target.
        draft: sizes of the draft, or None.
        work: device, dtype, context and trees.
        dealt: owner and place of each layer.
        number: number of the device.
        device: name of the device.
        slots: staging buffers, if the device streams.
    """
    owned = [index for index, owner in enumerate(dealt.owner) if owner == number]
    kept = set(dealt.resident)
    resident = tuple(place for place, index in enumerate(owned) if index in kept)
    local = Placement(len(owned), resident, slots=min(slots, len(owned) - len(resident)))
    part = replace(
        target,
        num_layers=len(owned),
        layer_params=tuple(target.layer_params[index] for index in owned),
        kv_shapes=tuple(target.kv_shapes[index] for index in owned),
        experts=None,
    )
    if number == 0:
        return build_ledger(part, draft, work, local)
    first, _ = target_passes(target, work)  # the estimate of activations needs all layers
    items = [
        *layer_items(part, work.dtype, local),
        LedgerItem("KV cache", kv_bytes(part, work, work.tree_rows)),
        *state_items(part, work),
        LedgerItem("dequantized pieces", dequantize_bytes(target, work.dtype, device)),
        LedgerItem("hidden rows", 2 * first.hidden),  # what arrives, and what leaves
        LedgerItem("tree mask", first.masks + ancestors_bytes(work)),
        LedgerItem("activations", first.rest),
        LedgerItem("library reserve", 0 if device == "cpu" else CUDA_RESERVE_BYTES),
    ]
    return tuple(item for item in items if item.bytes)


class DeviceCandidates:
    """The configurations that fit on several devices; for each draft, those with the longest context that fits.

    Args:
        request: models and choices.
        inputs: machines, rates, sizes and statistics.
        target: sizes of the target in one precision.
        single: configurations for the first device alone.
    """

    def __init__(self, request: PlanRequest, inputs: PlanInputs, target: ModelSpec, single: Candidates) -> None:
        self._request = request
        self._choices = request.choices
        self._inputs = inputs
        self._target = target
        self._single = single
        first = DeviceInputs(inputs.machine, inputs.rates_at_once or inputs.rates, request.choices.vram_bytes)
        self._devices = (first, *inputs.others)
        machines = [each.machine for each in self._devices]
        budgets = [
            default_budget(each.machine) if each.vram_bytes is None else each.vram_bytes for each in self._devices
        ]
        self._machines, self._budgets = tuple(machines), tuple(budgets)
        self._names = tuple(each.name for each in self._devices)
        self._apart = any(each.peer is not None for each in self._devices)
        self._models: dict[ModelSpec | None, DevicesCost] = {}

    @property
    def can_deal(self) -> bool:
        """Whether the target's layers can be on several devices."""
        alone = any(shape.state is not None or not shape.heads for shape in self._target.kv_shapes)
        return not self._target.shared_params and not (self._apart and alone)

    @cached_property
    def best(self) -> Candidate | None:
        """Preferred candidate; None if nothing fits."""
        return max(self.all, key=preference, default=None)

    @cached_property
    def all(self) -> list[Candidate]:
        """All candidates, with every draft and without."""
        if not self.can_deal:
            return []
        drafts = [draft for draft in self._single.drafts if draft is None or not draft.is_copy]
        return [candidate for draft in drafts for candidate in self._with_draft(draft)]

    def refusal(self) -> SpecchatError:
        """Build the error for devices that were named: they are too small, or cannot share the layers."""
        if not self.can_deal and self._apart:
            return UnsupportedModelError(
                f"{self._target.name} cannot be split over workers: its layers share more than rows",
                hint="leave --workers out",
            )
        if not self.can_deal:
            return UnsupportedModelError(
                f"the layers of {self._target.name} share blocks, so they cannot be on several devices",
                hint="use --device",
            )
        ctx = self._single.contexts[-1]
        draft = next((each for each in reversed(self._single.drafts) if each is None or not each.is_copy), None)
        work = self._single.workload_for(draft, ctx, min(self._single.tree_budgets(draft)))
        least = [self._least_bytes(draft, work, number) for number in range(len(self._machines))]
        number = max(range(len(least)), key=lambda each: least[each] - self._budgets[each])
        device, budget = self._names[number], self._budgets[number]
        if least[number] <= budget:
            return DoesNotFitError(
                f"the layers of {self._target.name} do not fit on {', '.join(self._names)} with --ctx {ctx:,}",
                hint=f"raise {'--vram here or on the workers' if self._apart else 'the budgets in --devices'}, "
                "or lower --ctx",
            )
        return DoesNotFitError(
            f"{self._target.name} needs at least {format_bytes(least[number])} on {device} with --ctx {ctx:,}, "
            f"but its budget is {format_bytes(budget)}",
            hint=f"raise {'its --vram' if self._apart else f'{device} in --devices'}, leave it out, or lower --ctx",
        )

    def _least_bytes(self, draft: ModelSpec | None, work: Workload, number: int) -> int:
        """Return the bytes of a device without any layer."""
        ledger = device_ledger(self._target, draft, work, Deal((), ()), number, self._machines[number].device, slots=0)
        return sum(item.bytes for item in ledger)

    def _with_draft(self, draft: ModelSpec | None) -> list[Candidate]:
        for ctx in self._single.contexts:
            works = [self._single.workload_for(draft, ctx, budget) for budget in self._single.tree_budgets(draft)]
            if found := [candidate for work in works for candidate in self._with_workload(draft, work)]:
                return found
        return []

    def _with_workload(self, draft: ModelSpec | None, work: Workload) -> Iterator[Candidate]:
        slots = SLOTS if self._choices.slots is None else (self._choices.slots,)
        for variant, other_bytes in self._single.workload_variants(draft, work):
            for count in slots:
                if (found := self._dealt(draft, variant, other_bytes, count)) is not None:
                    yield found
                    if not found.num_streamed:
                        return

    def _dealt(self, draft: ModelSpec | None, work: Workload, other_bytes: int, slots: int) -> Candidate | None:
        """Return the best deal whose ledgers stay within all budgets; None if none does."""
        target, model, budgets = self._target, self._model(draft), list(self._budgets)
        sizes = layer_sizes(target, work.dtype)
        layer_bytes = sum(sizes) // len(sizes)
        cached = kv_bytes(target, work, work.tree_rows) + sum(item.bytes for item in state_items(target, work))
        nothing = Deal((), ())
        beside = [other_bytes - cached]
        for number, device in enumerate(self._machines[1:], 1):
            ledger = device_ledger(target, draft, work, nothing, number, device.device, slots)
            beside.append(sum(item.bytes for item in ledger))
        nodes = work.tree_budget if self._choices.tree_budget else min(work.tree_budget, _USUAL_NODES)

        def seconds(shares: Sequence[Share]) -> float:
            return model.dealt_s(_tiers(shares, layer_bytes, slots, _hops(shares)), nodes)

        for _ in range(_MOST_ATTEMPTS):
            rooms = [
                Room(
                    budget - other,
                    slots,
                    layer_bytes,
                    cached // len(sizes),
                    streams=self._apart or machine.device != "cpu",
                )
                for budget, other, machine in zip(budgets, beside, self._machines, strict=True)
            ]
            shares = best_shares(len(sizes), rooms, model.links, seconds)
            if shares is None:
                return None
            dealt = deal(shares)
            excess = [
                sum(item.bytes for item in device_ledger(target, draft, work, dealt, i, each.device, slots)) - most
                for i, (each, most) in enumerate(zip(self._machines, self._budgets, strict=True))
            ]
            if all(each <= 0 for each in excess):
                return self._candidate(draft, work, shares, dealt, slots)
            budgets = [budget - max(each, 0) for budget, each in zip(budgets, excess, strict=True)]
        return None

    def _candidate(
        self, draft: ModelSpec | None, work: Workload, shares: tuple[Share, ...], dealt: Deal, slots: int
    ) -> Candidate:
        sizes, stays = layer_sizes(self._target, work.dtype), set(dealt.resident)
        streamed = {index: size for index, size in enumerate(sizes) if index not in stays}
        on_cpu = sum(
            item.bytes
            for number, each in enumerate(self._machines[: 1 if self._apart else None])
            if each.device == "cpu"
            for item in device_ledger(self._target, draft, work, dealt, number, "cpu", slots)
        )
        points = sum(item.bytes for item in restore_items(self._target, draft, work))
        host_bytes = max(self._single.host_budget(work, 0) - on_cpu - points, 0)
        if self._apart:
            in_ram = self._in_ram_apart(streamed, dealt, host_bytes)
        else:
            in_ram = keep_in_ram(streamed, host_bytes) if streamed else ()
        ram_bytes = sum(streamed[index] for index in in_ram)
        tiers = TierSizes(
            num_layers=len(sizes),
            num_in_ram=len(in_ram),
            num_on_disk=len(streamed) - len(in_ram),
            ram_bytes=ram_bytes,
            disk_bytes=sum(streamed.values()) - ram_bytes,
            slots=slots if streamed else 0,
            shares=shares,
            num_hops=dealt.num_hops,
            stretches=stretches_of(dealt.owner, frozenset(streamed)) if self._can_cut(work, shares) else (),
        )
        model, adaptive = self._model(draft), self._request.is_adaptive
        return DevicesCandidate(
            target=self._target,
            draft=draft,
            work=work,
            sizes=tiers,
            vram_bytes=self._budgets[0],
            tok_per_s=model.tok_per_s(tiers, work.tree_budget, adaptive=adaptive),
            adaptive=adaptive,
            model=model,
            retrieval=self._request.retrieval and work.tree_budget > 0,
            dealt=dealt,
            machines=self._machines,
            budgets=self._budgets,
            in_ram=in_ram,
            names=self._names,
            apart=self._apart,
        )

    def _can_cut(self, work: Workload, shares: Sequence[Share]) -> bool:
        """Return whether passes may have microbatches, which several devices compute at the same time.

        States of recurrent layers, layers that read other layers' keys, and heads that read between the layers need
        all rows of a layer together. A CPU would keep the thread that also launches the kernels of this machine's GPUs.
        """
        alone = any(shape.state is not None or not shape.heads for shape in self._target.kv_shapes)
        used = [machine for machine, share in zip(self._machines, shares, strict=True) if share.num_layers]
        at_once = self._apart or all(machine.device != "cpu" for machine in used)
        return len(used) > 1 and at_once and not alone and not work.tapped_width

    def _in_ram_apart(self, streamed: Mapping[int, int], dealt: Deal, host_bytes: int) -> tuple[int, ...]:
        """Return the streamed layers of GPUs that stay in the host memory of their own machines."""
        found = list[int]()
        for number, machine in enumerate(self._machines):
            own = {index: size for index, size in streamed.items() if dealt.owner[index] == number}
            if own and machine.device != "cpu":
                found += keep_in_ram(own, host_bytes if number == 0 else pinnable_ram(machine))
        return tuple(sorted(found))

    def _model(self, draft: ModelSpec | None) -> DevicesCost:
        if draft not in self._models:
            names = [machine.device for machine in self._machines]
            rates = [each.rates for each in self._devices]
            acceptance = self._inputs.acceptance(self._target, draft, samples=self._request.samples)
            self._models[draft] = DevicesCost(
                self._target,
                draft,
                self._single.dtype,
                names,
                rates,
                acceptance,
                self._choices.seats,
                retrieval=self._request.retrieval,
                peers=[each.peer for each in self._devices],
            )
        return self._models[draft]


def _tiers(shares: Sequence[Share], layer_bytes: int, slots: int, num_hops: int) -> TierSizes:
    """Return tier sizes of shares, with all streamed layers in host memory."""
    num_streamed = sum(share.num_streamed for share in shares)
    num_layers = sum(share.num_layers for share in shares)
    return TierSizes(
        num_layers=num_layers,
        num_in_ram=num_streamed,
        ram_bytes=num_streamed * layer_bytes,
        slots=slots,
        shares=tuple(shares),
        num_hops=num_hops,
    )


def _hops(shares: Sequence[Share]) -> int:
    """Return about how often rows change the device: to a layer of another one and back."""
    return 2 * sum(max(share.num_streamed, 1) for share in shares[1:] if share.num_layers)
