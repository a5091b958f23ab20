"""Chats from day to day: resuming, other models, files, habits from other tools; a fake engine replaces the model."""

import base64
import shutil

from support.chats import CTRL_D, ENTER, UP, chat, say
from support.terminal import TESTS

from specchat.chat import transcript

# --- resuming ----------------------------------------------------------------------------------------------------


def test_a_resumed_chat_shows_where_it_was(tmp_path):
    environment = {"SPECCHAT_STATE_DIR": str(tmp_path)}
    with chat("--session", "fox", environment=environment) as terminal:
        say(terminal, "the first", "You said: the first")
        say(terminal, "the last", "You said: the last")
        terminal.send(CTRL_D)
        assert terminal.exit_code() == 0
        assert terminal.screen.endswith("resume this chat with: specchat run -c")
    with chat("-c", environment=environment) as terminal:
        assert "session fox: 2 turns so far" in terminal.screen
        assert "> the last\n\nYou said: the last\n\n>" in terminal.screen
        assert "the first" not in terminal.screen
        assert b"\x1b[2mYou said: the last" in terminal.raw
        say(terminal, "and now", "You said: and now")
        terminal.send("/exit" + ENTER)
        assert terminal.exit_code() == 0


def test_leaving_an_unsaved_chat_names_no_way_back():
    with chat("--no-save") as terminal:
        say(terminal, "one", "You said: one")
        terminal.send(CTRL_D)
        assert terminal.exit_code() == 0
        assert "resume" not in terminal.screen


# --- daily use ---------------------------------------------------------------------------------------------------


def test_history_and_saved_chats_are_shown(tmp_path):
    environment = {"SPECCHAT_STATE_DIR": str(tmp_path)}
    with chat("--session", "fox", environment=environment, rows=50) as terminal:
        say(terminal, "/history", "no messages yet")
        say(terminal, "/sessions", "no saved chats")
        say(terminal, "one", "You said: one")
        say(terminal, "two", "You said: two")
        say(terminal, "/history", r"> one\n\nYou said: one\n\n> two\n\nYou said: two\n\n>")
        say(terminal, "/sessions", r"fox · 20.* · 2 turns · one\n/load ID continues one here")
        say(terminal, "/sessions nothing", "no saved chat contains that text")
        say(terminal, "/clear", "chat cleared")
        say(terminal, "/regen", "no answer to retry")
        say(terminal, "/?", "list commands and keys")


def test_the_model_is_changed_and_the_chat_goes_on(tmp_path):
    folder = tmp_path / "other"
    shutil.copytree(TESTS.parent / "specchat" / "demo" / "target", folder)
    environment = {"SPECCHAT_STATE_DIR": str(tmp_path / "state"), "FAKE_SAYS_CLOSED": "1"}
    with chat("--session", "fox", environment=environment, rows=60, columns=120) as terminal:
        say(terminal, "/model", "usage: /model NAME")
        say(terminal, "/model no such", "error: 'no such' looks like a prompt")
        say(terminal, "one", "You said: one")
        say(terminal, "/set max_tokens=200", "max_tokens = 200")
        say(terminal, f"/model {folder}", lambda t: f"· {folder} ·" in t.screen)
        assert terminal.screen.count("engine closed") == 1
        assert "session fox: 1 turn so far" in terminal.screen
        say(terminal, "/info", r"max_tokens +200")
        say(terminal, "two", "You said: two")
        say(terminal, "/model ./nosuch", r"error: folder nosuch does not exist\nhint: ")
        assert "going on with" not in terminal.screen and terminal.screen.count("engine closed") == 1
        (tmp_path / "empty").mkdir()
        say(terminal, f"/model {tmp_path}/empty", r"error: .*empty has no config.json (?s:.)*going on with")
        say(terminal, "three", "You said: three")
        terminal.send(CTRL_D)
        assert terminal.exit_code() == 0
    saved = transcript.read(tmp_path / "state" / "sessions" / "fox.jsonl")
    assert [each.question for each in saved.state.exchanges] == ["one", "two", "three"]
    assert saved.opened.setup["model"] == str(folder)


def test_an_unsaved_chat_changes_its_model_too():
    with chat("--no-save", rows=50) as terminal:
        say(terminal, "one", "You said: one")
        say(terminal, "/model demo", lambda t: t.screen.count("specchat 0") == 2)
        say(terminal, "/history", r"> one\n\nYou said: one\n\n>")


