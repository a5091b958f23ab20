"""The lines of the interface, and neutralized control characters."""

import io
from dataclasses import replace
from pathlib import Path

import pytest
from support.fake_engine import CHOSEN, MEMORY, PLAN
from support.plans import changed

from specchat.chat.answer import Speculation, Timings, Turn, Usage
from specchat.chat.state import Exchange
from specchat.records.chat import Message, Setting
from specchat.records.generation import Step
from specchat.records.model import ModelSource
from specchat.records.plan import LedgerItem
from specchat.ui.chat_view import (
    banner_lines,
    info_lines,
    plan_line,
    plan_lines,
    recalled_lines,
    stats_line,
    step_line,
    stopped_line,
)
from specchat.ui.commands import COMMANDS, help_lines
from specchat.ui.console import AnswerStream, Talk, neutral
from specchat.ui.plan_view import plan_text
from specchat.ui.rows import figures

GIB = 1 << 30
GPU_PLAN = changed(
    PLAN,
    device="cuda:0",
    ctx=8192,
    ledger=(
        LedgerItem("resident layers", 5 * GIB),
        LedgerItem("slots", GIB // 2),
        LedgerItem("embeddings and head", GIB),
        LedgerItem("KV cache", GIB),
        LedgerItem("draft", GIB),
        LedgerItem("draft KV cache", GIB // 2),
        LedgerItem("workspace", GIB // 2),
    ),
    vram_bytes=12 * GIB,
    streamed_bytes_per_step=38 * GIB,
)
TURN = Turn(
    message=Message("assistant", "x"),
    token_ids=(1,) * 212,
    finish_reason="stop",
    usage=Usage(1942, 1904, 212),
    timings=Timings(3.0, 2.3, 26.3, 1.0, 20.0, 5.0, 7.4),
    speculation=Speculation(15, 0, 14.1, 13.1, 500.0, 512),
    memory=replace(MEMORY, device_peak_bytes=int(9.9 * GIB), host_peak_bytes=42 * GIB),
)


def test_plan_line():
    assert plan_line(GPU_PLAN) == (
        "VRAM 9.5/12.0 GiB (resident 6.0, draft 1.0, KV 1.5 @8192, work 1.0) · streamed 38.0 GiB/pass"
    )
    apart = [replace(item, item="head") if item.item == "embeddings and head" else item for item in GPU_PLAN.ledger]
    assert plan_line(changed(GPU_PLAN, ledger=tuple(apart))) == plan_line(GPU_PLAN)
    small = plan_line(changed(PLAN, resident=(0, 1, 2, 3)))
    assert small == "RAM 150.0 MiB of 12.0 GiB (resident 100.0, KV 50.0 @400) · nothing streamed"


def test_stats_line():
    assert stats_line(TURN, GPU_PLAN) == (
        "212 tok · 7.4 tok/s · 14.1 tok/pass · TTFT 2.3 s · prompt 38 new + 1,904 cached tok · "
        "context 2,154/8,192 tok · VRAM 9.9 GiB · RAM 42.0 GiB"
    )
    assert stats_line(TURN, PLAN).endswith("· RAM 9.9 GiB")
    assert stopped_line(TURN) == "^C stopped · 212 tok · 7.4 tok/s"


def test_of_a_long_exchange_the_ends_are_recalled():
    exchange = Exchange("a\nb\nc\nd", Message("assistant", "\n".join(f"line {i}" for i in range(20))))
    lines = recalled_lines(exchange)
    assert lines[:7] == ["> a", "  b", "  c", "  …", "", "…", "line 8"]
    assert lines[-1] == "line 19"
    assert recalled_lines(Exchange("q", Message("assistant", "a"))) == ["> q", "", "a"]


def test_banner_names_the_model_and_the_draft():
    label = "a toy model for exercising the software"
    toy = banner_lines(ModelSource("demo", Path("x"), label=label), CHOSEN, "", "/info")[0]
    assert "demo (a toy model for exercising the software) · draft demo draft · fp32 on cpu" in toy
    streamed = banner_lines(ModelSource("org/x", Path("x")), CHOSEN, "", "/info")[1]
    assert streamed == (
        "2 of 4 layers in RAM (150 MiB) · 60.0 MiB streamed per pass · context 400 · about 6.0 tok/s (details: /info)"
    )
    resident = replace(CHOSEN, plan=changed(PLAN, resident=(0, 1, 2, 3)))
    second = banner_lines(ModelSource("org/x", Path("x")), resident, "", "--plan")[1]
    assert second == "all in RAM (150 MiB) · context 400 · about 6.0 tok/s (details: --plan)"
    without = replace(CHOSEN, plan=changed(PLAN, draft=None))
    plain = banner_lines(ModelSource("org/x", Path("x")), without, "plain decoding", "/info")[0]
    assert "org/x · plain decoding · fp32 on cpu" in plain


def test_step_line_and_plan_text():
    step = Step((1, 2, 3), None, 1, 20, 64, 2, 7, 0.5, 0.1, 0.3, 0.1, 0.05, 60 << 20)
    assert step_line(4, step).startswith(
        "step 4: 3 tok · tree 64 nodes, depth 7, 2 accepted · 0.500 s · draft 0.100 s, "
    )
    plain = replace(step, tree_nodes=0, draft_s=0.0, stream_wait_s=0.0, streamed_bytes=0)
    assert step_line(4, plain, text='a "b"\n').startswith(
        'step 4: 3 tok "a \\"b\\"\\n" · no draft tree · 0.500 s · verify 0.300 s · 1 new'
    )
    assert step_line(4, step).endswith("1 new + 20 cached rows · sample 0.100 s")
    assert step_line(4, step, 70) == "step 4: 3 tok · tree 64 nodes, depth 7, 2 accepted · 0.500 s"
    source = ModelSource("demo", Path("x"), label="a toy model for exercising the software")
    table = plan_text(source, replace(CHOSEN, plan=GPU_PLAN), "", 80)
    assert "a toy model" in table
    assert "9.5 GiB of 12.0 GiB" in table


@pytest.mark.parametrize(
    ("in_ram", "place"),
    [((), "disk"), ((3,), "host memory (layers: 1) and disk"), ((1, 3), "host memory")],
)
def test_plan_names_the_places_of_streamed_layers(in_ram, place):
    table = plan_text(ModelSource("demo", Path("x")), replace(CHOSEN, plan=changed(PLAN, in_ram=in_ram)), "", 80)
    assert f"60.0 MiB per pass, from {place}\n" in table


@pytest.mark.parametrize("width", [40, 80, 200])
def test_plan_fits_any_width_and_is_complete(width):
    """The plan shows every choice, its reason and its alternative within the width."""
    text = plan_text(ModelSource("an-organisation/a-model-with-quite-a-long-name", Path("x")), CHOSEN, "", width)
    assert all(len(line) <= width for line in text.splitlines())
    words = " ".join(text.split())
    for choice in CHOSEN.choices:
        assert choice.option in words and choice.value in words and choice.why in words
    assert "int8: 9.0 tok/s" in words and "about 6.0 tok/s: 12.0 tokens per pass of 2.0 s" in words
    assert "rates measured on this machine" in words


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b[31mb", "a␛[31mb"),
        ("\x07\x08\x00\x7f", "␇␈␀␡"),
        ("\x9b2J\x85", "\ufffd2J\ufffd"),
        ("one\r\ntwo\rthree\ttab\n", "one\ntwothree\ttab\n"),
        ("日本🦊é", "日本🦊é"),
    ],
)
def test_control_characters_are_made_visible(text, shown):
    assert neutral(text) == shown


class Pipe(io.TextIOWrapper):
    """A pipe, or a terminal, with a given encoding."""

    def __init__(self, encoding="utf-8", terminal=False):
        super().__init__(io.BytesIO(), encoding=encoding)
        self._terminal = terminal

    def isatty(self):
        return self._terminal

    def written(self):
        self.flush()
        return self.buffer.getvalue()


def test_answer_is_exact_in_a_pipe_and_safe_on_a_terminal():
    pipe = Pipe("ascii")
    stream = AnswerStream(pipe)
    stream.write("é\x1b\r\n")
    stream.end_line()
    assert pipe.written() == "é\x1b\r\n".encode()
    terminal = Pipe("latin-1", terminal=True)
    stream = AnswerStream(terminal)
    stream.write("é日\x1b")
    stream.end_line()
    assert terminal.written() == b"\xe9??\n"


@pytest.mark.parametrize(
    ("terminal", "environment", "styled"),
    [
        (True, {}, True),
        (False, {}, False),
        (False, {"FORCE_COLOR": "1"}, False),
        (True, {"NO_COLOR": "1"}, False),
        (True, {"NO_COLOR": ""}, True),
        (True, {"TERM": "dumb"}, False),
    ],
)
def test_styles_only_on_capable_terminals(monkeypatch, terminal, environment, styled):
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    stream = Pipe(terminal=terminal)
    Talk(stream).error("no [bold]markup[/] \x1b[31m", "none")
    written = stream.written().decode()
    assert ("\x1b[" in written) == styled
    assert "no [bold]markup[/] ␛[31m" in written
    assert written.count("\n") == 2


def test_quiet_silences_notices_but_not_errors_and_command_output():
    stream = Pipe()
    talk = Talk(stream, quiet=True)
    talk.say("a")
    talk.warn("b")
    talk.tell("c")
    talk.error("d\ne", None)
    assert stream.written() == b"c\nerror: d e\n"


@pytest.mark.parametrize("width", [40, 80, 120])
def test_help_and_settings_fit_any_width_and_are_complete(width):
    """No line is wider than the terminal, so none is broken inside a word."""
    settings = [
        Setting("repetition_penalty", "1.1", "the model's generation_config.json"),
        Setting("seed", "7", "/set"),
    ]
    for lines, words in (
        (help_lines(width), [text for command in COMMANDS for text in (command.usage, command.help)]),
        (info_lines(settings, width), ["repetition_penalty", "1.1", "generation_config.json", "seed", "7", "/set"]),
        (plan_lines(GPU_PLAN, width), plan_line(GPU_PLAN).split()),
    ):
        assert all(len(line) < width for line in lines)
        flat = " ".join(" ".join(lines).split())
        assert all(word in flat for word in words)


def test_figures_break_between_each_other():
    line = stats_line(TURN, GPU_PLAN)
    assert figures(line, None) == figures(line, 300) == [line]
    for width in (40, 60, 100):
        lines = figures(line, width)
        assert all(len(each) < width for each in lines)
        assert " ".join(lines) == line
        assert all(each.endswith(" ·") for each in lines[:-1])
