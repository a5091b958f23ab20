"""A chat: messages in, text deltas out, and at the end of each answer a record of what it took.

The history is text. Every turn renders the whole chat anew and tokenizes it anew, so an answer depends on what can be
read above it and on nothing else; the engine finds out how much of that its caches still hold.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from threading import Event
from typing import TYPE_CHECKING, Protocol

from specchat.chat.text import Detokenizer, StopStrings
from specchat.config import FinishReason, MemoryReport, Message, Plan, Sampling, Step
from specchat.errors import EmptyPromptError, UsageError

if TYPE_CHECKING:
    from specchat.models.hf_compat import Tokenizer


class Generator(Protocol):
    """The part of `specchat.engine.engine.Engine` that a chat uses."""

    @property
    def plan(self) -> Plan: ...  # noqa: D102

    @property
    def load_s(self) -> float: ...  # noqa: D102

    def generate(  # noqa: D102
        self,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        *,
        stop_ids: frozenset[int],
        max_tokens: int | None = None,
        cancel: Event | None = None,
    ) -> Iterator[Step]: ...

    def truncate(self, length: int) -> None: ...  # noqa: D102

    def memory(self) -> MemoryReport: ...  # noqa: D102


@dataclass(frozen=True)
class Delta:
    """What one step added to the answer.

    Attributes:
        text: new text; empty while characters or possible stop strings are incomplete.
        token_ids: new tokens, the stop token included.
        step: the step itself, or None for text that was only held back.
    """

    text: str
    token_ids: tuple[int, ...]
    step: Step | None = None


@dataclass(frozen=True)
class Usage:
    """Tokens read and written by a turn."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Timings:
    """Where a turn's time went; seconds.

    Attributes:
        load_s: loading the model, before the first turn.
        ttft_s: from submitting the prompt to the first token.
        decode_s: from the first token to the last.
        draft_s: drafting that no pass hid.
        verify_s: target passes.
        stream_wait_s: the part of verify_s spent waiting for layers.
        tok_per_s: tokens of the answer / (ttft_s + decode_s).
    """

    load_s: float
    ttft_s: float
    decode_s: float
    draft_s: float
    verify_s: float
    stream_wait_s: float
    tok_per_s: float


@dataclass(frozen=True)
class Speculation:
    """What drafting brought.

    Attributes:
        steps: passes that emitted a token, the first included.
        prefill_passes: passes that only read the prompt.
        tokens_per_step: emitted tokens per step, bonus token included.
        accepted_per_step: draft tokens among them, bonus token excluded.
        mean_tree_nodes: draft nodes verified per step.
        tree_budget: the most there could have been.
    """

    steps: int
    prefill_passes: int
    tokens_per_step: float
    accepted_per_step: float
    mean_tree_nodes: float
    tree_budget: int


@dataclass(frozen=True)
class Turn:
    """One finished answer.

    Attributes:
        message: the answer, without special tokens and stop string.
        token_ids: every emitted id, the stop token included.
    """

    message: Message
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    speculation: Speculation
    memory: MemoryReport


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
    ) -> None:
        check_has_template(tokenizer, base=base)
        if base and system is not None:
            raise UsageError("a system prompt needs a chat template, which --base leaves out")
        self.engine = engine
        self.sampling = sampling
        self.history: list[Message] = []
        self._tokenizer = tokenizer
        self._stop_ids = stop_ids
        self._stop_texts = tuple(stop_texts)
        self._max_tokens = max_tokens
        self._system = system
        self._base = base

    def clear(self) -> None:
        """Forgets every turn; the system prompt stays."""
        self.history.clear()

    def ask(self, text: str, cancel: Event | None = None) -> Iterator[Delta | Turn]:
        """Answers `text`: deltas as they come, then one `Turn`.

        A turn that is interrupted before its first token leaves no trace in the history; a later interrupt keeps the
        part that was written. An error leaves the history as it was.

        Args:
            text: the user's message.
            cancel: set it to stop at the next layer.

        Raises:
            EmptyPromptError: there is nothing in `text`.
            UsageError: `text` has bytes in it that are no characters.
            PromptTooLongError: the chat leaves no room for an answer.
        """
        _check_text(text)
        submitted = time.perf_counter()
        question = Message("user", text)
        prompt_ids = self._encode([*self.history, question])
        answer = _Answer(Detokenizer(self._tokenizer), StopStrings(self._stop_texts), self._stop_ids, submitted)
        steps = self.engine.generate(
            prompt_ids, self.sampling, stop_ids=self._stop_ids, max_tokens=self._max_tokens, cancel=cancel
        )
        with closing(steps):  # type: ignore[type-var]  # a generator, whose `close` typing.Iterator does not know
            for step in steps:
                yield answer.take(step)
                if answer.cut_by_stop_string:
                    break
        if answer.cut_by_stop_string:
            self.engine.truncate(len(prompt_ids) + len(answer.token_ids))
        rest = answer.finish()
        if rest:
            yield Delta(rest, ())
        turn = self._turn(answer, len(prompt_ids))
        if turn.token_ids:
            self.history += [question, turn.message]
        yield turn

    def _encode(self, messages: Sequence[Message]) -> list[int]:
        if self._base:
            return self._tokenizer.encode(_running_text(messages), add_special_tokens=True)
        system = [] if self._system is None else [Message("system", self._system)]
        return self._tokenizer.encode(self._tokenizer.render([*system, *messages]))

    def _turn(self, answer: _Answer, num_prompt_tokens: int) -> Turn:
        assert answer.finish_reason is not None, "the engine's last step names a finish reason"
        return Turn(
            message=Message("assistant", "".join(answer.texts)),
            token_ids=tuple(answer.token_ids),
            finish_reason=answer.finish_reason,
            usage=answer.usage(num_prompt_tokens),
            timings=answer.timings(self.engine.load_s),
            speculation=answer.speculation(self.engine.plan.tree_budget),
            memory=self.engine.memory(),
        )


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


