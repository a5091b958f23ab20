"""The interactive chat on a pty with real keys and a screen; a fake engine replaces the model."""

import base64
import os
import re
import signal
import stat

import pytest
from support.chats import CTRL_C, CTRL_D, CTRL_E, CTRL_L, CTRL_R, CTRL_X, ENTER, PASTE, PASTE_END, TAB, UP, chat, say

STATUS = re.compile(r"^(verifying 2 of 4|waiting) ·", re.MULTILINE)


# --- typing ------------------------------------------------------------------------------------------------------


def test_pasted_lines_are_one_message():
    with chat() as terminal:
        terminal.send(f"{PASTE}first\rsecond\r\rfourth{PASTE_END}")
        terminal.wait_for(lambda t: t.cursor_line == "  fourth")
        assert "You said" not in terminal.screen
        say(terminal, " more", r"You said: first\nsecond\n\nfourth more\n")


def test_triple_quotes_enclose_one_message():
    with chat() as terminal:
        terminal.send('"""one' + ENTER)
        terminal.wait_for(lambda t: t.cursor_line == "")
        say(terminal, '/two"""', r"You said: one\n/two\n")
        say(terminal, '"""/help"""', r"You said: /help\n")


def test_history_is_searchable_and_persistent(tmp_path):
    environment = {"SPECCHAT_STATE_DIR": str(tmp_path)}
    with chat(environment=environment) as terminal:
        say(terminal, "a first question", "You said: a first question")
        say(terminal, "another one", "You said: another one")
        terminal.send(CTRL_R + "fir")
        terminal.wait_for("a first question")
        terminal.wait_for(lambda t: "fir" in t.cursor_line)
        say(terminal, "", lambda t: t.screen.count("You said: a first question") == 2)
        terminal.send(CTRL_D)
        assert terminal.exit_code() == 0
    assert stat.S_IMODE((tmp_path / "history").stat().st_mode) == 0o600
    with chat(environment=environment) as terminal:
        terminal.send(UP + UP)
        terminal.wait_for(lambda t: t.cursor_line == "> another one")
    with chat("--no-save", environment=environment) as terminal:
        say(terminal, "a secret", "You said: a secret")
        terminal.send(UP)
        terminal.wait_for(lambda t: t.cursor_line == "> a secret")
    assert "secret" not in (tmp_path / "history").read_text()


def test_message_is_edited_in_the_editor(tmp_path):
    editor = tmp_path / "editor"
    editor.write_text('#!/bin/sh\nprintf "edited\\nlines" >> "$1"\n')
    editor.chmod(0o700)
    with chat(environment={"EDITOR": str(editor), "VISUAL": ""}) as terminal:
        terminal.send("to be ")
        terminal.wait_for("> to be")
        terminal.send(CTRL_X + CTRL_E)
        terminal.wait_for(lambda t: t.cursor_line == "  lines")
        say(terminal, "", r"You said: to be edited\nlines")


def test_ctrl_l_clears_the_screen_and_keeps_the_line():
    with chat() as terminal:
        say(terminal, "hello", "You said: hello")
        terminal.send("half")
        terminal.wait_for("> half")
        terminal.send(CTRL_L)
        terminal.wait_for(lambda t: t.screen == "> half")
        terminal.send("\x01" + CTRL_D)  # Ctrl-D at the start of a non-empty line deletes one character
        terminal.wait_for(lambda t: t.cursor_line == "> alf")


def test_tab_completes_commands_keys_and_files(tmp_path):
    (tmp_path / "notes.txt").write_text("the notes")
    with chat() as terminal:
        terminal.send("/verb" + TAB)
        terminal.wait_for(lambda t: t.cursor_line == "> /verbose")
        say(terminal, "", "each pass is shown")
        terminal.send("/set temp" + TAB)
        terminal.wait_for(lambda t: t.cursor_line == "> /set temperature=")
        say(terminal, "0.5", "temperature = 0.5")
        terminal.send(f"/read {tmp_path}/no" + TAB)
        terminal.wait_for("notes.txt")
        say(terminal, "", r"notes.txt \(9 tokens\)")
        terminal.send("/ret" + TAB)
        terminal.wait_for(lambda t: t.cursor_line == "> /retry")


