"""Lists of devices as users write them: `cuda:0,cuda:1=6GiB,cpu`."""

from dataclasses import replace
from typing import Literal

from specchat.errors import InvalidSizeError, UsageError
from specchat.records.plan import DeviceChoice, PlanChoices
from specchat.units import parse_size

_HINT = "write for example cuda:0,cuda:1=6GiB,cpu, or auto"


def is_device(text: str) -> bool:
    """Return whether a text is the name of one device; whether the device exists is checked later."""
    kind, colon, index = text.partition(":")
    return text in ("cpu", "cuda") or (kind == "cuda" and bool(colon) and index.isdecimal() and index.isascii())


def parse_devices(name: str, text: str) -> Literal["auto"] | tuple[DeviceChoice, ...]:
    """Parse a list of devices with memory budgets.

    Args:
        name: name of the setting, for messages.
        text: "auto", or devices separated by commas, each with "=SIZE" if it has a budget of its own.

    Raises:
        UsageError: the list is empty, names something else or a device twice, or its CPU does not come last.
    """
    if text == "auto":
        return "auto"
    found = [_parse(name, each.strip()) for each in text.split(",")]
    names = ["cuda:0" if each.device == "cuda" else each.device for each in found]
    if twice := next((each for each in names if names.count(each) > 1), None):
        raise UsageError(f"{name} names {twice} twice", hint="name each device once")
    if "cpu" in names[:-1]:
        raise UsageError(
            f"{name} must name cpu last: embeddings, head and draft are on the first device",
            hint="write cpu at the end",
        )
    return tuple(found)


def on_named_devices(choices: PlanChoices) -> PlanChoices:
    """Return choices with the device and the budget of the first device in their list; drop a list of one."""
    if choices.devices == "auto" or not choices.devices:
        return choices
    first, *others = choices.devices
    vram_bytes = choices.vram_bytes if first.vram_bytes is None else first.vram_bytes
    return replace(choices, device=first.device, vram_bytes=vram_bytes, devices=(first, *others) if others else ())


def _parse(name: str, text: str) -> DeviceChoice:
    device, equals, size = text.partition("=")
    if not is_device(device):
        raise UsageError(f"{name} must be a list of cpu, cuda or cuda:N, not '{text}'", hint=_HINT)
    if not equals:
        return DeviceChoice(device)
    try:
        return DeviceChoice(device, parse_size(size))
    except InvalidSizeError as error:
        raise InvalidSizeError(f"{name}, {device}: {error.message}", error.hint) from error
