"""Time to the first token, turn by turn, in real chats with the public command: it must not grow with the history.

    PYTHONPATH=.:tests python tests/benchmarks/turns.py [CHATS]

Each chat asks the demo, streamed, the same ten times over a pty; the figures come from the session file. Fails if the
median over chats of TTFT(turn 10) / TTFT(turn 2) is above 1.2, or if a prompt took more than one pass.
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
COMMAND = ("run", "demo", "--vram", "40MiB", "--max-tokens", "32", "--session", "turns")


def chat(seed):
    """What the session's file says of each turn."""
    with tempfile.TemporaryDirectory() as state:
        environment = {"SPECCHAT_STATE_DIR": state}
        with Terminal("specchat", *COMMAND, "--seed", str(seed), columns=120, environment=environment) as terminal:
            terminal.wait_for_prompt()
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
    ratios = []
    for seed in range(num_chats):
        turns = chat(seed)
        ratios.append(turns[-1]["ttft_s"] / turns[1]["ttft_s"])
        counts = [(t["ttft_s"] * 1e3, t["prompt_tokens"] - t["cached_tokens"], t["cached_tokens"]) for t in turns]
        shown = [f"{ttft_ms:.0f} ({new}+{cached})" for ttft_ms, new, cached in counts]
        print(f"chat {seed}: TTFT ms (new + cached tokens): {', '.join(shown)}; turn 10 / turn 2: {ratios[-1]:.2f}")
        assert not any(turn["prefill_passes"] for turn in turns), "a prompt took more than one pass"
    median = statistics.median(ratios)
    print(f"median of {num_chats} chats: {median:.2f}, limit {LIMIT}")
    return int(median > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
