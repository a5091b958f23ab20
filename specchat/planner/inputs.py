"""Find the inputs of a plan: machine, rates, sizes of the models, statistics of earlier chats."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from specchat.errors import ModelError
from specchat.hardware.machine import Hardware, Machine, Measured
from specchat.hardware.probe import find_hardware, find_machine, gpus_beside, remembered
from specchat.models.sizes.describe import describe
from specchat.paths import cache_folder, state_folder
from specchat.planner.acceptance import DEMO_ACCEPTANCE, TYPICAL_ACCEPTANCE
from specchat.planner.expert_statistics import load_experts
from specchat.planner.precision import lower_quants
from specchat.planner.rates import Rates, at_once, rates_of
from specchat.planner.request import DeviceInputs, PlanInputs, PlanRequest
from specchat.planner.statistics import load
from specchat.records.model import AUTO_QUANTS, ModelSource, ModelSpec, Quant
from specchat.records.plan import DeviceChoice


def find_inputs(request: PlanRequest, warn: Callable[[str], None] = lambda _: None) -> PlanInputs:
    """Return machine, rates, sizes of the models and statistics of earlier chats, without measuring anything.

    Args:
        request: models and choices; only configurations are read.
        warn: receives one line about statistics that cannot be read.

    Raises:
        DeviceUnusableError: the device asked for by name cannot be used.
    """
    named = request.choices.devices
    first = named[0].device if named and named != "auto" else request.choices.device
    machine = find_machine(first)
    folder = cache_folder()
    hardware = find_hardware(folder)
    measured = remembered(folder, hardware, machine, first)
    rates = rates_of(hardware, machine, measured)
    others = list(_others(request, machine, hardware, folder))
    rates_here, others = _at_once(machine, rates, others, measured)
    draft, *lower_drafts = _described_drafts(request.draft, request)
    return PlanInputs(
        machine=machine,
        rates=rates,
        typical=rates_of(hardware, machine),
        target=_describing(request.target),
        draft=draft,
        lower_drafts=tuple(each for each in lower_drafts if each is not None),
        prior=DEMO_ACCEPTANCE if request.target.is_toy else TYPICAL_ACCEPTANCE,
        statistics=load(state_folder(), warn),
        experts=load_experts(state_folder(), request.target.name, warn),
        heads=_described_heads(request, warn),
        free_disk_bytes=hardware.disk.free_bytes,
        others=tuple(others),
        rates_at_once=rates_here,
    )


def figures_of(device: str) -> tuple[Machine, Rates]:
    """Return the memory and the speeds of one device of this machine, without measuring anything."""
    machine, folder = find_machine(device), cache_folder()
    hardware = find_hardware(folder)
    return machine, rates_of(hardware, machine, remembered(folder, hardware, machine, device))


def _at_once(
    machine: Machine, rates: Rates, others: list[DeviceInputs], measured: Measured | None
) -> tuple[Rates | None, list[DeviceInputs]]:
    """Return the rates of the first device, and the other devices, while the links of all of them are in use."""
    known = {} if measured is None else {each.device: each.bytes_per_s for each in measured.at_once}
    gpus = [each for each in others if each.machine.device != "cpu"]
    if not gpus:
        return None, others
    names = [machine.device, *(each.machine.device for each in gpus)]
    first, *found = at_once([rates, *(each.rates for each in gpus)], [known.get(name) for name in names])
    shared = iter(found)
    return first, [each if each.machine.device == "cpu" else replace(each, rates=next(shared)) for each in others]


def _others(request: PlanRequest, first: Machine, hardware: Hardware, folder: Path) -> Iterator[DeviceInputs]:
    """Yield the devices besides the first one that layers may be dealt to.

    Raises:
        DeviceUnusableError: a device that was asked for by name cannot be used.
    """
    named = request.choices.devices
    choices = named[1:] if named != "auto" else [DeviceChoice(name) for name in gpus_beside(first)]
    for choice in choices:
        machine = find_machine(choice.device)
        measured = remembered(folder, hardware, machine, choice.device)
        yield DeviceInputs(machine, rates_of(hardware, machine, measured), choice.vram_bytes)


def _describing(source: ModelSource) -> Callable[[Quant], ModelSpec]:
    """Return a function that describes the model in a precision, and caches each description."""
    return lru_cache(maxsize=None)(lambda quant: describe(source, quant))


def _described_drafts(source: ModelSource | None, request: PlanRequest) -> list[ModelSpec | None]:
    """Return the draft, followed by its lower precisions; [None] without a draft."""
    if source is None:
        return [None]
    if request.choices.draft_quant != "auto":
        return [describe(source, request.choices.draft_quant)]
    if source.is_copy:
        return [describe(source, quant) for quant in AUTO_QUANTS]
    draft = describe(source)
    return [draft, *(describe(source, quant) for quant in lower_quants(draft))]


def _described_heads(request: PlanRequest, warn: Callable[[str], None]) -> tuple[ModelSpec, ...]:
    """Return the heads in their precisions; one that cannot be read must not keep the target from running."""
    found = list[ModelSpec]()
    for head in request.heads:
        try:
            found += [each for each in _described_drafts(head, request) if each is not None]
        except ModelError as error:
            which = f"the MTP layer of {request.target.name}" if head.part == "mtp" else f"the head {head.name}"
            warn(f"{which} is not used: {error.message}")
    return tuple(found)
