"""Random runs against plain decoding; each round prints its seed.

TEST_SEED repeats a round. `pytest -m soak tests/engine/test_differential.py` goes on for TEST_MINUTES, 60 by default.
"""

from __future__ import annotations

import os
import random
import shutil
import time
from pathlib import Path

import pytest
from support.differential import Tally, run_round
from support.streamed import tiny_packs


@pytest.mark.parametrize("number", range(1))
def test_random_runs_write_the_targets_text(number: int, tmp_path: Path):
    seed = int(os.environ.get("TEST_SEED", random.randrange(1 << 30)))
    print(f"TEST_SEED={seed}")
    tally = Tally()
    with tiny_packs(tmp_path):
        run_round(seed, tmp_path / "models", tally, engines=1)
    assert tally.total and len(tally.excused) <= 1


@pytest.mark.soak
def test_random_runs_for_an_hour(tmp_path: Path):
    end = time.monotonic() + 60 * float(os.environ.get("TEST_MINUTES", "60"))
    first = seed = int(os.environ.get("TEST_SEED", random.randrange(1 << 30)))
    tally = Tally()
    with tiny_packs(tmp_path):
        while time.monotonic() < end:
            run_round(seed, tmp_path / "models", tally, engines=3, requests=4)
            shutil.rmtree(tmp_path / "models")
            shutil.rmtree(tmp_path / "cache", ignore_errors=True)  # some models need no pack
            seed += 1
    print(f"TEST_SEED={first} to {seed - 1}: {tally}")
    assert len(tally.excused) <= max(1, tally.total // 10_000)
