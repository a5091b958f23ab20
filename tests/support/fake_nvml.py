"""The NVIDIA management library's own interface over cards that a test describes; installed in place of `pynvml`."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace

GIB = 1 << 30


@dataclass
class Card:
    """What a driver says of one card; None where it answers "not supported"."""

    name: str = "NVIDIA GeForce RTX 4090"
    uuid: str = "GPU-1"
    total: int = 24 * GIB
    free: int = 23 * GIB
    capability: tuple[int, int] | None = (8, 9)
    gen: int | None = 1
    width: int | None = 16
    max_gen: int | None = 4
    max_width: int | None = 16
    slices: list[Card] | None = None  # MIG instances
    is_lost: bool = False


@dataclass
class Driver:
    cards: list[Card] = field(default_factory=list)
    version: str = "580.65"
    cuda: int = 13000
    init_error: str | None = None
    version_error: str | None = None


def install(monkeypatch, driver: Driver) -> None:
    """Makes `import pynvml` find these cards."""
    monkeypatch.setitem(sys.modules, "pynvml", _module(driver))


def _module(driver: Driver) -> ModuleType:
    nvml = ModuleType("pynvml")

    class NVMLError(Exception):
        pass

    def fail(text):
        raise NVMLError(text)

    def supported(value):
        return fail("Not Supported") if value is None else value

    def alive(card):
        return fail("GPU is lost") if card.is_lost else card

    def init():
        if driver.init_error:
            fail(driver.init_error)
        nvml.is_open += 1

    def shut_down():
        nvml.is_open -= 1

    def version():
        return fail(driver.version_error) if driver.version_error else driver.version

    def mig(card, index):
        return card.slices[index] if index < len(card.slices) else fail("Not Found")

    nvml.NVMLError = NVMLError
    nvml.is_open = 0
    nvml.nvmlInit, nvml.nvmlShutdown = init, shut_down
    nvml.nvmlSystemGetDriverVersion = version
    nvml.nvmlSystemGetCudaDriverVersion_v2 = lambda: driver.cuda
    nvml.nvmlDeviceGetCount = lambda: len(driver.cards)
    nvml.nvmlDeviceGetHandleByIndex = lambda index: driver.cards[index]
    nvml.nvmlDeviceGetName = lambda card: alive(card).name
    nvml.nvmlDeviceGetUUID = lambda card: alive(card).uuid
    nvml.nvmlDeviceGetMemoryInfo = lambda card: SimpleNamespace(
        total=alive(card).total, free=card.free, used=card.total - card.free
    )
    nvml.nvmlDeviceGetCudaComputeCapability = lambda card: supported(card.capability)
    nvml.nvmlDeviceGetCurrPcieLinkGeneration = lambda card: supported(card.gen)
    nvml.nvmlDeviceGetCurrPcieLinkWidth = lambda card: supported(card.width)
    nvml.nvmlDeviceGetMaxPcieLinkGeneration = lambda card: supported(card.max_gen)
    nvml.nvmlDeviceGetMaxPcieLinkWidth = lambda card: supported(card.max_width)
    nvml.nvmlDeviceGetMigMode = lambda card: fail("Not Supported") if card.slices is None else [1, 1]
    nvml.nvmlDeviceGetMaxMigDeviceCount = lambda card: 7
    nvml.nvmlDeviceGetMigDeviceHandleByIndex = mig
    return nvml
