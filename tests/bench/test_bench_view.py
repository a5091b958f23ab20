"""The progress, tables and charts of a benchmark."""

import io
from types import SimpleNamespace

from specchat.bench.runner import Progress
from specchat.bench.tables import Table, _identity, headline, milliseconds, number, ratio, share, spread
from specchat.ui.bench_view import BenchLine, ReportView, chart_lines, progress_line
from specchat.ui.console import Talk


def test_progress_line_shows_work_and_times():
    line = progress_line(Progress(5, 24, 75.0, "specchat, math-1 turn 1, t=0"), 61.0)
    assert line == "bench: 5/24 · specchat, math-1 turn 1, t=0 · 1:01 · about 1:15 left"
    assert progress_line(Progress(0, 0, None, "loading demo"), 3.9, "ctx=512") == "bench: ctx=512 · loading demo · 0:03"


def test_off_a_terminal_progress_is_a_line_every_30_seconds(monkeypatch):
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr("specchat.ui.bench_view.time", SimpleNamespace(monotonic=lambda: clock.now))
    stream = io.StringIO()
    with BenchLine(Talk(stream)) as line:
        for done in range(50):
            line.update(Progress(done, 50, 1.0, "answering"))
            clock.now += 1.0
    assert stream.getvalue().splitlines() == [
        f"bench: {done}/50 · answering · 0:{done:02} · about 0:01 left" for done in (0, 30)
    ]


def test_quiet_progress_says_nothing():
    stream = io.StringIO()
    with BenchLine(Talk(stream, quiet=True)) as line:
        line.update(Progress(1, 2, None, "answering"))
    assert stream.getvalue() == ""


def test_tables_are_plain_text_off_a_terminal():
    stream = io.StringIO()
    ReportView(stream).table(Table("title", ("name", "x"), (("row\x1b[31m", "1"),), "a note"))
    text = stream.getvalue()
    assert "\x1b" not in text
    for words in ("title", "name", "row", "a note"):
        assert words in text


def test_bars_are_proportional_to_speeds():
    sweep = {
        "option": "ctx",
        "points": [
            {"value": value, "summary": {"tok_per_s": {"mean": speed, "sd": None}}}
            for value, speed in (("512", 4.0), ("1024", 8.0), ("2048", None))
        ],
    }
    title, *bars = chart_lines(sweep)
    assert title == "tok/s by ctx"
    assert [bar.count("█") for bar in bars] == [25, 50, 0]
    assert bars[0].startswith("   512 █")


def test_numbers_have_three_digits():
    assert [number(x) for x in (0, 0.00123, 0.0456, 1.5, 12.34, 1234.5, None)] == [
        "0",
        "0.0012",
        "0.046",
        "1.50",
        "12.3",
        "1,234",
        "",
    ]
    assert spread({"mean": 2.0, "sd": 0.5}) == "2.00 ± 0.500"
    assert spread({"mean": None, "sd": None}) == ""
    assert ratio({"ratio": 2.0, "low": 1.5, "high": 2.5}) == "2.00x [1.50, 2.50]"
    assert ratio(None) == ""
    assert (share(0.953), share(0.0123), share(None)) == ("95%", "1.2%", "")
    assert milliseconds(0.0123) == "12.3 ms"


def report_of(streamed=4, baselines=(), speedup=None, rate=7.43):
    return {
        "model": "org/name",
        "plan": {"streamed_layers": streamed},
        "summary": {"tok_per_s": {"mean": rate}},
        "baselines": [{"name": name, "identical_output": same} for name, same in baselines],
        "speedup": speedup or {},
        "sweep": None,
    }


def test_the_headline_is_one_sentence():
    assert headline(report_of()) == "org/name writes about 7.4 tokens per second."
    assert headline(report_of(rate=None)) == "org/name writes no text that counts."
    plain = headline(report_of(baselines=[("plain", True)], speedup={"plain": {"ratio": 4.12}}))
    assert plain == (
        "org/name writes about 7.4 tokens per second, 4.1 times as fast as without a draft, with the same text."
    )
    other = headline(report_of(baselines=[("assisted", False)]))
    assert other == "org/name writes about 7.4 tokens per second, with ANOTHER text."
    resident = headline(report_of(streamed=0, baselines=[("plain", True)]))
    assert "Every layer was in memory; to measure one that streams: specchat bench shape:" in resident


def test_only_other_programs_are_said_to_sample_with_their_own_numbers():
    def note(*names: str) -> str:
        baselines = [
            {
                "name": name,
                "identical_output": True,
                "compared_answers": 1,
                "compared_tokens": 8,
                "first_difference": None,
            }
            for name in names
        ]
        return _identity({"baselines": baselines}).note

    assert note("plain") == note("plain", "layers") == ""
    assert note("layers", "accelerate").startswith("accelerate samples with its own random numbers")
    assert note("plain", "accelerate").startswith("accelerate samples with its own random numbers")
    assert note("accelerate", "llama.cpp").startswith("accelerate and llama.cpp sample with their own random numbers")
