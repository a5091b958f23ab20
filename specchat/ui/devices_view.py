"""Several devices in words: what stays on each, what it streams over which link, and how long that takes."""

from collections.abc import Sequence

from specchat.records.plan import DevicePlan, Plan
from specchat.records.usage import DeviceUse, MemoryReport
from specchat.units import format_bytes

_COLUMNS = ("device", "stays", "streams", "link", "link busy", "computes", "memory")


def device_table(plan: Plan, width: int) -> list[str]:
    """Return the lines about the devices of a plan: a table, or a block for each where the width is too small.

    Args:
        plan: plan with several devices.
        width: width in columns.
    """
    rows = [_row(device) for device in plan.devices]
    widths = [max(map(len, column)) for column in zip(_COLUMNS, *rows, strict=True)]
    if sum(widths) + 2 * (len(widths) - 1) > width:
        return [line for row in rows for line in _block(row)]
    lines = [_COLUMNS, *rows]
    return ["  ".join(cell.ljust(size) for cell, size in zip(line, widths, strict=True)).rstrip() for line in lines]


def links_text(devices: Sequence[DevicePlan]) -> str:
    """Return the rates of the links in use, which are used at the same time; empty if nothing streams."""
    rates = [f"{device.link_bytes_per_s / 1e9:.1f}" for device in devices if device.streamed]
    return f"{' + '.join(rates)} GB/s at once" if rates else ""


def passes_text(plan: Plan) -> str:
    """Return the number of microbatches of passes, by their rows."""
    counts = plan.placement.microbatches.counts
    if not counts:
        return "in one piece"
    (rows, count), *more = counts
    largest = max(counts, key=lambda each: each[1])
    upto = f", up to {largest[1]} from {largest[0]:,} rows" if more and largest[1] != count else ""
    return f"in {count} microbatches from {rows:,} rows{upto}; devices compute them at the same time"


def devices_line(plan: Plan) -> str:
    """Return the memory and the layers of each device in one line."""
    parts = [
        f"{each.device} {format_bytes(each.num_bytes)} of {format_bytes(each.vram_bytes)} "
        f"({each.resident} layers stay, {each.streamed} streamed)"
        for each in plan.devices
    ]
    streamed = f"streamed {format_bytes(plan.streamed_bytes_per_step)}/pass" if plan.placement.streams else ""
    return " · ".join([*parts, streamed or "nothing streamed"])


def use_lines(memory: MemoryReport) -> list[str]:
    """Return one line for each of several devices: the share of time that its link and the device itself were busy."""
    return [
        f"{each.device}: link busy {each.link_busy:.0%} of the time, computing {each.compute_busy:.0%}, "
        f"{format_bytes(each.streamed_bytes)} streamed, {_exchanged(each)}memory "
        f"{format_bytes(each.device_peak_bytes)} of {format_bytes(each.device_budget_bytes)}"
        for each in memory.devices
    ]


def _exchanged(use: DeviceUse) -> str:
    """Return what a machine sent to others, and how long it waited for them; empty for devices of one machine."""
    if not use.sent_bytes:
        return ""
    return f"{format_bytes(use.sent_bytes)} of rows sent, {_seconds(use.row_wait_s)} waited for rows, "


def _row(device: DevicePlan) -> tuple[str, ...]:
    streams = f"{device.streamed} layers, {format_bytes(device.streamed_bytes)}" if device.streamed else "-"
    return (
        device.device,
        f"{device.resident} layers",
        streams,
        f"{device.link_bytes_per_s / 1e9:.1f} GB/s" if device.streamed else "-",
        _seconds(device.link_s) if device.streamed else "-",
        _seconds(device.compute_s),
        f"{format_bytes(device.num_bytes)} of {format_bytes(device.vram_bytes)}",
    )


def _block(row: Sequence[str]) -> list[str]:
    name, *cells = row
    facts = [(title, cell) for title, cell in zip(_COLUMNS[1:], cells, strict=True) if cell != "-"]
    return [f"{name}:", *(f"  {title:<9}  {cell}" for title, cell in facts)]


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.0f} ms"
