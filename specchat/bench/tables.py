"""Reports as tables of text, for the terminal and Markdown; made from the JSON, of older versions too."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from specchat.bench.records import LAYERS
from specchat.units import format_bytes, format_rate

_NOTHING = ""
# Baselines of specchat itself, whose draws depend on seed and position as those of the measured system do.
_OWN_DRAWS = frozenset({"plain", LAYERS})
_MAX_DEPTHS = 12
_STREAMED = "specchat bench shape:llama-8b --vram 2GiB"


@dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
        title: title of the table.
        header: names of the columns.
        rows: rows with a cell for each column.
        note: explanation of the figures; may be empty.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


def report_tables(report: Mapping[str, Any]) -> list[Table]:
    """Return all tables of a report of `bench --json`."""
    if report.get("sweep"):
        return [_sweep(report["sweep"]), *_memory_against_speed(report["sweep"])]
    tables = [_systems(report)]
    if report["baselines"]:
        tables.append(_identity(report))
    tables += _passes(report["summary"])
    tables.append(_memory(report["summary"], report["plan"]))
    tables += _devices(report["runs"])
    if report["disk_passes"]:
        tables.append(_disk_passes(report["disk_passes"]))
        if report["disk_passes"].get("page_cache"):
            tables.append(_disk_passes(report["disk_passes"]["page_cache"]))
    left_out = _left_out(report["runs"])
    return [*tables, left_out] if left_out.rows else tables


def share_lines(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the facts that belong to shared figures, as (name, value)."""
    machine, plan, settings = report["machine"], report["plan"], report["settings"]
    gpus = ", ".join(gpu["name"] for gpu in machine["gpus"])
    ram = format_bytes(machine["ram"]["total_bytes"])
    hardware = f"{machine['cpu']['name']}, {machine['cpu']['cores']} cores, {ram} RAM"
    layers = f"{plan['resident_layers']} layers resident, {plan['streamed_layers']} streamed"
    budget = f"{format_bytes(plan['device_bytes'])} of {format_bytes(plan['device_budget_bytes'])}"
    return [
        ("model", report["model"] + _label(report)),
        ("draft", f"{plan['draft'] or 'none'}, tree budget {plan['tree_budget']}"),
        ("plan", f"{plan['device']}, {plan['dtype']}, quant {plan['quant']}, ctx {plan['ctx']}, {layers}, {budget}"),
        ("machine", f"{gpus}; {hardware}" if gpus else hardware),
        ("versions", ", ".join(f"{name} {version}" for name, version in report["versions"].items())),
        (
            "asked",
            f"{_counted(report['questions']['asked'], 'question')} ({settings['prompts']}), "
            f"{_counted(settings['repeats'], 'repeat')}, "
            f"at most {settings['max_tokens']} tokens, seed {settings['seed']}",
        ),
        ("command", report["command"]),
        ("date", report["created"]),
    ]


def headline(report: Mapping[str, Any]) -> str:
    """Return the result in one or two sentences."""
    if report.get("sweep"):
        sweep = report["sweep"]
        best = next(point for point in sweep["points"] if point["value"] == sweep["best"])
        return f"Fastest with {sweep['option']}={sweep['best']}: {_speed(best['summary'])}."
    parts = [f"{report['model']} writes {_speed(report['summary'])}"]
    for baseline in report["baselines"]:
        parts += _compared(baseline, report.get("speedup") or {})
    sentence = ", ".join(parts) + "."
    if report["plan"]["streamed_layers"] or not parts[1:]:
        return sentence
    return f"{sentence} Every layer was in memory; to measure one that streams: {_STREAMED}"


def _speed(summary: Mapping[str, Any]) -> str:
    rate = summary["tok_per_s"]["mean"]
    return "no text that counts" if rate is None else f"about {number(rate, 2)} tokens per second"


def _compared(baseline: Mapping[str, Any], speedups: Mapping[str, Any]) -> list[str]:
    """Return the speed beside a baseline, and whether the texts are equal."""
    name = "without a draft" if baseline["name"] == "plain" else f"with {baseline['name']}"
    speedup = speedups.get(baseline["name"])
    parts = [] if speedup is None else [f"{number(speedup['ratio'], 2)} times as fast as {name}"]
    match baseline["identical_output"]:
        case True:
            parts.append("with the same text")
        case False:
            parts.append("with ANOTHER text")
    return parts


