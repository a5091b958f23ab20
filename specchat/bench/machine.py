"""The machine and the library versions of a measurement, as far as they affect speed."""

from importlib.metadata import PackageNotFoundError, version
from typing import Any

from specchat.hardware import report
from specchat.hardware.probe import find_hardware
from specchat.paths import cache_folder
from specchat.version import __version__

_PACKAGES = ("torch", "transformers", "accelerate", "safetensors")


def machine_object(device: str) -> dict[str, Any]:
    """Return the machine as in `probe --json`, without unused GPUs and without the user's folder.

    Args:
        device: device that computes passes, "cpu" or "cuda:N".
    """
    machine = report.machine_object(find_hardware(cache_folder()))
    del machine["disk"]
    if device == "cpu":
        machine["gpus"] = []
    return {"device": device, **machine}


def versions_object() -> dict[str, str]:
    """Return the versions of specchat and of the libraries that compute."""
    found = {"specchat": __version__}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
