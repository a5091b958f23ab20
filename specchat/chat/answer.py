"""An answer: the records of it while it comes and when it is done, and the sums behind them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Self

from specchat.chat.reasoning import Parts, Piece
from specchat.chat.text import Detokenizer, StopStrings
from specchat.records.chat import Message, Part
from specchat.records.generation import FinishReason, Step
from specchat.records.plan import MemoryReport


@dataclass(frozen=True)
class Delta:
    """What one step added to one part of the answer.

    Attributes:
        text: new text; empty while characters or possible stop strings are incomplete.
        token_ids: new tokens, the stop token included; of several deltas of a step only the first has them.
        step: the step itself, in the first of its deltas; None for text that was only held back.
        part: whether the text is the answer's or the thinking before it.
    """

    text: str
    token_ids: tuple[int, ...]
    step: Step | None = None
    part: Part = "answer"


@dataclass(frozen=True)
class Usage:
    """Tokens read and written by a turn; `reasoning_tokens` are those of the written ones that were thinking."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    reasoning_tokens: int = 0


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
        reasoning_s: from the first token to the end of the thinking; 0 without any.
    """

    load_s: float
    ttft_s: float
    decode_s: float
    draft_s: float
    verify_s: float
    stream_wait_s: float
    tok_per_s: float
    reasoning_s: float = 0.0

    @classmethod
    def of_steps(
        cls,
        steps: Sequence[Step],
        num_tokens: int,
        *,
        load_s: float,
        ttft_s: float,
        decode_s: float,
        reasoning_s: float = 0.0,
    ) -> Self:
        """The times of an answer of so many tokens that took these steps."""
        return cls(
            load_s=load_s,
            ttft_s=ttft_s,
            decode_s=decode_s,
            draft_s=sum(step.draft_s for step in steps),
            verify_s=sum(step.verify_s for step in steps),
            stream_wait_s=sum(step.stream_wait_s for step in steps),
            tok_per_s=num_tokens / (ttft_s + decode_s),
            reasoning_s=reasoning_s,
        )


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

    @classmethod
    def of_steps(cls, steps: Sequence[Step], num_tokens: int, num_accepted: int, tree_budget: int) -> Self:
        """What drafting brought to an answer of so many tokens, so many of them guessed, that took these steps."""
        emitting = [step for step in steps if step.token_ids]
        per_step = 1 / len(emitting) if emitting else 0.0
        return cls(
            steps=len(emitting),
            prefill_passes=sum(not step.token_ids and step.finish_reason is None for step in steps),
            tokens_per_step=num_tokens * per_step,
            accepted_per_step=num_accepted * per_step,
            mean_tree_nodes=sum(step.tree_nodes for step in emitting) * per_step,
            tree_budget=tree_budget,
        )


@dataclass(frozen=True)
class Turn:
    """One finished answer.

    Attributes:
        message: the answer without special tokens and stop string, and the thinking before it; an answer that was
            continued, as a whole.
        token_ids: every emitted id, the stop token included.
        unsaved: why the turn is not in the session's file, if it should be and could not be written.
    """

    message: Message
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    speculation: Speculation
    memory: MemoryReport
    unsaved: str | None = None


@dataclass
class Answer:
    """An answer while it is being written: its text, its tokens, and the sums for its record."""

    detokenizer: Detokenizer
    parts: Parts
    stops: StopStrings
    stop_ids: frozenset[int]
    submitted: float
    finish_reason: FinishReason | None = None
    token_ids: list[int] = field(default_factory=list)
    texts: dict[Part, list[str]] = field(default_factory=lambda: {"answer": [], "reasoning": []})
    steps: list[Step] = field(default_factory=list)
    num_accepted: int = 0
    num_reasoning: int = 0
    first_token_at: float | None = None
    last_token_at: float | None = None
    last_thought_at: float | None = None

    @property
    def cut_by_stop_string(self) -> bool:
        """Whether the answer is over because of what it says."""
        return self.stops.matched is not None

    def text(self, part: Part) -> str:
        """All of a part so far."""
        return "".join(self.texts[part])

    def take(self, step: Step) -> list[Delta]:
        """Adds a step's tokens, up to the one that completes a stop string."""
        self.steps.append(step)
        self.finish_reason = step.finish_reason
        begins_thinking = self.parts.part == "reasoning"
        pieces: list[Piece] = []
        num_kept = 0
        for token_id in step.token_ids:
            num_kept += 1
            if step.finish_reason == "stop" and num_kept == len(step.token_ids) and token_id in self.stop_ids:
                break  # ends the answer and is no part of its text, whether the tokenizer calls it special or not
            pieces += self._read(token_id)
            if self.cut_by_stop_string:
                self.finish_reason = "stop"
                break
        token_ids = step.token_ids[:num_kept]
        self._count(token_ids, step.accepted, thinks=begins_thinking or self.parts.part == "reasoning")
        return list(self._deltas(pieces, token_ids, step))

    def finish(self) -> list[Delta]:
        """The text that was still held back: partial characters, tags and stop strings that did not come."""
        if self.cut_by_stop_string:
            return []
        text = self.detokenizer.flush(complete=self.finish_reason == "stop")
        pieces = self._watched([*self.parts.feed(text), *self.parts.finish()])
        pieces.append(("answer", self.stops.flush()))
        return list(self._deltas(pieces, (), None))

    def usage(self, num_prompt_tokens: int) -> Usage:
        """Tokens read and written."""
        cached = self.steps[0].cached_rows if self.steps else 0
        return Usage(num_prompt_tokens, cached, len(self.token_ids), self.num_reasoning)

    def timings(self, load_s: float) -> Timings:
        """Where the time went."""
        first = self.first_token_at or time.perf_counter()
        return Timings.of_steps(
            self.steps,
            len(self.token_ids),
            load_s=load_s,
            ttft_s=first - self.submitted,
            decode_s=(self.last_token_at or first) - first,
            reasoning_s=(self.last_thought_at or first) - first,
        )

    def speculation(self, tree_budget: int) -> Speculation:
        """What drafting brought."""
        return Speculation.of_steps(self.steps, len(self.token_ids), self.num_accepted, tree_budget)

    def _read(self, token_id: int) -> list[Piece]:
        """What a token adds to the text; its thinking is counted as the parser learns of it."""
        was_thinking = self.parts.part == "reasoning"
        pieces = self._watched(self.parts.feed(self.detokenizer.feed(token_id)))
        self.num_reasoning += was_thinking or self.parts.part == "reasoning"
        return pieces

    def _watched(self, pieces: list[Piece]) -> list[Piece]:
        """The pieces up to a stop string; thinking is not watched."""
        return [(part, self.stops.feed(text) if part == "answer" else text) for part, text in pieces]

    def _deltas(self, pieces: list[Piece], token_ids: tuple[int, ...], step: Step | None) -> Iterator[Delta]:
        """One delta for each run of pieces of the same part; one without text for a step that brought none."""
        runs: list[tuple[Part, str]] = []
        for part, text in pieces:
            if not text:
                continue
            self.texts[part].append(text)
            if runs and runs[-1][0] == part:
                runs[-1] = (part, runs[-1][1] + text)
            else:
                runs.append((part, text))
        if not runs and step is not None:
            runs.append((self.parts.part, ""))
        for i, (part, text) in enumerate(runs):
            yield Delta(text, () if i else token_ids, None if i else step, part)

    def _count(self, token_ids: tuple[int, ...], accepted: int, *, thinks: bool) -> None:
        if not token_ids:
            return
        self.last_token_at = time.perf_counter()
        self.first_token_at = self.first_token_at or self.last_token_at
        if thinks or (self.num_reasoning and self.last_thought_at is None):
            self.last_thought_at = self.last_token_at
        self.token_ids += token_ids
        self.num_accepted += min(accepted, len(token_ids))
