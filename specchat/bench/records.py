"""What a measurement consists of: requests, answers, and the runs that hold both."""

from dataclasses import dataclass

from specchat.bench.prompts import Question
from specchat.records.generation import FinishReason, Sampling, Step

OWN = "specchat"  # the system that is measured; the others are what it is compared with
MIN_DISTINCT = 0.5
_GRAM = 4


@dataclass(frozen=True)
class Settings:
    """How a measurement is made.

    Attributes:
        temperatures: each question is answered at each; 0 is greedy.
        max_tokens: longest answer.
        repeats: how often everything is done.
        seed: of all draws.
        time_box_s: after this time, shared among the repeats, no further question is begun; None for no limit.
    """

    temperatures: tuple[float, ...] = (0.0, 0.7)
    max_tokens: int = 64
    repeats: int = 3
    seed: int = 0
    time_box_s: float | None = None


@dataclass(frozen=True)
class Request:
    """One prompt, as every system gets it.

    Attributes:
        prompt_ids: the conversation so far, in tokens.
        sampling: how tokens are drawn.
        stop_ids: tokens that end an answer.
        max_tokens: longest answer.
    """

    prompt_ids: tuple[int, ...]
    sampling: Sampling
    stop_ids: frozenset[int]
    max_tokens: int


@dataclass(frozen=True)
class Answer:
    """What a system wrote, and what it took; times leave out what the bench itself does between passes.

    Attributes:
        token_ids: the stop token included.
        finish_reason: why it ended.
        ttft_s: from the request to the first token: prefill and first step.
        decode_s: from the first token to the last.
        num_passes: passes of the target that brought tokens.
        first_tokens: tokens that the first of them brought.
        cached_tokens: prompt tokens that needed no computing.
        steps: the engine's records of its passes; empty for systems that are not ours.
    """

    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    ttft_s: float
    decode_s: float
    num_passes: int
    first_tokens: int
    cached_tokens: int = 0
    steps: tuple[Step, ...] = ()

    @property
    def total_s(self) -> float:
        """From the request to the last token."""
        return self.ttft_s + self.decode_s

    @property
    def tok_per_s(self) -> float:
        """Tokens of the answer per second, prefill included."""
        return len(self.token_ids) / self.total_s

    @property
    def decode_tok_per_s(self) -> float | None:
        """Tokens after those of the first pass, per second after it; None if there are none."""
        return (len(self.token_ids) - self.first_tokens) / self.decode_s if self.decode_s > 0 else None

    @property
    def tokens_per_step(self) -> float:
        """Tokens that a pass of the target brought."""
        return len(self.token_ids) / self.num_passes


@dataclass(frozen=True)
class Run:
    """One answer of one system to one turn.

    Attributes:
        system: `OWN` or a baseline's name.
        question: what was asked.
        turn: which of its turns, from 1.
        repeat: from 1.
        sampling: how it was drawn.
        prompt_ids: the conversation up to it, in tokens.
        text: the answer without special tokens.
    """

    system: str
    question: Question
    turn: int
    repeat: int
    sampling: Sampling
    prompt_ids: tuple[int, ...]
    answer: Answer
    text: str

    @property
    def temperature(self) -> float:
        """0 is greedy."""
        return self.sampling.temperature

    @property
    def prompt(self) -> tuple[str, int, float]:
        """What two runs have in common when they answer the same: question, turn, temperature."""
        return self.question.question_id, self.turn, self.temperature

    @property
    def distinct_4gram(self) -> float:
        """Different sequences of four tokens among all of the answer's; 1 for answers shorter than that."""
        ids = self.answer.token_ids
        grams = [ids[i : i + _GRAM] for i in range(len(ids) - _GRAM + 1)]
        return len(set(grams)) / len(grams) if grams else 1.0

    @property
    def counted(self) -> bool:
        """Whether it goes into means: a text that repeats itself is easy to guess, and says nothing of real ones."""
        return self.distinct_4gram >= MIN_DISTINCT


@dataclass(frozen=True)
class Measurement:
    """Everything that was answered.

    Attributes:
        runs: of all systems, in order of time.
        num_questions: that were asked.
        too_long: turns left out because the context has no room for them.
        not_begun: questions left out because the time was over.
        partial: it was interrupted.
        missing: everything that an interruption left out, in words.
    """

    runs: tuple[Run, ...]
    num_questions: int
    too_long: int
    not_begun: int
    partial: bool
    missing: tuple[str, ...] = ()

    def of(self, system: str) -> tuple[Run, ...]:
        """The runs of one system."""
        return tuple(run for run in self.runs if run.system == system)
