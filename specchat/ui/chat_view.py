"""The output of a chat: banner, plan, streamed answers and their statistics."""

import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from threading import Event
from typing import Any

from specchat.chat.answer import Delta, Turn
from specchat.chat.session import ChatSession
from specchat.chat.state import Dropped, Exchange
from specchat.planner.explain import ExplainedPlan
from specchat.records.chat import Setting
from specchat.records.generation import Guesses, Step
from specchat.records.model import ModelSource
from specchat.records.plan import LedgerItem, Plan
from specchat.ui.answer_view import AnswerView
from specchat.ui.console import AnswerStream, Talk
from specchat.ui.devices_view import devices_line, use_lines
from specchat.ui.live import LiveRegion, can_redraw
from specchat.ui.loading import BackgroundLoad
from specchat.ui.markdown import tail_rows
from specchat.ui.placement_view import expert_lines, places_of, step_experts
from specchat.ui.plan_view import model_name, short_speed
from specchat.ui.rows import figures, hanging, wrapped
from specchat.ui.status import AnswerStatus, Watched, given_back_lines, memory_text
from specchat.ui.tree_view import tree_lines
from specchat.ui.worker import Worker
from specchat.units import GIB, MIB, format_bytes
from specchat.version import __version__

_POLL_S = 0.2
# Shorter times of a step are not shown.
_SHOWN_S = 0.0005
# Lines of a resumed chat that are shown again.
_QUESTION_LINES = 3
_ANSWER_LINES = 12


class ChatView:
    """The view of one chat.

    Args:
        out: stdout, for answers.
        talk: stderr, for everything else.
        verbose: initial value of the attribute.
        raw: whether to show answers as they are, without rendering Markdown.

    Attributes:
        verbose: whether to show a line and a draft tree for each step.
        shows_thinking: whether thinking stays on the screen; if false, finished thinking is folded.
    """

    def __init__(self, out: AnswerStream, talk: Talk, *, verbose: bool = False, raw: bool = False) -> None:
        self.out = out
        self.talk = talk
        self.verbose = verbose
        self.shows_thinking = False
        self._raw = raw

    def banner(self, target: ModelSource, chosen: ExplainedPlan, draft_note: str, *, details: str = "--plan") -> None:
        """Show model, draft, memory and predicted speed, before anything is loaded.

        Args:
            target: source of the target.
            chosen: plan of the target, with reasons.
            draft_note: text to show if there is no draft.
            details: flag or command that shows the whole plan.
        """
        for line in banner_lines(target, chosen, draft_note, details):
            self._say_figures(line)

    def suggest(self, prompts: Sequence[str]) -> None:
        """Show messages that a new user may try."""
        self._say_figures("try: " + " · ".join(prompts))

    def _say_figures(self, line: str) -> None:
        for each in figures(line, self.talk.width):
            self.talk.say(each, "dim")

    def recall(self, exchange: Exchange) -> None:
        """Show the last question and answer of a resumed chat, dimmed; of a long one, the ends that matter."""
        for line in recalled_lines(exchange):
            self.talk.say(line, "dim")

    def follow(
        self,
        session: ChatSession,
        records: Iterator[Delta | Dropped | Turn],
        cancel: Event,
        write: Callable[[Delta], None] | None = None,
    ) -> Turn:
        """Show an answer until it ends, and return its turn; generation runs in a separate thread.

        Args:
            session: chat that generates the answer.
            records: iterator from a method of `session`, such as `ask`.
            cancel: event that was passed to that method.
            write: replacement for the default display of deltas; None for the default.

        Raises:
            SpecchatError: the answer failed.
            KeyboardInterrupt: Ctrl-C was pressed twice.
        """
        engine = session.engine
        status = AnswerStatus(Watched(engine.plan, lambda: engine.activity, engine.memory), cancel)
        shown = AnswerView(
            self.out,
            self.talk,
            raw=self._raw,
            folds_thinking=not self.shows_thinking,
            status=status.line,
            owns_text=write is None,
        )
        follower = _Follower(shown, status, write, self.talk, self._steps_shown(session))
        try:
            with Worker(records, cancel) as worker:
                return follower.follow(worker)
        finally:
            follower.end()

    def wait_for(self, load: BackgroundLoad[Any], cancel: Event) -> None:
        """Wait until the model is loaded or the user cancels, and show the progress of loading."""
        if load.is_done:
            return
        if self.talk.quiet or not can_redraw(self.talk.stream):
            self.talk.say("loading the model", "dim")
            while not load.wait(_POLL_S) and not cancel.is_set():
                pass
            return
        region = LiveRegion(self.talk.stream)
        try:
            while not load.wait(_POLL_S) and not cancel.is_set():
                region.update(tail_rows(load.reporter.line(), region.size()[0], 1, "dim"))
        finally:
            region.clear()

    def end(self, turn: Turn, plan: Plan) -> None:
        """Show the line under an answer, and its warnings."""
        self.out.end_line()
        self._say_figures(stopped_line(turn) if turn.finish_reason == "interrupt" else stats_line(turn, plan))
        for line in use_lines(turn.memory) if self.verbose else ():
            self._say_figures(line)
        if turn.unsaved is not None:
            self.talk.error(turn.unsaved, None)
        if turn.finish_reason == "context":
            self.talk.warn(
                f"answer cut off: the context of {plan.work.ctx:,} tokens is full; "
                "free space with /clear or /drop N, or restart with a larger --ctx"
            )

    def _steps_shown(self, session: ChatSession) -> Callable[[int, Step], None] | None:
        if not self.verbose:
            return None

        def show(number: int, step: Step) -> None:
            unseen = "" if step.tree is not None else "".join(map(session.token_text, step.token_ids))
            self.talk.say(step_line(number, step, self.talk.width, unseen), "dim")
            if step.tree is not None:
                for line in tree_lines(step.tree, step.token_ids, session.token_text, self.talk.console.width - 1):
                    self.talk.say_styled(line)

        return show


