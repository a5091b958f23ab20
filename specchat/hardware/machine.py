"""What a plan needs to know of the machine, as plain data."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Machine:
    """Memory that can be used now.

    Attributes:
        device: "cpu" or "cuda:0".
        device_free_bytes: memory of that device; on the CPU the same as ram_available_bytes.
        ram_available_bytes: what the system or the container still gives.
        fast_bf16: whether the device multiplies bfloat16 faster than float32.
        total_bytes: memory of host and device together, used or not; a number that stays the same.
    """

    device: str
    device_free_bytes: int
    ram_available_bytes: int
    fast_bf16: bool
    total_bytes: int = 1 << 62
