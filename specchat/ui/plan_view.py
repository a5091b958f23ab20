"""The full plan: choices and their reasons, predicted speed, memory ledger."""

import io
import textwrap
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from specchat.planner.cost import Prediction
from specchat.planner.explain import Choice, ExplainedPlan
from specchat.planner.rates import Basis
from specchat.records.limits import MOST_RESTORE_POINTS
from specchat.records.model import ModelSource
from specchat.records.plan import DevicePlan, Plan
from specchat.ui.console import neutral
from specchat.ui.devices_view import device_table, links_text, passes_text
from specchat.ui.placement_view import expert_facts
from specchat.units import format_bytes

_NARROW = 60
_WIDEST = 110  # columns; longer lines are hard to read
_BASES: dict[Basis, str] = {
    "measured": "rates measured on this machine",
    "typical": "rates typical of such machines and drafts",
    "guessed": "rates guessed, on the slow side",
}
_WAITS_FOR = {"link": "waiting for layers", "compute": "computing", "draft": "drafting"}


def plan_text(target: ModelSource, chosen: ExplainedPlan, draft_note: str, width: int) -> str:
    """Return the plan as `run --plan` and `probe MODEL` print it.

    Args:
        target: source of the target.
        chosen: plan of the target, with reasons.
        draft_note: text to show if there is no draft.
        width: width in columns.
    """
    plan, width = chosen.plan, min(width, _WIDEST)
    facts = [("model", model_name(target, plan)), ("expect", speed_text(chosen.prediction))]
    facts += [("basis", _BASES[chosen.prediction.basis]), ("layers", _layers(plan))]
    facts += [("assumes", assumption) for assumption in chosen.assumptions]
    if plan.draft is None and draft_note:
        facts.insert(1, ("draft", draft_note))
    if plan.experts is not None:
        facts += expert_facts(plan, plan.experts)
    elif plan.placement.streamed:
        facts.append(("streamed", f"{format_bytes(plan.streamed_bytes_per_step)} per pass, from {_places(plan)}"))
    if links := links_text(plan.devices):
        facts.append(("links", links))
    if plan.devices:
        facts.append(("passes", passes_text(plan)))
    choices = _stacked(chosen.choices, width) if width < _NARROW else _side_by_side(chosen.choices, width)
    devices = ["", *device_table(plan, width)] if plan.devices else []
    account = [*_device_account(plan, width), *_host_account(plan, width), *_state_account(plan, width)]
    return "\n".join([*_facts(facts, width), *devices, "", *choices, "", *account])


def model_name(target: ModelSource, plan: Plan) -> str:
    """Return the name of the target, with a note that every output must show."""
    note = target.label or ("text only" if plan.text_only else "")
    return f"{target.name} ({note})" if note else target.name


def _device_account(plan: Plan, width: int) -> list[str]:
    """Return the lines of the device memory ledger; one ledger after the other if there are several devices."""
    if plan.devices:
        return [line for each in plan.devices for line in _other_device(each, width)][:-1]
    ledger = [(item.item, format_bytes(item.bytes)) for item in plan.ledger]
    ledger.append(("sum", f"{format_bytes(plan.device_bytes)} of {format_bytes(plan.vram_bytes)}"))
    ledger.append(("without weights", f"{format_bytes(plan.generation_bytes)} (caches and workspaces)"))
    return ["RAM:" if plan.work.device == "cpu" else "VRAM:", *_facts(ledger, width, indent="  ")]


def _other_device(device: DevicePlan, width: int) -> list[str]:
    """Return the lines of one device's ledger, and an empty line."""
    ledger = [(item.item, format_bytes(item.bytes)) for item in device.ledger]
    ledger.append(("sum", f"{format_bytes(device.num_bytes)} of {format_bytes(device.vram_bytes)}"))
    title = textwrap.wrap(f"memory of {device.device}:", width, break_on_hyphens=False)
    return [*title, *_facts(ledger, width, indent="  "), ""]


def _host_account(plan: Plan, width: int) -> list[str]:
    """Return the lines of the host memory ledger."""
    if not plan.host_ledger:
        return []
    rows = [(item.item, format_bytes(item.bytes)) for item in plan.host_ledger]
    rows.append(("sum", format_bytes(sum(item.bytes for item in plan.host_ledger))))
    return ["", "other RAM:" if plan.work.device == "cpu" else "RAM:", *_facts(rows, width, indent="  ")]


