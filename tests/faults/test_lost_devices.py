"""Disks that fill and regain room, devices whose reads fail in mid-pass, and clocks that jump."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from support.delays import python_path
from support.engines import NOTHING, make_plan, random_prompt
from support.faults.fault import DEMO
from support.faults.saved import OPENED
from support.loading import load_engine
from support.mounts import breaking_disk, resize, small_disk
from support.plans import changed
from support.streamed import tiny_packs
from support.tiny_models import VOCAB, make_config, random_model, save

from specchat.chat import transcript
from specchat.chat.saved_chats import find_chats
from specchat.chat.state import Answered, Exchange, Opened
from specchat.errors import ModelError, SessionError
from specchat.records.chat import Message
from specchat.records.generation import Sampling

ROOT = Path(__file__).parents[2]


def opened() -> Opened:
    return Opened(OPENED["setup"], None, Sampling(), None, None)


def answered(number: int, length: int = 10) -> Answered:
    exchange = Exchange(f"question {number}", Message("assistant", "x" * length), 0)
    return Answered("ask", exchange, 0, (1,), "stop", {})


def test_turns_on_a_full_disk_are_saved_once_it_has_room(tmp_path: Path):
    """Each failure is said; nothing of the file is lost, and the next turn that fits brings the others along."""
    with small_disk(tmp_path / "disk", 64 << 10) as disk:
        path = disk / "sessions" / "fox.jsonl"
        journal = transcript.Transcript(path)
        journal(opened())
        journal(answered(0))
        filler = disk / "filler"
        with suppress(OSError):  # the disk is full now
            filler.write_bytes(bytes(64 << 10))
        for number in (1, 2):
            with pytest.raises(SessionError, match=r"cannot save the chat .*No space left"):
                journal(answered(number, 8000))
            assert [each.question for each in transcript.read(path).state.exchanges] == ["question 0"]
        filler.unlink()
        journal(answered(3))
        journal.close()
        assert [each.question for each in transcript.read(path).state.exchanges] == [
            f"question {number}" for number in range(4)
        ]
        assert transcript.read(path).repair is None


def test_a_chat_on_a_disk_that_becomes_read_only_goes_on(tmp_path: Path):
    with small_disk(tmp_path / "disk", 1 << 20) as disk:
        path = disk / "fox.jsonl"
        journal = transcript.Transcript(path)
        journal(opened())
        journal(answered(0))
        journal.close()
        assert subprocess.run(["mount", "-o", "remount,ro", disk], check=False).returncode == 0
        with pytest.raises((SessionError, OSError), match=r"[Rr]ead-only"):
            transcript.Transcript(path, transcript.read(path))(answered(1))
        fresh = transcript.Transcript(disk / "new.jsonl")
        fresh(opened())
        with pytest.raises(SessionError, match="Read-only"):
            fresh(answered(1))
        assert len(transcript.read(path).state.exchanges) == 1


@pytest.mark.parametrize("seconds", [-1e9, 0, 1e10, 1e12])
def test_chats_of_any_time_are_listed(seconds: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A clock that was wrong, or a file system that keeps times beyond the calendar."""
    with small_disk(tmp_path / "disk", 1 << 20) as disk:
        monkeypatch.setenv("SPECCHAT_STATE_DIR", str(disk))
        for number in range(2):
            journal = transcript.Transcript(disk / "sessions" / f"fox{number}.jsonl")
            journal(opened())
            journal(answered(number))
            journal.close()
        os.utime(disk / "sessions" / "fox0.jsonl", (seconds, seconds))
        assert {chat.session_id for chat in find_chats()} == {"fox0", "fox1"}
        assert transcript.last_session() is not None


@pytest.mark.slow
def test_a_pack_is_written_whole_once_the_disk_has_room(tmp_path: Path):
    (tmp_path / "model").mkdir()
    for file in DEMO.iterdir():
        (tmp_path / "model" / file.name).symlink_to(file)
    with small_disk(tmp_path / "cache", 1 << 20) as cache:
        environment = os.environ | {
            "PYTHONPATH": python_path(ROOT, ROOT / "tests"),
            "SPECCHAT_CACHE_DIR": str(cache),
            "SPECCHAT_STATE_DIR": str(tmp_path / "state"),
        }
        command = [sys.executable, "-m", "specchat", "run", str(tmp_path / "model"), "Hi", "--no-save", "-q", "--json"]
        command += ["--device", "cpu", "--quant", "int8", "--draft", "none", "--ctx", "128", "--max-tokens", "4"]
        command += ["--temperature", "0"]
        refused = subprocess.run(command, env=environment, capture_output=True, check=False)
        assert refused.returncode == 4, refused.stderr
        assert b"Traceback" not in refused.stderr and len(refused.stderr.strip().splitlines()) <= 4
        assert not list(cache.rglob("*.tmp"))
        resize(cache, 4 << 30)
        runs = [subprocess.run(command, env=environment, capture_output=True, check=False) for _ in range(2)]
        assert [run.returncode for run in runs] == [0, 0], runs
        texts = [run.stdout for run in runs]
        assert json.loads(texts[0])["token_ids"] == json.loads(texts[1])["token_ids"]


@pytest.mark.slow
@pytest.mark.parametrize("in_ram", [(), (0, 1, 2, 3)], ids=["unbuffered", "cached"])
def test_a_device_that_fails_in_mid_pass_is_an_error_of_the_model(in_ram: tuple[int, ...], tmp_path: Path):
    """The pass ends with an error, also the next one, and everything can be closed."""
    with tiny_packs(tmp_path), breaking_disk(tmp_path / "disk") as disk:
        config = make_config("llama")
        config.hidden_size, config.intermediate_size = 256, 512  # layers that threads read
        source = save(random_model(config), disk.folder / "model")
        plan = changed(make_plan(source, None, num_layers=4, resident=()), in_ram=in_ram)
        engine = load_engine(plan, source, None)
        try:
            prompt = random_prompt(9, VOCAB)
            steps = engine.generate(prompt, Sampling(), stop_ids=NOTHING, max_tokens=20)
            assert [next(steps).token_ids for _ in range(2)]
            disk.break_reads()
            with pytest.raises(ModelError, match=r"cannot read .*[Ii]nput/output error"):
                list(steps)
            with pytest.raises(ModelError, match=r"cannot read .*[Ii]nput/output error"):
                list(engine.generate(prompt, Sampling(), stop_ids=NOTHING, max_tokens=2))
        finally:
            engine.close()
