"""A chat of a thousand turns keeps its memory, its files and its threads."""

from __future__ import annotations

import gc
import json
import os
import random
import threading
from pathlib import Path

import pytest
from support.engines import make_plan
from support.faults.fault import DEMO
from support.loading import load_engine

from specchat.chat import transcript
from specchat.chat.answer import Turn
from specchat.chat.session import ChatSession
from specchat.loading.engine import stop_ids
from specchat.models.checkpoint.generation_config import load_generation_defaults
from specchat.models.hf.tokenizer import load_tokenizer
from specchat.records.generation import Sampling
from specchat.records.model import ModelSource

NUM_TURNS, WARM_UP = 1000, 150
WORDS = ("fox", "night", "river", "tell", "me", "why", "then", "stone", "who", "sings")


def held() -> tuple[int, int, int]:
    """Bytes of this process that are in memory, its open files, and its threads."""
    gc.collect()
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["VmRSS"].split()[0]) << 10, len(list(Path("/proc/self/fd").iterdir())), int(lines["Threads"])


@pytest.mark.slow
def test_a_thousand_turns_leave_nothing_behind(tmp_path: Path):
    """Streamed layers, trees, retries, undone and stopped answers; the oldest turns are dropped."""
    rng = random.Random(seed := int(os.environ.get("TEST_SEED", "0")))
    source = ModelSource("demo", DEMO)
    num_layers = json.loads((DEMO / "config.json").read_text())["num_hidden_layers"]
    plan = make_plan(source, source, num_layers=num_layers, resident=(0,), ctx=384, tree_budget=8)
    tokenizer = load_tokenizer(source.path)
    before = held()
    journal = transcript.Transcript(tmp_path / "long.jsonl")
    with load_engine(plan, source, source) as engine:
        session = ChatSession(
            engine,
            tokenizer,
            sampling=Sampling(temperature=0.9, seed=seed),
            stop_ids=stop_ids(load_generation_defaults(source.path), tokenizer),
            max_tokens=6,
            overflow="drop-oldest",
            journal=journal,
        )
        early = held()
        for number in range(NUM_TURNS):
            if number == WARM_UP:
                early = held()
            cancel = threading.Event()
            if number % 7 == 3:
                cancel.set()
            question = " ".join(rng.choices(WORDS, k=rng.randint(1, 20)))
            *_, turn = session.retry() if number % 11 == 5 else session.ask(question, cancel)
            assert isinstance(turn, Turn) and turn.unsaved is None
            if number % 13 == 8:
                session.undo()
            if number % 211 == 100:
                session.clear()
        late = held()
    journal.close()
    after = held()
    growth = late[0] / early[0] - 1
    print(f"TEST_SEED={seed}: {early[0] >> 20} MiB after {WARM_UP} turns, {growth:+.2%} after {NUM_TURNS}")
    print(f"files {early[1]} and {late[1]}, threads {early[2]} and {late[2]}; closed: {after[1:]}, before {before[1:]}")
    assert growth < 0.01
    assert late[1:] == early[1:]
    assert after[1] <= before[1] and after[2] <= before[2]
