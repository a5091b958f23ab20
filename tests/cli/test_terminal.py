"""The chat on a terminal: keys, a pty, a screen. One chat uses `demo`, the others a fake model."""

import re
import signal
import subprocess
import sys

import pytest
from support.terminal import TESTS, Terminal

from specchat.loading.checking import check_model
from specchat.models.catalog.ref import demo_source

CTRL_C, CTRL_D, CTRL_J, ENTER = "\x03", "\x04", "\n", "\r"
# Escapes for colours, dim and bold, but not those that move the cursor.
STYLE = re.compile(rb"\x1b\[[0-9;]*[1-9][0-9;]*m")


def chat(*arguments, **settings):
    terminal = Terminal("support.fake_cli", "run", "demo", *arguments, **settings)
    terminal.wait_for_prompt()
    return terminal


@pytest.fixture
def known_demo():
    """Describe all that a plan of the demo weighs, and check it, so that the prompt appears before torch is imported.

    A process of its own, because this one may remember what its cache folder no longer has.
    """
    subprocess.run([sys.executable, "-m", "specchat", "run", "demo", "--plan"], check=True, capture_output=True)
    for name in ("target", "draft"):
        check_model(demo_source(name))


def test_two_turns_with_the_demo(known_demo):
    arguments = ("--seed", "1", "--max-tokens", "40", "--tree-budget", "64")
    with Terminal("specchat", "run", "demo", *arguments, columns=120) as terminal:
        terminal.wait_for_prompt()
        assert "a toy model for exercising the software" in terminal.screen
        assert re.search(
            r"all in RAM \([\d.]+ MiB\) · context 1,024 · about [\d.]+ tok/s \(details: /info\)", terminal.screen
        )
        terminal.send("Tell me a story about a fox." + ENTER)
        terminal.wait_for("+ 0 cached")
        terminal.wait_for_prompt()
        assert re.search(r"\d+ tok · [\d.]+ tok/s · [\d.]+ tok/pass · TTFT [\d.]+ s · prompt \d+ new", terminal.screen)
        terminal.send("What happened next?" + ENTER)
        terminal.wait_for(
            lambda t: re.search(r"prompt \d+ new \+ [1-9]\d* cached tok · context \d+/1,024 tok", t.screen)
        )
        terminal.wait_for_prompt()
        terminal.send(CTRL_D)
        assert terminal.exit_code() == 0
        assert b"Traceback" not in terminal.raw


def test_a_worker_lost_at_the_prompt_is_told_above_it(tmp_path):
    lost, saved = tmp_path / "lost", tmp_path / "chat.json"
    terminal = chat(columns=120, environment={"FAKE_LOST": str(lost), "FAKE_IDLE_S": "0.05"})
    with terminal:
        terminal.send("a question" + ENTER)
        terminal.wait_for("tok/s")
        terminal.wait_for_prompt()
        terminal.send(f"/save {saved}")
        lost.touch()
        terminal.wait_for("error: worker 1 (far:7000) is gone")
        terminal.wait_for(f"> /save {saved}")
        terminal.send(ENTER)
        terminal.wait_for("saved")
        terminal.wait_for_prompt()
        terminal.send(CTRL_D)
        assert terminal.exit_code() == 0
        assert terminal.raw.count(b"is gone") == 1
    assert "a question" in saved.read_text()


def test_prompt_appears_before_torch_is_imported(known_demo, tmp_path):
    """Use a torch whose import takes ten minutes."""
    torch = tmp_path / "torch"
    torch.mkdir()
    (torch / "version.py").write_text("__version__, cuda, hip = '2.13.0', None, None\n")
    (torch / "__init__.py").write_text("import time; time.sleep(600)\n")
    environment = {"PYTHONPATH": f"{tmp_path}:{TESTS}:{TESTS.parent}"}
    with Terminal("specchat", "run", "demo", environment=environment) as terminal:
        terminal.wait_for(lambda t: t.cursor_line == ">" and "loading the model" in t.screen)
        assert "all in RAM" in terminal.screen
        terminal.send("half a mess")
        terminal.wait_for("> half a mess")
        terminal.send(CTRL_C)
        terminal.wait_for(lambda t: t.cursor_line == ">")
        terminal.send(CTRL_D)
        assert terminal.exit_code() == 0


