"""How long one waits for specchat: until the chat's first prompt, for a plan, for a probe, for a first token.

    PYTHONPATH=.:tests python tests/benchmarks/start_up.py [ROUNDS]

Everything that can be remembered has been by then: a first round is not counted. Not a test: run it on a quiet machine.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time

from support.terminal import Terminal

COMMANDS = {
    "run demo --plan": ("run", "demo", "--plan"),
    "probe": ("probe",),
    "probe demo": ("probe", "demo"),
    "run demo, one token": ("run", "demo", "Hi", "--max-tokens", "1", "--no-save"),
}


def until_prompt(environment: dict[str, str]) -> tuple[float, float]:
    """Seconds to the first prompt, and to an answer's first token if a message is typed there at once."""
    begin = time.perf_counter()
    with Terminal("specchat", "run", "demo", "--no-save", "--max-tokens", "1", environment=environment) as terminal:
        terminal.wait_for(lambda t: t.cursor_line == ">", timeout_s=60)
        at_prompt = time.perf_counter() - begin
        terminal.send("Hi\r")
        terminal.wait_for("TTFT", timeout_s=60)
        return at_prompt, time.perf_counter() - begin


def until_end(arguments: tuple[str, ...]) -> float:
    """Seconds that a command takes."""
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-m", "specchat", *arguments], check=True, capture_output=True)
    return time.perf_counter() - begin


def main(rounds: int) -> None:
    figures: dict[str, list[float]] = {"run demo: prompt": [], "run demo: answered": [], **{n: [] for n in COMMANDS}}
    for number in range(-1, rounds):
        with tempfile.TemporaryDirectory() as state:
            seconds = [*until_prompt({"XDG_STATE_HOME": state}), *map(until_end, COMMANDS.values())]
        for name, taken in zip(figures, seconds, strict=True):
            figures[name] += [taken] if number >= 0 else []
    for name, taken in figures.items():
        print(f"{name:24} {statistics.median(taken):6.2f} s ({min(taken):.2f} to {max(taken):.2f})")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
