"""Reports as Markdown, JSON lines and CSV."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from specchat.bench.tables import Table, notes, report_tables, share_lines
from specchat.json_lines import to_json

_COLUMNS = (
    "system",
    "question_id",
    "category",
    "turn",
    "repeat",
    "temperature",
    "tokens",
    "finish_reason",
    "steps",
    "tokens_per_step",
    "ttft_s",
    "decode_s",
    "tok_per_s",
    "distinct_4gram",
    "counted",
)


def markdown(report: Mapping[str, Any]) -> str:
    """Return the notes, all tables, and the facts to share with the figures."""
    parts = [f"**{note}**" for note in notes(report)]
    parts += [markdown_table(table) for table in report_tables(report)]
    parts.append("\n".join(f"- {name}: {_code(name, value)}" for name, value in share_lines(report)))
    return "\n\n".join(parts)


def markdown_table(table: Table) -> str:
    """Return one table with its title and note."""
    lines = [f"**{table.title}**", "", _row(table.header), _row(["---"] * len(table.header)), *map(_row, table.rows)]
    return "\n".join([*lines, "", table.note] if table.note else lines)


def json_lines(report: Mapping[str, Any]) -> str:
    """Return one line for each answer of each system, and the rest of the report as the last line."""
    lines = [{"type": "run", "system": name, **run} for name, run in _all_runs(report)]
    rest = {key: value for key, value in report.items() if key != "runs"}
    rest["baselines"] = [{k: v for k, v in each.items() if k != "runs"} for each in report["baselines"]]
    lines.append({"type": "report", **rest})
    return "\n".join(map(to_json, lines))


def comma_separated(report: Mapping[str, Any]) -> str:
    """Return one CSV row for each answer of each system."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for name, run in _all_runs(report):
        values = _flat(run) | {"system": name}
        writer.writerow([values[column] for column in _COLUMNS])
    return out.getvalue().rstrip("\n")


def _all_runs(report: Mapping[str, Any]) -> Iterable[tuple[str, Mapping[str, Any]]]:
    yield from (("specchat", run) for run in report["runs"])
    for baseline in report["baselines"]:
        yield from ((baseline["name"], run) for run in baseline["runs"])


def _flat(run: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run's figures at one level: specchat's own runs group some of them in nested objects."""
    flat = {**run, **run.get("timings", {})}
    flat["steps"] = run["speculation"]["steps"] if "speculation" in run else run["steps"]
    flat["tokens"] = len(run["token_ids"])
    flat["tokens_per_step"] = flat["tokens"] / flat["steps"]
    return flat


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _code(name: str, value: str) -> str:
    return f"`{value}`" if name == "command" else value