def notes(report: Mapping[str, Any]) -> list[str]:
    """Return the warnings about a report."""
    found = []
    if report["partial"]:
        found.append("PARTIAL: the measurement was interrupted; the figures cover only the answers completed before")
    elif report.get("missing"):
        found.append(f"interrupted after all answers; not measured: {', '.join(report['missing'])}")
    if report["label"]:
        found.append(f"{report['model']}: {report['label']}")
    questions = report["questions"]
    if questions["turns_too_long"]:
        found.append(f"{_counted(questions['turns_too_long'], 'turn')} left out: too long for the context")
    if questions["not_begun"]:
        asked = _counted(questions["not_begun"], "question")
        found.append(f"{asked} left out for lack of time; use --limit N to ask N questions")
    return found


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}" + ("" if number == 1 else "s")


def _table(title: str, header: Sequence[str], rows: Iterable[Sequence[str]], note: str = "") -> Table:
    """Return a table without the columns that have no cell."""
    rows = [*rows]
    kept = [i for i in range(len(header)) if any(row[i] for row in rows)]
    return Table(title, tuple(header[i] for i in kept), tuple(tuple(row[i] for i in kept) for row in rows), note)


def number(value: float | None, digits: int = 3) -> str:
    """Format a number with this many significant digits, without exponent."""
    if value is None:
        return _NOTHING
    if value == 0:
        return "0"
    magnitude = len(str(int(abs(value)))) if abs(value) >= 1 else 0
    return f"{value:,.{max(digits - magnitude, 0)}f}" if abs(value) >= 0.01 else f"{value:.{digits - 1}g}"


def spread(figure: Mapping[str, Any]) -> str:
    """Format mean and standard deviation."""
    return number(figure["mean"]) + (f" ± {number(figure['sd'])}" if figure["sd"] is not None else "")


def ratio(figure: Mapping[str, Any] | None) -> str:
    """Format a ratio and its interval."""
    if figure is None:
        return _NOTHING
    interval = "" if figure["low"] is None else f" [{number(figure['low'])}, {number(figure['high'])}]"
    return f"{number(figure['ratio'])}x{interval}"


def milliseconds(seconds: float | None) -> str:
    """Format seconds as milliseconds."""
    return _NOTHING if seconds is None else f"{number(seconds * 1e3)} ms"


def share(value: float | None) -> str:
    """Format a share as a percentage."""
    return _NOTHING if value is None else f"{value:.0%}" if value >= 0.1 else f"{value:.1%}"


def temperature_label(value: float) -> str:
    """Return the label of a temperature."""
    return "greedy" if value == 0 else f"t={value:g}"


def _rate(bytes_per_s: float | None) -> str:
    return _NOTHING if bytes_per_s is None else format_rate(bytes_per_s)


def _label(report: Mapping[str, Any]) -> str:
    return f" ({report['label']})" if report["label"] else ""


def _systems(report: Mapping[str, Any]) -> Table:
    rows = [("specchat", entry, None) for entry in report["summary"]["by_temperature"]]
    for baseline in report["baselines"]:
        rows += [(baseline["name"], entry, entry["speedup"]) for entry in baseline["by_temperature"]]
    rows.sort(key=lambda row: row[1]["temperature"])
    run_spread = report["summary"]["run_spread"]
    note = (
        "means ± standard deviation over answers, including prefill and first step; speedups with [95% interval]; "
        "per pass: speedup at equal tokens per pass"
    )
    if run_spread is not None:
        note += f"; standard deviation between repeats: {share(run_spread)} of the mean"
    return _table(
        "speed",
        (
            "system",
            "sampling",
            "tok/s",
            "TTFT s",
            "tok/pass",
            "distinct 4-grams",
            "answers",
            "speedup of specchat",
            "per pass",
        ),
        tuple(
            (
                name,
                temperature_label(entry["temperature"]),
                spread(entry["tok_per_s"]),
                spread(entry["ttft_s"]),
                number(entry["tokens_per_step"]["mean"]),
                number(entry["distinct_4gram"]["mean"]),
                f"{entry['counted_answers']} of {entry['answers']}",
                *(("", "") if name == "specchat" else _gains(speedup)),
            )
            for name, entry, speedup in rows
        ),
        note,
    )


