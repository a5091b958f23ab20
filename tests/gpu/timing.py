"""Timing of calls on a GPU, and how much is measured."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

DEVICE = torch.device("cuda:0")
Fact = dict[str, Any]


@dataclass(frozen=True)
class Scale:
    """How much is measured.

    Attributes:
        divisor: what sizes are divided by; a rehearsal without a GPU has a large one.
        calls: number of timed calls.
    """

    divisor: int = 1
    calls: int = 20

    def of(self, size: int) -> int:
        return max(size // self.divisor, 64)


def device_ms(call: Callable[[], Any], calls: int, warm_ups: int = 2) -> float:
    """Milliseconds of a call on the device."""
    for _ in range(warm_ups):
        call()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(DEVICE)
    begin.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return round(begin.elapsed_time(end) / calls, 4)


def host_us(call: Callable[[], Any], calls: int) -> float:
    """Microseconds that the host takes to queue a call."""
    call()
    torch.cuda.synchronize(DEVICE)
    begin = time.perf_counter()
    for _ in range(calls):
        call()
    spent_s = time.perf_counter() - begin
    torch.cuda.synchronize(DEVICE)
    return round(spent_s / calls * 1e6, 2)
