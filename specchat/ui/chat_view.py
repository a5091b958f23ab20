"""What a person sees of a run: banner, plan, the streaming answer, its statistics."""

from collections.abc import Callable, Iterable, Sequence

from specchat import __version__
from specchat.chat.session import Delta, Turn
from specchat.config import LedgerItem, MemoryReport, ModelSource, Plan, Step
from specchat.ui.console import AnswerStream, Talk
from specchat.units import GIB, MIB, format_bytes


class ChatView:
    """Shows one chat.

    Args:
        out: where answers go.
        talk: where everything else goes.
        verbose: also show each step.
    """

    def __init__(self, out: AnswerStream, talk: Talk, *, verbose: bool = False) -> None:
        self.out = out
        self.talk = talk
        self._verbose = verbose

    def banner(self, target: ModelSource, plan: Plan, draft_note: str) -> None:
        """Model, draft and plan, before anything is loaded."""
        for line in banner_lines(target, plan, draft_note):
            self.talk.say(line, "dim")

    def write(self, delta: Delta) -> None:
        """The next piece of an answer."""
        self.out.write(delta.text)

    def show(self, records: Iterable[Delta | Turn], write: Callable[[Delta], None]) -> Turn:
        """Follows an answer to its end.

        Args:
            records: from `ChatSession.ask`.
            write: shows a piece of the answer.
        """
        num_steps = 0
        for record in records:
            if isinstance(record, Turn):
                return record
            write(record)
            if self._verbose and record.step is not None:
                num_steps += 1
                self.talk.say(step_line(num_steps, record.step), "dim")
        raise AssertionError("the last record of an answer is its turn")

    def end(self, turn: Turn, plan: Plan) -> None:
        """The line under an answer."""
        self.out.end_line()
        self.talk.say(stopped_line(turn) if turn.finish_reason == "interrupt" else stats_line(turn, plan), "dim")
        if turn.finish_reason == "context":
            self.talk.warn(
                f"the context of {plan.ctx:,} tokens is full, so the answer ends here; "
                "/clear starts a chat over, --ctx makes room where the model allows"
            )


# --- lines -------------------------------------------------------------------------------------------------------


def banner_lines(target: ModelSource, plan: Plan, draft_note: str) -> list[str]:
    """What will answer, with which helper, and where it all goes."""
    model = f"{target.name} ({target.label})" if target.label else target.name
    draft = f"draft {plan.draft}" if plan.draft else draft_note
    return [f"specchat {__version__} · {model} · {draft} · {plan.dtype} on {plan.device}", plan_line(plan)]


def plan_line(plan: Plan) -> str:
    """The plan in one line; no speed in it, for none was measured."""
    unit = _unit(plan.device_bytes)
    shares = ", ".join(f"{name} {_scaled(size, unit)}{note}" for name, size, note in _shares(plan))
    total = f"{_scaled(plan.device_bytes, unit)} {_unit_name(unit)} of {format_bytes(plan.device_budget_bytes)}"
    if _unit(plan.device_budget_bytes) == unit:
        total = f"{_scaled(plan.device_bytes, unit)}/{format_bytes(plan.device_budget_bytes)}"
    streamed = f"streamed {format_bytes(plan.streamed_bytes_per_step)}/pass" if plan.streamed else "nothing streamed"
    return f"{_memory_name(plan.device)} {total} ({shares}) · {streamed}"


def stats_line(turn: Turn, plan: Plan) -> str:
    """What an answer took."""
    usage, timings = turn.usage, turn.timings
    new = usage.prompt_tokens - usage.cached_tokens
    used = usage.prompt_tokens + usage.completion_tokens
    return " · ".join(
        [
            f"{usage.completion_tokens:,} tok",
            f"{timings.tok_per_s:.1f} tok/s",
            f"{turn.speculation.tokens_per_step:.1f} tok/pass",
            f"TTFT {timings.ttft_s:.1f} s",
            f"prompt {new:,} new + {usage.cached_tokens:,} cached",
            f"ctx {used:,}/{plan.ctx:,}",
            _memory_in_use(turn.memory, plan.device),
        ]
    )


