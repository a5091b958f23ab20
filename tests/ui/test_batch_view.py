"""The lines of a job on stderr."""

from __future__ import annotations

import pytest

from specchat.batch.job import Progress
from specchat.ui.batch_view import duration, progress_text, summary_text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0, "0 s"), (0.4, "0.4 s"), (42, "42 s"), (59.7, "1 min 0 s"), (185, "3 min 5 s"), (7800, "2 h 10 min")],
)
def test_durations(seconds: float, text: str):
    assert duration(seconds) == text


def test_progress_names_what_is_done_and_left():
    progress = Progress(
        num_done=30, num_lines=1000, num_failed=0, num_alive=10, num_tokens=900, seconds=10.0, num_answered=20
    )
    assert progress_text(progress) == "30 of 1,000 done · 90.0 tok/s · 10 at once · 8 min 5 s left"
    assert summary_text(progress) == "30 of 1,000 done · 900 tokens in 10 s · 90.0 tok/s"
    begun = Progress(num_done=2, num_lines=5, num_failed=2, num_alive=3, num_tokens=0, seconds=0.0, num_answered=0)
    assert progress_text(begun) == "2 of 5 done · 2 failed · 0.0 tok/s · 3 at once"
