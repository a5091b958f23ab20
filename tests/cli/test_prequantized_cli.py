"""`specchat run` on a pre-quantized checkpoint: its answer and its errors."""

from __future__ import annotations

import io
import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.quantized import Kind, awq, gptq, hide_tensors, save_quantized
from support.tiny_models import make_config, random_model

from specchat.cli.app import run_command_line
from specchat.models import locate
from specchat.models.hub.download import Download
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


def test_plan_of_a_prequantized_hub_model_downloads_it(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
):
    """Download it after consent, because its configuration alone does not give the sizes of its matrices."""
    whole = quantized(gptq(act_order=False), tmp_path / "whole")
    (tmp_path / "sketch").mkdir()
    (tmp_path / "sketch" / "config.json").write_bytes((whole.path / "config.json").read_bytes())
    monkeypatch.setattr(locate, "look_up", lambda ref, **_: Download(ref, "abc", 10, 4, 1000, tmp_path))
    monkeypatch.setattr(locate, "sketch", lambda *_: ModelSource("org/name", tmp_path / "sketch"))
    monkeypatch.setattr(locate, "obtain", lambda *_, **__: whole)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    arguments = ("run", "org/name", "--plan", "--json", "--draft", "none", "--dtype", "fp32", "--base")
    assert run_command_line(arguments) == 2
    capfd.readouterr()
    assert run_command_line((*arguments, "--yes")) == 0
    assert json.loads(capfd.readouterr().out)["quant"] == "gptq int4"
