"""A chat: messages in, text deltas out, and at the end of each answer a record of what it took.

The history is text. Every turn renders the whole chat anew and tokenizes it anew, so an answer depends on what can be
read above it and on nothing else; the engine finds out how much of that its caches still hold.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from threading import Event
from typing import TYPE_CHECKING, Literal, Protocol

from specchat.chat.answer import Answer, Delta, Speculation, Timings, Turn, Usage
from specchat.chat.reasoning import Parts, PlainText, ThinkTags
from specchat.chat.settings import Value, parse_value
from specchat.chat.state import (
    Answered,
    ChatRecord,
    ChatState,
    Cleared,
    Dropped,
    Exchange,
    How,
    Loaded,
    SystemSet,
    ThinkingSet,
    Undone,
    ValueSet,
    apply,
    state_of,
)
from specchat.chat.text import Detokenizer, StopStrings
from specchat.errors import EmptyPromptError, SessionError, UsageError
from specchat.records.chat import Message, Overflow, Setting
from specchat.records.generation import Activity, Sampling, Step
from specchat.records.plan import MemoryReport, Plan

if TYPE_CHECKING:
    from specchat.models.hf.tokenizer import Tokenizer

__all__ = ["ChatSession", "Delta", "Dropped", "Speculation", "Timings", "Turn", "Usage"]

# The share of the context from which on a user should know that it fills up.
CONTEXT_WARNING = 0.8
# With "drop-oldest", the part of the context that is made free for an answer.
_ANSWER_SHARE = 4


class Generator(Protocol):
    """The part of `specchat.engine.engine.Engine` that a chat uses."""

    @property
    def plan(self) -> Plan: ...

    @property
    def load_s(self) -> float: ...

    @property
    def activity(self) -> Activity: ...

    def generate(
        self,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        *,
        stop_ids: frozenset[int],
        max_tokens: int | None = None,
        cancel: Event | None = None,
    ) -> Iterator[Step]: ...

    def truncate(self, length: int) -> None: ...

    def memory(self) -> MemoryReport: ...

    def close(self) -> None: ...


def check_has_template(tokenizer: Tokenizer, *, base: bool) -> None:
    """Refuses to chat with a model that was not made for it.

    Raises:
        UsageError: there is no chat template and plain continuation was not asked for.
    """
    if not base and not tokenizer.has_chat_template:
        raise UsageError(
            "this model has no chat template: it continues texts and does not chat",
            hint="--base lets it continue the prompt as it stands",
        )


@dataclass(frozen=True)
class _Prompt:
    """What the engine reads for an answer.

    Attributes:
        before: exchanges above the question.
        question: the user's message.
        so_far: the answer that is continued, or None.
        text: all that as the template writes it.
        ids: its tokens.
    """

    before: tuple[Exchange, ...]
    question: str
    so_far: Message | None
    text: str
    ids: list[int]


class ChatSession:
    """The messages of a chat, and the model that answers them.

    Args:
        engine: generates tokens; its caches are this chat's.
        tokenizer: the target's.
        sampling: how tokens are drawn, seed included.
        stop_ids: tokens that end an answer.
        stop_texts: strings that end an answer and are cut off it.
        max_tokens: longest answer, or None for as long as the context allows.
        system: the system prompt, or None.
        base: continue text without a chat template.
        thinking: the template's switch for thinking, or None to leave it alone.
        overflow: what becomes of a chat that fills its context: "stop" refuses, "drop-oldest" leaves out old turns.
        exchanges: the chat so far, when one is resumed.
        sources: where settings come from, by name, for `settings`.
        journal: is told everything that happens to the chat, before the caller is.
        observe: is given the steps of every answer, and the temperature that it was drawn at.

    Raises:
        UsageError: no chat template and not `base`, or a system prompt with `base`.
    """

    def __init__(
        self,
        engine: Generator,
        tokenizer: Tokenizer,
        *,
        sampling: Sampling,
        stop_ids: frozenset[int],
        stop_texts: Sequence[str] = (),
        max_tokens: int | None = None,
        system: str | None = None,
        base: bool = False,
        thinking: bool | None = None,
        overflow: Overflow = "stop",
        exchanges: Sequence[Exchange] = (),
        sources: Mapping[str, str] | None = None,
        journal: Callable[[ChatRecord], None] | None = None,
        observe: Callable[[Sequence[Step], float], None] = lambda _steps, _temperature: None,
    ) -> None:
        check_has_template(tokenizer, base=base)
        if base and system is not None:
            raise UsageError("a system prompt needs a chat template, which --base leaves out")
        self.engine = engine
        self.overflow: Overflow = overflow
        self._state = ChatState(tuple(exchanges), system, sampling, max_tokens, thinking)
        self._tokenizer = tokenizer
        self._stop_ids = stop_ids
        self._stop_texts = tuple(stop_texts)
        self._base = base
        self._sources = dict(sources or {})
        self._journal = journal
        self._observe = observe

    # --- what there is -------------------------------------------------------------------------------------------

    @property
    def state(self) -> ChatState:
        """Everything the next answer depends on, besides the model."""
        return self._state

    @property
    def history(self) -> list[Message]:
        """Questions and answers so far, without the system prompt."""
        return self._state.messages

    @property
    def sampling(self) -> Sampling:
        """How first attempts are drawn."""
        return self._state.sampling

    @property
    def system(self) -> str | None:
        """The system prompt."""
        return self._state.system

    @property
    def thinking(self) -> bool | None:
        """The template's switch for thinking; None leaves it to the template."""
        return self._state.thinking

    @property
    def can_switch_thinking(self) -> bool:
        """Whether the model's template has a switch for thinking."""
        return not self._base and self._tokenizer.thinking_switch is not None

    @property
    def ctx(self) -> int:
        """Tokens that chat and answer can have together."""
        return self.engine.plan.work.ctx

    @property
    def context_used(self) -> int:
        """Tokens of the chat so far: what the next prompt starts with."""
        if not self._state.exchanges:
            return 0
        return len(self._encode(self._text(self._state.messages, "none")))

    @property
    def context_is_low(self) -> bool:
        """Whether the chat has come to the share of the context that is worth a warning."""
        return self.context_used >= CONTEXT_WARNING * self.ctx

    def settings(self) -> list[Setting]:
        """What answers are made with, and where each setting came from."""
        values = {**asdict(self._state.sampling), "max_tokens": self._state.max_tokens}
        shown = {
            **{key: _shown(value) for key, value in values.items()},
            "stop": " ".join(map(repr, self._stop_texts)) or "none",
            "system": self._state.system or "none",
            "think": {True: "on", False: "off", None: "as the template has it"}[self._state.thinking],
            "overflow": self.overflow,
        }
        return [Setting(name, value, self._sources.get(name, "default")) for name, value in shown.items()]

    def token_text(self, token_id: int) -> str:
        """A token by itself, as far as it is text; special tokens are shown, too."""
        return self._tokenizer.decode([token_id], skip_special_tokens=False)

    # --- answers -------------------------------------------------------------------------------------------------

    def ask(self, text: str, cancel: Event | None = None) -> Iterator[Delta | Dropped | Turn]:
        """Answers `text`: deltas as they come, then one `Turn`.

        A turn that is interrupted before its first token leaves no trace in the history; a later interrupt keeps the
        part that was written. An error leaves the history as it was. Old turns that must make room are announced first.

        Args:
            text: the user's message.
            cancel: set it to stop at the next layer.

        Raises:
            EmptyPromptError: there is nothing in `text`.
            UsageError: `text` has bytes in it that are no characters.
            PromptTooLongError: the chat leaves no room for an answer.
        """
        _check_text(text)
        return self._answer("ask", text, 0, cancel)

    def retry(self, cancel: Event | None = None) -> Iterator[Delta | Dropped | Turn]:
        """Answers the last question again, with draws of their own; the old answer goes when a token has come.

        Raises:
            UsageError: there is no answer yet.
        """
        last = self._last("there is no answer to try again")
        return self._answer("retry", last.question, last.attempt + 1, cancel)

    def edit(self, text: str, cancel: Event | None = None) -> Iterator[Delta | Dropped | Turn]:
        """Answers `text` in the place of the last question.

        Raises:
            EmptyPromptError: there is nothing in `text`.
            UsageError: there is no question yet, or `text` has bytes in it that are no characters.
        """
        self._last("there is no message to edit")
        _check_text(text)
        return self._answer("edit", text, 0, cancel)

    def continue_last(self, cancel: Event | None = None) -> Iterator[Delta | Dropped | Turn]:
        """Lets the model go on with its last answer, from where it ended.

        Raises:
            UsageError: there is no answer yet, or the template cannot show it unfinished.
        """
        last = self._last("there is no answer to continue")
        return self._answer("continue", last.question, last.attempt, cancel, last.answer)

    def undo(self) -> str:
        """Takes back the last question and its answer; the question.

        Raises:
            UsageError: there is none.
        """
        last = self._last("there is nothing to undo")
        self._record(Undone())
        return last.question

    def drop(self, num_exchanges: int) -> Dropped:
        """Leaves out the oldest exchanges from now on.

        Raises:
            UsageError: there are not that many.
        """
        num_all = len(self._state.exchanges)
        if not 1 <= num_exchanges <= num_all:
            raise UsageError(f"there {'is 1 turn' if num_all == 1 else f'are {num_all} turns'} to drop")
        questions = tuple(e.question for e in self._state.exchanges[:num_exchanges])
        dropped = Dropped(num_exchanges, "asked", questions)
        self._record(dropped)
        return dropped

    # --- changes -------------------------------------------------------------------------------------------------

    def clear(self) -> None:
        """Forgets every turn; the system prompt stays."""
        if self._state.exchanges:
            self._record(Cleared())

    def set_system(self, system: str | None) -> None:
        """Another system prompt from the next answer on, or none.

        Raises:
            UsageError: there is no template to put it in.
        """
        if self._base and system is not None:
            raise UsageError("a system prompt needs a chat template, which --base leaves out")
        self._record(SystemSet(system))
        self._sources["system"] = "/system"

    def set_sampling(self, key: str, value: str) -> Value | None:
        """Another value for a setting, from the next answer on; the value as understood.

        Args:
            key: a name from `specchat.chat.settings.KINDS`; dashes may stand for underscores.
            value: as typed; "none" takes a limit away.

        Raises:
            UsageError: there is no such setting (the hint has the nearest one), or it does not take that value.
        """
        name, parsed = parse_value(key, value)
        self._record(ValueSet(name, parsed))
        self._sources[name] = "/set"
        return parsed

    def set_thinking(self, thinking: bool | None) -> None:
        """Switches thinking on or off from the next answer on; None leaves it to the template.

        Raises:
            UsageError: the template has no such switch.
        """
        if not self.can_switch_thinking:
            raise UsageError("this model's chat template has no switch for thinking")
        self._record(ThinkingSet(thinking))
        self._sources["think"] = "/think"

    def load(self, records: Sequence[ChatRecord], source: str) -> None:
        """Another chat takes the place of this one: its turns and system prompt, under the settings of now.

        Args:
            records: of the other chat, from `transcript.read`.
            source: where they come from, for the session's file.
        """
        state = state_of(records)
        self._record(Loaded(state.exchanges, None if self._base else state.system, source))

    # --- within --------------------------------------------------------------------------------------------------

    def _record(self, record: ChatRecord) -> None:
        self._state = apply(self._state, record)
        if self._journal is not None:
            self._journal(record)

    def _last(self, complaint: str) -> Exchange:
        if not self._state.exchanges:
            raise UsageError(complaint)
        return self._state.exchanges[-1]

    def _answer(
        self, how: How, question: str, attempt: int, cancel: Event | None, so_far: Message | None = None
    ) -> Iterator[Delta | Dropped | Turn]:
        submitted = time.perf_counter()
        before = self._state.exchanges if how == "ask" else self._state.exchanges[:-1]
        prompt = self._prompt(before, question, so_far)
        while prompt.before and self._must_drop(len(prompt.ids)):
            dropped = Dropped(1, "overflow", (prompt.before[0].question,))
            self._record(dropped)
            yield dropped
            prompt = self._prompt(prompt.before[1:], question, so_far)
        answer = self._begin(prompt, submitted)
        sampling = self._state.sampling_of(attempt)
        steps = self.engine.generate(
            prompt.ids, sampling, stop_ids=self._stop_ids, max_tokens=self._state.max_tokens, cancel=cancel
        )
        with closing(steps):  # type: ignore[type-var]  # a generator, whose `close` typing.Iterator does not know
            for step in steps:
                yield from answer.take(step)
                if answer.cut_by_stop_string:
                    break
        if answer.cut_by_stop_string:
            self.engine.truncate(len(prompt.ids) + len(answer.token_ids))
        yield from answer.finish()
        turn = self._turn(answer, prompt)
        if turn.token_ids:
            exchange = Exchange(question, turn.message, attempt)
            facts = {**asdict(turn.usage), **asdict(turn.timings), **asdict(turn.speculation)}
            try:
                self._record(Answered(how, exchange, sampling.seed, turn.token_ids, turn.finish_reason, facts))
            except SessionError as error:  # the answer is there all the same
                turn = replace(turn, unsaved=error.message)
        self._observe(answer.steps, sampling.temperature)
        yield turn

    def _must_drop(self, num_prompt_tokens: int) -> bool:
        room = self.ctx // _ANSWER_SHARE
        room = min(room, self._state.max_tokens or room)
        return self.overflow == "drop-oldest" and num_prompt_tokens + room > self.ctx

    def _prompt(self, before: tuple[Exchange, ...], question: str, so_far: Message | None) -> _Prompt:
        messages = [*ChatState(before).messages, Message("user", question)]
        text = self._text(messages, "answer") if so_far is None else self._text([*messages, so_far], "continue")
        return _Prompt(before, question, so_far, text, self._encode(text))

    def _text(self, messages: Sequence[Message], ending: Literal["answer", "continue", "none"]) -> str:
        if self._base:
            return _running_text(messages)
        system = [] if self._state.system is None else [Message("system", self._state.system)]
        return self._tokenizer.render([*system, *messages], ending=ending, thinking=self._state.thinking)

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=self._base)

    def _begin(self, prompt: _Prompt, submitted: float) -> Answer:
        parser = None if self._base else self._tokenizer.response_parser(prompt.text)
        tags = PlainText() if self._base else _think_tags(prompt)
        return Answer(
            detokenizer=Detokenizer(self._tokenizer, skip_special_tokens=parser is None),
            parts=Parts(parser or tags, continuing=prompt.so_far is not None),
            stops=StopStrings(self._stop_texts),
            stop_ids=self._stop_ids,
            submitted=submitted,
        )

    def _turn(self, answer: Answer, prompt: _Prompt) -> Turn:
        assert answer.finish_reason is not None, "the engine's last step names a finish reason"
        so_far = prompt.so_far or Message("assistant", "")
        reasoning = (so_far.reasoning or "") + answer.text("reasoning")
        return Turn(
            message=Message("assistant", so_far.content + answer.text("answer"), reasoning or None),
            token_ids=tuple(answer.token_ids),
            finish_reason=answer.finish_reason,
            usage=answer.usage(len(prompt.ids)),
            timings=answer.timings(self.engine.load_s),
            speculation=answer.speculation(self.engine.plan.work.tree_budget),
            memory=self.engine.memory(),
        )


def _think_tags(prompt: _Prompt) -> ThinkTags:
    """Finds thinking in models without a parser of their own; where the prompt leaves off decides how it begins."""
    if prompt.so_far is not None:
        is_thinking = not prompt.so_far.content and bool(prompt.so_far.reasoning)
        return ThinkTags(opened=is_thinking, begun=not is_thinking)
    return ThinkTags(opened=prompt.text.rstrip().endswith("<think>"))


def _shown(value: Value | None) -> str:
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _check_text(text: str) -> None:
    if not text.strip():
        raise EmptyPromptError("the prompt is empty")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # how Python passes on arguments and keys that are not UTF-8
        raise UsageError("the prompt is not UTF-8 text") from error


def _running_text(messages: Sequence[Message]) -> str:
    """A base model's chat is one text that both sides write on; the user's later parts begin on lines of their own."""
    parts = [("\n" if i and m.role == "user" else "") + m.content for i, m in enumerate(messages)]
    return "".join(parts)
