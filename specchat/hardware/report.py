"""The report as JSON, in bytes and bytes per second."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from specchat.hardware.machine import Gpu, Hardware, Measured
from specchat.hardware.probe import Report
from specchat.hardware.verdicts import Verdict

SCHEMA_VERSION = 1


def machine_object(hardware: Hardware, measured: Measured | None = None) -> dict[str, Any]:
    """Describe the machine without its rates; PCIe state under load if measured, else the current one."""
    return {
        "gpus": [_gpu_object(gpu, measured) for gpu in hardware.survey.gpus],
        "cpu": {"name": hardware.cpu.name, "cores": hardware.cpu.cores, "isa": list(hardware.cpu.isa)},
        "ram": asdict(hardware.ram),
        "disk": {"path": str(hardware.disk.path), "free_bytes": hardware.disk.free_bytes},
        "platform": asdict(hardware.platform),
    }


def _gpu_object(gpu: Gpu, measured: Measured | None) -> dict[str, Any]:
    link = gpu.pcie
    if measured is not None and measured.gpu_uuid == gpu.uuid and measured.pcie_under_load is not None:
        link = replace(link, gen=measured.pcie_under_load[0], width=measured.pcie_under_load[1])
    return {
        "name": gpu.name,
        "uuid": gpu.uuid,
        "vram_total_bytes": gpu.vram_total_bytes,
        "vram_free_bytes": gpu.vram_free_bytes,
        "compute_capability": gpu.compute_capability,
        "driver": gpu.driver,
        "pcie": asdict(link),
    }


def report_object(report: Report, verdicts: Sequence[Verdict], plan: dict[str, Any] | None) -> dict[str, Any]:
    """Build the object that `probe --json` prints.

    Args:
        report: report on this machine.
        verdicts: verdicts on the machine and on further topics, such as the libraries.
        plan: plan of a model on this machine, or None.
    """
    measured = report.measured
    return {
        "schema_version": SCHEMA_VERSION,
        "machine": machine_object(report.hardware, measured),
        "links": asdict(measured.links),
        "links_at_once": [
            {"device": each.device, "h2d_pinned_bytes_per_s": each.bytes_per_s} for each in measured.at_once
        ],
        "compute": {
            "device": measured.device,
            "dtype": measured.matmul_dtype,
            "matmul": [asdict(rate) for rate in measured.matmul],
            "packed": [asdict(rate) for rate in measured.packed],
        },
        "measured_at": measured.measured_at,
        "verdicts": [
            {"level": each.level, "text": f"{each.topic}: {each.text}", "hint": each.hint} for each in verdicts
        ],
        "plan": plan,
    }
