"""Systems that answer at known times, and measurements made of them: no model, no waiting."""

from dataclasses import dataclass, field, replace
from types import MappingProxyType

from specchat.bench.identity import Identity
from specchat.bench.prompts import Question
from specchat.bench.records import OWN, AnswerRecord, BenchSettings
from specchat.bench.report import Baseline, Outcome
from specchat.bench.runner import Runner
from specchat.bench.systems import EngineSystem
from support.fake_engine import EOS, MEMORY, PLAN, TOKENIZER, FakeEngine

STEP_S = 0.5  # what a step of the fake engine takes
QUESTIONS = (
    Question("one", "writing", ("hello?", "and more?")),
    Question("two", "math", ("1 + 1?",)),
)
SETTINGS = BenchSettings(max_tokens=32, repeats=2)
TEXT = "abcdefgh"  # with the stop token 9 tokens: three steps


@dataclass
class Clock:
    """Time that only passes when something takes it."""

    now: float = 0.0

    def __call__(self):
        return self.now

    def take(self, seconds):
        self.now += seconds


class Endless(list):
    """The same answer for ever."""

    def pop(self, _index=0):
        return self[0]


def own_system(clock, text=TEXT, name=OWN, cancel_after=None, between_passes=lambda: None):
    answers = Endless([[*TOKENIZER.encode(text), EOS]])
    engine = FakeEngine(answers, pause=lambda: clock.take(STEP_S), cancel_after=cancel_after, plan=PLAN)
    return EngineSystem(name, engine, between_passes=between_passes, clock=clock)


@dataclass
class SlowSystem:
    """One token a pass, at one second each, without records of passes."""

    clock: Clock
    name: str = "accelerate"
    text: str = TEXT
    is_keyed: bool = False
    requests: list = field(default_factory=list)

    def begin(self):
        pass

    def answer(self, request, cancel):
        if cancel.is_set():
            return None
        self.requests.append(request)
        ids = (*TOKENIZER.encode(self.text), EOS)
        self.clock.take(len(ids))
        return AnswerRecord(ids, "stop", ttft_s=1.0, decode_s=len(ids) - 1.0, num_passes=len(ids), first_tokens=1)


def runner(
    clock, systems, cancel, settings=SETTINGS, report=lambda _: None, ctx=400, passes_after=MappingProxyType({})
):
    return Runner(
        systems,
        TOKENIZER,
        stop_ids=frozenset({EOS}),
        ctx=ctx,
        settings=settings,
        cancel=cancel,
        passes_after=passes_after,
        report=report,
        clock=clock,
    )


def outcome(measurement, names=("accelerate",), link=None):
    baselines = tuple(Baseline(name, Identity(4, 36, ())) for name in names)
    return Outcome(replace(PLAN), 1.5, measurement, baselines, MEMORY, link)
