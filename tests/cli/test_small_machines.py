"""Small machines and containers: a model of twice the memory runs with the defaults alone, in a real memory cgroup."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.cgroups import memory_group

from specchat.units import MIB

LIMIT = 1536 * MIB
# 3.3 GiB in bf16: more than twice the limit.
MODEL = "shape:hidden=2048,layers=32,heads=32,kv_heads=8,head_dim=64,mlp=7168,dtype=bf16"
COMMAND = [sys.executable, "-m", "specchat", "run", MODEL, "Hello", "--json"]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a user who has the model already."""
    folder = tmp_path_factory.mktemp("small")
    paths = {f"SPECCHAT_{name}_DIR": str(folder / name.lower()) for name in ("CACHE", "STATE")}
    environment = os.environ | paths | {"PYTHONPATH": str(Path(__file__).parents[2]), "SPECCHAT_DEVICE": "cpu"}
    prepare = [*COMMAND, "--yes", "--quant", "none", "--max-tokens", "1"]
    subprocess.run(prepare, env=environment, stdin=subprocess.DEVNULL, capture_output=True, check=True)
    weights = list(folder.rglob("*.safetensors"))
    assert sum(file.stat().st_size for file in weights) >= 2 * LIMIT
    for file in weights:
        with file.open("rb") as opened:  # out of the page cache: it belongs to another cgroup
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return environment


@pytest.mark.slow
def test_a_budget_above_the_groups_memory_is_no_reason_to_be_killed(tmp_path: Path):
    """Groups that have almost what the plan with all layers in memory would take, libraries included, and less.

    Files of libraries count for the group that read them first, so 90% may suffice.
    """
    model = "shape:hidden=1024,layers=20,heads=16,kv_heads=4,head_dim=64,mlp=3584,dtype=fp32"
    paths = {f"SPECCHAT_{name}_DIR": str(tmp_path / name.lower()) for name in ("CACHE", "STATE")}
    environment = os.environ | paths | {"PYTHONPATH": str(Path(__file__).parents[2]), "SPECCHAT_DEVICE": "cpu"}
    command = [sys.executable, "-m", "specchat", "run", model, "Hello", "--json", "--yes", "--quant", "none"]
    command += ["--vram", "4GiB", "--draft", "none", "--ctx", "512", "--max-tokens", "20", "--temperature", "0"]
    free = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, check=True)
    expected = json.loads(free.stdout)
    assert expected["memory"]["streamed_layers"] == 0
    for share in (0.95, 0.88, 0.85, 0.80):
        limit = int(share * expected["memory"]["host_peak_bytes"])
        with memory_group(limit) as group:
            done = group.run(command, env=environment, stdin=subprocess.DEVNULL, timeout=600)
        assert done.returncode == 0, (share, done.returncode, done.stderr)
        result = json.loads(done.stdout)
        assert result["token_ids"] == expected["token_ids"]
        streamed, peak = (result["memory"][name] for name in ("streamed_layers", "host_peak_bytes"))
        assert bool(streamed) == ("cannot allocate" in done.stderr or "memory is short" in done.stderr)
        print(f"limit {limit >> 20} MiB, peak {peak >> 20} MiB, {streamed} layers streamed")
    assert streamed


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--quant", "none")], ids=["defaults", "full precision"])
def test_a_model_of_twice_the_memory_runs(environment: dict[str, str], options: tuple[str, ...]):
    with memory_group(LIMIT) as group:
        done = group.run([*COMMAND, *options], env=environment, stdin=subprocess.DEVNULL, timeout=600)
    assert done.returncode == 0, done.stderr  # 137: killed for lack of memory
    result = json.loads(done.stdout)
    assert result["message"]["content"] and result["finish_reason"] == "stop"
    memory = result["memory"]
    assert 0 < memory["predicted_device_bytes"] <= memory["device_budget_bytes"] < LIMIT * 3 // 4
    assert memory["device_peak_bytes"] <= memory["device_budget_bytes"]
    if options:
        assert result["quant"] == "none" and memory["streamed_layers"] > 0
        assert memory["streamed_bytes_per_step"] > LIMIT
