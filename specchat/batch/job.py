"""A job: answer all prompts of a file, many in one pass, and write each result as soon as its answer ends."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from threading import Event
from typing import Any, Protocol

from specchat.batch.prompts import PromptLine
from specchat.batch.results import JobSettings, Results, left_of
from specchat.chat.answer import Answer
from specchat.chat.prompt import running_text
from specchat.chat.reasoning import Parts, PlainText, ThinkTags
from specchat.chat.settings import MAX_SEED
from specchat.chat.text import Detokenizer, StopStrings
from specchat.errors import SpecchatError
from specchat.loading.sampling import SamplingChoices, resolve_sampling
from specchat.models.checkpoint.generation_config import GenerationDefaults
from specchat.models.hf.tokenizer import Tokenizer
from specchat.planner.learning import PassSteps
from specchat.planner.statistics import SharedPass
from specchat.records.chat import Message
from specchat.records.generation import Request, Sampling, Step

_SAMPLING = tuple(SamplingChoices.__dataclass_fields__)


class ManyGenerator(Protocol):
    """The part of `specchat.engine.engine.Engine` that a job uses."""

    def generate_many(self, requests: Iterable[Request], *, cancel: Event | None = None) -> Iterator[tuple[int, Step]]:
        """Answer many requests; see `Engine.generate_many`."""


@dataclass(frozen=True)
class Progress:
    """State of a job after a pass.

    Attributes:
        num_done: number of lines with a result, those of earlier runs included.
        num_lines: number of lines.
        num_failed: number of results that are errors.
        num_alive: number of answers in progress.
        num_tokens: number of tokens written in this run.
        seconds: seconds since the first prompt of this run.
        num_answered: number of lines that got their result in this run.
        warning: news of this pass for the user, in one line, or None.
    """

    num_done: int
    num_lines: int
    num_failed: int
    num_alive: int
    num_tokens: int
    seconds: float
    num_answered: int
    warning: str | None = None

    @property
    def tok_per_s(self) -> float:
        """Tokens per second of all answers together."""
        return self.num_tokens / self.seconds if self.seconds else 0.0

    @property
    def seconds_left(self) -> float | None:
        """Seconds until the end at the speed so far; None before the first result."""
        if not self.num_answered:
            return None
        return self.seconds / self.num_answered * (self.num_lines - self.num_done)


class Renderer:
    """Turns lines into token ids.

    Args:
        tokenizer: tokenizer of the target.
        settings: settings of the job.
    """

    def __init__(self, tokenizer: Tokenizer, settings: JobSettings) -> None:
        self._tokenizer = tokenizer
        self._settings = settings

    def text(self, line: PromptLine) -> str:
        """Return the prompt as the model reads it.

        Raises:
            UsageError: the chat template rejects the messages.
        """
        settings, messages = self._settings, line.messages
        if settings.base:
            return running_text(messages)
        if settings.system is not None and messages[0].role != "system":
            messages = (Message("system", settings.system), *messages)
        return self._tokenizer.render(messages, thinking=settings.thinking)

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a rendered prompt."""
        return self._tokenizer.encode(text, add_special_tokens=self._settings.base)

    def context_for(self, lines: Iterable[PromptLine]) -> int | None:
        """Return the context that the longest line needs with its answer; None if an answer has no limit."""
        needed = 1
        for line in lines:
            if line.error is not None:
                continue
            max_tokens = line.values.get("max_tokens", self._settings.max_tokens)
            if max_tokens is None:
                return None
            try:
                needed = max(needed, len(self.encode(self.text(line))) + int(max_tokens))
            except SpecchatError:
                continue  # the line gets its error later
        return needed


@dataclass
class _Open:
    """A line whose answer is in progress."""

    line: PromptLine
    sampling: Sampling
    answer: Answer
    num_prompt_tokens: int
    cancel: Event


