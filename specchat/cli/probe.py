"""`specchat probe`: the machine, its rates, and the models that it can run."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Literal

from specchat.cli.ask import asker, can_ask
from specchat.cli.offer import is_accepted
from specchat.cli.output import print_line
from specchat.errors import UsageError
from specchat.json_lines import to_json
from specchat.loading.libraries import prepare_libraries
from specchat.loading.locate import parse_models, sketch_models
from specchat.loading.planning import make_plan
from specchat.loading.recommending import best_to_start, recommend_models
from specchat.loading.request import ModelRequest
from specchat.paths import cache_folder
from specchat.records.plan import DeviceChoice
from specchat.units import size_text

if TYPE_CHECKING:
    from specchat.hardware.probe import Report
    from specchat.hardware.verdicts import Verdict
    from specchat.loading.planning import Planned
    from specchat.planner.recommendations import Recommendations
    from specchat.ui.console import Talk

_DAMAGED = 3


@dataclass(frozen=True)
class ProbeOptions:
    """Checked options of `specchat probe`.

    Attributes:
        models: options about model, memory and device; without a model, recommendations replace the plan.
        yes: whether to download without asking.
        quiet: whether only the report and errors are shown.
        json: whether to print one JSON object.
        markdown: whether to print Markdown.
        refresh: whether to measure again instead of using saved rates.
        verify: whether to check every pack against its checksums.
    """

    models: ModelRequest
    yes: bool = False
    quiet: bool = False
    json: bool = False
    markdown: bool = False
    refresh: bool = False
    verify: bool = False


def check_combination(options: ProbeOptions) -> ProbeOptions:
    """Refuse flags that contradict each other, and return the options unchanged.

    Raises:
        UsageError: two flags contradict each other.
    """
    if options.json and options.markdown:
        raise UsageError("--json and --markdown cannot be combined", hint="leave --json or --markdown out")
    return options


def probe(options: ProbeOptions, start: Callable[[Sequence[str]], int]) -> int:
    """Run `specchat probe` and return the exit code.

    Args:
        options: checked options.
        start: runs a command line, for a user who takes the offered model; returns its exit code.
    """
    from specchat.hardware import probe as hardware
    from specchat.ui.console import talk
    from specchat.ui.probe_view import ProbeLine
    from specchat.ui.progress import TalkReporter

    say = talk(quiet=options.quiet)
    refs = None if options.models.model is None else parse_models(options.models)
    prepare_libraries()
    with TemporaryDirectory(prefix="specchat-") as folder:
        reporter = TalkReporter(say)
        # A model that does not exist is refused before the rates are measured.
        ask = asker(yes=options.yes)
        found = None if refs is None else sketch_models(options.models, refs, reporter, ask, Path(folder))
        line = ProbeLine(say)
        try:
            report = hardware.probe(
                cache_folder(), options.models.choices.device, refresh=options.refresh, progress=line.update
            )
        finally:
            line.end()
        planned = None if found is None else make_plan(options.models, found, reporter)
    recommendations = recommend_models(options.models, report.hardware, report.measured) if refs is None else None
    packs = (*_found_packs(), *(_verify(say) if options.verify else ()))
    _print(options, report, (*report.verdicts, _compiler(), *packs), planned, recommendations)
    if any(verdict.level == "error" for verdict in packs):
        return _DAMAGED
    if recommendations is not None and can_ask() and not (options.json or options.markdown or options.quiet):
        best = best_to_start(recommendations, offline=options.models.offline)
        say.say("")
        if best is not None and is_accepted(best, say):
            return start(f"run {best.model.id} --yes{_flags(options.models)}".split())
    return 0


# --- flags ------------------------------------------------------------------------------------------------------


def _devices_text(devices: Literal["auto"] | tuple[DeviceChoice, ...]) -> str | None:
    """Return a list of devices as it is typed; None for an empty one."""
    if devices == "auto":
        return "auto"
    texts = (each.device + ("" if each.vram_bytes is None else f"={size_text(each.vram_bytes)}") for each in devices)
    return ",".join(texts) or None


def _flags(request: ModelRequest) -> str:
    """Return the flags that affect plans, as they are typed."""
    choices = request.choices
    asked = {
        "--device": choices.device if choices.device != "auto" else None,
        "--devices": _devices_text(choices.devices),
        "--dtype": choices.dtype if choices.dtype != "auto" else None,
        "--vram": None if choices.vram_bytes is None else size_text(choices.vram_bytes),
        "--ram": None if choices.ram_bytes is None else size_text(choices.ram_bytes),
        "--ctx": choices.ctx,
        "--quant": choices.quant if choices.quant != "auto" else None,
        "--draft": request.draft if request.draft_model == "none" else None,
    }
    return "".join(f" {flag} {value}" for flag, value in asked.items() if value is not None)


def _compiler() -> "Verdict":
    """Return what dequantizes the blocks of GGUF files on a CPU."""
    from specchat.hardware.system import has_compiler
    from specchat.hardware.verdicts import Verdict

    if has_compiler():
        return Verdict("ok", "GGUF", "numba compiles the loops that dequantize blocks on the CPU")
    hint = "pip install 'specchat[cpu]': loops that numba compiles are several times as fast"
    return Verdict("ok", "GGUF", "torch dequantizes blocks on the CPU", hint)


# --- packs -------------------------------------------------------------------------------------------------------


def _found_packs() -> "tuple[Verdict, ...]":
    """Return a verdict on the disk space of all packs, and a warning for each unused pack."""
    from specchat.hardware.verdicts import Verdict
    from specchat.models.packs.inventory import find_packs, packs_folder
    from specchat.paths import from_home
    from specchat.units import format_bytes

    packs = find_packs()
    if not packs:
        return ()
    size = format_bytes(sum(pack.nbytes for pack in packs))
    total = f"{len(packs)} in {from_home(packs_folder())}, {size} in total"
    return (
        Verdict("ok", "packs", total),
        *(
            Verdict(
                "warn",
                "idle pack",
                f"{pack.name}, {format_bytes(pack.nbytes)} in {from_home(pack.path)}: {pack.idle}",
                "delete it to free the space; specchat builds packs again when it needs them",
            )
            for pack in packs
            if pack.idle is not None
        ),
    )


def _verify(say: "Talk") -> "tuple[Verdict, ...]":
    """Check every byte of every pack and return the verdicts."""
    from specchat.hardware.verdicts import Verdict
    from specchat.models.packs.inventory import packs_folder
    from specchat.models.packs.pack import list_packs
    from specchat.models.packs.verify import verify_pack
    from specchat.ui.progress import ProgressLine
    from specchat.units import format_bytes

    hint = "delete the named file or folder; specchat builds it again when it needs it"
    unreadable: list[str] = []
    packs = list_packs(warn=unreadable.append)
    verdicts = [Verdict("error", "pack", text, hint) for text in unreadable]
    for pack in packs:
        with ProgressLine(say, f"checking {pack.name}") as line:
            damages = verify_pack(pack, line.update)
        if not damages:
            verdicts.append(Verdict("ok", "pack", f"{pack.name}, {pack.dtype}, {format_bytes(pack.nbytes)}: intact"))
        verdicts += [Verdict("error", "pack", f"{pack.name}: {each.path}: {each.reason}", hint) for each in damages]
    return tuple(verdicts) or (Verdict("ok", "pack", f"no packs in {packs_folder()}"),)


# --- the report --------------------------------------------------------------------------------------------------


def _print(
    options: ProbeOptions,
    report: "Report",
    verdicts: "tuple[Verdict, ...]",
    planned: "Planned | None",
    recommendations: "Recommendations | None",
) -> None:
    from specchat.chat.result import chosen_object, recommendations_object
    from specchat.hardware.report import report_object
    from specchat.ui.console import columns
    from specchat.ui.plan_view import plan_text
    from specchat.ui.probe_view import ProbeView, markdown
    from specchat.ui.recommendations_view import recommendation_lines, recommendation_table

    flags = _flags(options.models)
    if options.json:
        plan = None if planned is None else chosen_object(planned.chosen)
        models = None if recommendations is None else recommendations_object(recommendations, flags)
        print_line(to_json({**report_object(report, verdicts, plan), "models": models}))
        return
    table = None
    if planned is not None:
        width = columns(sys.stdout)
        table = plan_text(planned.models.target, planned.chosen, planned.models.draft_note, width)
    if options.markdown:
        print_line(
            markdown(
                report, verdicts, table, [] if recommendations is None else recommendation_table(recommendations, flags)
            )
        )
    else:
        ProbeView(sys.stdout).report(
            report, verdicts, table, [] if recommendations is None else recommendation_lines(recommendations, flags)
        )