# --- loading -----------------------------------------------------------------------------------------------------


def test_typing_while_the_model_loads(tmp_path):
    gate = tmp_path / "gate"
    with chat(ready=False, environment={"FAKE_LOAD_GATE": str(gate)}) as terminal:
        terminal.wait_for("loading the model")
        assert terminal.screen.index("RAM") < terminal.screen.index("loading the model")  # the plan comes first
        terminal.send("already ")
        terminal.wait_for(lambda t: t.cursor_line == "> already" and "loading the model" in t.screen)
        terminal.send("here" + ENTER)
        gate.touch()
        terminal.wait_for("You said: already here")
        terminal.wait_for_prompt()
        assert "loading" not in terminal.screen


def test_loading_note_disappears_when_loading_ends(tmp_path):
    gate = tmp_path / "gate"
    with chat(ready=False, environment={"FAKE_LOAD_GATE": str(gate)}) as terminal:
        terminal.wait_for("loading the model")
        terminal.send("half")
        terminal.wait_for(lambda t: t.cursor_line == "> half" and "loading the model" in t.screen)
        gate.touch()
        terminal.wait_for(lambda t: t.cursor_line == "> half" and "loading" not in t.screen)


def test_waiting_for_the_model_can_be_cancelled():
    with chat(ready=False, environment={"FAKE_LOAD_GATE": "/nonexistent"}) as terminal:
        terminal.wait_for("loading the model")
        terminal.send("too slow" + ENTER)
        terminal.wait_for(lambda t: t.cursor_line.startswith("loading the model"))
        terminal.send(CTRL_C)
        terminal.wait_for("^C stopped before the model was loaded")
        terminal.wait_for(lambda t: t.cursor_line == "> too slow")
        terminal.send("\x15" + CTRL_D)
        assert terminal.exit_code() == 0


@pytest.mark.parametrize(
    ("typed", "cursor_line"),
    [("", ">"), ("half a message", "> half a message"), ("a whole one\r", "loading the model ·")],
    ids=["nothing", "half", "sent"],
)
def test_failed_load_is_reported(tmp_path, typed, cursor_line):
    gate = tmp_path / "gate"
    environment = {"FAKE_LOAD_GATE": str(gate), "FAKE_LOAD_FAILS": "1", "SPECCHAT_STATE_DIR": str(tmp_path)}
    with chat(ready=False, environment=environment) as terminal:
        terminal.wait_for("loading the model")
        terminal.send(typed)
        terminal.wait_for(lambda t: t.cursor_line.startswith(cursor_line))
        gate.touch()
        assert terminal.exit_code() == 4
        assert "error: the model is too large\nhint: try --vram 8GiB" in terminal.screen
        assert b"Traceback" not in terminal.raw
    if typed:
        assert typed.strip() in (tmp_path / "history").read_text()


# --- the answer --------------------------------------------------------------------------------------------------


def test_status_line_appears_and_disappears(tmp_path):
    gate = tmp_path / "gate"
    with chat(environment={"FAKE_GATE": str(gate)}) as terminal:
        terminal.send("held hello" + ENTER)
        terminal.wait_for(lambda t: re.search(r"^verifying 2 of 4 · \d+ s · RAM 140", t.screen, re.MULTILINE))
        gate.touch()
        terminal.wait_for("You said: held hello")
        terminal.wait_for_prompt()
        assert not STATUS.search(terminal.scrollback)
        gate.unlink()
        terminal.send("gated long" + ENTER)
        terminal.wait_for(lambda t: re.search(r"word3.*\n(.*\n)?verifying 2 of 4 · [\d]+ tok · [\d.]+ tok/s", t.screen))
        assert re.search(r"3.0 tok/pass · \d+ s · 210 MB/s", terminal.screen)
        gate.touch()
        terminal.wait_for("word59")
        terminal.wait_for_prompt()
        assert not STATUS.search(terminal.scrollback)
        assert " ".join(f"word{i}" for i in range(60)) in " ".join(terminal.scrollback.split())


def test_quiet_hides_the_status_line():
    with chat("-q") as terminal:
        terminal.send("gated long" + ENTER)
        terminal.wait_for("word9")
        assert not STATUS.search(terminal.screen)