class _Follower:
    """The loop that takes an answer's records from the worker and passes them to the view."""

    def __init__(
        self,
        shown: AnswerView,
        status: AnswerStatus,
        write: Callable[[Delta], None] | None,
        talk: Talk,
        show_step: Callable[[int, Step], None] | None,
    ) -> None:
        self._shown = shown
        self._status = status
        self._write = write
        self._talk = talk
        self._show_step = show_step
        self._num_steps = 0
        self._num_thought_tokens = 0
        self._began_thinking_s: float | None = None

    def follow(self, worker: Worker[Delta | Dropped | Turn]) -> Turn:
        """Show records until the turn arrives, and return it."""
        while True:
            self._shown.draw()
            record = worker.next(self._shown.next_draw_in_s())
            match record:
                case Turn():
                    return record
                case Delta():
                    self._take(record)
                case Dropped():
                    self._shown.interlude(partial(self._talk.warn, dropped_line(record)))

    def end(self) -> None:
        """Complete the thinking and the text on the screen."""
        self._end_thinking()
        self._shown.end()

    def _take(self, delta: Delta) -> None:
        self._status.saw(len(delta.token_ids), delta.step)
        if delta.step is not None and delta.step.warning is not None:
            self._shown.interlude(partial(self._talk.warn, delta.step.warning))
        if self._write is not None:
            self._shown.elsewhere(partial(self._write, delta))
        elif delta.part == "reasoning":
            self._take_thinking(delta)
        else:
            if delta.text:
                self._end_thinking()
            self._shown.write(delta.text)
        if delta.step is not None and self._show_step is not None:
            self._num_steps += 1
            self._shown.interlude(partial(self._show_step, self._num_steps, delta.step))

    def _take_thinking(self, delta: Delta) -> None:
        if delta.text.strip() and self._began_thinking_s is None:
            self._began_thinking_s = self._status.elapsed_s
        self._num_thought_tokens += len(delta.token_ids)
        if self._began_thinking_s is not None:
            self._shown.think(delta.text)

    def _end_thinking(self) -> None:
        if self._began_thinking_s is None:
            return
        seconds = self._status.elapsed_s - self._began_thinking_s
        self._began_thinking_s = None
        self._shown.end_thinking(f"thought {seconds:.0f} s, {self._num_thought_tokens:,} tok")


# --- lines -------------------------------------------------------------------------------------------------------


def banner_lines(target: ModelSource, chosen: ExplainedPlan, draft_note: str, details: str) -> list[str]:
    """Return the banner: model, draft, dtype, device, weights; then memory, context and the predicted speed."""
    plan = chosen.plan
    facts = [
        model_name(target, plan),
        _draft(plan) if plan.draft else draft_note,
        f"{plan.work.dtype} on {plan.work.device}",
    ]
    if plan.quant != "none":
        facts.append(_weights(plan))
    places = places_of(plan, _memory_name(plan.work.device))
    return [
        " · ".join([f"specchat {__version__}", *facts]),
        f"{places} · context {plan.work.ctx:,} · {short_speed(chosen.prediction)} (details: {details})",
    ]


