"""Asking every system everything, interleaved, so that whatever drifts on the machine hits all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from threading import Event
from typing import TYPE_CHECKING

from specchat.bench.prompts import Question
from specchat.bench.records import OWN, Answer, Measurement, Request, Run, Settings
from specchat.bench.systems import Clock, System
from specchat.config import Message, Sampling

if TYPE_CHECKING:
    from specchat.models.hf_compat import Tokenizer

_WARM_UP_TOKENS = 8


@dataclass(frozen=True)
class Progress:
    """How far a measurement is.

    Attributes:
        done, total: answers.
        left_s: what is left, as far as can be told; None at first.
        what: what is being done now.
    """

    done: int
    total: int
    left_s: float | None
    what: str


@dataclass
class _Pace:
    """Answers done of how many, and what they took; the systems take turns, so a mean over all foretells the rest."""

    total: int
    done: int = 0
    spent_s: float = 0.0

    def note(self, seconds: float) -> None:
        """One more answer."""
        self.done += 1
        self.spent_s += seconds

    def left_s(self) -> float | None:
        """What is left; None before anything is known."""
        return (self.total - self.done) * self.spent_s / self.done if self.done else None


@dataclass(frozen=True)
class _Session:
    """One conversation: a question at a temperature, for the n-th time."""

    question: Question
    temperature: float
    repeat: int


class Runner:
    """Holds the conversations.

    Args:
        systems: the first is `OWN`; its answers are the history that every system's next turn follows.
        tokenizer: the target's.
        stop_ids: tokens that end an answer.
        ctx: tokens that the context holds.
        settings: what is measured.
        cancel: set it to stop; what was measured by then stays.
        report: told how far it is.
        clock: seconds.
    """

    def __init__(
        self,
        systems: Sequence[System],
        tokenizer: Tokenizer,
        *,
        stop_ids: frozenset[int],
        ctx: int,
        settings: Settings,
        cancel: Event,
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
        self._pace = _Pace(0)
        self._too_long: set[tuple[Question, int]] = set()

    def warm_up(self, question: Question) -> None:
        """One short answer of each system that does not count: first passes build caches and fault pages in."""
        prompt_ids = self._encode([Message("user", question.turns[0])])[: self._ctx - _WARM_UP_TOKENS - 1]
        for system in self._systems:
            if not self._cancel.is_set():
                self._report(Progress(0, 0, None, f"warming up {system.name}"))
                system.begin()
                system.answer(Request(prompt_ids, Sampling(), self._stop_ids, _WARM_UP_TOKENS), self._cancel)

    def run(self, questions: Sequence[Question]) -> Measurement:
        """Everything, or what there was time for."""
        runs: list[Run] = []
        asked = list(questions)
        self._pace = _Pace(self._num_answers(asked))
        begin = self._clock()
        for repeat in range(1, self._settings.repeats + 1):
            for number, question in enumerate(asked):
                if repeat == 1 and number and self._is_late(begin):
                    asked = asked[:number]
                    self._pace.total = self._num_answers(asked)
                    break
                for temperature in self._settings.temperatures:
                    runs += self._converse(_Session(question, temperature, repeat))
                if self._cancel.is_set():
                    return self._measurement(runs, 0, partial=True)
        return self._measurement(runs, len(questions) - len(asked), partial=False)

    def _measurement(self, runs: Sequence[Run], not_begun: int, *, partial: bool) -> Measurement:
        num_questions = len({run.question for run in runs})
        return Measurement(tuple(runs), num_questions, len(self._too_long), not_begun, partial)

    def _num_answers(self, questions: Sequence[Question]) -> int:
        num_turns = sum(len(question.turns) for question in questions)
        return num_turns * len(self._systems) * len(self._settings.temperatures) * self._settings.repeats

    def _is_late(self, begin: float) -> bool:
        box = self._settings.time_box_s
        return box is not None and self._clock() - begin > box / self._settings.repeats

    def _converse(self, session: _Session) -> Iterator[Run]:
        """Our own conversation, then each baseline's on the same history."""
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
        """Each turn behind what `history` holds by then, as long as it fits; noted in `prompts`, too."""
        for turn, text in enumerate(question.turns, start=1):
            history.append(Message("user", text))
            prompt_ids = self._encode(history)
            if len(prompt_ids) + self._settings.max_tokens > self._ctx:
                self._skip_from(question, turn)
                return
            prompts.append(prompt_ids)
            yield prompt_ids

    def _answers(self, system: System, session: _Session, prompts: Iterable[tuple[int, ...]]) -> Iterator[Run]:
        """One system's answers, turn by turn, until one is interrupted."""
        system.begin()
        for turn, prompt_ids in enumerate(prompts, start=1):
            run = self._ask(system, session, turn, prompt_ids)
            if run is None:
                return
            yield run

    def _skip_from(self, question: Question, turn: int) -> None:
        """Counts a turn that the context has no room for, and those that would have followed it."""
        left = range(turn, len(question.turns) + 1)
        self._too_long |= {(question, each) for each in left}
        self._pace.total -= len(left) * len(self._systems)

    def _ask(self, system: System, session: _Session, turn: int, prompt_ids: tuple[int, ...]) -> Run | None:
        """One answer; None when it was interrupted."""
        if self._cancel.is_set():
            return None
        pace, settings = self._pace, self._settings
        what = f"{system.name}, {session.question.question_id} turn {turn}, t={session.temperature:g}"
        self._report(Progress(pace.done, pace.total, pace.left_s(), what))
        sampling = Sampling(temperature=session.temperature, seed=settings.seed)
        begin = self._clock()
        answer = system.answer(Request(prompt_ids, sampling, self._stop_ids, settings.max_tokens), self._cancel)
        if answer is None:
            return None
        pace.note(self._clock() - begin)
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
        """The conversation through the chat template; as plain text for models that have none."""
        if self._tokenizer.has_chat_template:
            return tuple(self._tokenizer.encode(self._tokenizer.render(history)))
        text = "\n".join(message.content for message in history)
        return tuple(self._tokenizer.encode(text, add_special_tokens=True))

    def _text(self, answer: Answer) -> str:
        ids = answer.token_ids[:-1] if answer.finish_reason == "stop" else answer.token_ids
        return self._tokenizer.decode(ids)
