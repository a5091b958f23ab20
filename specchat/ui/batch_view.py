"""What a job tells on stderr: one line while it runs, one line at the end."""

import time

from specchat.batch.job import Progress
from specchat.ui.console import Talk

_REDRAW_S = 0.2


def progress_text(progress: Progress) -> str:
    """Return the line that is shown while the job runs."""
    parts = [
        f"{progress.num_done:,} of {progress.num_lines:,} done",
        f"{progress.tok_per_s:.1f} tok/s",
        f"{progress.num_alive} at once",
    ]
    if progress.num_failed:
        parts.insert(1, f"{progress.num_failed:,} failed")
    if progress.seconds_left is not None:
        parts.append(f"{duration(progress.seconds_left)} left")
    return " · ".join(parts)


def summary_text(progress: Progress) -> str:
    """Return the line that is shown at the end."""
    text = f"{progress.num_done:,} of {progress.num_lines:,} done"
    return f"{text} · {progress.num_tokens:,} tokens in {duration(progress.seconds)} · {progress.tok_per_s:.1f} tok/s"


def duration(seconds: float) -> str:
    """Return a duration for people to read, such as `0.4 s`, `42 s`, `3 min 5 s` or `2 h 10 min`."""
    if 0.05 <= seconds < 1:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


class BatchView:
    """The progress line of a job, which is redrawn in place on terminals and silent elsewhere.

    Args:
        talk: stderr.
    """

    def __init__(self, talk: Talk) -> None:
        self._talk = talk
        self._drawn_at = float("-inf")

    def show(self, progress: Progress) -> None:
        """Show the progress, at most a few times a second."""
        if progress.warning is not None:
            self.clear()
            self._talk.warn(progress.warning)
        now = time.monotonic()
        if now - self._drawn_at >= _REDRAW_S:
            self._drawn_at = now
            self._talk.overwrite(progress_text(progress))

    def clear(self) -> None:
        """Remove the line."""
        self._talk.overwrite("")
