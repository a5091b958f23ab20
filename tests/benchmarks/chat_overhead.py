"""What the screen costs: idle CPU at the prompt, and tok/s with everything shown, with --quiet and without a screen.

    PYTHONPATH=. python tests/benchmarks/chat_overhead.py [MODEL OPTION ...]

An answer is written in each way in turn, in one process on a pty whose other end is only emptied; ratios are of answers
next to each other. Not a test: run it on a quiet machine.
"""

from __future__ import annotations

import json
import os
import pty
import statistics
import subprocess
import sys
import tempfile
import termios
import threading
import time
from pathlib import Path

ROUNDS, MAX_TOKENS, IDLE_S, LOADING_S = 7, 60, 20, 15
DEFAULT = ("demo", "--vram", "40MiB", "--ctx", "512")
WAYS = ("shown", "quiet", "none")


def on_pty(command: list[str], environment: dict[str, str]) -> tuple[subprocess.Popen, list[bytes]]:
    """Starts a program on a terminal that shows nothing; what it wrote is collected."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (30, 100))
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env=os.environ | environment, start_new_session=True
    )
    os.close(theirs)
    written: list[bytes] = []

    def empty() -> None:
        try:
            while data := os.read(ours, 65536):
                written.append(data)
        except OSError:
            pass

    threading.Thread(target=empty, daemon=True).start()
    return process, written


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def idle_share(model: tuple[str, ...]) -> float:
    """CPU time over wall time at an empty prompt, with the model loaded."""
    process, written = on_pty(
        [sys.executable, "-m", "specchat", "run", *model, "--no-save"], {"TERM": "xterm-256color"}
    )
    while b"type /help for commands" not in b"".join(written):
        time.sleep(0.1)
    time.sleep(LOADING_S)
    before, begin = cpu_s(process.pid), time.monotonic()
    time.sleep(IDLE_S)
    share = (cpu_s(process.pid) - before) / (time.monotonic() - begin)
    process.kill()
    process.wait()
    return share


def answers(report: Path) -> None:
    """In the child: writes the answers, and what they took to a file."""
    from specchat.chat.answer import Turn
    from specchat.cli import run
    from specchat.cli.app import main
    from specchat.ui.chat_view import ChatView
    from specchat.ui.console import answer_stream, talk
    from specchat.ui.progress import TalkReporter

    def measure(parts, _view) -> int:
        session = parts.load(TalkReporter(talk()))
        results = []
        for number in range(len(WAYS) * (ROUNDS + 1)):
            # each way is first as often as last
            way = WAYS[(number + number // len(WAYS)) % len(WAYS)]
            session.clear()
            cancel = threading.Event()
            records = session.ask(f"Tell me story number {number // len(WAYS)}.", cancel)
            if way == "none":
                turn = next(record for record in records if isinstance(record, Turn))
                for _ in records:
                    pass
            else:
                turn = ChatView(answer_stream(), talk(quiet=way == "quiet")).follow(session, records, cancel)
            if number >= len(WAYS):  # the first round warms up
                step_s = (turn.timings.ttft_s + turn.timings.decode_s) / turn.speculation.steps
                results.append((number // len(WAYS), way, turn.timings.tok_per_s, step_s))
        session.engine.close()
        report.write_text(json.dumps(results))
        return 0

    run._interactive = measure
    main()


def overhead(model: tuple[str, ...]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, __file__, "run", *model, "--no-save", "--max-tokens", str(MAX_TOKENS)]
        process, written = on_pty(command, {"TERM": "xterm-256color", "CHAT_OVERHEAD_REPORT": str(report)})
        if process.wait() != 0 or not report.exists():
            sys.exit(b"".join(written).decode())
        results = json.loads(report.read_text())
    rates = {(number, way): rate for number, way, rate, _ in results}
    numbers = sorted({number for number, *_ in results})
    print(f"steps of {statistics.median(step_s for *_, step_s in results) * 1e3:.1f} ms (median)")
    for way in WAYS:
        print(f"{way:<6} {statistics.median(rates[n, way] for n in numbers):.2f} tok/s (median of {len(numbers)})")
    for a, b in (("shown", "quiet"), ("shown", "none"), ("quiet", "none")):
        ratios = [rates[n, a] / rates[n, b] for n in numbers]
        shown = " ".join(f"{ratio:.3f}" for ratio in ratios)
        print(f"{a} / {b}: median {statistics.median(ratios):.4f}, mean {statistics.mean(ratios):.4f}  [{shown}]")


if __name__ == "__main__":
    if "CHAT_OVERHEAD_REPORT" in os.environ:
        answers(Path(os.environ["CHAT_OVERHEAD_REPORT"]))
    else:
        chosen = tuple(sys.argv[1:]) or DEFAULT
        print(f"idle at the prompt: {idle_share(chosen):.2%} of a core", flush=True)
        overhead(chosen)