def test_ctrl_c_keeps_the_partial_answer():
    with chat() as terminal:
        terminal.send("gated long" + ENTER)
        terminal.wait_for("word3")
        terminal.send(CTRL_C)
        terminal.wait_for(lambda t: re.search(r"^\^C stopped · \d+ tok · [\d.]+ tok/s$", t.screen, re.MULTILINE))
        assert "word59" not in terminal.screen
        terminal.wait_for_prompt()
        terminal.send("again" + ENTER)
        terminal.wait_for("You said: again")
        terminal.wait_for(lambda t: re.search(r"prompt \d+ new \+ [1-9]\d* cached", t.screen))


def test_ctrl_c_before_the_first_token_restores_the_message(tmp_path):
    gate = tmp_path / "gate"
    with chat(environment={"FAKE_GATE": str(gate)}) as terminal:
        terminal.send("held begin" + ENTER)
        terminal.wait_for("verifying 2 of 4")
        terminal.send(CTRL_C)
        terminal.wait_for("^C stopped before the first token")
        terminal.wait_for(lambda t: t.cursor_line == "> held begin")
        gate.touch()
        terminal.send("!" + ENTER)
        terminal.wait_for("You said: held begin!")


def test_ctrl_c_clears_the_line_and_a_second_one_exits():
    with chat(environment={"FAKE_LEAVE_WITHIN_S": "60"}) as terminal:
        terminal.send("half a mess")
        terminal.wait_for("half a mess")
        terminal.send(CTRL_C)
        terminal.wait_for_prompt()
        terminal.send(CTRL_C)
        assert terminal.exit_code() == 130
        assert b"Traceback" not in terminal.raw


def test_one_live_line_while_a_single_answer_loads(tmp_path):
    gate = tmp_path / "gate"
    with Terminal("support.fake_cli", "run", "demo", "hi", environment={"FAKE_LOAD_GATE": str(gate)}) as terminal:
        terminal.wait_for(lambda t: re.search(r"^loading the model · \d+ s$", t.screen, re.MULTILINE))
        gate.touch()
        assert terminal.exit_code() == 0
        assert "You said: hi" in terminal.screen and "loading" not in terminal.scrollback
    with Terminal("support.fake_cli", "run", "demo", "hi", environment={"FAKE_LOAD_GATE": "/nonexistent"}) as terminal:
        terminal.wait_for("loading the model ·")
        terminal.send(CTRL_C)
        assert terminal.exit_code() == 130
        assert b"Traceback" not in terminal.raw


def test_ctrl_c_is_counted_anew_after_a_message_is_sent(tmp_path):
    gate = tmp_path / "gate"
    with chat(environment={"FAKE_LEAVE_WITHIN_S": "60", "FAKE_GATE": str(gate)}) as terminal:
        terminal.send("half a mess")
        terminal.wait_for("half a mess")
        terminal.send(CTRL_C)
        terminal.wait_for_prompt()
        terminal.send("gated long" + ENTER)
        terminal.wait_for("word3")
        terminal.send(CTRL_C)
        terminal.wait_for("^C stopped")
        terminal.wait_for_prompt()
        terminal.send(CTRL_D)
        assert terminal.exit_code() == 0


