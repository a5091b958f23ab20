"""Comparison of two reports: the change of each figure and its significance."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from specchat.bench import summary
from specchat.bench.records import MIN_DISTINCT
from specchat.bench.tables import Table, number, ratio
from specchat.chat.result import SCHEMA_VERSION
from specchat.errors import UsageError
from specchat.files import read_given

Runs = Mapping[tuple[Any, ...], Mapping[str, Any]]

# With fewer questions no difference is significant at this level, however large: n signs are all equal by chance with
# probability 2 / 2^n.
SIGNIFICANCE = 0.05
MIN_QUESTIONS = 6

_FIGURES: dict[str, Callable[[Mapping[str, Any]], float]] = {
    "tok_per_s": lambda run: float(run["timings"]["tok_per_s"]),
    "ttft_s": lambda run: float(run["timings"]["ttft_s"]),
    "tokens_per_step": lambda run: float(run["speculation"]["tokens_per_step"]),
}


def read_report(path: Path) -> dict[str, Any]:
    """Read a report that `bench --json` printed.

    Raises:
        UsageError: the file cannot be read or is not a report.
    """
    try:
        report = json.loads(read_given(path))
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not JSON"
        raise UsageError(
            f"cannot read {path}: {reason}", hint="make a report with specchat bench MODEL --json > FILE"
        ) from error
    if not isinstance(report, dict) or "runs" not in report or "summary" not in report:
        raise UsageError(
            f"{path} is not a report of specchat bench", "make a report with specchat bench MODEL --json > FILE"
        )
    if report.get("schema_version") != SCHEMA_VERSION:
        raise UsageError(f"{path} has schema_version {report.get('schema_version')}, not {SCHEMA_VERSION}")
    return report


def comparison_object(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    """Compare the second report with the first, over the prompts that both have.

    Raises:
        UsageError: the reports have no prompt in common.
    """
    runs_a, runs_b = _by_prompt(a), _by_prompt(b)
    common = runs_a.keys() & runs_b.keys()
    if not common:
        raise UsageError("the two reports have no prompt in common", hint="measure both with the same --prompts")
    return {
        "schema_version": SCHEMA_VERSION,
        "a": _head(a),
        "b": _head(b),
        "common_answers": len(common),
        "same_output": sum(runs_a[key]["token_ids"] == runs_b[key]["token_ids"] for key in common),
        "figures": {name: _change(runs_a, runs_b, get) for name, get in _FIGURES.items()},
    }


def comparison_table(comparison: Mapping[str, Any]) -> Table:
    """Return the comparison as a table."""
    rows = []
    for name, change in comparison["figures"].items():
        if change is None:
            rows.append((name, "", "", "", "", "no answers counted"))
            continue
        verdict = {True: "significant", False: "may be chance", None: f"fewer than {MIN_QUESTIONS} questions"}
        cells = number(change["a"]), number(change["b"]), ratio(change), number(change["p_value"])
        rows.append((name, *cells, verdict[change["significant"]]))
    note = (
        f"{comparison['common_answers']} answers to the same prompts, {comparison['same_output']} of them identical; "
        f"geometric mean of paired ratios [95% interval], sign-flip test over questions; "
        f"A: {comparison['a']['command']} ({comparison['a']['created']}); "
        f"B: {comparison['b']['command']} ({comparison['b']['created']})"
    )
    return Table("B against A", ("figure", "A", "B", "B / A", "p", "verdict"), tuple(rows), note)


def _head(report: Mapping[str, Any]) -> dict[str, Any]:
    return {key: report[key] for key in ("model", "command", "created", "versions")}


def _by_prompt(report: Mapping[str, Any]) -> Runs:
    keys = ("question_id", "turn", "temperature", "repeat")
    return {tuple(run[key] for key in keys): run for run in report["runs"]}


def _change(runs_a: Runs, runs_b: Runs, get: Callable[[Mapping[str, Any]], float]) -> dict[str, Any] | None:
    logs: dict[str, list[float]] = {}
    values: list[tuple[float, float]] = []
    for key in sorted(runs_a.keys() & runs_b.keys()):
        run_a, run_b = runs_a[key], runs_b[key]
        if min(run_a["distinct_4gram"], run_b["distinct_4gram"]) < MIN_DISTINCT:
            continue
        pair = get(run_a), get(run_b)
        values.append(pair)
        logs.setdefault(key[0], []).append(math.log(pair[1] / pair[0]))
    found = summary.ratio_of(logs)
    if found is None:
        return None
    return {
        "a": summary.spread(a for a, _ in values).mean,
        "b": summary.spread(b for _, b in values).mean,
        **asdict(found),
        "significant": found.p_value < SIGNIFICANCE
        if found.p_value is not None and len(logs) >= MIN_QUESTIONS
        else None,
    }
