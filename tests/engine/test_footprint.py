"""Memory of a streaming process, measured from outside: everything that the process holds besides torch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from specchat.units import MIB

# A process of its own makes the model and its description, as the first start with a model does: that leaves some
# 50 MiB of libraries and heap behind, which is not what streaming takes.
_PREPARED = """
import sys
from specchat.models.catalog.ref import known_draft, parse_model

from support.loading import load_engine, plan_here, plan_request, prepare
from support.locating import locate
ref = parse_model(sys.argv[1])
target, draft = locate(ref, offline=True, confirm=lambda _: False, warn=lambda _: None), known_draft(ref)
vram_bytes, ram_bytes = map(int, sys.argv[2:])
plan = plan_here(plan_request(target, draft, "cpu", quant="none", vram_bytes=vram_bytes, ram_bytes=ram_bytes))
prepare(target, plan.work.dtype, progress=lambda *_: None, warn=lambda _: None)
"""

_WATCHED = """
import re, sys, threading, time
import torch, transformers, transformers.models.llama.modeling_llama
for dtype in (torch.float32, torch.bfloat16):
    (torch.randn(512, 512).to(dtype) @ torch.randn(512, 512).to(dtype)).sum()

def anonymous():
    status = open("/proc/self/status").read()
    return sum(int(re.search(name + r":\\s+(\\d+)", status)[1]) for name in ("RssAnon", "RssShmem")) * 1024

base, peak = anonymous(), 0
def watch():
    global peak
    while True:
        peak = max(peak, anonymous())
        time.sleep(0.002)
threading.Thread(target=watch, daemon=True).start()

from specchat.records.generation import Sampling
from specchat.engine.engine import Engine
from specchat.models.catalog.ref import known_draft, parse_model

from support.loading import load_engine, plan_here, plan_request, prepare
from support.locating import locate
ref = parse_model(sys.argv[1])
target, draft = locate(ref, offline=True, confirm=lambda _: False, warn=lambda _: None), known_draft(ref)
vram_bytes, ram_bytes = map(int, sys.argv[2:])
plan = plan_here(plan_request(target, draft, "cpu", quant="none", vram_bytes=vram_bytes, ram_bytes=ram_bytes))
pack = prepare(target, plan.work.dtype, progress=lambda _: None, warn=lambda _: None)
with load_engine(plan, target, draft, pack) as engine:
    for _ in engine.generate(range(5, 300), Sampling(), stop_ids=frozenset(), max_tokens=24):
        pass
tiers = set(plan.placement.tiers) - {"device"}
print(*tiers, plan.streamed_bytes_per_step + plan.device_bytes, peak - base)
"""
# Layers of 100 MiB, 1.6 GiB in all: four times the budget.
_SHAPE = "shape:hidden=2048,layers=16,heads=16,kv_heads=4,head_dim=128,mlp=7168"
_BUDGET = 410 * MIB
_TESTS = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.parametrize("tier", ["disk", "ram"])
def test_the_process_stays_within_its_budget(tier: str, tmp_path_factory: pytest.TempPathFactory, monkeypatch):
    folder = tmp_path_factory.getbasetemp() / "footprint"
    monkeypatch.setenv("SPECCHAT_CACHE_DIR", str(folder))
    ram = 0 if tier == "disk" else 1 << 60
    arguments = [_SHAPE, str(_BUDGET), str(ram)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(_TESTS.parent), str(_TESTS)))}
    subprocess.run([sys.executable, "-c", _PREPARED, *arguments], env=environment, capture_output=True, check=True)
    watched = [sys.executable, "-c", _WATCHED, *arguments]
    out = subprocess.run(watched, env=environment, capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr
    found, model_bytes, peak = out.stdout.split()
    print(f"\n{tier}: {int(peak) / MIB:.0f} MiB beside torch, budget {_BUDGET / MIB:.0f} MiB")
    assert found == tier and int(model_bytes) >= 4 * _BUDGET
    assert int(peak) <= 1.05 * _BUDGET + 64 * MIB