def test_the_last_code_block_is_copied():
    plain = {"PATH": "/usr/bin:/bin", "WAYLAND_DISPLAY": "", "DISPLAY": "", "SSH_CONNECTION": "here"}
    with chat(environment=plain, rows=50) as terminal:
        say(terminal, "one", "You said: one")
        say(terminal, "/copy code", "the last answer has no code block")
        say(terminal, "/copy that", "/copy takes code or nothing")
        say(terminal, "markdown", "The end.")
        say(terminal, "/copy code", "copied 30 characters")
        assert base64.b64encode(b"def f(x):\n    return x  # done") in terminal.raw


def test_the_model_s_own_answer_is_edited():
    with chat(rows=50) as terminal:
        say(terminal, "/edit answer", "no answer to edit")
        say(terminal, "/edit that", "/edit takes answer or nothing")
        say(terminal, "one", "You said: one")
        terminal.send("/edit answer" + ENTER)
        terminal.wait_for(lambda t: t.cursor_line == "> You said: one")
        say(terminal, " or two", "changed the last answer")
        say(terminal, "/history", r"> one\n\nYou said: one or two\n\n>")
        say(terminal, "more", "You said: more")


def test_a_file_that_cannot_fit_is_refused_and_attached_ones_are_listed(tmp_path):
    (tmp_path / "large.txt").write_text("x" * 500)
    (tmp_path / "small.txt").write_text("small")
    with chat(rows=50, columns=150) as terminal:
        say(terminal, "/read", "nothing is attached")
        say(terminal, f"/read {tmp_path}/large.txt", "large.txt has 500 tokens, but 400 of 400 are free")
        say(terminal, f"/read {tmp_path}/small.txt", r"attached small.txt \(5 tokens\)")
        say(terminal, "/read", lambda t: t.screen.count("small.txt (5 tokens)") == 2)
        say(terminal, "/read none", "nothing is attached to the next message")
        say(terminal, "hello", "You said: hello")
        assert "small\n\nhello" not in terminal.screen


def test_a_file_of_the_command_line_goes_with_the_first_message(tmp_path):
    (tmp_path / "notes.txt").write_text("the notes\n")
    with chat("--file", str(tmp_path / "notes.txt")) as terminal:
        assert "notes.txt goes with the next message" in terminal.screen
        say(terminal, "what", r"You said: the notes\n\nwhat\n")
        say(terminal, "and", r"You said: and\n")


def test_a_bare_help_asks():
    with chat(rows=60) as terminal:
        terminal.send("help" + ENTER)
        terminal.wait_for("list the commands? (no sends 'help' to the model) [Y/n]")
        terminal.send("n" + ENTER)
        terminal.wait_for("You said: help")
        terminal.wait_for_prompt()
        terminal.send("?" + ENTER)
        terminal.wait_for("list the commands? (no sends '?' to the model) [Y/n]")
        terminal.send(ENTER)
        terminal.wait_for("/help, /?")
        terminal.wait_for_prompt()
        assert "You said: ?" not in terminal.screen


def test_a_bare_exit_asks():
    with chat() as terminal:
        terminal.send("exit" + ENTER)
        terminal.wait_for("leave the chat? (no sends 'exit' to the model) [Y/n]")
        terminal.send("n" + ENTER)
        terminal.wait_for("You said: exit")
        terminal.wait_for_prompt()
        terminal.send(UP)
        terminal.wait_for(lambda t: t.cursor_line == "> exit")  # the answer is no part of the history
        terminal.send(ENTER)
        terminal.wait_for(lambda t: t.cursor_line.endswith("[Y/n]"))
        terminal.send(ENTER)
        assert terminal.exit_code() == 0


def test_other_tools_commands_are_answered():
    with chat() as terminal:
        say(terminal, "/show", "there is no /show: /info and /set show")
        say(terminal, "/list", "there is no /list: `specchat models`")


def test_vi_keys_and_the_bell_are_settings(monkeypatch):
    environment = {"SPECCHAT_VI": "1", "SPECCHAT_BELL": "1", "FAKE_SLOW_S": "0"}
    with chat(environment=environment) as terminal:
        terminal.send("one two\x1b" + "0dw")  # Esc, to the start of the line, delete a word
        terminal.wait_for(lambda t: t.cursor_line == "> two")
        before = terminal.raw.count(b"\x07")
        say(terminal, "", "You said: two")
        assert terminal.raw.count(b"\x07") == before + 1
    with chat(environment={"FAKE_SLOW_S": "0"}) as terminal:
        say(terminal, "one", "You said: one")
        assert b"\x07" not in terminal.raw