class Job:
    """The answering of one file.

    Args:
        engine: engine with as many seats as answers are to share a pass.
        tokenizer: tokenizer of the target.
        defaults: the model's generation_config.
        stop_ids: token ids that end an answer.
        settings: settings of all lines.
        lines: lines of the file.
        results: file of the results.
        observe: receives the steps of every pass.
    """

    def __init__(
        self,
        engine: ManyGenerator,
        tokenizer: Tokenizer,
        defaults: GenerationDefaults,
        stop_ids: frozenset[int],
        settings: JobSettings,
        lines: Sequence[PromptLine],
        results: Results,
        observe: Callable[[SharedPass], None] = lambda _: None,
    ) -> None:
        self._observe = observe
        self._engine = engine
        self._tokenizer = tokenizer
        self._defaults = defaults
        self._stop_ids = stop_ids
        self._settings = settings
        self._lines = lines
        self._results = results
        self._renderer = Renderer(tokenizer, settings)
        self._open: dict[int, _Open] = {}  # by number of the request
        self._pass_steps = PassSteps()
        self._num_asked = self._num_tokens = 0
        self._num_before = len(results.finished)
        self._begin = time.perf_counter()

    def run(self, cancel: Event | None = None) -> Iterator[Progress]:
        """Answer all lines without a result, and yield the progress after each step.

        Args:
            cancel: event that ends the job; unfinished answers get no result, so they are answered when the job
                continues.
        """
        self._begin = time.perf_counter()
        for number, step in self._engine.generate_many(self._requests(), cancel=cancel):
            current = self._open.get(number)
            if current is not None:  # else its text has ended before
                shared = self._pass_steps.add(step, samples=not current.sampling.greedy)
                if shared is not None:
                    self._observe(shared)
                self._take(number, current, step)
            yield self._progress(step.warning)
        yield self._progress()

    def _requests(self) -> Iterator[Request]:
        """Yield the request of each line without a result; write the error of a line that cannot be asked."""
        for line in left_of(self._lines, self._results):
            if line.error is not None:
                self._results.add(line, {"error": line.error})
                continue
            try:
                text = self._renderer.text(line)
                ids = self._renderer.encode(text)
            except SpecchatError as error:
                self._results.add(line, {"error": error.message})
                continue
            yield self._asked(line, text, ids)

    def _asked(self, line: PromptLine, text: str, ids: list[int]) -> Request:
        sampling, max_tokens = self._sampling(line), line.values.get("max_tokens", self._settings.max_tokens)
        current = _Open(line, sampling, self._answer(text), len(ids), Event())
        self._open[self._num_asked] = current
        self._num_asked += 1
        return Request(
            tuple(ids), sampling, self._stop_ids, None if max_tokens is None else int(max_tokens), current.cancel
        )

    def _sampling(self, line: PromptLine) -> Sampling:
        """Return the sampling of a line: its own values, then those of the job, then the model's."""
        own: dict[str, Any] = {key: value for key, value in line.values.items() if key in _SAMPLING}
        seed = line.values.get("seed", (self._settings.seed + line.number - 1) % (MAX_SEED + 1))
        return resolve_sampling(replace(self._settings.sampling, **own), self._defaults, int(seed))

    def _answer(self, text: str) -> Answer:
        parser = None if self._settings.base else self._tokenizer.response_parser(text)
        tags = PlainText() if self._settings.base else ThinkTags.after(text)
        return Answer(
            detokenizer=Detokenizer(self._tokenizer, skip_special_tokens=parser is None),
            parts=Parts(parser or tags, continuing=False),
            stops=StopStrings(self._settings.stops),
            stop_ids=self._stop_ids,
            submitted=time.perf_counter(),
        )

    def _take(self, number: int, current: _Open, step: Step) -> None:
        """Add a step to its answer, and write the result if the answer ends."""
        answer = current.answer
        if step.finish_reason == "interrupt":
            del self._open[number]
            return
        if step.error is not None:
            del self._open[number]
            self._results.add(current.line, {"error": step.error.message})
            return
        num_before = len(answer.token_ids)
        answer.take(step)
        self._num_tokens += len(answer.token_ids) - num_before
        if answer.finish_reason is not None:
            current.cancel.set()  # after a stop string, the engine would go on
            answer.finish()
            del self._open[number]
            self._results.add(current.line, _result(current))

    def _progress(self, warning: str | None = None) -> Progress:
        num_done = len(self._results.finished)
        return Progress(
            num_done=num_done,
            num_lines=len(self._lines),
            num_failed=self._results.num_failed,
            num_alive=len(self._open),
            num_tokens=self._num_tokens,
            seconds=time.perf_counter() - self._begin,
            num_answered=num_done - self._num_before,
            warning=warning,
        )


def _result(current: _Open) -> dict[str, Any]:
    """Return the values of a finished answer's line."""
    answer = current.answer
    reasoning = answer.text("reasoning")
    return {
        "seed": current.sampling.seed,
        "text": answer.text("answer"),
        **({"reasoning": reasoning} if reasoning else {}),
        "token_ids": answer.token_ids,
        "finish_reason": answer.finish_reason,
        "usage": asdict(answer.usage(current.num_prompt_tokens)),
        "tokens_per_step": answer.speculation(0).tokens_per_step,
    }
