"""`specchat probe`: the machine, its rates, and what a model would get here."""

import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from specchat.cli import models as shared
from specchat.cli.options import ModelOptions
from specchat.cli.output import print_line, to_json
from specchat.config import cache_folder
from specchat.errors import UsageError

if TYPE_CHECKING:
    from specchat.cli.models import Models
    from specchat.config import Plan
    from specchat.hardware.machine import Measured
    from specchat.hardware.probe import Report
    from specchat.hardware.verdicts import Verdict
    from specchat.ui.console import Talk

_DAMAGED = 3


@dataclass(frozen=True)
class ProbeOptions:
    """Everything `specchat probe` can be told, checked.

    Attributes:
        models: the model whose plan is asked for, if one is, and the device.
        refresh: measure again.
        verify: read every pack and check it.
    """

    models: ModelOptions
    json: bool = False
    markdown: bool = False
    refresh: bool = False
    verify: bool = False


def check_combination(options: ProbeOptions) -> ProbeOptions:
    """Refuses flags that contradict each other.

    Raises:
        UsageError: two of them do.
    """
    if options.json and options.markdown:
        raise UsageError("--json and --markdown cannot be combined", hint="leave --json or --markdown out")
    return options


def probe(options: ProbeOptions) -> int:
    """Does what `specchat probe` was asked to; returns the exit code."""
    from specchat.hardware import probe as hardware
    from specchat.ui.console import talk
    from specchat.ui.probe_view import ProbeLine

    say = talk(quiet=options.models.quiet)
    refs = None if options.models.model is None else shared.parse_models(options.models)
    shared.prepare_libraries()
    line = ProbeLine(say)
    try:
        report = hardware.probe(cache_folder(), options.models.device, refresh=options.refresh, progress=line.update)
    finally:
        line.end()
    with TemporaryDirectory(prefix="specchat-") as folder:
        found = None if refs is None else shared.sketch_models(options.models, refs, say, Path(folder))
        plan = None if found is None else shared.make_plan(options.models, found)
    packs = _verify(say) if options.verify else ()
    _print(options, report, (*report.verdicts, *packs), found, plan)
    return _DAMAGED if any(verdict.level == "error" for verdict in packs) else 0


# --- packs -------------------------------------------------------------------------------------------------------


def _verify(say: "Talk") -> "tuple[Verdict, ...]":
    """A verdict on every pack, all of its bytes read."""
    from specchat.hardware.verdicts import Verdict
    from specchat.models.pack import list_packs, packs_folder
    from specchat.models.pack_verify import verify_pack
    from specchat.ui.progress import ProgressLine
    from specchat.units import format_bytes

    hint = "delete what is named: it is written again from the model when it is needed"
    unreadable: list[str] = []
    packs = list_packs(warn=unreadable.append)
    verdicts = [Verdict("error", "pack", text, hint) for text in unreadable]
    for pack in packs:
        with ProgressLine(say, f"checking {pack.name}") as line:
            damages = verify_pack(pack, line.update)
        if not damages:
            verdicts.append(Verdict("ok", "pack", f"{pack.name}, {pack.dtype}, {format_bytes(pack.nbytes)}: good"))
        verdicts += [Verdict("error", "pack", f"{pack.name}: {each.path}: {each.reason}", hint) for each in damages]
    return tuple(verdicts) or (Verdict("ok", "pack", f"there are none in {packs_folder()}"),)


# --- the report --------------------------------------------------------------------------------------------------


def _print(
    options: ProbeOptions,
    report: "Report",
    verdicts: "tuple[Verdict, ...]",
    found: "Models | None",
    plan: "Plan | None",
) -> None:
    from specchat.hardware.report import report_object
    from specchat.ui.chat_view import plan_table
    from specchat.ui.probe_view import ProbeView, markdown

    if options.json:
        bounded = None if plan is None else _plan_object(plan, report.measured)
        print_line(to_json(report_object(report, verdicts, bounded)))
        return
    table = None if plan is None or found is None else plan_table(found.target, plan, found.draft_note)
    if options.markdown:
        print_line(markdown(report, verdicts, table))
    else:
        ProbeView(sys.stdout).report(report, verdicts, table)


def _plan_object(plan: "Plan", measured: "Measured") -> dict[str, Any]:
    """The plan, with the least time that a pass can take: nothing else has been predicted yet."""
    from specchat.chat.result import plan_object

    pass_s = _least_pass_s(plan, measured)
    if pass_s is None:
        return plan_object(plan)
    return {
        **plan_object(plan),
        "predicted_pass_s": pass_s,
        "basis": "bound: streamed bytes at the link's measured rate; computing and drafting come on top",
    }


def _least_pass_s(plan: "Plan", measured: "Measured") -> float | None:
    """What the slowest link takes for the layers that cross it; None where none do, or nothing was measured."""
    links = measured.links
    # layers are about equally large
    from_disk = plan.streamed_bytes_per_step * plan.tiers.count("disk") / max(len(plan.streamed), 1)
    to_device = 0 if plan.device == "cpu" else plan.streamed_bytes_per_step
    crossings = (
        (from_disk, links.disk_read_bytes_per_s),
        (to_device, links.h2d_pinned_bytes_per_s or links.h2d_pageable_bytes_per_s),
    )
    return max((num_bytes / rate for num_bytes, rate in crossings if num_bytes and rate), default=None)
