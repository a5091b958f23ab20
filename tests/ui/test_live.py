"""The live region: final and live rows on the screen after any sequence of updates."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.screen import ScreenStream

from specchat.ui.live import LiveRegion, Row, can_redraw, reflows

COLUMNS, ROWS = 20, 6


@pytest.fixture(autouse=True, scope="module")
def _size():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", str(COLUMNS))
        patch.setenv("LINES", str(ROWS))
        yield


def rows_of(texts):
    return [Row.plain(text) for text in texts]


LINE = st.text("abcdé日本 ", max_size=COLUMNS // 2)
FRAMES = st.lists(st.tuples(st.lists(LINE, max_size=ROWS + 3), st.lists(LINE, max_size=4)), max_size=8)


@given(FRAMES)
def test_final_rows_come_before_live_rows(frames):
    stream = ScreenStream(COLUMNS, ROWS)
    region = LiveRegion(stream)
    final, live = [], []
    for live, more in frames:
        final += more
        region.update(rows_of(live), more)
        shown = "\n".join([*final, *live[-(ROWS - 1) :]]).rstrip()
        got = "\n".join(stream.lines).replace("日 ", "日").replace("本 ", "本")  # pyte pads wide characters
        assert [line.rstrip() for line in got.split("\n")] == [
            line.rstrip().replace("日 ", "日").replace("本 ", "本") for line in shown.split("\n")
        ]
    region.clear()
    assert len([line for line in stream.lines if line]) == len([line for line in final if line.strip()])


def test_only_changed_rows_are_written():
    stream = ScreenStream(COLUMNS, ROWS)
    region = LiveRegion(stream)
    region.update(rows_of(["one", "two", "three"]))
    written = len(stream.written)
    region.update(rows_of(["one", "two", "three"]))
    assert len(stream.written) == written
    region.update(rows_of(["one", "two", "four"]))
    assert "two" not in stream.written[written:]
    assert stream.lines == ["one", "two", "four"]


def test_live_rows_are_cut_and_final_rows_wrap():
    stream = ScreenStream(COLUMNS, ROWS)
    region = LiveRegion(stream)
    region.update(rows_of(["x" * 50, "y"]))
    region.update(rows_of(["z", "y"]), ["w" * 30])  # final rows wrap
    assert stream.lines == ["w" * 20, "w" * 10, "z", "y"]


class Reflowing(ScreenStream):
    """A terminal that re-wraps its rows when it becomes narrower."""

    def narrow(self, columns):
        lines = self.lines
        self.screen.resize(ROWS, columns)
        self.screen.reset()
        wrapped = [line[i : i + columns] for line in lines for i in range(0, max(len(line), 1), columns)]
        self.write("\n".join(wrapped))


@pytest.mark.parametrize("narrower", [10, 7])
def test_narrowing_a_terminal_that_rewraps(monkeypatch, narrower):
    monkeypatch.setenv("VTE_VERSION", "7600")
    stream = Reflowing(COLUMNS, ROWS)
    region = LiveRegion(stream)
    region.update(rows_of(["a" * 18, "b" * 12]), ["kept"])
    stream.narrow(narrower)
    monkeypatch.setenv("COLUMNS", str(narrower))
    region.update(rows_of(["c"]))
    assert stream.lines == ["kept", "c"]


def test_narrowing_a_terminal_that_does_not_rewrap(monkeypatch):
    for name in ("VTE_VERSION", "TMUX", "KITTY_WINDOW_ID", "KONSOLE_VERSION", "WEZTERM_PANE", "WT_SESSION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("TERM_PROGRAM", raising=False)
    stream = ScreenStream(COLUMNS, ROWS)
    region = LiveRegion(stream)
    region.update(rows_of(["a" * 18, "b" * 12]), ["kept"])
    stream.screen.resize(ROWS, 10)
    monkeypatch.setenv("COLUMNS", "10")
    region.update(rows_of(["c"]))
    assert stream.lines == ["kept", "c"]


def test_terminals_known_to_rewrap():
    assert reflows({"TERM_PROGRAM": "iTerm.app"})
    assert reflows({"TMUX": "/tmp/x"})
    assert not reflows({"TERM_PROGRAM": "xterm"})


@pytest.mark.parametrize(("term", "can"), [("xterm-256color", True), ("dumb", False), ("", False), (None, False)])
def test_terminals_that_can_redraw(monkeypatch, term, can):
    monkeypatch.delenv("TERM", raising=False)
    if term is not None:
        monkeypatch.setenv("TERM", term)
    assert can_redraw(ScreenStream()) == can