def _weights(plan: Plan) -> str:
    """Return the precision of the weights; if it was lowered automatically, also the flag that keeps the original."""
    if plan.lowered_from is None:
        return f"weights {plan.quant}"
    return f"weights {plan.quant}, not the original {plan.lowered_from} (keep it with --quant none)"


def _draft(plan: Plan) -> str:
    quant = f" ({plan.draft_quant})" if plan.draft_quant != "none" else ""
    return f"draft {plan.draft}{quant}{' + retrieval' if plan.retrieval else ''}"


def plan_lines(plan: Plan, width: int) -> list[str]:
    """Return the memory use and the streaming of a plan for /info, in lines that break between the figures."""
    return [row for line in figures(plan_line(plan), width) for row in wrapped(line, max(width - 1, 20))]


def plan_line(plan: Plan) -> str:
    """Return the memory use and the streaming of a plan in one line."""
    if plan.devices:
        return devices_line(plan)
    unit = _unit(plan.device_bytes)
    shares = ", ".join(f"{name} {_scaled(size, unit)}{note}" for name, size, note in _shares(plan))
    total = f"{_scaled(plan.device_bytes, unit)} {_unit_name(unit)} of {format_bytes(plan.vram_bytes)}"
    if _unit(plan.vram_bytes) == unit:
        total = f"{_scaled(plan.device_bytes, unit)}/{format_bytes(plan.vram_bytes)}"
    streamed = (
        f"streamed {format_bytes(plan.streamed_bytes_per_step)}/pass" if plan.placement.streams else "nothing streamed"
    )
    return f"{_memory_name(plan.work.device)} {total} ({shares}) · {streamed}"


def stats_line(turn: Turn, plan: Plan) -> str:
    """Return the statistics of an answer in one line."""
    usage, timings = turn.usage, turn.timings
    new = usage.prompt_tokens - usage.cached_tokens
    used = usage.prompt_tokens + usage.completion_tokens
    return " · ".join(
        [
            f"{usage.completion_tokens:,} tok",
            f"{timings.tok_per_s:.1f} tok/s",
            f"{turn.speculation.tokens_per_step:.1f} tok/pass",
            f"TTFT {timings.ttft_s:.1f} s",
            f"prompt {new:,} new + {usage.cached_tokens:,} cached tok",
            f"context {used:,}/{plan.work.ctx:,} tok",
            memory_text(turn.memory, plan.work.device),
        ]
    )


def totals_lines(turns: Sequence[Turn], plan: Plan) -> list[str]:
    """Return the totals over all answers, then the statistics of the last one."""
    num_tokens = sum(turn.usage.completion_tokens for turn in turns)
    num_steps = sum(turn.speculation.steps for turn in turns)
    ttft_s = sum(turn.timings.ttft_s for turn in turns)
    decode_s = sum(turn.timings.decode_s for turn in turns)
    draft_s, verify_s, wait_s = (
        sum(getattr(turn.timings, name) for turn in turns) for name in ("draft_s", "verify_s", "stream_wait_s")
    )
    answers = "1 answer" if len(turns) == 1 else f"{len(turns)} answers"
    return [
        f"{answers} · {num_tokens:,} tok · {num_tokens / max(ttft_s + decode_s, 1e-9):.1f} tok/s · "
        f"{num_tokens / max(num_steps, 1):.1f} tok/pass",
        f"time: {ttft_s:.1f} s until first tokens (TTFT), {decode_s:.1f} s decoding",
        f"of this: {verify_s:.1f} s in target passes ({wait_s:.1f} s waiting for layers), {draft_s:.1f} s drafting",
        *_source_lines(turns, num_steps),
        *given_back_lines(turns[-1].memory),
        *expert_lines(turns[-1].memory, plan),
        *use_lines(turns[-1].memory),
        f"last answer: {stats_line(turns[-1], plan)}",
    ]


def _source_lines(turns: Sequence[Turn], num_steps: int) -> list[str]:
    """Return one line for each source of draft nodes: nodes and accepted nodes of a mean pass, and its time."""
    totals, steps = dict[str, Guesses](), max(num_steps, 1)
    for each in (guesses for turn in turns for guesses in turn.speculation.by_source):
        totals[each.source] = totals.get(each.source, Guesses(each.source, 0, 0)).plus(each)
    return [
        f"drafted by {each.source}: {each.offered / steps:.1f} tok/pass, {each.accepted / steps:.2f} accepted, "
        f"{1e3 * each.draft_s / steps:.1f} ms"
        for each in totals.values()
    ]


