"""The probe of a GPU's links, on a pretended GPU: refused pinning leaves no error, and every GPU times its own work."""

from __future__ import annotations

import pytest
import torch
from support.pretended_gpu import PretendedGpu

from specchat.hardware import cuda, links, probe
from specchat.hardware.machine import Machine
from specchat.units import GIB


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cuda, "_BYTES", 4096)
    monkeypatch.setattr(links, "_MATRIX", (64, 64), raising=False)


def test_a_refused_pin_costs_the_report_nothing_else():
    with PretendedGpu() as gpu:
        gpu.runtime.refuses_to_pin = True
        found = cuda.measure_cuda_links(0)
        assert found.h2d_pinned_bytes_per_s is None and found.d2h_bytes_per_s is None
        assert found.h2d_pageable_bytes_per_s > 0
        assert torch.ones(4, device="cuda:0").sum().item() == 4  # reports what an earlier call has left


def test_an_error_of_another_call_stays():
    with PretendedGpu() as gpu:
        cuda.forget_error(torch.device("cuda:0"))
        gpu.runtime.last_error = 700
        cuda.forget_error(torch.device("cuda:0"))
        assert gpu.runtime.last_error is None


@pytest.mark.parametrize("index", [0, 1])
def test_copies_are_timed_on_their_own_gpu(index: int):
    with PretendedGpu(num_devices=2) as gpu:
        found = cuda.measure_cuda_links(index)
        assert set(gpu.runtime.timed) == {torch.device("cuda", index)}
        assert gpu.runtime.implied == {index} and not gpu.runtime.pinned
        assert found.uuid == f"GPU-pretended-{index}"
        assert torch.cuda.current_device() == 0


def test_a_machine_names_its_gpu_as_the_driver_does(monkeypatch: pytest.MonkeyPatch):
    with PretendedGpu(num_devices=2):
        machine = probe.find_machine("cuda:1")
    assert isinstance(machine, Machine)
    assert (machine.device, machine.gpu_uuid, machine.device_total_bytes) == ("cuda:1", "GPU-pretended-1", 12 * GIB)
