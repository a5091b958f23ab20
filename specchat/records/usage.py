"""Records of what an engine was seen to use: memory, links and devices."""

from dataclasses import dataclass


@dataclass(frozen=True)
class DeviceUse:
    """Measured use of one of several devices, since loading.

    Attributes:
        device: name of the device.
        device_budget_bytes: memory budget.
        device_peak_bytes: most memory that was in use; on a CPU the sum of its ledger.
        predicted_device_bytes: sum of the device's ledger.
        streamed_bytes: bytes that passes used of its streamed layers.
        wait_s: seconds that passes waited for its streamed layers.
        link_busy: share of the passes' time in which its link was busy; a link also fills slots between passes.
        compute_busy: share of the passes' time in which it computed layers.
        row_wait_s: seconds that it waited for rows of other machines; 0 for devices of one machine.
        sent_bytes: bytes of rows that it sent to other machines.
    """

    device: str
    device_budget_bytes: int
    device_peak_bytes: int
    predicted_device_bytes: int
    streamed_bytes: int
    wait_s: float
    link_busy: float
    compute_busy: float
    row_wait_s: float = 0.0
    sent_bytes: int = 0


@dataclass(frozen=True)
class MemoryReport:
    """Measured memory of the engine next to the ledger's prediction, in bytes.

    Attributes:
        given_back_layers: number of layers that left host memory because memory was short.
        given_back_bytes: bytes of these layers.
        expert_hits: experts that were in their slots when a layer used them, since loading.
        expert_misses: experts that had to be read, among them useful guesses.
        useful_guesses: experts that were read before their router named them, and then used.
        useless_guesses: experts that were read, but that no router named.
        devices: use of each device if there are several; the other figures are those of the first one.
    """

    device_budget_bytes: int
    device_peak_bytes: int
    predicted_device_bytes: int
    host_peak_bytes: int
    runtime_bytes: int
    resident_layers: int
    streamed_layers: int
    streamed_bytes_per_step: int
    given_back_layers: int = 0
    given_back_bytes: int = 0
    expert_hits: int = 0
    expert_misses: int = 0
    useful_guesses: int = 0
    useless_guesses: int = 0
    devices: tuple[DeviceUse, ...] = ()

    @property
    def expert_hit_rate(self) -> float | None:
        """Share of used experts that were in their slots; None if no experts are read one by one."""
        used = self.expert_hits + self.expert_misses
        return self.expert_hits / used if used else None
