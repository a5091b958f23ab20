"""A chat that is killed keeps every complete turn."""

import json
import random
import signal
from pathlib import Path

import pytest
from support.terminal import Terminal

ENTER = "\r"


def start(state, *arguments):
    environment = {"SPECCHAT_STATE_DIR": str(state), "FAKE_PAUSE_S": "0.01"}
    terminal = Terminal("support.fake_cli", "run", "demo", *arguments, environment=environment)
    terminal.wait_for_prompt()
    return terminal


def saved(state):
    (path,) = Path(state, "sessions").glob("*.jsonl")
    records = [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
    return [record["exchange"]["question"] for record in records if record["type"] == "answer"]


def chat_and_die(state, number, rng):
    """Complete some turns, kill the chat during another, and return the questions of the complete turns."""
    questions = [f"q{number}-{i}" for i in range(rng.randint(0, 2))]
    arguments = ("--overflow", "drop-oldest") if number == 0 else ("-c",)  # the fake's context is small
    with start(state, *arguments) as terminal:
        for question in questions:
            terminal.send(question + ENTER)
            terminal.wait_for(f"You said: {question}")
            terminal.wait_for_prompt()
        if number == 0 and not questions:
            questions.append("first")
            terminal.send("first" + ENTER)
            terminal.wait_for("You said: first")
            terminal.wait_for_prompt()
        terminal.send("long" + ENTER)
        terminal.wait_for(f"word{rng.choice([1, 20, 58])}")
        terminal.kill(signal.SIGKILL)
        assert terminal.exit_code() == -signal.SIGKILL
    return questions


def survive(state, num_kills):
    rng = random.Random(num_kills)
    completed = []
    for number in range(num_kills):
        completed += chat_and_die(state, number, rng)
        assert [question for question in saved(state) if question != "long"] == completed
    with start(state, "-c") as terminal:
        terminal.send("last" + ENTER)
        terminal.wait_for("You said: last")
        terminal.wait_for_prompt()
    assert [question for question in saved(state) if question != "long"] == [*completed, "last"]


def test_killed_twice(tmp_path):
    survive(tmp_path, 2)


@pytest.mark.slow
def test_killed_50_times(tmp_path):
    survive(tmp_path, 50)
