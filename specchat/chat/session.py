"""A chat session: messages in, text deltas out, and one record per finished answer.

The history is text. Every turn renders and tokenizes the whole chat again, so an answer depends only on the visible
text above it. The engine finds out which prefix of the prompt its KV caches still hold.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from threading import Event
from typing import TYPE_CHECKING, Literal

from specchat.chat.answer import Answer, Delta, Turn
from specchat.chat.generator import Generator
from specchat.chat.prompt import Prompt, check_has_template, check_text, ending_after, running_text
from specchat.chat.reasoning import Parts, PlainText
from specchat.chat.settings import parse_value, shown_values
from specchat.chat.state import (
    Answered,
    ChatRecord,
    ChatState,
    Cleared,
    Dropped,
    Exchange,
    How,
    Loaded,
    Rewritten,
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
from specchat.records.generation import Sampling, Step

if TYPE_CHECKING:
    from specchat.models.hf.tokenizer import Tokenizer


# Warn the user once this share of the context is in use.
CONTEXT_WARNING = 0.8
# With "drop-oldest", 1/4 of the context is kept free for the answer.
_ANSWER_SHARE = 4


class ChatSession:
    """The messages of a chat, and the model that answers them.

    Args:
        engine: engine that generates tokens; its KV caches belong to this chat.
        tokenizer: tokenizer of the target.
        sampling: sampling settings, seed included.
        stop_ids: tokens that end an answer.
        stop_texts: strings that end an answer and are removed from it.
        max_tokens: maximum tokens of an answer; None for as many as the context allows.
        system: system prompt, or None.
        base: whether to continue text without a chat template.
        thinking: the template's switch for thinking; None keeps the template's default.
        overflow: policy for a full context; "stop" refuses the message, "drop-oldest" drops old turns.
        exchanges: exchanges of a resumed chat.
        sources: source of each setting by name, for `settings`.
        journal: receives each record of the chat before the caller sees its effect.
        observe: receives the steps of every answer and the temperature of its sampling.

    Raises:
        UsageError: the model has no chat template and `base` is false, or `base` comes with a system prompt.
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
            raise UsageError("a system prompt needs a chat template, which --base does not use")
        self.engine = engine
        self._state = ChatState(tuple(exchanges), system, sampling, max_tokens, thinking, tuple(stop_texts), overflow)
        self._tokenizer = tokenizer
        self._stop_ids = stop_ids
        self._base = base
        self._sources = dict(sources or {})
        self._journal = journal
        self._observe = observe
        self._num_last = 0  # tokens of the last prompt and its answer

    # --- state ---------------------------------------------------------------------------------------------------

    @property
    def state(self) -> ChatState:
        """State of the chat: everything that the next answer depends on, except the model."""
        return self._state

    @property
    def history(self) -> list[Message]:
        """Questions and answers so far, without the system prompt."""
        return self._state.messages

    @property
    def sampling(self) -> Sampling:
        """Sampling settings of first attempts."""
        return self._state.sampling

    @property
    def system(self) -> str | None:
        """The system prompt."""
        return self._state.system

    @property
    def thinking(self) -> bool | None:
        """The template's switch for thinking; None keeps the template's default."""
        return self._state.thinking

    @property
    def can_switch_thinking(self) -> bool:
        """Whether the model's template has a switch for thinking."""
        return not self._base and self._tokenizer.thinking_switch is not None

    @property
    def ctx(self) -> int:
        """Maximum tokens of chat and answer together."""
        return self.engine.plan.work.ctx

    @property
    def context_used(self) -> int:
        """Tokens of the chat so far, with which the next prompt starts."""
        if not self._state.exchanges:
            return 0
        try:
            return len(self._encode(self._text(self._state.messages, "none")))
        except UsageError:  # some templates only render chats that end with a question
            return self._num_last

    @property
    def context_is_low(self) -> bool:
        """Whether the chat fills the context to `CONTEXT_WARNING` or more."""
        return self.context_used >= CONTEXT_WARNING * self.ctx

    def count_tokens(self, text: str) -> int:
        """Return the number of tokens of a text."""
        return len(self._encode(text))

    def settings(self) -> list[Setting]:
        """Return the settings of the next answer and the source of each."""
        shown = shown_values(self._state)
        return [Setting(name, value, self._sources.get(name, "default")) for name, value in shown.items()]

    def token_text(self, token_id: int) -> str:
        """Return the text of one token; special tokens are shown, too."""
        return self._tokenizer.decode([token_id], skip_special_tokens=False)

    # --- answers -------------------------------------------------------------------------------------------------

    def ask(self, text: str, cancel: Event | None = None) -> Iterator[Delta | Dropped | Turn]:
        """Answer `text`: yield deltas during generation, then one `Turn`.

        An interrupt before the first token leaves the history unchanged; a later one keeps the partial answer. An error
        leaves the history unchanged. Old turns that are dropped to make room are yielded first.

        Args:
            text: message of the user.
            cancel: event that stops generation at the next layer.

        Raises:
            EmptyPromptError: `text` is blank.
            UsageError: `text` is not valid UTF-8.
            PromptTooLongError: the chat leaves no room for an answer in the context.
        """
        check_text(text)
        return self._answer("ask", text, 0, cancel)

    def retry(self, cancel: Event | None = None) -> Iterator[Delta | Dropped | Turn]:
        """Answer the last question again with a new seed; the first new token replaces the old answer.

        Raises:
            UsageError: there is no answer yet.
        """
        last = self._last("no answer to retry")
        return self._answer("retry", last.question, last.attempt + 1, cancel)

    def edit(self, text: str, cancel: Event | None = None) -> Iterator[Delta | Dropped | Turn]:
        """Answer `text` in place of the last question.

        Raises:
            EmptyPromptError: `text` is blank.
            UsageError: there is no question yet, or `text` is not valid UTF-8.
        """
        self._last("no message to edit")
        check_text(text)
        return self._answer("edit", text, 0, cancel)

    def continue_last(self, cancel: Event | None = None) -> Iterator[Delta | Dropped | Turn]:
        """Continue the last answer from its end.

        Raises:
            UsageError: there is no answer yet, or the template cannot render an unfinished answer.
        """
        last = self._last("no answer to continue")
        return self._answer("continue", last.question, last.attempt, cancel, last.answer)

    def undo(self) -> str:
        """Remove the last question and its answer, and return the question.

        Raises:
            UsageError: the chat is empty.
        """
        last = self._last("nothing to undo")
        self._record(Undone())
        return last.question

    def drop(self, num_exchanges: int) -> Dropped:
        """Drop the oldest exchanges from the chat.

        Raises:
            UsageError: the chat has fewer exchanges.
        """
        num_all = len(self._state.exchanges)
        if not 1 <= num_exchanges <= num_all:
            raise UsageError(f"the chat has {'1 turn' if num_all == 1 else f'{num_all} turns'} to drop")
        questions = tuple(e.question for e in self._state.exchanges[:num_exchanges])
        dropped = Dropped(num_exchanges, "asked", questions)
        self._record(dropped)
        return dropped

    def rewrite(self, text: str) -> None:
        """Replace the text of the last answer; the thinking before it goes.

        Raises:
            UsageError: there is no answer yet.
            EmptyPromptError: `text` is blank.
        """
        self._last("no answer to edit")
        check_text(text)
        self._record(Rewritten(text))

    # --- changes -------------------------------------------------------------------------------------------------

    def clear(self) -> None:
        """Drop every turn and keep the system prompt."""
        if self._state.exchanges:
            self._record(Cleared())

    def set_system(self, system: str | None) -> None:
        """Set or remove the system prompt for the next answers.

        Raises:
            UsageError: the chat uses no chat template.
        """
        if self._base and system is not None:
            raise UsageError("a system prompt needs a chat template, which --base does not use")
        self._record(SystemSet(system))
        self._sources["system"] = "/system"

    def set_value(self, key: str, value: str) -> Setting:
        """Change a setting for the next answers, and return it as `settings` shows it.

        Args:
            key: name from `specchat.chat.settings.SETTABLE`; dashes are read as underscores.
            value: value as typed; "none" removes a limit or a text.

        Raises:
            UsageError: the setting is unknown (the hint names the closest one), or the value is not allowed.
        """
        name, parsed = parse_value(key, value)
        match name, parsed:
            case "system", None | str():
                self.set_system(parsed)
            case "think", None | bool():
                self.set_thinking(parsed)
            case _:
                self._record(ValueSet(name, parsed))
        self._sources[name] = "/set"
        return Setting(name, shown_values(self._state)[name], "/set")

    def set_thinking(self, thinking: bool | None) -> None:
        """Switch thinking on or off for the next answers; None restores the template's default.

        Raises:
            UsageError: the template has no switch for thinking.
        """
        if not self.can_switch_thinking:
            raise UsageError("this model's chat template has no switch for thinking")
        self._record(ThinkingSet(thinking))
        self._sources["think"] = "/think"

    def load(self, records: Sequence[ChatRecord], source: str) -> None:
        """Replace this chat's turns and system prompt with another chat's; the current settings stay.

        Args:
            records: records of the other chat, from `transcript.read`.
            source: origin of the records, for the session's file.
        """
        state = state_of(records)
        self._record(Loaded(state.exchanges, None if self._base else state.system, source))

    # --- internals -----------------------------------------------------------------------------------------------

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
            prompt.ids,
            sampling,
            stop_ids=self._stop_ids,
            max_tokens=self._state.max_tokens,
            cancel=cancel,
            restore_at=prompt.restore_at,
        )
        with closing(steps):  # type: ignore[type-var]  # a generator, whose `close` typing.Iterator does not know
            for step in steps:
                yield from answer.take(step)
                if answer.cut_by_stop_string:
                    break
        if answer.cut_by_stop_string:
            self.engine.truncate(len(prompt.ids) + len(answer.token_ids))
        yield from answer.finish()
        self._num_last = len(prompt.ids) + len(answer.token_ids)
        turn = self._turn(answer, prompt)
        if turn.token_ids:
            exchange = Exchange(question, turn.message, attempt)
            facts = {**asdict(turn.usage), **asdict(turn.timings), **asdict(turn.speculation)}
            del facts["by_source"]  # only sums are kept
            try:
                self._record(Answered(how, exchange, sampling.seed, turn.token_ids, turn.finish_reason, facts))
            except SessionError as error:  # the answer itself is complete
                turn = replace(turn, unsaved=error.message)
        self._observe(answer.steps, sampling.temperature)
        yield turn

    def _must_drop(self, num_prompt_tokens: int) -> bool:
        room = self.ctx // _ANSWER_SHARE
        room = min(room, self._state.max_tokens or room)
        return self._state.overflow == "drop-oldest" and num_prompt_tokens + room > self.ctx

    def _prompt(self, before: tuple[Exchange, ...], question: str, so_far: Message | None) -> Prompt:
        messages = [*ChatState(before).messages, Message("user", question)]
        if so_far is not None:
            return self._encoded(Prompt(before, question, so_far, self._text([*messages, so_far], "continue"), []))
        text = self._text(messages, "answer")
        ending = ending_after(self._text(messages, "none"), text)
        ending_ids = self._encode(ending) if ending else ()
        return self._encoded(Prompt(before, question, so_far, text, [], ending_ids))

    def _encoded(self, prompt: Prompt) -> Prompt:
        ids = self._encode(prompt.text)
        if not ids:
            raise EmptyPromptError("the model's tokenizer makes no tokens of the prompt")
        return replace(prompt, ids=ids)

    def _text(self, messages: Sequence[Message], ending: Literal["answer", "continue", "none"]) -> str:
        if self._base:
            return running_text(messages)
        system = [] if self._state.system is None else [Message("system", self._state.system)]
        return self._tokenizer.render([*system, *messages], ending=ending, thinking=self._state.thinking)

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=self._base)

    def _begin(self, prompt: Prompt, submitted: float) -> Answer:
        parser = None if self._base else self._tokenizer.response_parser(prompt.text)
        tags = PlainText() if self._base else prompt.think_tags()
        return Answer(
            detokenizer=Detokenizer(self._tokenizer, skip_special_tokens=parser is None),
            parts=Parts(parser or tags, continuing=prompt.so_far is not None),
            stops=StopStrings(self._state.stops),
            stop_ids=self._stop_ids,
            submitted=submitted,
        )

    def _turn(self, answer: Answer, prompt: Prompt) -> Turn:
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