@dataclass
class _Answer:
    """An answer while it is being written: its text, its tokens, and the sums for its record."""

    detokenizer: Detokenizer
    stops: StopStrings
    stop_ids: frozenset[int]
    submitted: float
    finish_reason: FinishReason | None = None
    token_ids: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    num_accepted: int = 0
    first_token_at: float | None = None
    last_token_at: float | None = None

    @property
    def cut_by_stop_string(self) -> bool:
        return self.stops.matched is not None

    def take(self, step: Step) -> Delta:
        """Adds a step's tokens, up to the one that completes a stop string."""
        self.steps.append(step)
        self.finish_reason = step.finish_reason
        text, num_kept = "", 0
        for token_id in step.token_ids:
            num_kept += 1
            if step.finish_reason == "stop" and num_kept == len(step.token_ids) and token_id in self.stop_ids:
                break  # ends the answer and is no part of its text, whether the tokenizer calls it special or not
            text += self.stops.feed(self.detokenizer.feed(token_id))
            if self.cut_by_stop_string:
                self.finish_reason = "stop"
                break
        token_ids = step.token_ids[:num_kept]
        self._count(token_ids, step.accepted)
        self.texts.append(text)
        return Delta(text, token_ids, step)

    def finish(self) -> str:
        """The text that was still held back: partial characters, and beginnings of stop strings that did not come."""
        if self.cut_by_stop_string:
            return ""
        rest = self.stops.feed(self.detokenizer.flush(complete=self.finish_reason == "stop"))
        rest += self.stops.flush()
        self.texts.append(rest)
        return rest

    def _count(self, token_ids: tuple[int, ...], accepted: int) -> None:
        if not token_ids:
            return
        self.last_token_at = time.perf_counter()
        self.first_token_at = self.first_token_at or self.last_token_at
        self.token_ids += token_ids
        self.num_accepted += min(accepted, len(token_ids))

    def usage(self, num_prompt_tokens: int) -> Usage:
        cached = self.steps[0].cached_rows if self.steps else 0
        return Usage(num_prompt_tokens, cached, len(self.token_ids))

    def timings(self, load_s: float) -> Timings:
        first = self.first_token_at or time.perf_counter()
        ttft_s = first - self.submitted
        decode_s = (self.last_token_at or first) - first
        return Timings(
            load_s=load_s,
            ttft_s=ttft_s,
            decode_s=decode_s,
            draft_s=sum(step.draft_s for step in self.steps),
            verify_s=sum(step.verify_s for step in self.steps),
            stream_wait_s=sum(step.stream_wait_s for step in self.steps),
            tok_per_s=len(self.token_ids) / (ttft_s + decode_s),
        )

    def speculation(self, tree_budget: int) -> Speculation:
        emitting = [step for step in self.steps if step.token_ids]
        per_step = 1 / len(emitting) if emitting else 0.0
        return Speculation(
            steps=len(emitting),
            prefill_passes=sum(not step.token_ids and step.finish_reason is None for step in self.steps),
            tokens_per_step=len(self.token_ids) * per_step,
            accepted_per_step=self.num_accepted * per_step,
            mean_tree_nodes=sum(step.tree_nodes for step in emitting) * per_step,
            tree_budget=tree_budget,
        )
