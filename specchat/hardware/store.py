"""Measured figures kept from one report to the next: a file for each machine, replaced whole or not at all."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

from specchat.files import atomic_write_text
from specchat.hardware.machine import Hardware, Links, MatmulRate, Measured

_VERSION = 1  # of what is measured, and how


def key_of(hardware: Hardware, device: str) -> str:
    """A name that changes whenever the figures would: other cards, driver, processor, torch, or disk."""
    facts = [
        _VERSION,
        device,
        *((gpu.uuid, gpu.driver) for gpu in hardware.survey.gpus),
        hardware.cpu.name,
        hardware.cpu.cores,
        hardware.ram.total_bytes,
        str(hardware.disk.path),
        None if hardware.torch is None else hardware.torch.version,
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def load(folder: Path, key: str) -> Measured | None:
    """What was saved; None if nothing was, or another version wrote it."""
    try:
        values = json.loads(_file(folder, key).read_text())
        pcie = values["pcie_under_load"]
        values |= {
            "links": Links(**values["links"]),
            "matmul": tuple(MatmulRate(**rate) for rate in values["matmul"]),
            "pcie_under_load": None if pcie is None else (int(pcie[0]), int(pcie[1])),
        }
        return Measured(**values)
    except (OSError, ValueError, KeyError, TypeError):  # absent, torn by a full disk, or of another make: measure again
        return None


def save(folder: Path, key: str, measured: Measured) -> None:
    """Keeps figures for the next report.

    Raises:
        OSError: the folder cannot be written to.
    """
    atomic_write_text(_file(folder, key), json.dumps(asdict(measured)), durably=True)


def _file(folder: Path, key: str) -> Path:
    return folder / f"probe-{key}.json"
