"""An answer: its records during and after generation, and the sums behind the records."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Self

from specchat.chat.reasoning import Parts, Piece
from specchat.chat.text import Detokenizer, StopStrings
from specchat.records.chat import Message, Part
from specchat.records.generation import FinishReason, Guesses, Step, guesses_of
from specchat.records.usage import MemoryReport


@dataclass(frozen=True)
class Delta:
    """The text that one step added to one part of the answer.

    Attributes:
        text: new text; empty while a character or a possible stop string is incomplete.
        token_ids: new tokens, stop token included. If a step yields several deltas, only the first has the tokens.
        step: the step, in its first delta only; None for text that was held back earlier.
        part: part that the text belongs to, the answer or the thinking before it.
    """

    text: str
    token_ids: tuple[int, ...]
    step: Step | None = None
    part: Part = "answer"


@dataclass(frozen=True)
class Usage:
    """The token counts of a turn; `completion_tokens` includes `reasoning_tokens`, the tokens of the thinking."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    reasoning_tokens: int = 0


@dataclass(frozen=True)
class Timings:
    """The durations of a turn's phases, in seconds.

    Attributes:
        load_s: time to load the model, before the first turn.
        ttft_s: time from submitting the prompt to the first token.
        decode_s: time from the first token to the last.
        draft_s: drafting time that no reads of the next pass's layers hid.
        verify_s: time of all target passes.
        stream_wait_s: part of `verify_s` spent waiting for streamed layers.
        tok_per_s: tokens of the answer divided by (ttft_s + decode_s).
        reasoning_s: time from the first token to the end of the thinking; 0 without thinking.
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
        """Return the times of an answer of `num_tokens` tokens, summed over its steps."""
        return cls(
            load_s=load_s,
            ttft_s=ttft_s,
            decode_s=decode_s,
            draft_s=sum(step.exposed_draft_s for step in steps),
            verify_s=sum(step.verify_s for step in steps),
            stream_wait_s=sum(step.stream_wait_s for step in steps),
            tok_per_s=num_tokens / (ttft_s + decode_s),
            reasoning_s=reasoning_s,
        )


@dataclass(frozen=True)
class Speculation:
    """The figures of speculative decoding for one answer.

    Attributes:
        steps: number of passes that emitted a token, the first one included.
        prefill_passes: number of passes that only read the prompt.
        tokens_per_step: mean emitted tokens per step, bonus token included.
        accepted_per_step: mean accepted draft tokens per step, bonus token excluded.
        mean_tree_nodes: mean draft nodes verified per step.
        tree_budget: maximum draft nodes per step.
        by_source: draft nodes and drafting time of each source.
    """

    steps: int
    prefill_passes: int
    tokens_per_step: float
    accepted_per_step: float
    mean_tree_nodes: float
    tree_budget: int
    by_source: tuple[Guesses, ...] = ()

    @classmethod
    def of_steps(cls, steps: Sequence[Step], num_tokens: int, num_accepted: int, tree_budget: int) -> Self:
        """Return the figures of an answer of `num_tokens` tokens, of which `num_accepted` were drafted."""
        emitting = [step for step in steps if step.token_ids]
        per_step = 1 / len(emitting) if emitting else 0.0
        return cls(
            steps=len(emitting),
            prefill_passes=sum(not step.token_ids and step.finish_reason is None for step in steps),
            tokens_per_step=num_tokens * per_step,
            accepted_per_step=num_accepted * per_step,
            mean_tree_nodes=sum(step.tree_nodes for step in emitting) * per_step,
            tree_budget=tree_budget,
            by_source=guesses_of(emitting),
        )


@dataclass(frozen=True)
class Turn:
    """One finished answer.

    Attributes:
        message: answer without special tokens and stop string, and the thinking before it. A continued answer is
            given as a whole.
        token_ids: all emitted ids, stop token included.
        finish_reason: reason why the answer ended.
        usage: token counts.
        timings: durations, in seconds.
        speculation: figures of speculative decoding.
        memory: memory in use at the end of the answer.
        unsaved: reason why the turn could not be written to the session's file; None otherwise.
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
    """An answer while it is generated: its text, its tokens, and the sums for its record."""

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
        """Whether a stop string ended the answer."""
        return self.stops.matched is not None

    def text(self, part: Part) -> str:
        """Return the text of a part so far."""
        return "".join(self.texts[part])

    def take(self, step: Step) -> list[Delta]:
        """Add a step's tokens, up to the one that completes a stop string, and return their deltas."""
        self.steps.append(step)
        self.finish_reason = step.finish_reason
        begins_thinking = self.parts.part == "reasoning"
        pieces: list[Piece] = []
        num_kept = 0
        for token_id in step.token_ids:
            num_kept += 1
            if step.finish_reason == "stop" and num_kept == len(step.token_ids) and token_id in self.stop_ids:
                break  # a stop token is no part of the text, even if the tokenizer does not mark it as special
            pieces += self._read(token_id)
            if self.cut_by_stop_string:
                self.finish_reason = "stop"
                break
        token_ids = step.token_ids[:num_kept]
        self._count(token_ids, step.accepted, thinks=begins_thinking or self.parts.part == "reasoning")
        return list(self._deltas(pieces, token_ids, step))

    def finish(self) -> list[Delta]:
        """Return the text that was still held back: incomplete characters, tags and stop strings."""
        if self.cut_by_stop_string:
            return []
        text = self.detokenizer.flush(complete=self.finish_reason == "stop")
        pieces = self._cut_at_stop([*self.parts.feed(text), *self.parts.finish()])
        pieces.append(("answer", self.stops.flush()))
        return list(self._deltas(pieces, (), None))

    def usage(self, num_prompt_tokens: int) -> Usage:
        """Return the token counts."""
        cached = self.steps[0].cached_rows if self.steps else 0
        return Usage(num_prompt_tokens, cached, len(self.token_ids), self.num_reasoning)

    def timings(self, load_s: float) -> Timings:
        """Return the durations."""
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
        """Return the figures of speculative decoding."""
        return Speculation.of_steps(self.steps, len(self.token_ids), self.num_accepted, tree_budget)

    def _read(self, token_id: int) -> list[Piece]:
        """Return the text that a token adds.

        The token counts as thinking if the parser is inside the thinking before or after the token.
        """
        was_thinking = self.parts.part == "reasoning"
        pieces = self._cut_at_stop(self.parts.feed(self.detokenizer.feed(token_id)))
        self.num_reasoning += was_thinking or self.parts.part == "reasoning"
        return pieces

    def _cut_at_stop(self, pieces: list[Piece]) -> list[Piece]:
        """Cut the pieces at a stop string; stop strings do not apply to thinking."""
        return [(part, self.stops.feed(text) if part == "answer" else text) for part, text in pieces]

    def _deltas(self, pieces: list[Piece], token_ids: tuple[int, ...], step: Step | None) -> Iterator[Delta]:
        """Yield one delta per run of pieces of one part; yield an empty delta for a step without text."""
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
