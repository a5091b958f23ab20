"""Durations and time limits come from clocks that never jump; the wall clock only dates what people read."""

import re
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "specchat"
# Where the time of the day is meant.
DATES = {
    "chat/transcript.py": "names and lines of saved chats",
    "cli/bench.py": "date of a report",
    "cli/bench_batch.py": "date of a report",
    "cli/serve.py": "created, in the protocol",
    "files.py": "when a file was changed",
    "hardware/probe.py": "date of a measurement",
    "serve/objects.py": "created, in the protocol",
}
WALL = re.compile(
    r"\btime\.(?:time|time_ns|localtime|gmtime|ctime)\b|\b(?:datetime|date)\.(?:now|utcnow|today|fromtimestamp)\b"
    r"|from time import|import time as|CLOCK_REALTIME"
)


def test_only_dates_are_read_from_the_wall_clock():
    found = {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py") if WALL.search(path.read_text())}
    assert found == DATES.keys()