def info_lines(settings: Sequence[Setting], width: int) -> list[str]:
    """Return one aligned line per setting: name, value and source; on a narrow terminal the source stands below."""
    names = max((len(setting.name) for setting in settings), default=0)
    values = [_short(setting.value, 60) for setting in settings]
    column = max(map(len, values), default=0)
    lines = [f"{s.name:<{names}}  {value:<{column}}  {s.source}" for s, value in zip(settings, values, strict=True)]
    if max(map(len, lines), default=0) < width:
        return lines
    narrow = [f"{s.name} {value} ({s.source})" for s, value in zip(settings, values, strict=True)]
    return [row for line in narrow for row in hanging(line, max(width - 1, 20))]


def stopped_line(turn: Turn) -> str:
    """Return the statistics of an interrupted answer in one line."""
    if not turn.token_ids:
        return "^C stopped before the first token · nothing kept"
    return f"^C stopped · {turn.usage.completion_tokens:,} tok · {turn.timings.tok_per_s:.1f} tok/s"


def recalled_lines(exchange: Exchange) -> list[str]:
    """Return the start of a question and the end of its answer."""
    question = exchange.question.strip().splitlines()
    answer = exchange.answer.content.strip().splitlines()
    first = [f"{'  ' if i else '> '}{line}" for i, line in enumerate(question[:_QUESTION_LINES])]
    first += ["  …"] if len(question) > _QUESTION_LINES else []
    last = ["…"] if len(answer) > _ANSWER_LINES else []
    return [*first, "", *last, *answer[-_ANSWER_LINES:]]


def dropped_line(dropped: Dropped) -> str:
    """Return the announcement of dropped turns."""
    turns = "turn" if dropped.num_exchanges == 1 else f"{dropped.num_exchanges} turns"
    quoted = "; ".join(f'"{_short(question)}"' for question in dropped.questions)
    return f"context full: dropped the oldest {turns}" + (f" ({quoted})" if quoted else "")


def _short(text: str, max_chars: int = 40) -> str:
    line = " ".join(text.split())
    return line if len(line) <= max_chars else f"{line[: max_chars - 1]}…"


def step_line(number: int, step: Step, width: int | None = None, text: str = "") -> str:
    """Return the figures of one step in one line, for --verbose; times of what did not happen are left out.

    Args:
        number: number of the step, from 1.
        step: the step.
        width: columns of the terminal; figures that do not fit are left out. None for no limit.
        text: text of a step without a tree, which would not be seen otherwise.
    """
    line = f"step {number}: {len(step.token_ids)} tok{_quoted(text)}"
    times = (("draft", step.draft_s), ("verify", step.verify_s), ("waiting", step.stream_wait_s))
    for part in (
        _tree(step),
        f"{step.pass_s:.3f} s",
        ", ".join(f"{name} {seconds:.3f} s" for name, seconds in times if seconds >= _SHOWN_S),
        f"streamed {format_bytes(step.streamed_bytes)}" if step.streamed_bytes else "",
        step_experts(step),
        f"{step.new_rows:,} new + {step.cached_rows:,} cached rows",
        f"sample {step.sample_s:.3f} s",
    ):
        longer = f"{line} · {part}" if part else line
        if width is not None and len(longer) >= width:
            break
        line = longer
    return line


def _quoted(text: str) -> str:
    return f" {json.dumps(text, ensure_ascii=False)}" if text else ""


def _tree(step: Step) -> str:
    if not step.tree_nodes:
        return "no draft tree"
    nodes = "1 node" if step.tree_nodes == 1 else f"{step.tree_nodes} nodes"
    return f"tree {nodes}, depth {step.depth}, {step.accepted} accepted"


def _shares(plan: Plan) -> list[tuple[str, int, str]]:
    """Return the ledger summed to the items of the plan line: name, bytes, note."""
    sums = {"resident": 0, "draft": 0, "KV": 0, "work": 0}
    for item in plan.ledger:
        sums[_share(item)] += item.bytes
    notes = {"KV": f" @{plan.work.ctx}"}
    return [(name, size, notes.get(name, "")) for name, size in sums.items() if size]


def _share(item: LedgerItem) -> str:
    name = item.item.lower()
    if "kv" in name:
        return "KV"
    if name == "draft":
        return "draft"
    return "resident" if "resident" in name or "embedding" in name or name in ("head", "shared blocks") else "work"


def _memory_name(device: str) -> str:
    return "RAM" if device == "cpu" else "VRAM"


def _unit(num_bytes: int) -> int:
    return GIB if num_bytes >= GIB else MIB


def _unit_name(unit: int) -> str:
    return "GiB" if unit == GIB else "MiB"


def _scaled(num_bytes: int, unit: int) -> str:
    return f"{num_bytes / unit:.1f}"
