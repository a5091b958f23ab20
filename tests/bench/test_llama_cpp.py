"""The llama.cpp baseline against a small stand-in that speaks the server's protocol."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from threading import Event, Timer

import pytest

from specchat.bench.llama_cpp import LLAMA_CPP, PROGRAM, WITH_DRAFT, LlamaModel, LlamaServer, LlamaSystem
from specchat.bench.records import Request
from specchat.bench.setup import check_baselines
from specchat.errors import ModelError, NotAvailableError, UsageError
from specchat.models.checkpoint.gguf import FILE_LIST
from specchat.records.generation import Sampling
from specchat.records.model import ModelSource

STAND_IN = """#!{python}
import json, sys, time
from http.server import BaseHTTPRequestHandler, HTTPServer

arguments = dict(zip(sys.argv[1::2], sys.argv[2::2]))
if "broken" in arguments["--model"]:
    sys.exit("error: unknown model architecture")

if "slow" in arguments["--model"]:
    time.sleep(60)

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.reply(200, {{"status": "ok"}})

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if asked["prompt"] == [0]:
            return self.reply(400, {{"error": "too long"}})
        if asked["prompt"] == [1]:
            time.sleep(60)
        tokens = [each + 1 for each in asked["prompt"]][: asked["n_predict"]]
        timings = {{"predicted_ms": 1.0, "draft_n_accepted": 2, "cache_n": 3 * asked["cache_prompt"]}}
        self.reply(200, {{"tokens": tokens, "timings": timings, "asked": asked, "arguments": arguments}})

    def reply(self, status, values):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(values).encode())

    def log_message(self, *_):
        pass

HTTPServer((arguments["--host"], int(arguments["--port"])), Handler).serve_forever()
"""
MODEL = LlamaModel(Path("x.gguf"), ctx=512, threads=2)


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    program = tmp_path / PROGRAM
    program.write_text(STAND_IN.format(python=sys.executable))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")


def request(*prompt_ids: int, stop_ids: frozenset[int] = frozenset()) -> Request:
    return Request(prompt_ids, Sampling(temperature=0.7, top_k=5, seed=3), stop_ids, max_tokens=5)


def test_answers_carry_tokens_and_times(stand_in):
    times = iter([0.0, 2.0, 10.0, 11.0])
    with LlamaServer(MODEL, LLAMA_CPP["llama.cpp-ngram"], Event()) as server:
        raw = server.complete({"prompt": [4], "n_predict": 1, "cache_prompt": False}, Event())
        system = LlamaSystem("llama.cpp", server, clock=lambda: next(times))
        system.begin()
        first = system.answer(request(4, 5, 6, 7, 8, 9), Event())
        second = system.answer(request(4, 5, 6, stop_ids=frozenset({6})), Event())
        with pytest.raises(ModelError, match=r"refused a prompt: .*too long"):
            system._clock = lambda: 0.0
            system.answer(request(0), Event())
        cancel = Event()
        Timer(0.2, cancel.set).start()
        assert system.answer(request(1), cancel) is None
    given = raw["arguments"]
    assert (given["--model"], given["--ctx-size"], given["--threads"]) == ("x.gguf", "512", "2")
    assert (given["--spec-type"], given["--n-gpu-layers"]) == ("ngram-cache", "0")
    assert (first.token_ids, first.finish_reason, first.num_passes) == ((5, 6, 7, 8, 9), "length", 3)
    assert first.ttft_s == pytest.approx(1.999) and first.decode_s == pytest.approx(0.001) and first.cached_tokens == 0
    assert (second.token_ids, second.finish_reason, second.cached_tokens) == ((5, 6), "stop", 3)


def test_a_server_that_does_not_start_says_why(stand_in):
    with pytest.raises(NotAvailableError, match="did not start: error: unknown model architecture"):
        LlamaServer(LlamaModel(Path("broken.gguf"), 512, 2), (), Event())


def test_ctrl_c_ends_the_wait_for_a_server(stand_in):
    """The server itself gets no Ctrl-C from the terminal, and is ended like any other."""
    cancel = Event()
    Timer(0.2, cancel.set).start()
    with LlamaServer(LlamaModel(Path("slow.gguf"), 512, 2), (), cancel) as server:
        assert cancel.is_set() and server._process.poll() is None
        assert os.getpgid(server._process.pid) != os.getpgrp()
    assert server._process.poll() is not None


def test_baselines_are_checked_before_anything_is_loaded(tmp_path, monkeypatch, stand_in):
    folder = tmp_path / "gguf"
    folder.mkdir()
    (folder / FILE_LIST).write_text(json.dumps({"files": ["x.gguf"]}))
    blocks, plain = ModelSource("x", folder), ModelSource("y", tmp_path)
    check_baselines([*LLAMA_CPP], blocks, blocks)
    with pytest.raises(UsageError, match="runs GGUF files, and y is none"):
        check_baselines(["llama.cpp"], plain, None)
    for draft in (None, plain):
        with pytest.raises(UsageError, match="needs a draft that is a GGUF file"):
            check_baselines([WITH_DRAFT], blocks, draft)
    monkeypatch.setenv("PATH", str(folder))
    with pytest.raises(NotAvailableError, match="not on PATH"):
        check_baselines(["llama.cpp"], blocks, None)