EXPECTED = """A title

Some bold words and code, which go on
for long enough to be wrapped on a
narrow screen.

1. first
2. second

```python
def f(x):
    return x  # done
```

name   size
───────────
a         1

The end."""


def test_markdown_is_rendered():
    with chat(columns=40, environment={"FAKE_PAUSE_S": "0.01"}) as terminal:
        terminal.send("markdown" + ENTER)
        terminal.wait_for("The end.")
        terminal.wait_for_prompt()
        assert EXPECTED in terminal.scrollback
        assert b"\x1b[1mbold" in terminal.raw


def test_raw_shows_markdown_source():
    with chat("--raw", columns=60) as terminal:
        terminal.send("markdown" + ENTER)
        terminal.wait_for("The end.")
        terminal.wait_for_prompt()
        assert "# A title\n\nSome **bold** words and `code`, which go on for long enough" in terminal.scrollback
        assert "```python\ndef f(x):" in terminal.scrollback


@pytest.mark.parametrize("size", [(40, 30), (100, 12), (140, 40)], ids=str)
def test_window_is_resized_during_an_answer(tmp_path, size):
    gate = tmp_path / "gate"
    with chat(environment={"FAKE_GATE": str(gate)}) as terminal:
        terminal.send("gated long" + ENTER)
        terminal.wait_for(lambda t: "word20" in t.screen and STATUS.search(t.screen))
        terminal.resize(*size)
        gate.touch()
        terminal.wait_for("word59")
        terminal.wait_for_prompt()
        numbers = [int(n) for n in re.findall(r"word(\d+)", terminal.scrollback.split("> gated long")[-1])]
        assert numbers == list(range(numbers[0], 60))  # pyte drops the rows that do not fit the lower window
        assert numbers[0] == 0 or size[1] < 30
        assert not STATUS.search(terminal.scrollback)


def test_answer_longer_than_the_screen():
    with chat(rows=12, environment={"FAKE_PAUSE_S": "0.002"}) as terminal:
        terminal.send("lines" + ENTER)
        terminal.wait_for("line 69")
        terminal.wait_for_prompt()
        assert [int(n) for n in re.findall(r"^line (\d+)$", terminal.scrollback, re.MULTILINE)] == list(range(70))


def test_ctrl_c_twice_during_an_answer_exits():
    with chat(environment={"FAKE_LEAVE_WITHIN_S": "60", "FAKE_SAYS_CLOSED": "1"}) as terminal:
        terminal.send("stuck" + ENTER)
        terminal.wait_for("verifying")
        terminal.send(CTRL_C)
        terminal.wait_for("stopping ·")
        terminal.send(CTRL_C)
        assert terminal.exit_code() == 130
        assert "engine closed" in terminal.screen
        assert b"Traceback" not in terminal.raw


def test_a_call_that_never_ends_is_left_behind():
    for end, code in ((CTRL_C, 130), (signal.SIGTERM, 143)):
        with chat(environment={"FAKE_LEAVE_WITHIN_S": "60", "FAKE_SAYS_CLOSED": "1"}) as terminal:
            terminal.send("frozen" + ENTER)
            terminal.wait_for("verifying")
            terminal.send(CTRL_C)
            terminal.wait_for("stopping ·")
            terminal.send(end) if end is CTRL_C else terminal.kill(end)
            assert terminal.exit_code() == code
            assert "engine closed" in terminal.screen
            assert b"Traceback" not in terminal.raw


def test_text_typed_during_an_answer_is_read_by_the_next_prompt(tmp_path):
    gate = tmp_path / "gate"
    with chat(environment={"FAKE_GATE": str(gate)}) as terminal:
        terminal.send("gated hello" + ENTER)
        terminal.wait_for("You said: ")
        terminal.send("next" + ENTER)
        gate.touch()
        terminal.wait_for("You said: next")
        assert terminal.screen.index("You said: gated hello\n") < terminal.screen.index("> next\n")