def _state_account(plan: Plan, width: int) -> list[str]:
    """Return the lines about recurrent layers, part by part; the ledgers count them, too."""
    states = plan.states
    if states is None:
        return []
    stashes = ", ".join(f"{format_bytes(nbytes)} for {nodes} nodes" for nodes, nbytes in states.stash_bytes)
    points = f"{format_bytes(states.num_points * states.point_bytes)}, {states.num_points} of "
    rows = [
        ("state", format_bytes(states.state_bytes)),
        ("working copy", format_bytes(states.working_bytes)),
        ("stash of a tree", stashes),
        ("restore points", points + format_bytes(states.point_bytes)),
        (f"KV cache of {states.num_attention} layers", format_bytes(states.kv_bytes)),
    ]
    if states.num_points < MOST_RESTORE_POINTS and plan.work.seats == 1:
        rows[3] = (rows[3][0], f"{rows[3][1]} ({MOST_RESTORE_POINTS} with more RAM)")
    of_all = f"{states.num_recurrent} of {plan.placement.num_layers}"
    return ["", f"recurrent layers ({of_all}):", *_facts(rows, width, indent="  ")]


def speed_text(prediction: Prediction) -> str:
    """Return the predicted speed, the tokens per pass and the bottleneck of a pass."""
    tokens = f"{prediction.tokens_per_step:.1f} tokens" if prediction.tokens_per_step > 1 else "1 token"
    passes = f"{tokens} per pass of {_seconds(prediction.pass_s)}, mostly {_WAITS_FOR[prediction.bound]}"
    return f"{short_speed(prediction)}: {passes}"


def short_speed(prediction: Prediction) -> str:
    """Return the predicted speed, for the banner."""
    return f"about {_tok_per_s(prediction.tok_per_s)}"


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds * 1e3:.0f} ms"


def _tok_per_s(rate: float) -> str:
    return f"{rate:.0f} tok/s" if rate >= 100 else f"{rate:.1f} tok/s" if rate >= 1 else f"{rate:.2f} tok/s"


def _layers(plan: Plan) -> str:
    if plan.experts is not None:
        return f"{plan.placement.num_layers}, all resident besides their experts"
    placement = plan.placement
    if not placement.streamed:
        expanded = f", {len(placement.expanded)} of them larger to be faster" if placement.expanded else ""
        return f"{placement.num_layers}, all resident{expanded}"
    text = f"{len(placement.resident)} resident, {len(placement.streamed)} streamed through {placement.slots} slots"
    if not plan.stages:
        return text
    first = plan.first_stage
    return f"{text}; {len(first.resident)} resident up to {first.ctx:,} tokens"


def _places(plan: Plan) -> str:
    """Return the places of streamed layers between passes."""
    if "disk" not in plan.placement.tiers:
        return "host memory"
    return f"host memory (layers: {len(plan.placement.in_ram)}) and disk" if plan.placement.in_ram else "disk"


def _facts(rows: Sequence[tuple[str, str]], width: int, indent: str = "") -> list[str]:
    column = max(len(name) for name, _ in rows)
    lines: list[str] = []
    for name, value in rows:
        head = f"{indent}{name:<{column}}  "
        room = max(width - len(head), 16)
        first, *rest = textwrap.wrap(neutral(value), room) or [""]
        lines += [head + first, *(" " * len(head) + line for line in rest)]
    return [line.rstrip() for line in lines]


def _side_by_side(choices: Sequence[Choice], width: int) -> list[str]:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_edge=False)
    table.add_column("choice", no_wrap=True)
    table.add_column("", overflow="fold", max_width=width // 3)
    table.add_column("why", overflow="fold")
    table.add_column("alternative", overflow="fold", max_width=width // 3)
    for choice in choices:
        cells = (choice.option, choice.value, _why(choice), _alternative(choice))
        table.add_row(*(Text(neutral(cell)) for cell in cells))
    console = Console(file=io.StringIO(), width=width, color_system=None, force_terminal=False, highlight=False)
    with console.capture() as captured:
        console.print(table)
    return [line.rstrip() for line in captured.get().splitlines()]


def _stacked(choices: Sequence[Choice], width: int) -> list[str]:
    lines: list[str] = []
    for choice in choices:
        lines += textwrap.wrap(neutral(f"{choice.option}: {choice.value}"), width, subsequent_indent="  ")
        for text in (_why(choice), _alternative(choice)):
            lines += textwrap.wrap(neutral(text), width, initial_indent="  ", subsequent_indent="  ")
    return lines


def _why(choice: Choice) -> str:
    return f"asked for{'' if choice.why == 'asked for' else f': {choice.why}'}" if choice.pinned else choice.why


def _alternative(choice: Choice) -> str:
    """Return the predicted speed of the alternative value."""
    other = choice.alternative
    if other is None:
        return ""
    return f"{other.value}: " + ("does not fit" if other.tok_per_s is None else _tok_per_s(other.tok_per_s))