def _gains(speedup: Mapping[str, Any] | None) -> tuple[str, str]:
    return (_NOTHING, _NOTHING) if speedup is None else (ratio(speedup), ratio(speedup["per_pass"]))


def _identity(report: Mapping[str, Any]) -> Table:
    rows = [
        (
            baseline["name"],
            {True: "identical", False: "DIFFERENT", None: _NOTHING}[baseline["identical_output"]],
            f"{_counted(baseline['compared_answers'], 'answer')}, {_counted(baseline['compared_tokens'], 'token')}",
            _difference(baseline),
        )
        for baseline in report["baselines"]
    ]
    others = [baseline["name"] for baseline in report["baselines"] if baseline["name"] not in _OWN_DRAWS]
    samples = "samples with its" if len(others) == 1 else "sample with their"
    note = f"{' and '.join(others)} {samples} own random numbers, so only greedy texts are compared" if others else ""
    return _table("identical output", ("baseline", "text", "compared", "first difference"), rows, note)


def _difference(baseline: Mapping[str, Any]) -> str:
    first = baseline["first_difference"]
    if first is None:
        return _NOTHING
    temperature = temperature_label(first["temperature"])
    where = f"{first['question_id']} turn {first['turn']}, {temperature}, token {first['index']}"
    kind = "a near-tie" if first["near_tie"] else "NOT a near-tie"
    count = f"{baseline['differing_answers']} answers differ, {baseline['near_ties']} of them at near-ties"
    return f"{where}: {kind} (margin {number(first['margin'])}); {count}"


def _passes(summary: Mapping[str, Any]) -> Iterator[Table]:
    split = summary["pass_split"]
    if split is not None:
        names = {
            "link_wait_s": "waiting for layers",
            "compute_s": "computing",
            "draft_s": "drafting, not hidden",
            "head_s": "head and sampling",
            "host_s": "host",
        }
        rows = [(text, milliseconds(split[key]), share(split[key] / summary["pass_s"])) for key, text in names.items()]
        rows.append(("total", milliseconds(summary["pass_s"]), ""))
        predicted = summary["predicted_pass_s"]
        if predicted is not None:
            rows.append(("predicted", milliseconds(predicted), share(predicted / summary["pass_s"])))
        note = "" if predicted is None else f"predicted: {summary['prediction_basis']}"
        yield Table("time of a mean pass", ("part", "time", "share"), tuple(rows), note)
    depths = summary["accept_by_depth"][:_MAX_DEPTHS]
    if depths:
        header = ("depth", *(str(depth) for depth in range(1, len(depths) + 1)))
        yield Table("accepted draft tokens by tree depth", header, (("share", *map(share, depths)),))
    if summary["accept_by_source"]:
        sources = [
            (
                each["source"],
                number(each["offered_per_step"]),
                number(each["accepted_per_step"]),
                share(each["share"]),
                milliseconds(each["draft_s"]),
            )
            for each in summary["accept_by_source"]
        ]
        yield Table(
            "accepted draft tokens by source",
            ("source", "drafted per pass", "accepted per pass", "share", "time per pass"),
            tuple(sources),
        )


def _memory(summary: Mapping[str, Any], plan: Mapping[str, Any]) -> Table:
    stream = summary["stream"]
    rows = [
        ("device memory, peak", format_bytes(summary["device_peak_bytes"])),
        ("device memory, planned", format_bytes(summary["predicted_device_bytes"])),
        ("host memory, peak", format_bytes(summary["host_peak_bytes"])),
        ("host memory, planned", format_bytes(summary["predicted_host_bytes"])),
        ("streamed per pass", format_bytes(plan["streamed_bytes_per_step"])),
    ]
    if stream["achieved_bytes_per_s"] is not None:
        rows.append(("link rate over whole passes", format_rate(stream["achieved_bytes_per_s"])))
    if stream["link_bytes_per_s"] is not None:
        rows.append(("link rate without other work", format_rate(stream["link_bytes_per_s"])))
    rows.append(("load time", f"{number(summary['load_s'])} s"))
    return Table("memory and link", ("what", "figure"), tuple(rows))