def test_thinking_is_folded_shown_and_hidden(tmp_path):
    gate = tmp_path / "gate"
    with chat(environment={"FAKE_GATE": str(gate)}) as terminal:
        terminal.send("gated think" + ENTER)
        terminal.wait_for("First this.\nThen")
        gate.touch()
        terminal.wait_for("So it is.")
        terminal.wait_for_prompt()
        assert "First this." not in terminal.scrollback
        assert re.search(r"^thought \d+ s, \d+ tok\nSo it is.", terminal.scrollback, re.MULTILINE)
        say(terminal, "/think show", r"First this.\nThen that.\n")
        say(terminal, "think", lambda t: t.screen.count("So it is.") == 2)
        assert terminal.screen.count("First this.\nThen that.\n") == 2
        say(terminal, "/think hide", "finished thinking will be hidden")
        say(terminal, "think", lambda t: t.screen.count("So it is.") == 3)
        assert terminal.screen.count("First this.") == 2


# --- commands ----------------------------------------------------------------------------------------------------


def test_commands_that_change_the_chat():
    with chat(rows=50) as terminal:
        say(terminal, "/retry", "no answer to retry")
        say(terminal, "one", "You said: one")
        say(terminal, "/retry", lambda t: t.screen.count("You said: one") == 2)
        assert "greedy decoding repeats the same answer" in terminal.screen
        terminal.send("/edit" + ENTER)
        terminal.wait_for(lambda t: t.cursor_line == "> one")
        say(terminal, " and more", "You said: one and more")
        say(terminal, "two", "You said: two")
        say(terminal, "/drop 3", "error: the chat has 2 turns to drop")
        say(terminal, "/drop 1", r"dropped 1 turn; \d+ of 400 tokens in use")
        say(terminal, "/drop", "usage: /drop N")
        terminal.send("/undo" + ENTER)
        terminal.wait_for(lambda t: "removed the last message" in t.screen and t.cursor_line == "> two")
        say(terminal, "!", "You said: two!")
        say(terminal, "/clear", "chat cleared")
        say(terminal, "/clear now", "/clear takes no argument")
        say(terminal, "/undo", "error: nothing to undo")


def test_cancelled_edit_does_not_replace_the_last_message():
    with chat() as terminal:
        say(terminal, "one", "You said: one")
        terminal.send("/edit" + ENTER)
        terminal.wait_for(lambda t: t.cursor_line == "> one")
        terminal.send(CTRL_C)
        terminal.wait_for_prompt()
        say(terminal, "two", "You said: two")
        say(terminal, "/drop 2", "dropped 2 turns")


def test_commands_about_settings(tmp_path):
    with chat(rows=60, environment={"SPECCHAT_STATE_DIR": str(tmp_path)}) as terminal:
        say(terminal, "/system", "system prompt: none")
        say(terminal, "/system Be brief.", "system prompt: Be brief.")
        say(terminal, "/system none", lambda t: t.screen.count("system prompt: none") == 2)
        say(terminal, "/set temperatur=1", "error: .*temperatur")
        say(terminal, "/set temperature=1", "temperature = 1")
        say(terminal, "/set", r"temperature +1 +/set")
        say(terminal, "/set parameter top_k 40", "top_k = 40")
        say(terminal, '/set system "Be kind."', "system = Be kind.")
        say(terminal, "/set stop=###", "stop = '###'")
        say(terminal, "/set overflow drop-oldest", "overflow = drop-oldest")
        say(terminal, "/set parameter num_ctx 4096", "hint: start the chat again with --ctx")
        say(terminal, "/think maybe", "/think takes on, off, show or hide")
        say(terminal, "/think", "thinking: model default, hidden")
        say(terminal, "/info", r"temperature +1 +/set")
        terminal.wait_for("0 of 400 tokens in use")
        say(terminal, "/stats", "no answers yet")
        say(terminal, "hello", "You said: hello")
        say(terminal, "/stats", r"1 answer · 16 tok")


def test_verbose_draws_the_tree():
    with chat("--verbose", rows=60) as terminal:
        say(terminal, "hi", "You said: hi")
        assert re.search(r"^step 1: 3 tok · tree 64 nodes, depth 5, 2 accepted", terminal.screen, re.MULTILINE)
        assert re.search(r'^ +1 ● "Y" +○ "Z"\n +2 ● "o" +○ "p"\n +→ "u"$', terminal.screen, re.MULTILINE)


