"""The destination of answer, thinking and status line, for every kind of stdout and stderr."""

import io
import os
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.screen import ScreenStream

from specchat.ui import answer_view
from specchat.ui.answer_view import AnswerView
from specchat.ui.console import AnswerStream, Talk

PIECES = [
    "Some **bold** text, ",
    "longer than a line of this terminal.\n\n",
    "- an item\n",
    "```\ncode\n",
    "```\n",
    "\x1b[2J",
]


@pytest.fixture(autouse=True, scope="module")
def _terminal():
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"COLUMNS": "40", "LINES": "12", "TERM": "xterm-256color"}.items():
            patch.setenv(name, value)
        patch.delenv("NO_COLOR", raising=False)
        patch.setattr(answer_view, "_REDRAW_S", 0.0)
        patch.setattr(answer_view, "_SHARE_OF_TIME", 1e9)  # removes the limit on redraws
        patch.setattr(answer_view, "_TICK_S", 0.0)
        yield


def view_of(out, talk, **settings):
    settings = {"raw": False, "folds_thinking": True, **settings}
    return AnswerView(AnswerStream(out), Talk(talk), status=lambda _: "the status", **settings)


@pytest.fixture
def pipe():
    """Yield both ends of a pipe; reading does not block."""
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    with os.fdopen(writing, "w") as out, os.fdopen(reading, "rb") as end:
        yield out, end


def test_pipe_gets_exact_text_and_the_status_line_is_removed(pipe):
    out, end = pipe
    screen = ScreenStream()
    view = view_of(out, screen)
    view.draw()
    assert screen.lines == ["the status"]
    view.write("a\x1b[31m **b**")
    view.draw()
    view.write("\r\nc")
    view.end()
    assert end.read() == b"a\x1b[31m **b**\r\nc\n"
    assert screen.lines == [""]


def test_status_line_stays_if_stdout_is_a_file(tmp_path):
    screen = ScreenStream()
    with (tmp_path / "answer").open("w") as out:
        view = view_of(out, screen)
        view.write("text")
        view.draw()
        assert screen.lines == ["the status"]
        view.end()
    assert (tmp_path / "answer").read_bytes() == b"text\n"
    assert screen.lines == [""]


def test_thinking_streams_to_stderr_without_a_terminal(pipe):
    out, end = pipe
    talk = io.StringIO()
    view = view_of(out, talk)
    view.think("first ")
    assert talk.getvalue() == "first "
    view.think("then\x1b[1m")
    view.end_thinking("thought 1 s, 2 tok")
    view.write("so")
    view.end()
    assert talk.getvalue() == "first then␛[1m\nthought 1 s, 2 tok\n"
    assert end.read() == b"so\n"


def test_json_output_is_not_overwritten():
    screen = ScreenStream()
    view = view_of(screen, screen, owns_text=False)
    view.draw()
    view.elsewhere(lambda: screen.write('{"a":1}\n'))
    view.draw()
    view.end()
    assert screen.lines == ['{"a":1}']
    assert "\x1b" not in screen.written


def test_dumb_terminal_gets_appended_text(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    screen = ScreenStream()
    view = view_of(screen, screen)
    for piece in ("one **t", "wo**\n", "\x1b[2Jthree"):
        view.write(piece)
        view.draw()
    view.end()
    assert screen.written == "one **two**\n␛[2Jthree\n"


def test_only_the_end_of_thinking_is_shown():
    screen = ScreenStream()
    view = view_of(screen, screen)
    view.think("\n".join(f"thought {i}" for i in range(20)))
    view.draw()
    assert screen.lines == [*(f"thought {i}" for i in range(14, 20)), "the status"]
    view.end_thinking("thought 3 s, 20 tok")
    view.write("so")
    view.draw()
    assert screen.lines == ["thought 3 s, 20 tok", "so", "the status"]


@given(st.lists(st.tuples(st.sampled_from(PIECES), st.booleans()), max_size=12))
def test_final_screen_does_not_depend_on_redraws(pieces):
    screen, at_once = ScreenStream(), ScreenStream()
    view = view_of(screen, screen)
    for piece, drawn in pieces:
        view.write(piece)
        if drawn:
            view.draw()
            assert screen.lines[-1] == "the status"
    view.end()
    whole = view_of(at_once, at_once)
    whole.write("".join(piece for piece, _ in pieces))
    whole.end()
    assert screen.lines == at_once.lines
    assert "the status" not in "\n".join(screen.lines)
    # only these sequences were sent: styles, cursor up and right, erase below, wrapping on and off, frames
    assert not re.sub(r"\x1b\[(?:[0-9;]*m|\d+[AC]|J|\?7[lh]|\?2026[hl])", "", screen.written).count("\x1b")


def test_figures_of_passes_have_lines_of_their_own_in_a_log(tmp_path):
    """After `2>&1`, answer and figures meet in one file; a file of the answer alone keeps its exact bytes."""
    for both, expected in ((True, "Hel\nstep 1\nlo"), (False, "Hello")):
        log, other = tmp_path / "log", tmp_path / "other"
        with log.open("a") as out, (log if both else other).open("a") as err:
            view = view_of(out, err, raw=True)
            view.write("Hel")
            view.interlude(lambda err=err: print("step 1", file=err, flush=True))
            view.write("lo")
            view.end()
        assert log.read_text().rstrip("\n") == expected
        log.unlink()