def _devices(runs: Sequence[Mapping[str, Any]]) -> list[Table]:
    """Return the table of several devices, as they were used until the last answer; none for one device."""
    used = runs[-1]["memory"].get("devices") if runs else None
    if not used:
        return []
    rows = [
        (
            each["device"],
            share(each["link_busy"]),
            share(each["compute_busy"]),
            format_bytes(each["streamed_bytes"]),
            format_bytes(each["sent_bytes"]) if each["sent_bytes"] else "-",
            f"{format_bytes(each['device_peak_bytes'])} of {format_bytes(each['device_budget_bytes'])}",
        )
        for each in used
    ]
    header = ("device", "link busy", "computing", "streamed", "rows sent", "memory, peak")
    return [Table("devices", header, tuple(rows), "Shares of the time of all passes since loading.")]


def _disk_passes(passes: Mapping[str, Any]) -> Table:
    raw = passes["raw"]
    rows = [("raw reads", _NOTHING, format_rate(raw["bytes_per_s"]), _NOTHING, _NOTHING)]
    rows += [
        (
            system["name"],
            milliseconds(system["pass_s"]),
            _rate(system["achieved_bytes_per_s"]),
            share(system["utilisation"]),
            f"{number(system['relative_pass_s'])}x",
        )
        for system in passes["systems"]
    ]
    how = "past the page cache" if raw["direct"] else "through the page cache"
    note = (
        f"medians of {passes['rounds']} interleaved rounds; before a pass, {share(passes['resident_share'])} of the "
        f"files' pages were in the page cache; raw reads went {how}"
    )
    if passes.get("own_over_resident") is not None:
        note += f"; specchat takes {number(passes['own_over_resident'])}x the time of a pass with every layer in memory"
    kind = "cold " if passes["cold"] else ""
    where = "" if passes["cold"] else ", files in the page cache"
    header = ("system", "pass", "rate", "share of raw rate", "time / specchat's")
    return _table(f"{kind}passes of {passes['rows']} rows{where}", header, rows, note)


def _sweep(sweep: Mapping[str, Any]) -> Table:
    rows = []
    for point in sweep["points"]:
        summary, plan = point["summary"], point["plan"]
        rows.append(
            (
                point["value"],
                spread(summary["tok_per_s"]),
                number(summary["tokens_per_step"]["mean"]),
                milliseconds(summary["pass_s"]),
                share(summary["draft_share"]),
                f"{plan['resident_layers']} + {plan['streamed_layers']}",
                format_bytes(summary["device_peak_bytes"]),
                ", ".join(f"{name} {ratio(figure)}" for name, figure in point["speedup"].items()) or _NOTHING,
            )
        )
    header = ("tok/s", "tok/pass", "pass", "drafting", "resident + streamed", "device memory", "speedup over")
    return _table(f"by {sweep['option']}", (sweep["option"], *header), rows)


def _memory_against_speed(sweep: Mapping[str, Any]) -> list[Table]:
    """Return the table of generation memory against speed, or no table for reports without generation memory."""
    points = sweep["points"]
    if not all("generation" in point for point in points):
        return []
    rows = tuple(
        (
            point["value"],
            format_bytes(point["generation"]["planned_bytes"]),
            _NOTHING if (peak := point["generation"]["peak_bytes"]) is None else format_bytes(peak),
            share(point["generation"]["share_of_first"]),
            spread(point["summary"]["tok_per_s"]),
            ratio(point["generation"]["speed_over_first"]),
        )
        for point in points
    )
    note = (
        "memory without weights: planned for a full context, and counted in one short answer; "
        f"ratios are to {sweep['option']}={points[0]['value']}, those of speed over pairs of answers [95% interval]"
    )
    header = (sweep["option"], "planned", "counted", "planned / first", "tok/s", "speed / first")
    return [_table("memory against speed", header, rows, note)]


def _left_out(runs: Sequence[Mapping[str, Any]]) -> Table:
    rows = {
        (
            f"{run['question_id']} turn {run['turn']}",
            temperature_label(run["temperature"]),
            number(run["distinct_4gram"]),
        )
        for run in runs
        if not run["counted"]
    }
    header = ("answer", "sampling", "distinct 4-grams")
    return Table("answers that repeat themselves, left out of means", header, tuple(sorted(rows)))
