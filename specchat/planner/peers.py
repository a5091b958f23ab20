"""Figures of other machines, as their workers tell them."""

from collections.abc import Mapping
from typing import Any

from specchat.hardware.machine import Machine, MatmulRate
from specchat.planner.rates import Rate, Rates
from specchat.planner.request import DeviceInputs, Peer


def inputs_of(values: Mapping[str, Any], peer: Peer) -> DeviceInputs:
    """Return the facts about a worker's device.

    Args:
        values: machine, rates and budget, as JSON keeps them.
        peer: way to the machine.
    """
    machine = Machine(**{**values["machine"], "fused": tuple(values["machine"]["fused"])})
    return DeviceInputs(machine, _rates(values["rates"]), values["vram_bytes"], peer)


def _rates(values: Mapping[str, Any]) -> Rates:
    found: dict[str, Any] = dict(values)
    for name in ("disk", "ram", "pinned", "pageable", "memory"):
        found[name] = None if values[name] is None else Rate(**values[name])
    for name in ("matmul", "packed"):
        found[name] = tuple(MatmulRate(**each) for each in values[name])
    found["copy_s"] = tuple(values["copy_s"])
    return Rates(**found)
