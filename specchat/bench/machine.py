"""Where a measurement was made: hardware and versions, as far as they bear on speed."""

from importlib.metadata import PackageNotFoundError, version
from typing import Any

from specchat.hardware import report
from specchat.hardware.probe import find_hardware
from specchat.paths import cache_folder
from specchat.version import __version__

_PACKAGES = ("torch", "transformers", "accelerate", "safetensors")


def machine_object(device: str) -> dict[str, Any]:
    """The machine as `probe --json` has it, without GPUs that were not used, and without the name of a user's folder.

    Args:
        device: "cpu" or "cuda:N", where passes run.
    """
    machine = report.machine_object(find_hardware(cache_folder()))
    del machine["disk"]
    if device == "cpu":
        machine["gpus"] = []
    return {"device": device, **machine}


def versions_object() -> dict[str, str]:
    """Our own version and those of the libraries that compute."""
    found = {"specchat": __version__}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
