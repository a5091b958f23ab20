"""`specchat run --prompts`, killed at random points and started again: nothing is lost, nothing is answered twice."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from specchat.bench.prompts import BUILT_IN

NUM_PROMPTS, NUM_KILLS = 1000, 10
_POLL_S, _MOST_S = 0.01, 600.0
_SAME = ("line", "seed", "settings", "request")


@dataclass(frozen=True)
class Command:
    """A job of 1,000 prompts, of which 16 share a pass."""

    folder: Path

    @property
    def out(self) -> Path:
        return self.folder / "out.jsonl"

    @property
    def num_lines(self) -> int:
        return self.out.read_bytes().count(b"\n") if self.out.exists() else 0

    @contextmanager
    def started(self) -> Iterator[subprocess.Popen[bytes]]:
        """The job while it runs; killed at the end if it runs then."""
        flags = ("--batch", "16", "--max-tokens", "8", "--device", "cpu", "--seed", "3", "--temperature", "0.7")
        command = (sys.executable, "-m", "specchat", "run", "demo", "--prompts", str(self.folder / "in.jsonl"))
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        with (self.folder / "stderr").open("wb") as stderr:
            process = subprocess.Popen([*command, "-o", str(self.out), *flags], stderr=stderr, env=environment)
        try:
            yield process
        finally:
            process.kill()
            process.wait()

    def wait_for(self, process: subprocess.Popen[bytes], num_lines: int) -> None:
        """Wait until the file has so many lines, or the process has ended."""
        until = time.monotonic() + _MOST_S
        while process.poll() is None and self.num_lines < num_lines:
            assert time.monotonic() < until, self.stderr
            time.sleep(_POLL_S)

    def finish(self, process: subprocess.Popen[bytes]) -> None:
        assert process.wait(_MOST_S) == 0, self.stderr

    @property
    def stderr(self) -> str:
        return (self.folder / "stderr").read_text(encoding="utf-8")

    def results(self) -> dict[str, dict]:
        """The results by id: each line is whole, and no id comes twice."""
        lines = [json.loads(line) for line in self.out.read_text(encoding="utf-8").splitlines()]
        found = {each["id"]: each for each in lines}
        assert len(found) == len(lines)
        return found


def command(folder: Path) -> Command:
    """A job with prompts of different lengths."""
    folder.mkdir()
    questions = [turn for question in BUILT_IN for turn in question.turns]
    lines = (
        {"id": f"p{i}", "prompt": f"{i}: {questions[i % len(questions)][: 10 + i % 60]}"} for i in range(NUM_PROMPTS)
    )
    (folder / "in.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    return Command(folder)


@pytest.mark.slow
def test_a_killed_job_loses_nothing_and_answers_nothing_twice(tmp_path: Path):
    whole, killed, rng = command(tmp_path / "whole"), command(tmp_path / "killed"), random.Random(11)

    with whole.started() as process:
        whole.wait_for(process, NUM_PROMPTS // 5)
        early_bytes = psutil.Process(process.pid).memory_info().rss
        whole.wait_for(process, NUM_PROMPTS * 9 // 10)
        late_bytes = psutil.Process(process.pid).memory_info().rss
        whole.finish(process)
    assert late_bytes < 1.03 * early_bytes, "memory is flat"

    for _ in range(NUM_KILLS):
        before = killed.out.read_bytes() if killed.out.exists() else b""
        with killed.started() as process:
            killed.wait_for(process, before.count(b"\n") + rng.randint(1, 60))
            time.sleep(rng.uniform(0, 0.1))  # anywhere in a pass or between two
            assert process.poll() is None, killed.stderr
        after = killed.out.read_bytes()
        assert after.startswith(before[: before.rfind(b"\n") + 1]), "a result is never changed"
    assert 0 < killed.num_lines < NUM_PROMPTS
    with killed.started() as process:
        killed.finish(process)

    first, second = whole.results(), killed.results()
    assert set(first) == set(second) == {f"p{i}" for i in range(NUM_PROMPTS)}
    # Which prompts share a pass differs, so the last bits of scores may, and a near-tie may fall differently.
    num_other = sum(first[name]["token_ids"] != second[name]["token_ids"] for name in first)
    assert num_other <= 2
    for name, result in second.items():
        assert [result[key] for key in _SAME] == [first[name][key] for key in _SAME]
        assert result["usage"]["prompt_tokens"] == first[name]["usage"]["prompt_tokens"]
