"""Time to the first token, turn by turn, in real chats with the public command: it must not grow with the history.

    PYTHONPATH=.:tests python tests/benchmarks/turns.py [CHATS]

Each chat asks the demo, streamed, the same ten times over a pty; the figures come from the session file. Fails if
TTFT(turn 10) is above 1.2 x TTFT(turn 2), medians over chats, or if a prompt took more than one pass. Run it on a quiet
machine: a pass takes less than a tenth of a second.
"""

import json
import statistics
import sys
import tempfile
from pathlib import Path

from support.terminal import Terminal

ENTER, CTRL_D = "\r", "\x04"
TURNS = 10
LIMIT = 1.2
# Trees of one size, or a cheaper later tree could hide a dearer history.
COMMAND = ("run", "demo", "--vram", "40MiB", "--tree-budget", "64", "--max-tokens", "32", "--session", "turns")


def chat(seed):
    """What the session's file says of each turn."""
    with tempfile.TemporaryDirectory() as state:
        environment = {"SPECCHAT_STATE_DIR": state}
        with Terminal("specchat", *COMMAND, "--seed", str(seed), columns=120, environment=environment) as terminal:
            terminal.wait_for(lambda t: t.cursor_line == ">", timeout_s=60)  # imports take their time
            file = Path(state, "sessions", "turns.jsonl")
            for number in range(1, TURNS + 1):
                terminal.send("What did the fox do then?" + ENTER)
                terminal.wait_for(lambda _, n=number: len(answers(file)) == n)
                terminal.wait_for_prompt()
            terminal.send(CTRL_D)
            assert terminal.exit_code() == 0
        return answers(file)


def answers(file):
    lines = file.read_text().splitlines() if file.exists() else []
    records = [json.loads(line) for line in lines]
    return [record["facts"] for record in records if record["type"] == "answer"]


def main():
    num_chats = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    chats = [chat(seed) for seed in range(num_chats)]
    for seed, turns in enumerate(chats):
        counts = [(t["ttft_s"] * 1e3, t["prompt_tokens"] - t["cached_tokens"], t["cached_tokens"]) for t in turns]
        shown = [f"{ttft_ms:.0f} ({new}+{cached})" for ttft_ms, new, cached in counts]
        print(f"chat {seed}: TTFT ms (new + cached tokens): {', '.join(shown)}")
        assert not any(turn["prefill_passes"] for turn in turns), "a prompt took more than one pass"
    medians = [statistics.median(turns[i]["ttft_s"] for turns in chats) for i in range(TURNS)]
    ratio = medians[-1] / medians[1]
    print(f"medians of {num_chats} chats, ms: {', '.join(f'{m * 1e3:.0f}' for m in medians)}")
    print(f"turn 10 / turn 2: {ratio:.2f}, limit {LIMIT}")
    return int(ratio > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
