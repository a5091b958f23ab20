"""Kernels that a device has refused, of which the user hears once."""

import torch

_refused: set[tuple[torch.device, str]] = set()
_untold: list[str] = []


def is_refused(device: torch.device, kernel: str) -> bool:
    """Return whether a device has refused a kernel."""
    return (device, kernel) in _refused


def refuse(device: torch.device, kernel: str, error: Exception) -> None:
    """Remember that a kernel failed on a device; the user hears of the device's first one."""
    if not any(other == device for other, _ in _refused):
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        _untold.append(f"Triton fails on {device}, so torch computes, which is slower: {reason}")
    _refused.add((device, kernel))


def take_refusals() -> list[str]:
    """Return one-line warnings that nobody has taken yet."""
    taken = list(_untold)
    _untold.clear()
    return taken


def forget_refusals() -> None:
    """Forget all refusals, so that kernels are tried again."""
    _refused.clear()
    _untold.clear()
