"""The llama.cpp baseline against small stand-ins that speak the server's protocol, or that of llama-cpp-python."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from threading import Event, Timer
from types import SimpleNamespace

import psutil
import pytest

from specchat.bench import llama_process
from specchat.bench.llama_cpp import (
    LLAMA_CPP,
    PROGRAM,
    WITH_DRAFT,
    LlamaServer,
    LlamaSystem,
    _arguments,
    find_llama,
    start_llama,
)
from specchat.bench.llama_process import LlamaModel
from specchat.bench.llama_python import PACKAGE, LlamaPython
from specchat.bench.records import Request
from specchat.bench.setup import check_baselines
from specchat.cli.bench import _avoids_page_cache
from specchat.cli.bench_options import BenchOptions
from specchat.errors import ModelError, NotAvailableError, UsageError
from specchat.loading.request import ModelRequest
from specchat.models.checkpoint.gguf import FILE_LIST
from specchat.records.generation import Sampling
from specchat.records.model import ModelSource
from specchat.records.plan import PlanChoices

STAND_IN = """#!{python}
import json, os, signal, sys, time
from http.server import BaseHTTPRequestHandler, HTTPServer

arguments = dict(zip(sys.argv[1::2], sys.argv[2::2]))
if "broken" in arguments["--model"]:
    sys.exit("error: unknown model architecture")

if "killed" in arguments["--model"]:
    os.kill(os.getpid(), signal.SIGKILL)

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
# The part of llama-cpp-python that is used; it counts up from the last token, and keeps what it has read.
PACKAGE_STAND_IN = """
import sys, time
import numpy as np

class Llama:
    metadata = {"tokenizer.ggml.eot_token_id": "30"}

    def __init__(self, **settings):
        print("noise on stdout", flush=True)
        if "broken" in settings["model_path"]:
            sys.exit("error: unknown model architecture")
        assert settings["n_threads"] == settings["n_threads_batch"] == 2 and settings["n_gpu_layers"] == 0
        self.input_ids, self.n_tokens, self.size = np.zeros(settings["n_ctx"], dtype=int), 0, settings["n_ctx"]

    def n_ctx(self):
        return self.size

    def reset(self):
        self.n_tokens = 0

    def set_seed(self, seed):
        assert seed == 3

    def token_eos(self):
        return 20

    def generate(self, tokens, *, top_k, top_p, min_p, temp, repeat_penalty):
        assert (top_k, temp) == (5, 0.7)
        if tokens == [1]:
            time.sleep(60)
        if tokens == [0]:
            raise ValueError("bad prompt")
        self.n_tokens = len(tokens)
        self.input_ids[: self.n_tokens] = tokens
        while True:
            yield int(self.input_ids[self.n_tokens - 1]) + 1
            self.input_ids[self.n_tokens] = self.input_ids[self.n_tokens - 1] + 1
            self.n_tokens += 1
"""
MODEL = LlamaModel(Path("x.gguf"), ctx=512, threads=2)


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    program = tmp_path / PROGRAM
    program.write_text(STAND_IN.format(python=sys.executable))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")


@pytest.fixture
def package_stand_in(tmp_path, monkeypatch):
    """A llama-cpp-python without a server on PATH."""
    (tmp_path / "llama_cpp.py").write_text(PACKAGE_STAND_IN)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    monkeypatch.syspath_prepend(tmp_path)


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


def test_a_limited_server_keeps_weights_as_the_file_has_them():
    assert "--no-repack" in _arguments(replace(MODEL, limit_bytes=1 << 30), 8000)
    assert "--no-repack" not in _arguments(MODEL, 8000)


def test_a_server_that_the_limit_ends_is_told_apart(stand_in, monkeypatch):
    unlimited = SimpleNamespace(command=lambda command: command)
    monkeypatch.setattr(llama_process, "MemoryGroup", lambda _: nullcontext(unlimited))
    with pytest.raises(NotAvailableError, match="needs more memory than the limit"):
        LlamaServer(LlamaModel(Path("killed.gguf"), 512, 2, limit_bytes=1 << 30), (), Event())