def test_read_save_and_load(tmp_path):
    (tmp_path / "notes.txt").write_text("the notes\n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with chat(rows=60, columns=150) as terminal:
        say(terminal, f"/read {tmp_path}/notes.txt", r"attached notes.txt \(9 tokens\) to the next message")
        say(terminal, "what about it", r"You said: the notes\n\nwhat about it\n")
        say(terminal, f"/read {tmp_path}/binary", "is not UTF-8 text")
        say(terminal, f"/read {tmp_path}/missing", r"cannot read .*missing: No such file")
        say(terminal, f"/save {tmp_path}/chat.md", f"saved to {tmp_path}/chat.md")
        say(terminal, f"/save {tmp_path}/chat.jsonl", f"saved to {tmp_path}/chat.jsonl")
        say(terminal, f"/save {tmp_path}/chat.md", "already exists")
        say(terminal, "/clear", "chat cleared")
        say(terminal, f"/load {tmp_path}/chat.jsonl", "loaded 1 turn from")
        say(terminal, "/retry", lambda t: t.screen.count("You said: the notes") == 2)
        say(terminal, "/clear", lambda t: t.screen.count("chat cleared") == 2)
        say(terminal, f"/load {tmp_path}/chat.md", r"loaded 1 turn from .*chat.md")
        say(terminal, "/retry", lambda t: t.screen.count("You said: the notes") == 3)
        say(terminal, "/load nosuch", "no file and no saved chat is named 'nosuch'")
    assert "You said: the notes" in (tmp_path / "chat.md").read_text()


def test_copy_uses_a_program_or_the_terminal(tmp_path):
    tool = tmp_path / "wl-copy"
    tool.write_text(f'#!/bin/sh\ncat > "{tmp_path}/copied"\n')
    tool.chmod(0o700)
    plain = {"PATH": "/usr/bin:/bin", "WAYLAND_DISPLAY": "", "DISPLAY": "", "SSH_CONNECTION": "here"}
    with chat(environment=plain) as terminal:
        say(terminal, "/copy", "no answer to copy")
        say(terminal, "**this**", "You said: this")
        say(terminal, "/copy", "copied 18 characters through the terminal")
        assert b"\x1b]52;c;" + base64.b64encode(b"You said: **this**") + b"\x07" in terminal.raw
    desktop = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "WAYLAND_DISPLAY": "wayland-0"}
    with chat(environment=desktop) as terminal:
        say(terminal, "**this**", "You said: this")
        say(terminal, "/copy", "copied 18 characters with wl-copy")
    assert (tmp_path / "copied").read_text() == "You said: **this**"


def test_full_context_is_announced():
    advice = r"free space with /clear or /drop N, or restart with\s+a larger --ctx"
    with chat(rows=60) as terminal:
        say(terminal, "x" * 155, rf"warning: context nearly full: \d+ of 400 tokens; {advice}")
        terminal.send("x" * 155 + ENTER)
        terminal.wait_for(lambda t: re.search(rf"error: too long\nhint: {advice}", t.screen))
        terminal.wait_for(lambda t: t.cursor_line.endswith("xxx"))  # the message is back at the prompt
        assert terminal.screen.count("warning:") == 1
        terminal.send(CTRL_C)


def test_stopped_answer_is_continued(tmp_path):
    gate = tmp_path / "gate"
    with chat(environment={"FAKE_GATE": str(gate)}) as terminal:
        say(terminal, "/continue", "no answer to continue")
        terminal.send("gated hello" + ENTER)
        terminal.wait_for("You said")
        terminal.send(CTRL_C)
        terminal.wait_for("^C stopped")
        terminal.wait_for_prompt()
        gate.touch()
        say(terminal, "/continue", r"You said: gated hello\n")
        say(terminal, "/stats", r"\d+ answers? ·")
        terminal.send("/undo" + ENTER)
        terminal.wait_for(lambda t: "removed the last message" in t.screen and t.cursor_line == "> gated hello")


def test_continuing_a_whole_answer_says_that_nothing_follows():
    with chat() as terminal:
        say(terminal, "ended here", "You said: ended here\n")
        say(terminal, "/continue", "the model adds nothing: it ends its answer here")


@pytest.mark.parametrize("word", ["/exit", "/bye", "/quit"])
def test_exit_commands(word):
    with chat() as terminal:
        terminal.send(word + ENTER)
        assert terminal.exit_code() == 0
