"""`specchat probe`: its JSON, exit codes and saved rates. The rates are given here, not measured."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from support import fake_nvml
from support.fake_nvml import Card, Driver
from support.machines import MEASURED

from specchat.cli.app import run_command_line
from specchat.hardware import probe as probing
from specchat.hardware import store
from specchat.hardware.machine import Links
from specchat.units import format_bytes

ON_CPU = replace(
    MEASURED,
    device="cpu",
    links=Links(None, None, None, 8e9, 2e9),
    gpu_uuid=None,
    pcie_under_load=None,
    pinning_works=None,
)


@pytest.fixture
def probe(tmp_path, monkeypatch, capfd):
    """Return a function that runs `specchat probe` with saved rates."""
    monkeypatch.setenv("SPECCHAT_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(probing, "_measure", None)  # would fail if it were called

    def call(*arguments, measured=ON_CPU):
        for device in ("auto", "cpu"):
            store.save(tmp_path, store.key_of(probing.find_hardware(tmp_path), device), measured)
        capfd.readouterr()
        code = run_command_line(("probe", *arguments))
        return code, *capfd.readouterr()

    return call


def test_a_missing_model_is_refused_before_anything_is_measured(probe):
    code, _, err = probe("./missing", "--refresh")
    assert code == 3, err
    assert "missing" in err


def test_json_has_the_documented_keys(probe):
    code, out, err = probe("--json")
    report = json.loads(out)
    assert code == 0 and err == "" and report["schema_version"] == 1 and report["plan"] is None
    assert set(report["machine"]) == {"gpus", "cpu", "ram", "disk", "platform"}
    assert set(report["machine"]["cpu"]) == {"name", "cores", "isa"}
    assert set(report["machine"]["disk"]) == {"path", "free_bytes"}
    assert set(report["machine"]["ram"]) == {
        "total_bytes",
        "available_bytes",
        "cgroup_limit_bytes",
        "swap_bytes",
        "pin_limit_bytes",
    }
    assert report["machine"]["platform"]["wsl"] is False
    assert report["links"] == {
        "h2d_pinned_bytes_per_s": None,
        "h2d_pageable_bytes_per_s": None,
        "d2h_bytes_per_s": None,
        "ram_copy_bytes_per_s": 8e9,
        "disk_read_bytes_per_s": 2e9,
    }
    assert all(set(each) == {"level", "text", "hint"} for each in report["verdicts"])
    assert {each["level"] for each in report["verdicts"]} <= {"ok", "warn", "error"}


def test_json_describes_a_gpu(probe, monkeypatch):
    fake_nvml.install(monkeypatch, Driver([Card(width=8)]))
    code, out, _ = probe("--json", measured=replace(MEASURED, pcie_under_load=(4, 8)))
    (gpu,) = json.loads(out)["machine"]["gpus"]
    assert code == 0 and gpu["pcie"] == {"gen": 4, "width": 8, "max_gen": 4, "max_width": 16}
    assert set(gpu) == {
        "name",
        "uuid",
        "vram_total_bytes",
        "vram_free_bytes",
        "compute_capability",
        "driver",
        "pcie",
    }


def test_missing_gpu_is_a_warning(probe, monkeypatch):
    fake_nvml.install(monkeypatch, Driver(init_error="NVML Shared Library Not Found"))
    code, out, _ = probe()
    assert code == 0 and "warn" in out and "GPU" in out and "\x1b" not in out
    assert all(line == line.rstrip() for line in out.splitlines())


def test_unusable_device_exits_with_5(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("SPECCHAT_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    fake_nvml.install(monkeypatch, Driver([Card()], version="535.1", cuda=12020))
    assert run_command_line(("probe", "--device", "cuda:0")) == 5
    assert "cannot use cuda:0" in capfd.readouterr().err


def test_the_plan_of_a_model(probe):
    code, out, _ = probe("demo", "--json", "--vram", "35MiB", "--ram", "1MiB", "--ctx", "1024", "--quant", "none")
    plan = json.loads(out)["plan"]
    assert code == 0 and plan["target"] == "demo" and plan["streamed_layers"] > 0
    assert sum(item["bytes"] for item in plan["ledger"]) == plan["device_bytes"] <= plan["device_budget_bytes"]
    assert plan["predicted_tok_per_s"] == pytest.approx(plan["predicted_tokens_per_step"] / plan["predicted_pass_s"])
    assert {"vram"} < {each["option"] for each in plan["choices"]} and plan["basis"] in ("measured", "typical")
    assert [each["option"] for each in plan["choices"] if each["pinned"]] == ["quant", "ctx", "vram"]
    code, out, _ = probe("demo")
    assert code == 0 and "resident layers" in out


def test_recommendations_for_this_machine(probe, tmp_path, monkeypatch):
    monkeypatch.setattr("specchat.models.hub.cache.cached_models", lambda: ["Qwen/Qwen3-0.6B"])
    code, out, _ = probe("--json", "--vram", "4GiB", "--device", "cpu")
    models = json.loads(out)["models"]
    assert code == 0 and set(models) == {"runs", "too_large", "no_disk"}
    runs = {each["model"]: each for each in models["runs"]}
    assert runs["Qwen/Qwen3-0.6B"]["cached"] and runs["Qwen/Qwen3-0.6B"]["download_bytes"] == 0
    assert not runs["Qwen/Qwen3-1.7B"]["cached"] and runs["Qwen/Qwen3-1.7B"]["download_bytes"] > 3e9
    assert runs["Qwen/Qwen3-1.7B"]["command"] == "specchat run Qwen/Qwen3-1.7B --device cpu --vram 4GiB"
    speeds = [each["predicted_tok_per_s"] for each in models["runs"]]
    slow = [speed for speed in speeds if speed < 5]
    assert slow == sorted(slow, reverse=True) and speeds[len(speeds) - len(slow) :] == slow
    _, out, _ = probe()
    assert "specchat run Qwen/Qwen3-0.6B\n" in out and "already downloaded" in out
    _, out, _ = probe("--markdown")
    assert "| `specchat run Qwen/Qwen3-0.6B` |" in out
    _, out, _ = probe("demo", "--json")
    assert json.loads(out)["models"] is None


def test_the_plan_of_a_shape_writes_no_model(probe, tmp_path):
    code, out, _ = probe("shape:llama-70b", "--json", "--vram", "12GiB", "--device", "cpu", "--quant", "none")
    plan = json.loads(out)["plan"]
    assert code == 0 and plan["target"] == "shape:llama-70b" and plan["streamed_layers"] > 60
    assert all(path.suffix == ".json" for path in tmp_path.rglob("*") if path.is_file())


def test_budget_too_small_exits_with_4(probe):
    code, out, err = probe("demo", "--vram", "1MiB")
    assert code == 4 and out == "" and "hint:" in err


def test_markdown_for_a_bug_report(probe):
    code, out, _ = probe("--markdown")
    lines = out.splitlines()
    assert code == 0 and lines[0].startswith("**specchat ") and "| ok | RAM copy | 8.0 GB/s |  |" in lines
    models = lines.index("What this machine can run, best first; speeds are predicted:")
    for table in (lines[:models], lines[models:]):
        assert len({line.count("|") for line in table if line.startswith("|")}) == 1
    assert probe("--markdown", "--json")[0] == 2


def test_verify_checks_packs(probe, tmp_path):
    from specchat.models.catalog.shape import parse_shape
    from specchat.models.synthetic.layers import materialise

    code, out, _ = probe("--verify")
    assert code == 0 and "no packs" in out
    source = materialise(
        parse_shape("hidden=256,layers=8,heads=4,kv_heads=2,head_dim=64,mlp=704,dtype=fp32"), warn=lambda _: None
    )
    code, out, _ = probe("--verify", "--json")
    assert code == 0 and any("intact" in each["text"] for each in json.loads(out)["verdicts"])
    layer = source.path / "layer-00001.safetensors"
    with layer.open("r+b") as stream:
        stream.seek(-4096, 2)
        stream.write(b"\xff" * 64)
    code, out, _ = probe("--verify", "--json")
    (verdict,) = [each for each in json.loads(out)["verdicts"] if each["level"] == "error"]
    assert code == 3 and "layer-00001.safetensors" in verdict["text"] and "checksum" in verdict["text"]
    (source.path / "layer-00000.safetensors").unlink()
    code, out, _ = probe("--verify")
    assert code == 3 and "layer-00000" in out


def test_unused_packs_are_listed(probe, tmp_path):
    from specchat.models.catalog.shape import parse_shape
    from specchat.models.synthetic.layers import materialise

    def verdicts():
        code, out, _ = probe("--json")
        assert code == 0
        texts = [(each["level"], each["text"]) for each in json.loads(out)["verdicts"]]
        return [(level, text) for level, text in texts if str(tmp_path / "packs") in text]

    assert verdicts() == []
    shape = parse_shape("hidden=256,layers=8,heads=4,kv_heads=2,head_dim=64,mlp=704")
    path = materialise(shape, warn=lambda _: None).path
    size = sum(file.stat().st_size for file in path.iterdir())
    assert verdicts() == [("ok", f"packs: 1 in {path.parent}, {format_bytes(size)} in total")]
    for name in ("later", "earlier", "foreign", "unfinished"):
        shutil.copytree(path, path.parent / name)
    os.utime(path.parent / "later" / "manifest.json", (2e9, 2e9))
    os.utime(path.parent / "earlier" / "manifest.json", (1e9, 1e9))
    manifest = path.parent / "foreign" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"layout": 0, "name": "other"}))
    (path.parent / "unfinished" / "manifest.json").unlink()
    (summary, *idle) = verdicts()
    assert summary[1].startswith("packs: 5 in ") and all(level == "warn" for level, _ in idle)
    found = {text.partition(" in ")[2].partition(": ") for _, text in idle}
    whys = {Path(where).name: why for where, _, why in found}
    assert whys.keys() == {"earlier", "foreign", "unfinished", path.name}
    assert "later pack" in whys["earlier"] and "later pack" in whys[path.name]
    assert "another version" in whys["foreign"] and "interrupted" in whys["unfinished"]
    assert "idle pack" in probe()[1] and "idle pack" in probe("--markdown")[1]


def test_saved_rates_need_no_torch(tmp_path):
    (tmp_path / "packs" / "unfinished").mkdir(parents=True)
    program = (
        "import sys; from pathlib import Path; from support.machines import MEASURED;"
        "from specchat.hardware import probe, store; folder = Path(sys.argv[1]);"
        "store.save(folder, store.key_of(probe.find_hardware(folder), 'auto'), MEASURED);"
        "from specchat.cli.app import run_command_line; code = run_command_line(['probe']);"
        "print(code, 'torch' in sys.modules, file=sys.stderr)"
    )
    out = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        env={"SPECCHAT_CACHE_DIR": str(tmp_path), "PYTHONPATH": ":".join(sys.path), "PATH": ""},
    )
    assert out.stderr.strip() == "0 False"
