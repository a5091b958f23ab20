"""The conversations of all systems, interleaved, so that drifts of the machine affect all systems alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from threading import Event
from types import MappingProxyType
from typing import TYPE_CHECKING

from specchat.bench.prompts import Question
from specchat.bench.records import OWN, AnswerRecord, BenchSettings, Measurement, Request, Run
from specchat.bench.systems import Clock, System
from specchat.chat.prompt import running_text
from specchat.records.chat import Message
from specchat.records.generation import Sampling

if TYPE_CHECKING:
    from specchat.models.hf.tokenizer import Tokenizer

_WARM_UP_TOKENS = 8


@dataclass(frozen=True)
class Progress:
    """Progress of a measurement.

    Attributes:
        done, total: numbers of answers.
        left_s: estimate of the remaining seconds; None at first.
        what: description of the current work.
    """

    done: int
    total: int
    left_s: float | None
    what: str


@dataclass
class _AnswerPace:
    """Counts and times of one system's answers, to estimate the remaining time.

    Attributes:
        total: number of all answers, done and to come.
        warm_up_s: seconds of a full-length answer at the speed of the warm-up.
        warm_up_pass_s: seconds of a pass of the warm-up.
        done: number of answers so far.
        spent_s: seconds spent on the answers so far.
        passes: number of passes in the answers so far.
    """

    total: int = 0
    warm_up_s: float = 0.0
    warm_up_pass_s: float = 0.0
    done: int = 0
    spent_s: float = 0.0
    passes: int = 0

    def note(self, seconds: float, answer: AnswerRecord) -> None:
        """Add an answer."""
        self.done += 1
        self.spent_s += seconds
        self.passes += answer.num_passes

    def note_warm_up(self, seconds: float, answer: AnswerRecord, max_tokens: int) -> None:
        """Estimate the time of a full-length answer from the warm-up: passes take as long, but there are more."""
        self.warm_up_s = seconds * max(max_tokens / len(answer.token_ids), 1.0)
        self.warm_up_pass_s = seconds / answer.num_passes

    @property
    def is_known(self) -> bool:
        """Whether the time of an answer can be estimated."""
        return bool(self.done or self.warm_up_s)

    @property
    def answer_s(self) -> float:
        """Mean seconds of an answer. The warm-up counts as one of full length, because the first ones may be short."""
        counted = self.done + (self.warm_up_s > 0)
        return (self.spent_s + self.warm_up_s) / max(counted, 1)

    @property
    def pass_s(self) -> float:
        """Mean seconds of a pass, including the work between passes."""
        return self.spent_s / self.passes if self.passes else self.warm_up_pass_s

    @property
    def left_s(self) -> float:
        """Estimated seconds for the remaining answers."""
        return (self.total - self.done) * self.answer_s


@dataclass(frozen=True)
class _Session:
    """One conversation: a question, a temperature and the number of the repetition."""

    question: Question
    temperature: float
    repeat: int


class Runner:
    """The conversations of all systems.

    Args:
        systems: measured systems. The first is `OWN`; its answers are the history of every system's next turn.
        tokenizer: tokenizer of the target.
        stop_ids: tokens that end an answer.
        ctx: context length in tokens.
        settings: settings of the measurement.
        cancel: ends the conversations once set; complete answers are kept.
        passes_after: number of single passes of each system after all answers, for the estimate of remaining time.
        report: receives the progress.
        clock: clock in seconds.
    """

    def __init__(
        self,
        systems: Sequence[System],
        tokenizer: Tokenizer,
        *,
        stop_ids: frozenset[int],
        ctx: int,
        settings: BenchSettings,
        cancel: Event,
        passes_after: Mapping[str, int] = MappingProxyType({}),
        report: Callable[[Progress], None] = lambda _: None,
        clock: Clock = time.perf_counter,
    ) -> None:
        assert systems[0].name == OWN
        self._systems = systems
        self._tokenizer = tokenizer
        self._stop_ids = stop_ids
        self._ctx = ctx
        self._settings = settings
        self._cancel = cancel
        self._report = report
        self._clock = clock
        self._passes_after = passes_after
        self._paces = {system.name: _AnswerPace() for system in systems}
        self._box_began: float | None = None
        self._too_long: set[tuple[Question, int]] = set()

    def warm_up(self, question: Question) -> None:
        """Ask each system for a short answer that is not counted: first passes build caches and fault pages in."""
        prompt_ids = self._encode([Message("user", question.turns[0])])[: self._ctx - _WARM_UP_TOKENS - 1]
        for system in self._systems:
            if not self._cancel.is_set():
                self._report(Progress(0, 0, None, f"warming up {system.name}"))
                system.begin()
                begin = self._clock()
                answer = system.answer(Request(prompt_ids, Sampling(), self._stop_ids, _WARM_UP_TOKENS), self._cancel)
                if answer is not None:
                    spent_s = self._clock() - begin
                    self._paces[system.name].note_warm_up(spent_s, answer, self._settings.max_tokens)

    def run(self, questions: Sequence[Question]) -> Measurement:
        """Ask all questions, or those that the time limit allows, and return the measurement."""
        runs: list[Run] = []
        asked = list(questions)
        self._plan_for(asked)
        self._box_began = begin = self._clock()
        for repeat in range(1, self._settings.repeats + 1):
            if repeat > 1:
                self._box_began = None  # the first repeat decides how many questions fit
            for number, question in enumerate(asked):
                if repeat == 1 and number and self._is_late(begin):
                    asked = asked[:number]
                    self._plan_for(asked)
                    break
                for temperature in self._settings.temperatures:
                    runs += self._converse(_Session(question, temperature, repeat))
                if self._cancel.is_set():
                    return self._measurement(runs, 0, partial=True)
        return self._measurement(runs, len(questions) - len(asked), partial=False)

    def _measurement(self, runs: Sequence[Run], not_begun: int, *, partial: bool) -> Measurement:
        num_questions = len({run.question for run in runs})
        return Measurement(tuple(runs), num_questions, len(self._too_long), not_begun, partial)

    def _plan_for(self, questions: Sequence[Question]) -> None:
        """Set the total number of answers of each system."""
        num_turns = sum(len(question.turns) for question in questions)
        for pace in self._paces.values():
            pace.total = num_turns * len(self._settings.temperatures) * self._settings.repeats

    def _progress(self, what: str) -> Progress:
        """Return the progress; a time box limits the remaining time, because it may leave answers out."""
        paces = self._paces.values()
        answers_s = sum(pace.left_s for pace in paces)
        if self._settings.time_box_s is not None and self._box_began is not None:
            answers_s = min(answers_s, max(self._settings.time_box_s - (self._clock() - self._box_began), 0.0))
        passes_s = sum(count * self._paces[name].pass_s for name, count in self._passes_after.items())
        left_s = answers_s + passes_s if all(pace.is_known for pace in paces) else None
        return Progress(sum(pace.done for pace in paces), sum(pace.total for pace in paces), left_s, what)

    def _is_late(self, begin: float) -> bool:
        box = self._settings.time_box_s
        return box is not None and self._clock() - begin > box / self._settings.repeats

    def _converse(self, session: _Session) -> Iterator[Run]:
        """Yield specchat's answers of one conversation, then each baseline's on the same history."""
        own, *others = self._systems
        history: list[Message] = []
        prompts: list[tuple[int, ...]] = []
        for run in self._answers(own, session, self._prompts(session.question, history, prompts)):
            history.append(Message("assistant", run.text))
            yield run
        for system in others:
            yield from self._answers(system, session, prompts)

    def _prompts(
        self, question: Question, history: list[Message], prompts: list[tuple[int, ...]]
    ) -> Iterator[tuple[int, ...]]:
        """Yield the prompt of each turn that fits into the context, after `history`; also append it to `prompts`."""
        for turn, text in enumerate(question.turns, start=1):
            history.append(Message("user", text))
            prompt_ids = self._encode(history)
            if len(prompt_ids) + self._settings.max_tokens > self._ctx:
                self._skip_from(question, turn)
                return
            prompts.append(prompt_ids)
            yield prompt_ids

    def _answers(self, system: System, session: _Session, prompts: Iterable[tuple[int, ...]]) -> Iterator[Run]:
        """Yield one system's answers, turn by turn, until one is interrupted."""
        system.begin()
        for turn, prompt_ids in enumerate(prompts, start=1):
            run = self._ask(system, session, turn, prompt_ids)
            if run is None:
                return
            yield run

    def _skip_from(self, question: Question, turn: int) -> None:
        """Count a turn that does not fit into the context, and the turns after it, as left out."""
        left = range(turn, len(question.turns) + 1)
        self._too_long |= {(question, each) for each in left}
        for pace in self._paces.values():
            pace.total -= len(left)

    def _ask(self, system: System, session: _Session, turn: int, prompt_ids: tuple[int, ...]) -> Run | None:
        """Return one answer, or None if it was interrupted."""
        if self._cancel.is_set():
            return None
        settings = self._settings
        what = f"{system.name}, {session.question.question_id} turn {turn}, t={session.temperature:g}"
        self._report(self._progress(what))
        sampling = Sampling(temperature=session.temperature, seed=settings.seed)
        begin = self._clock()
        answer = system.answer(Request(prompt_ids, sampling, self._stop_ids, settings.max_tokens), self._cancel)
        if answer is None:
            return None
        self._paces[system.name].note(self._clock() - begin, answer)
        return Run(
            system=system.name,
            question=session.question,
            turn=turn,
            repeat=session.repeat,
            sampling=sampling,
            prompt_ids=prompt_ids,
            answer=answer,
            text=self._text(answer),
        )

    def _encode(self, history: Sequence[Message]) -> tuple[int, ...]:
        """Return the tokens of the conversation through the chat template, or of plain text if the model has none."""
        if self._tokenizer.has_chat_template:
            return tuple(self._tokenizer.encode(self._tokenizer.render(history)))
        return tuple(self._tokenizer.encode(running_text(history), add_special_tokens=True))

    def _text(self, answer: AnswerRecord) -> str:
        ids = answer.token_ids[:-1] if answer.finish_reason == "stop" else answer.token_ids
        return self._tokenizer.decode(ids)