def test_the_package_answers_by_token_ids(package_stand_in):
    with start_llama("llama.cpp", MODEL, Event()) as process:
        assert isinstance(process, LlamaPython)
        system = LlamaSystem("llama.cpp", process)
        system.begin()
        first = system.answer(request(4, 5, 6), Event())
        second = system.answer(request(4, 5, 6, 7, 8, 3), Event())
        system.begin()
        third = system.answer(request(4, 5, 6, 7, 17), Event())
        at_eot = system.answer(request(28), Event())
        with pytest.raises(ModelError, match="refused a prompt: bad prompt"):
            system.answer(request(0), Event())
        with pytest.raises(ModelError, match="512 tokens does not fit"):
            system.answer(request(*range(512)), Event())
        cancel = Event()
        Timer(0.2, cancel.set).start()
        assert system.answer(request(1), cancel) is None
    assert (first.token_ids, first.finish_reason, first.num_passes) == ((7, 8, 9, 10, 11), "length", 5)
    assert first.cached_tokens == 0 and first.ttft_s > 0 and first.decode_s > 0
    assert second.cached_tokens == 5 and second.token_ids == (4, 5, 6, 7, 8)
    assert third.cached_tokens == 0 and third.token_ids == (18, 19, 20)
    assert at_eot.token_ids == (29, 30)


def test_the_package_says_why_it_does_not_start(package_stand_in):
    with pytest.raises(NotAvailableError, match=f"{PACKAGE} did not start: error: unknown model architecture"):
        start_llama("llama.cpp", LlamaModel(Path("broken.gguf"), 512, 2), Event())


def test_a_package_that_ends_says_why(package_stand_in):
    with start_llama("llama.cpp", MODEL, Event()) as process:
        process._process.kill()
        with pytest.raises(ModelError, match=f"{PACKAGE} ended"):
            process.complete({"prompt": [1]}, Event())


def test_speculation_of_llama_cpp_needs_its_server(package_stand_in, stand_in, monkeypatch, tmp_path):
    assert find_llama([*LLAMA_CPP]) == PROGRAM
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert find_llama(["llama.cpp"]) == PACKAGE
    with pytest.raises(NotAvailableError, match=r"'llama.cpp-ngram' needs llama-server, which is not on PATH$"):
        find_llama(["llama.cpp", "llama.cpp-ngram"])


def test_ctrl_c_ends_the_wait_for_a_server(stand_in):
    """The server itself gets no Ctrl-C from the terminal, and is ended like any other."""
    cancel = Event()
    Timer(0.2, cancel.set).start()
    with LlamaServer(LlamaModel(Path("slow.gguf"), 512, 2), (), cancel) as server:
        assert cancel.is_set() and server._process.poll() is None
        assert os.getpgid(server._process.pid) != os.getpgrp()
    assert server._process.poll() is not None


PARENT = """
import sys, time
from pathlib import Path
from threading import Event
from specchat.bench.llama_cpp import LlamaServer
from specchat.bench.llama_process import LlamaModel

server = LlamaServer(LlamaModel(Path("x.gguf"), 512, 2), (), Event())
print(server._process.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="needs util-linux's setpriv")
def test_a_killed_bench_leaves_no_server(stand_in):
    bench = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    with bench:
        assert bench.stdout is not None
        server = psutil.Process(int(bench.stdout.readline()))
        bench.kill()
    psutil.wait_procs([server], timeout=10)
    assert not server.is_running() or server.status() == psutil.STATUS_ZOMBIE


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
    monkeypatch.setattr("specchat.bench.llama_cpp.has_package", lambda: False)
    with pytest.raises(NotAvailableError, match="not on PATH, or llama-cpp-python, which is not installed"):
        check_baselines(["llama.cpp"], blocks, None)


@pytest.mark.parametrize(
    ("baselines", "limit", "ram", "avoids"),
    [
        (("llama.cpp",), 2**30, None, True),
        (("plain", "llama.cpp-draft"), 2**30, None, True),
        (("llama.cpp",), 2**30, 2**20, False),
        (("llama.cpp",), None, None, False),
        (("plain",), 2**30, None, False),
    ],
)
def test_a_limit_is_not_extended_by_pages_of_the_other(baselines, limit, ram, avoids):
    """llama.cpp maps the file that specchat reads, so specchat then keeps none of its pages."""
    models = ModelRequest("x.gguf", choices=PlanChoices(ram_bytes=ram))
    options = BenchOptions(models, baselines=baselines, limit_memory=limit)
    assert _avoids_page_cache(options) == avoids
