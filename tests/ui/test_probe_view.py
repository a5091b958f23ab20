"""The hardware report on wide and narrow screens."""

from __future__ import annotations

import io
import time
from dataclasses import replace

import pytest
from support.machines import MEASURED, hardware

from specchat.hardware.machine import GpuSurvey
from specchat.hardware.probe import Report
from specchat.hardware.verdicts import Verdict, judge
from specchat.ui import probe_view
from specchat.ui.probe_view import ProbeView, bar

HARDWARE = hardware(GpuSurvey())
REPORT = Report(HARDWARE, MEASURED, judge(HARDWARE, MEASURED, {}))


@pytest.mark.parametrize("width", [40, 80])
def test_report_fits_the_width_and_keeps_every_word(width, monkeypatch):
    monkeypatch.setattr(probe_view, "_WIDTH_OFF_TERMINAL", width)
    stream = io.StringIO()
    ProbeView(stream).report(REPORT, REPORT.verdicts, None)
    lines = stream.getvalue().splitlines()
    assert all(len(line) <= width for line in lines)
    words = " ".join(lines).split()
    for verdict in REPORT.verdicts:
        assert all(
            word in words for word in f"{verdict.level} {verdict.topic} {verdict.text} {verdict.hint or ''}".split()
        )


@pytest.mark.parametrize(
    ("share", "drawn"), [(0, "····"), (1, "████"), (0.5, "██··"), (0.03125, "▏···"), (2, "████"), (-1, "····")]
)
def test_bar_has_a_fixed_width(share, drawn):
    assert bar(share, 4) == drawn


@pytest.mark.parametrize(
    ("measured_at", "shown"),
    [("2026-03-01T12:00:00+00:00", "measured 2026-03-01 12:00;"), ("long ago", "measured long ago;")],
)
def test_the_time_of_the_rates_is_local_and_short(measured_at, shown, monkeypatch):
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    stream = io.StringIO()
    report = replace(REPORT, measured=replace(MEASURED, measured_at=measured_at))
    ProbeView(stream).report(report, REPORT.verdicts, None)
    assert shown in stream.getvalue()


def test_control_characters_are_made_visible():
    stream = io.StringIO()
    ProbeView(stream).report(REPORT, [Verdict("warn", "GPU", "a\x1b[31mb", "c\rd")], None)
    assert "\x1b" not in stream.getvalue() and "\r" not in stream.getvalue()
