"""Measured rates of GPU links agree with manual copies. Needs a GPU."""

from __future__ import annotations

import statistics
import time

import pytest
import torch

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _needs_cuda():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")


def test_pinned_copies_agree_with_copies_by_hand():
    from specchat.hardware.cuda import measure_cuda_links

    found = measure_cuda_links(0)
    host = torch.empty(256 << 20, dtype=torch.uint8, pin_memory=True)
    device = torch.empty_like(host, device="cuda:0")
    seconds = []
    for _ in range(8):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        device.copy_(host, non_blocking=True)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    by_hand = host.nbytes / statistics.median(seconds[2:])
    print(f"\n{found.h2d_pinned_bytes_per_s / 1e9:.1f}, by hand {by_hand / 1e9:.1f} GB/s, PCIe {found.pcie}")
    assert found.h2d_pinned_bytes_per_s == pytest.approx(by_hand, rel=0.15)
    assert found.d2h_bytes_per_s > 0 and found.h2d_pageable_bytes_per_s <= 1.1 * found.h2d_pinned_bytes_per_s
