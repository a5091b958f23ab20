"""The first ten minutes with a GPU: what decides most comes first, and a part that fails stops no other.

    PYTHONPATH=.:tests python -m gpu.first_run OUT              runs all parts; prints as they go
    PYTHONPATH=.:tests python -m gpu.first_run OUT facts demo   runs some parts
    PYTHONPATH=.:tests python -m gpu.first_run OUT --write      writes the results in OUT into docs/measured.md

Models are synthetic; nothing is downloaded. The cache of packs is a folder in OUT.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from specchat.bench.readme import with_measured

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "measured.md"
BEGIN = "<!-- gpu: PYTHONPATH=.:tests python -m gpu.first_run OUT --write writes the text below -->"
END = "<!-- gpu: end -->"
_TAIL = 4000
# The weights of a 70B model's layers, as many as fit in a few minutes of quantizing and copying.
_SHAPE = "shape:llama-70b,layers=6"
_DEMO = "-p 'Tell me about the sea.' --max-tokens 64 --seed 1 --temperature 0.7 --dtype fp32 --json"
_BENCH = "--quant int8 --vram 8GiB --ram 20GiB --passes --limit 1 --max-tokens 48 --repeats 1 --json"


@dataclass(frozen=True)
class Part:
    """One part of the run.

    Attributes:
        name: name of the part, and of its files in the output folder.
        limit_s: seconds after which it is ended.
        command: command line, with {out} for the output folder.
    """

    name: str
    limit_s: int
    command: str


PARTS = (
    Part("machine", 30, "nvidia-smi -q -d MEMORY,CLOCK,PERFORMANCE; nvidia-smi topo -m; which gcc; nproc; free -g"),
    Part("imports", 60, "{python} -c 'import torch, specchat.engine.engine; print(torch.__version__)'"),
    Part("facts", 180, "{python} -m gpu.facts {out}/facts.json"),
    Part(
        "tests",
        150,
        "{python} -m pytest -n 0 -q -m gpu -k 'not utilization' --durations=8 tests/engine/streaming/test_cuda.py "
        "tests/models/quant/test_triton.py tests/hardware/test_cuda_links.py",
    ),
    Part("demo_cpu", 60, f"{{python}} -m specchat run demo --device cpu {_DEMO} > {{out}}/demo_cpu.json"),
    Part("demo_cuda", 60, f"{{python}} -m specchat run demo --device cuda:0 {_DEMO} > {{out}}/demo_cuda.json"),
    Part("bench", 180, f"{{python}} -m specchat bench {_SHAPE} --tree-budget 64 {_BENCH} > {{out}}/bench.json"),
    Part("profile", 90, f"{{python}} -m gpu.profile_steps {_SHAPE} {{out}}"),
    Part("link", 120, "{python} -m pytest -n 0 -q -s -m gpu -k utilization tests/engine/streaming/test_cuda.py"),
)


@dataclass(frozen=True)
class Result:
    """How a part ended: exit status (None at the time limit), seconds, and the end of its output."""

    name: str
    status: int | None
    seconds: float
    output: str


def run(part: Part, out: Path) -> Result:
    """Run a part, and return how it ended."""
    command = part.command.format(python=shlex.quote(sys.executable), out=shlex.quote(str(out)))
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        "SPECCHAT_CACHE_DIR": str(out / "cache"),
        "SPECCHAT_STATE_DIR": str(out / "state"),
        "HF_HUB_OFFLINE": "1",
    }
    begin, log = time.monotonic(), out / f"{part.name}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["bash", "-c", command],
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status: int | None = process.wait(part.limit_s)
        except subprocess.TimeoutExpired:
            status = None
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    tail = log.read_bytes()[-_TAIL:].decode(errors="replace")
    return Result(part.name, status, round(time.monotonic() - begin, 1), tail)


def run_all(parts: Sequence[Part], out: Path) -> list[Result]:
    """Run parts in order; every result is written at once, so that a stop loses nothing."""
    out.mkdir(parents=True, exist_ok=True)
    results = list[Result]()
    for part in parts:
        print(f"--- {part.name}, at most {part.limit_s} s", flush=True)
        results.append(run(part, out))
        print(results[-1].output, flush=True)
        ended = "the time limit" if results[-1].status is None else f"status {results[-1].status}"
        print(f"--- {part.name}: {ended} after {results[-1].seconds} s", flush=True)
        (out / "results.json").write_text(json.dumps([asdict(each) for each in results], indent=1))
    return results


# --- the page --------------------------------------------------------------------------------------------------------


def written(out: Path) -> list[str]:
    """The sections of the page."""
    results = [Result(**each) for each in json.loads((out / "results.json").read_text())]
    rows = [f"| {each.name} | {_ended(each)} | {each.seconds} |" for each in results]
    sections = ["| part | result | s |\n| --- | --- | --- |\n" + "\n".join(rows)]
    if (same := _same_text(out)) is not None:
        sections.append(f"The demo's text in float32 is {'the same' if same else '**different**'} on CPU and GPU.")
    sections += _facts(out)
    sections += [f"**{name}**\n\n```\n{text.strip()}\n```" for name, text in _files(out)]
    return sections


def _ended(result: Result) -> str:
    if result.status is None:
        return "ended at its time limit"
    return "passed" if result.status == 0 else f"failed: {' '.join(result.output.split()[-24:])}".replace("|", "/")


def _same_text(out: Path) -> bool | None:
    """Whether both devices wrote the same text; None unless both wrote one."""
    texts = []
    for name in ("demo_cpu", "demo_cuda"):
        try:
            texts.append(json.loads((out / f"{name}.json").read_text())["message"]["content"])
        except (OSError, ValueError, KeyError):
            return None
    return bool(texts[0] == texts[1])


def _facts(out: Path) -> list[str]:
    try:
        facts: dict[str, Any] = json.loads((out / "facts.json").read_text())
    except (OSError, ValueError):
        return []
    rows = []
    for name, fact in facts.items():
        values = fact.items() if isinstance(fact, dict) else [("", fact)]
        rows += [f"| {name} | {key} | {value} |" for key, value in values]
    return ["| fact | of | value |\n| --- | --- | --- |\n" + "\n".join(rows)]


def _files(out: Path) -> list[tuple[str, str]]:
    """Texts that parts have left."""
    return [(name, (out / name).read_text()) for name in ("profile.txt",) if (out / name).exists()]


def main(arguments: Sequence[str]) -> None:
    out, names = Path(arguments[0]).resolve(), [each for each in arguments[1:] if each != "--write"]
    if "--write" in arguments:
        PAGE.write_text(with_measured(PAGE.read_text(), written(out), BEGIN, END))
        return
    run_all([part for part in PARTS if not names or part.name in names], out)


if __name__ == "__main__":
    main(sys.argv[1:])
