"""`specchat run` on a pre-quantized checkpoint: its answer and its errors."""

from __future__ import annotations

import io
import json
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from support.fake_hub import FakeHub, point_to, serving
from support.quantized import Kind, awq, block_fp8, gptq, hide_tensors, save_quantized
from support.tiny_models import make_config, random_model

from specchat.cli.app import run_command_line
from specchat.records.model import ModelSource

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path):
    """Return a function that runs `specchat run SOURCE ...` and returns its exit code, stdout and stderr."""
    monkeypatch.setenv("SPECCHAT_CACHE_DIR", str(tmp_path / "cache"))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)}

    def call(source: ModelSource, *options: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
        capfd.readouterr()
        arguments = ("run", str(source.path), "w5 w6 w7", "--base", "--draft", "none", "--dtype", "fp32", *options)
        code = run_command_line(arguments)
        return code, *capfd.readouterr()

    yield call
    for number, handler in handlers.items():
        signal.signal(number, handler)


def quantized(kind: Kind, folder: Path) -> ModelSource:
    config = make_config("llama")
    config.num_hidden_layers = 1
    return save_quantized(random_model(config), folder, kind).quantized


def test_answer_reports_the_quantization(run: Call, tmp_path: Path):
    source = quantized(gptq(act_order=True), tmp_path)
    code, out, err = run(source, "--json", "--max-tokens", "4")
    assert code == 0, err
    assert json.loads(out)["quant"] == "gptq int4"
    assert len(json.loads(out)["token_ids"]) == 4
    assert "gptq int4" in err


def test_unusable_prequantized_models_exit_with_hints(run: Call, tmp_path: Path):
    source = quantized(awq(), tmp_path)
    code, out, err = run(source, "--quant", "int4")
    assert (code, out) == (2, "")
    assert "is pre-quantized (awq int4)" in err
    assert "hint: " in err
    hide_tensors(source, "q_proj.scales")
    code, out, err = run(source)
    assert (code, out) == (3, "")
    assert "q_proj.scales" in err
    assert "hint: " in err
    file = source.path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": {"quant_method": "quip"}}))
    code, out, err = run(source)
    assert (code, out) == (2, "")
    assert "quip" in err
    assert "hint: " in err


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    with serving() as hub:
        point_to(monkeypatch, hub.url, tmp_path / "hub")
        yield hub


@pytest.mark.parametrize("kind", [gptq(act_order=True), awq(), block_fp8()], ids=["GPTQ", "AWQ", "FP8"])
def test_a_plan_needs_no_more_than_headers_from_the_hub(run: Call, hub: FakeHub, tmp_path: Path, kind: Kind):
    """The plan is that of the downloaded model, and no tensor is downloaded."""
    config = make_config("llama")
    config.vocab_size = 8192  # large files, whose headers are a small part
    source = save_quantized(random_model(config), tmp_path / "model", kind).quantized
    files = {file.name: file.read_bytes() for file in source.path.iterdir()}
    hub.publish("org/name", files)
    plans = []
    for name in (str(source.path), "org/name"):
        code, out, err = run(replace(source, path=Path(name)), "--plan", "--json", "--vram", "256MiB")
        assert code == 0, err
        plans.append(json.loads(out))
    assert {key: value for key, value in plans[0].items() if plans[1][key] != value}.keys() <= {"target"}
    total = sum(len(body) for name, body in files.items() if name.endswith(".safetensors"))
    assert 0 < hub.weight_bytes < total / 4
