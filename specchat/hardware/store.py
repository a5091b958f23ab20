"""Measured rates on disk, one file per machine, replaced atomically."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

from specchat.files import atomic_write_text, read_regular
from specchat.hardware.machine import Hardware, LinkRate, Links, MatmulRate, Measured

_VERSION = 4  # raise when measurements change


def key_of(hardware: Hardware, device: str) -> str:
    """Return a key that changes with everything that affects rates: cards, driver, CPU, torch, disk."""
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
    """Load saved rates; None if there are none, or if another version wrote them."""
    try:
        values = json.loads(read_regular(_file(folder, key)))
        pcie = values["pcie_under_load"]
        values |= {
            "links": Links(**values["links"]),
            "matmul": tuple(MatmulRate(**rate) for rate in values["matmul"]),
            "packed": tuple(MatmulRate(**rate) for rate in values["packed"]),
            "at_once": tuple(LinkRate(**rate) for rate in values["at_once"]),
            "pcie_under_load": None if pcie is None else (int(pcie[0]), int(pcie[1])),
        }
        return Measured(**values)
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        RecursionError,
    ):  # absent, truncated by a full disk, or from another version
        return None


def save(folder: Path, key: str, measured: Measured) -> None:
    """Save rates for the next report.

    Raises:
        OSError: the folder is not writable.
    """
    atomic_write_text(_file(folder, key), json.dumps(asdict(measured)), durably=True)


def _file(folder: Path, key: str) -> Path:
    return folder / f"probe-{key}.json"
