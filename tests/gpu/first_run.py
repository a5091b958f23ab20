"""The first ten minutes with a GPU: what decides most comes first, and a part that fails stops no other.

    PYTHONPATH=.:tests python -m gpu.first_run OUT                      runs all parts; prints as they go
    PYTHONPATH=.:tests python -m gpu.first_run OUT facts demo_cpu       runs some parts
    PYTHONPATH=.:tests python -m gpu.first_run OUT --within 540         ends after so many seconds
    PYTHONPATH=.:tests python -m gpu.first_run OUT [OUT ...] --write    writes results into docs/measured.md
    PYTHONPATH=.:tests python -m gpu.carry .gpu                         collects packages that a bare machine may lack

Models are synthetic; nothing is downloaded. OUT gets eight files at most, of a few MiB; packs are in a temporary
folder. What one run had no time for, another one does: results of several folders are written together. Packages in
.gpu are used where the machine has none.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
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
# Parts that would have less time left are left out.
_LEAST_S = 10
CARRIED = ROOT / ".gpu"
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


_TRITON = "tests/models/quant/test_triton.py tests/models/quant/test_triton_product.py"
_STREAMS = "tests/engine/streaming/test_cuda.py tests/hardware/test_cuda_links.py"
_PYTEST = "{python} -m pytest -n 0 -q -p no:cacheprovider -m gpu"
PARTS = (
    Part("machine", 30, "nvidia-smi -q -d MEMORY,CLOCK,PERFORMANCE; nvidia-smi topo -m; which gcc; nproc; free -g"),
    Part("imports", 60, "{python} -m gpu.versions"),
    Part("facts", 200, "{python} -m gpu.facts {out}/facts.json"),
    Part("products", 60, f"{_PYTEST} --maxfail=5 -k 'product or few_rows' {_TRITON}"),
    Part("demo_cpu", 60, f"{{python}} -m specchat run demo --device cpu {_DEMO} > {{out}}/demo_cpu.json"),
    Part("demo_cuda", 60, f"{{python}} -m specchat run demo --device cuda:0 {_DEMO} > {{out}}/demo_cuda.json"),
    Part("streams", 90, f"{_PYTEST} -k 'not utilization' --durations=8 {_STREAMS}"),
    Part("bench", 180, f"{{python}} -m specchat bench {_SHAPE} --tree-budget 64 {_BENCH} > {{out}}/bench.json"),
    Part("profile", 90, f"{{python}} -m gpu.profile_steps {_SHAPE} {{out}}"),
    Part("probe", 60, "{python} -m specchat probe --device cuda:0 --refresh"),
    Part("kernels", 150, f"{_PYTEST} -k 'not product and not few_rows' --durations=5 {_TRITON}"),
    Part("link", 120, f"{_PYTEST} -s -k utilization tests/engine/streaming/test_cuda.py"),
)


@dataclass(frozen=True)
class Result:
    """How a part ended: exit status (None at the time limit), seconds, and the end of its output."""

    name: str
    status: int | None
    seconds: float
    output: str


def run(part: Part, out: Path, cache: Path, limit_s: float) -> Result:
    """Run a part, print its output as it comes, and return how it ended.

    Args:
        part: the part.
        out: folder of its results.
        cache: folder for packs and the like.
        limit_s: seconds after which it is ended.
    """
    command = part.command.format(python=shlex.quote(sys.executable), out=shlex.quote(str(out)))
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests", CARRIED))),
        "PYTHONUNBUFFERED": "1",
        "SPECCHAT_CACHE_DIR": str(cache / "cache"),
        "SPECCHAT_STATE_DIR": str(cache / "state"),
        "TRITON_CACHE_DIR": str(cache / "triton"),
        "HF_HUB_OFFLINE": "1",
    }
    begin, ended_early = time.monotonic(), threading.Event()
    process = subprocess.Popen(
        ["bash", "-c", command],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )

    def end() -> None:
        ended_early.set()
        os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(limit_s, end)
    timer.start()
    output = b""
    assert process.stdout is not None
    with (out / "log.txt").open("ab") as log:
        log.write(f"--- {part.name}\n".encode())
        for line in process.stdout:
            sys.stdout.write(line.decode(errors="replace"))
            sys.stdout.flush()
            log.write(line)
            output = (output + line)[-_TAIL:]
    status = process.wait()
    timer.cancel()
    seconds = round(time.monotonic() - begin, 1)
    return Result(part.name, None if ended_early.is_set() else status, seconds, output.decode(errors="replace"))


def run_all(parts: Sequence[Part], out: Path, within_s: float = float("inf")) -> list[Result]:
    """Run parts in order; every result is written at once, so that a stop loses nothing.

    Args:
        parts: parts to run.
        out: folder of the results, which keeps those of earlier runs.
        within_s: seconds that all parts may take; those for which no time is left are left out.
    """
    out.mkdir(parents=True, exist_ok=True)
    end, results = time.monotonic() + within_s, list[Result]()
    earlier = [each for each in read_results(out) if each.name not in {part.name for part in parts}]
    with tempfile.TemporaryDirectory(prefix="first-run-", ignore_cleanup_errors=True) as cache:
        for part in parts:
            limit_s = min(part.limit_s, end - time.monotonic())
            if limit_s < min(_LEAST_S, part.limit_s):
                print(f"--- {part.name}: no time left", flush=True)
                continue
            print(f"--- {part.name}, at most {limit_s:.0f} s", flush=True)
            results.append(run(part, out, Path(cache), limit_s))
            ended = "the time limit" if results[-1].status is None else f"status {results[-1].status}"
            print(f"--- {part.name}: {ended} after {results[-1].seconds} s", flush=True)
            found = [asdict(each) for each in (*earlier, *results)]
            (out / "results.json").write_text(json.dumps(found, indent=1))
    return results


def read_results(out: Path) -> list[Result]:
    """The results in a folder; none if there are none, or none that can be read."""
    try:
        return [Result(**each) for each in json.loads((out / "results.json").read_text())]
    except (OSError, ValueError, TypeError):
        return []


# --- the page --------------------------------------------------------------------------------------------------------


def written(folders: Sequence[Path]) -> list[str]:
    """The sections of the page; later folders replace the parts of earlier ones."""
    by_name = {each.name: each for out in folders for each in read_results(out)}
    rows = [f"| {each.name} | {_ended(each)} | {each.seconds} |" for each in by_name.values()]
    sections = ["| part | result | s |\n| --- | --- | --- |\n" + "\n".join(rows)]
    if (same := _same_text(folders)) is not None:
        sections.append(f"The demo's text in float32 is {'the same' if same else '**different**'} on CPU and GPU.")
    sections += _facts(folders)
    for name in ("imports", "probe", "link"):
        if name in by_name and by_name[name].status == 0:
            sections.append(_fenced(name, by_name[name].output))
    if profile := _found(folders, "profile.txt"):
        sections.append(_fenced("profile.txt", profile))
    return sections


def _fenced(name: str, text: str) -> str:
    return f"**{name}**\n\n```\n{text.strip()}\n```"


def _found(folders: Sequence[Path], name: str) -> str:
    """The text of a file in the last folder that has it; empty if none has."""
    return next((file.read_text() for out in reversed(folders) if (file := out / name).exists()), "")


def _ended(result: Result) -> str:
    if result.status is None:
        return "ended at its time limit"
    return "passed" if result.status == 0 else f"failed: {' '.join(result.output.split()[-24:])}".replace("|", "/")


def _same_text(folders: Sequence[Path]) -> bool | None:
    """Whether both devices wrote the same text; None unless both wrote one."""
    try:
        texts = [json.loads(_found(folders, f"demo_{name}.json"))["token_ids"] for name in ("cpu", "cuda")]
    except (ValueError, KeyError):
        return None
    return bool(texts[0] == texts[1])


def _facts(folders: Sequence[Path]) -> list[str]:
    try:
        facts: dict[str, Any] = json.loads(_found(folders, "facts.json"))
    except ValueError:
        return []
    rows = []
    for name, fact in facts.items():
        values = fact.items() if isinstance(fact, dict) else [("", fact)]
        rows += [f"| {name} | {key} | {value} |" for key, value in values]
    return ["| fact | of | value |\n| --- | --- | --- |\n" + "\n".join(rows)]


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="gpu.first_run")
    parser.add_argument("out", type=Path, help="folder of the results")
    parser.add_argument("others", nargs="*", metavar="PART", help="parts to run; with --write, further folders")
    parser.add_argument("--within", type=float, default=float("inf"), metavar="S", help="seconds for all parts")
    parser.add_argument("--write", action="store_true", help="write the results into docs/measured.md")
    asked = parser.parse_args(arguments)
    if asked.write:
        folders = [asked.out, *map(Path, asked.others)]
        PAGE.write_text(with_measured(PAGE.read_text(), written(folders), BEGIN, END))
        return
    if unknown := set(asked.others) - {part.name for part in PARTS}:
        parser.error(f"no such parts: {', '.join(sorted(unknown))}")
    run_all(
        [part for part in PARTS if not asked.others or part.name in asked.others], asked.out.resolve(), asked.within
    )


if __name__ == "__main__":
    main(sys.argv[1:])
