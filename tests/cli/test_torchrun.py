"""Jobs under torchrun: rank 0 answers as one process does, and the other ranks compute layers for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from specchat.cli.app import run_command_line
from specchat.engine.workers.meeting import MeetingPoint
from specchat.errors import UsageError, WorkerUnreachableError
from specchat.loading.torchrun import Ranks, find_ranks

ENVIRONMENT = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
TOKEN = "a token of the tests"
VRAM = "28MiB"  # less than all layers take


def test_the_environment_of_torchrun_is_read():
    assert find_ranks({}) is None
    assert find_ranks({**ENVIRONMENT, "WORLD_SIZE": "1"}) is None
    assert find_ranks({name: text for name, text in ENVIRONMENT.items() if name != "MASTER_PORT"}) is None
    assert find_ranks(ENVIRONMENT) == Ranks(1, 2, 0, ("127.0.0.1", 29500), has_store=False, attempt=0)
    started = {"LOCAL_RANK": "1", "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "2"}
    assert find_ranks({**ENVIRONMENT, **started}) == Ranks(1, 2, 1, ("127.0.0.1", 29500), has_store=True, attempt=2)
    with pytest.raises(UsageError, match="RANK is 'x'"):
        find_ranks({**ENVIRONMENT, "RANK": "x"})


def test_workers_leave_their_addresses_and_learn_of_the_end():
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    workers = [MeetingPoint(("127.0.0.1", store.port), rank, 3) for rank in (1, 2)]
    first = MeetingPoint(("127.0.0.1", store.port), 0, 3)
    assert workers[0].own_host() == "127.0.0.1"
    threading.Timer(0.1, lambda: workers[1].tell(("127.0.0.1", 7002))).start()  # rank 0 waits for the last one
    workers[0].tell(("::1", 7001))
    assert first.workers() == (("::1", 7001), ("127.0.0.1", 7002))
    assert not workers[0].has_ended()
    first.end()
    until = time.monotonic() + 30  # the store answers no one who sets a key
    while not all(worker.has_ended() for worker in workers):
        assert time.monotonic() < until


def test_ranks_that_do_not_come_are_named():
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    first, other = (MeetingPoint(("127.0.0.1", store.port), rank, 3, patience_s=0.1) for rank in (0, 1))
    other.tell(("127.0.0.1", 7001))
    with pytest.raises(WorkerUnreachableError, match="rank 2 has not come"):
        first.workers()


@pytest.mark.parametrize("command", [["run", "demo", "hello"], ["run", "demo"], ["serve", "demo"]])
def test_torchrun_starts_jobs_only(command: list[str], monkeypatch: pytest.MonkeyPatch, capsys):
    for name, text in ENVIRONMENT.items():
        monkeypatch.setenv(name, text)
    assert run_command_line(command) == 2
    assert "torchrun starts --prompts and bench" in capsys.readouterr().err


def test_the_ranks_are_the_workers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys):
    for name, text in {**ENVIRONMENT, "SPECCHAT_TOKEN": TOKEN}.items():
        monkeypatch.setenv(name, text)
    (tmp_path / "prompts.txt").write_text("hello\n")
    prompts = ["--prompts", str(tmp_path / "prompts.txt"), "-o", str(tmp_path / "answers.jsonl")]
    assert run_command_line(["run", "demo", *prompts, "--workers", "127.0.0.1:1"]) == 2
    assert "torchrun's ranks are the workers" in capsys.readouterr().err


@pytest.mark.parametrize("rank", ["0", "1"])
def test_every_rank_refuses_what_reaches_one_machine_only(rank: str, monkeypatch: pytest.MonkeyPatch, capsys):
    for name, text in {**ENVIRONMENT, "RANK": rank, "SPECCHAT_TOKEN": TOKEN}.items():
        monkeypatch.setenv(name, text)
    assert run_command_line(["bench", "demo", "--cold"]) == 2
    assert "--cold does not reach workers" in capsys.readouterr().err


@pytest.fixture
def start(tmp_path: Path):
    """Start specchat on a number of ranks, and return what rank 0 printed."""

    def run(*arguments: str, ranks: int, token: str = TOKEN) -> subprocess.CompletedProcess[str]:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        command = [*torchrun, "-m", "specchat"] if ranks > 1 else [sys.executable, "-m", "specchat"]
        environment = {**os.environ, "SPECCHAT_TOKEN": token, "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            [*command, *arguments],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )

    return run


@pytest.mark.slow
def test_a_job_has_the_answers_of_one_process(start, tmp_path: Path):
    asked = ({"id": number, "prompt": text} for number, text in enumerate(("Tell me about a fox.", "What is the sea?")))
    (tmp_path / "prompts.jsonl").write_text("".join(f"{json.dumps(each)}\n" for each in asked))
    found = {}
    for ranks in (1, 3):
        job = ("run", "demo", "--prompts", "prompts.jsonl", "--output", f"{ranks}.jsonl", "--seed", "3")
        ended = start(*job, "--max-tokens", "24", "--dtype", "fp32", "--device", "cpu", "--vram", VRAM, ranks=ranks)
        assert ended.returncode == 0, ended.stderr
        lines = [json.loads(line) for line in (tmp_path / f"{ranks}.jsonl").read_text().splitlines()]
        found[ranks] = sorted((line["id"], line["text"]) for line in lines)
    assert len(found[1]) == 2
    assert found[3] == found[1]


@pytest.mark.slow
def test_a_bench_measures_layers_on_other_ranks(start):
    small = ("--limit", "1", "--max-tokens", "8", "-r", "1", "--ctx", "512", "--tree-budget", "16")
    ended = start("bench", "demo", *small, "--device", "cpu", "--vram", VRAM, "--json", "-q", ranks=2)
    assert ended.returncode == 0, ended.stderr
    report = json.loads(ended.stdout)
    layers = [each["resident_layers"] + each["streamed_layers"] for each in report["plan"]["devices"]]
    assert sum(layers) == 8 and min(layers) > 0, report["plan"]["devices"]
    assert [each["identical_output"] for each in report["baselines"]] == [True]


@pytest.mark.slow
def test_a_job_that_fails_ends_every_rank(start):
    ended = start("run", "demo", "--prompts", "missing.txt", "-o", "answers.jsonl", ranks=2)
    assert ended.returncode != 0
    assert "missing.txt" in ended.stderr
