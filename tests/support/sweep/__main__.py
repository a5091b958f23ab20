"""Tries tiny models of every type of language model that transformers has.

    PYTHONPATH=.:tests python -m support.sweep [TYPE ...] [--composite | --causal] [--jobs N] [--json FILE] [--write]

prints one line for each type: exact, refused with a reason, or broken. --write writes the tables of docs/models.md;
give no types with it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def main() -> None:
    from support.sweep import page, pool
    from support.sweep.configs import all_types, causal_types, composite_types

    parser = argparse.ArgumentParser(prog="support.sweep")
    parser.add_argument("types", nargs="*", metavar="TYPE")
    parser.add_argument("--causal", action="store_true", help="all causal LMs")
    parser.add_argument("--composite", action="store_true", help="all types with a text_config")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", type=Path, help="file of all outcomes")
    parser.add_argument("--write", action="store_true", help="write docs/models.md")
    asked = parser.parse_args()
    kinds = asked.types or [*asked.causal * causal_types(), *asked.composite * composite_types()] or all_types()
    begin, outcomes = time.monotonic(), []
    for outcome in pool.run(kinds, asked.jobs):
        outcomes.append(outcome)
        print(f"{outcome.kind}: {outcome.result}: {outcome.detail}", flush=True)
    counts = Counter(outcome.result for outcome in outcomes)
    print(f"{len(outcomes)} types: {dict(counts)} in {time.monotonic() - begin:.0f} s", file=sys.stderr)
    if asked.json:
        asked.json.write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=1))
    if asked.write:
        page.write(outcomes)


if __name__ == "__main__":
    main()