def test_commands():
    with chat() as terminal:
        terminal.send("/help" + ENTER)
        terminal.wait_for("/clear")
        terminal.send("/hlep" + ENTER)
        terminal.wait_for("did you mean /help?")
        terminal.send("//literal" + ENTER)
        terminal.wait_for("You said: /literal")
        terminal.wait_for_prompt()
        terminal.send("/clear" + ENTER)
        terminal.wait_for("chat cleared")
        terminal.wait_for_prompt()
        terminal.send("fresh" + ENTER)
        terminal.wait_for("You said: fresh")
        assert "hlep" not in terminal.screen.split("You said: fresh")[1]
        terminal.wait_for_prompt()
        terminal.send("/bye" + ENTER)
        assert terminal.exit_code() == 0


def test_a_message_of_several_lines_and_the_history():
    with chat() as terminal:
        terminal.send("one" + CTRL_J + "two\x1b" + ENTER + "three" + ENTER)
        terminal.wait_for("You said: one\ntwo\nthree")
        assert "> one\n  two\n  three\n\nYou said: one\n" in terminal.screen
        terminal.wait_for_prompt()
        terminal.send("\x1b[A")
        terminal.wait_for(lambda t: t.screen.count("> one") == 2)


def test_answers_cannot_send_terminal_escapes():
    with chat() as terminal:
        terminal.send("escape" + ENTER)
        terminal.wait_for("a␛[31mb␇c")
        assert b"\x1b[31m" not in terminal.raw
        assert b"\x9b2J" not in terminal.raw


def test_40_columns():
    with chat(columns=40) as terminal:
        terminal.send("hello" + ENTER)
        terminal.wait_for("You said: hello")
        terminal.wait_for_prompt()
        assert "exercising the software" in " ".join(terminal.screen.split())  # broken between words
        assert re.search(r"TTFT\s+[\d.]+ s", terminal.screen)


@pytest.mark.parametrize("environment", [{"NO_COLOR": "1"}, {"TERM": "dumb"}], ids=["NO_COLOR", "dumb"])
def test_no_styles_with_no_color_or_dumb_terminal(environment):
    with chat(environment=environment) as terminal:
        terminal.send("hello" + ENTER)
        terminal.wait_for("You said: hello")
        terminal.wait_for_prompt()
        terminal.send("/nothing" + ENTER)
        terminal.wait_for("unknown command")
        terminal.send(CTRL_D)
        assert terminal.exit_code() == 0
        assert not STYLE.findall(terminal.raw)


def test_styles_on_a_terminal():
    with chat() as terminal:
        assert STYLE.findall(terminal.raw)


def _wait_at(point, terminal):
    """Wait until the program is at a point of a chat whose model is loaded: only a loaded engine can be closed."""
    terminal.send(("gated long" if point == "answer" else "one") + ENTER)
    terminal.wait_for("word3" if point == "answer" else "You said: one")
    if point == "prompt":
        terminal.wait_for_prompt()


@pytest.mark.parametrize("at", ["prompt", "answer", "end of the answer"])
def test_a_closed_terminal_ends_the_program(at, tmp_path):
    told = tmp_path / "told"
    with chat(environment={"FAKE_WRITES_CLOSED": str(told)}) as terminal:
        _wait_at(at, terminal)
        assert terminal.hang_up() == 129
    assert told.read_text() == "engine closed"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("at", ["prompt", "answer"])
def test_signals_close_the_engine(number, at):
    with chat(environment={"FAKE_SAYS_CLOSED": "1"}) as terminal:
        _wait_at(at, terminal)
        terminal.kill(number)
        assert terminal.exit_code() == 128 + number
        assert "engine closed" in terminal.screen
        assert b"Traceback" not in terminal.raw


def test_a_terminal_closed_while_the_model_loads_ends_the_program(tmp_path):
    with chat(environment={"FAKE_LOAD_GATE": str(tmp_path / "never")}) as terminal:
        assert terminal.hang_up() == 129
    with chat(environment={"FAKE_LOAD_GATE": str(tmp_path / "never")}) as terminal:
        terminal.kill(signal.SIGTERM)
        assert terminal.exit_code() == 128 + signal.SIGTERM
        assert b"Traceback" not in terminal.raw
