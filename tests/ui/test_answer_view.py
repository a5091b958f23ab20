"""Where an answer, its thinking and the status line go, for every kind of stdout and stderr."""

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
        patch.setattr(answer_view, "_SHARE_OF_TIME", 1e9)  # draws whenever it is asked to
        patch.setattr(answer_view, "_TICK_S", 0.0)
        yield


def view_of(out, talk, **settings):
    settings = {"raw": False, "folds_thinking": True, **settings}
    return AnswerView(AnswerStream(out), Talk(talk), status=lambda _: "the status", **settings)


@pytest.fixture
def pipe():
    """Both ends of a pipe; what was written so far can be read."""
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    with os.fdopen(writing, "w") as out, os.fdopen(reading, "rb") as end:
        yield out, end


def test_in_a_pipe_the_text_is_exact_and_the_status_ends_where_it_begins(pipe):
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


def test_beside_a_file_the_status_goes_on(tmp_path):
    screen = ScreenStream()
    with (tmp_path / "answer").open("w") as out:
        view = view_of(out, screen)
        view.write("text")
        view.draw()
        assert screen.lines == ["the status"]
        view.end()
    assert (tmp_path / "answer").read_bytes() == b"text\n"
    assert screen.lines == [""]


def test_without_a_terminal_thinking_goes_to_stderr_as_it_comes(pipe):
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


def test_what_json_prints_is_not_drawn_over():
    screen = ScreenStream()
    view = view_of(screen, screen, owns_text=False)
    view.draw()
    view.elsewhere(lambda: screen.write('{"a":1}\n'))
    view.draw()
    view.end()
    assert screen.lines == ['{"a":1}']
    assert "\x1b" not in screen.written


def test_on_a_dumb_terminal_the_text_runs_on(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    screen = ScreenStream()
    view = view_of(screen, screen)
    for piece in ("one **t", "wo**\n", "\x1b[2Jthree"):
        view.write(piece)
        view.draw()
    view.end()
    assert screen.written == "one **two**\n␛[2Jthree\n"


def test_the_thinking_shown_is_only_its_end():
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
def test_however_it_is_drawn_the_screen_ends_up_the_same(pieces):
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
    # styles, moves up and right, erasing below, wrapping off and on, frames: nothing else was ever sent
    assert not re.sub(r"\x1b\[(?:[0-9;]*m|\d+[AC]|J|\?7[lh]|\?2026[hl])", "", screen.written).count("\x1b")