def stopped_line(turn: Turn) -> str:
    """What an interrupted answer had come to."""
    if not turn.token_ids:
        return "^C stopped before the first token · nothing was kept"
    return f"^C stopped · {turn.usage.completion_tokens:,} tok · {turn.timings.tok_per_s:.1f} tok/s"


def step_line(number: int, step: Step) -> str:
    """One pass, for --verbose."""
    return " · ".join(
        [
            f"step {number}: {len(step.token_ids)} tok",
            f"tree {step.tree_nodes} nodes, depth {step.depth}, {step.accepted} accepted",
            f"{step.new_rows:,} new + {step.cached_rows:,} cached rows",
            f"{step.pass_s:.3f} s (draft {step.draft_s:.3f}, verify {step.verify_s:.3f} with {step.stream_wait_s:.3f} "
            f"waiting, sample {step.sample_s:.3f})",
            f"streamed {format_bytes(step.streamed_bytes)}",
        ]
    )


def plan_table(target: ModelSource, plan: Plan, draft_note: str) -> str:
    """The plan in full, as `--plan` prints it."""
    facts = [
        ("model", f"{target.name} ({target.label})" if target.label else target.name),
        ("draft", plan.draft or draft_note),
        ("device", f"{plan.device}, {plan.dtype}, quant {plan.quant}"),
        ("context", f"{plan.ctx:,} tokens"),
        ("tree budget", f"{plan.tree_budget:,} draft nodes"),
        ("layers", _layers(plan)),
    ]
    if plan.streamed:
        place = "host memory" if plan.tier == "ram" else "the disk"
        facts.append(("streamed from", f"{place}, {format_bytes(plan.streamed_bytes_per_step)} a pass"))
    if plan.host_bytes:
        facts.append(("host memory", format_bytes(plan.host_bytes)))
    memory = _memory_name(plan.device)
    ledger = [
        *((item.item, format_bytes(item.bytes)) for item in plan.ledger),
        ("sum", f"{format_bytes(plan.device_bytes)} of {format_bytes(plan.device_budget_bytes)}"),
        ("without weights", f"{format_bytes(plan.generation_bytes)}, the memory that generating takes"),
    ]
    return "\n".join([*_columns(facts), "", f"{memory}:", *_columns(ledger, indent="  ")])


def _layers(plan: Plan) -> str:
    if not plan.streamed:
        return f"{plan.num_layers}, all resident"
    size = format_bytes(plan.streamed_bytes_per_step)
    return f"{len(plan.resident)} resident, {len(plan.streamed)} streamed through {plan.slots} slots, {size} each pass"


def _columns(rows: Sequence[tuple[str, str]], indent: str = "") -> list[str]:
    width = max(len(name) for name, _ in rows)
    return [f"{indent}{name:<{width}}  {value}" for name, value in rows]


def _shares(plan: Plan) -> list[tuple[str, int, str]]:
    """The ledger in the few words of the plan line."""
    sums = {"resident": 0, "draft": 0, "KV": 0, "work": 0}
    for item in plan.ledger:
        sums[_share(item)] += item.bytes
    notes = {"KV": f" @{plan.ctx}"}
    return [(name, size, notes.get(name, "")) for name, size in sums.items() if size]


def _share(item: LedgerItem) -> str:
    name = item.item.lower()
    if "kv" in name:
        return "KV"
    if name == "draft":
        return "draft"
    return "resident" if "resident" in name or "embedding" in name else "work"


def _memory_in_use(memory: MemoryReport, device: str) -> str:
    if device == "cpu":
        return f"RAM {_gib(memory.device_peak_bytes)}"
    return f"VRAM {_gib(memory.device_peak_bytes)} · RAM {_gib(memory.host_peak_bytes)}"


def _gib(num_bytes: int) -> str:
    """GiB without the unit, as on the stats line; less than one says its unit."""
    return f"{num_bytes / GIB:.1f}" if num_bytes >= GIB else format_bytes(num_bytes)


def _memory_name(device: str) -> str:
    return "RAM" if device == "cpu" else "VRAM"


def _unit(num_bytes: int) -> int:
    return GIB if num_bytes >= GIB else MIB


def _unit_name(unit: int) -> str:
    return "GiB" if unit == GIB else "MiB"


def _scaled(num_bytes: int, unit: int) -> str:
    return f"{num_bytes / unit:.1f}"
