"""Records of a measurement: requests, answers, and the runs that hold both."""

from dataclasses import dataclass

from specchat.bench.prompts import Question
from specchat.records.generation import FinishReason, Sampling, Step

# Baselines that load the target a second time, with accelerate's offloading.
OFFLOADED = frozenset({"accelerate", "assisted"})
LAYERS = "layers"  # the baseline of specchat's own passes over whole layers, where single experts are read
OWN = "specchat"  # the measured system; the others are its baselines
MIN_DISTINCT = 0.5
_GRAM = 4


@dataclass(frozen=True)
class BenchSettings:
    """Settings of a measurement.

    Attributes:
        temperatures: temperatures at which each question is answered; 0 is greedy.
        max_tokens: longest answer in tokens.
        repeats: number of repetitions of all questions.
        seed: seed of the sampling.
        time_box_s: time in seconds, shared among the repeats, after which no question begins; None for no limit.
        limit_memory_bytes: limit of memory and page cache of each system's process; None for no limit.
    """

    temperatures: tuple[float, ...] = (0.0, 0.7)
    max_tokens: int = 64
    repeats: int = 3
    seed: int = 0
    time_box_s: float | None = None
    limit_memory_bytes: int | None = None


@dataclass(frozen=True)
class Request:
    """One prompt with its limits, the same for every system.

    Attributes:
        prompt_ids: tokens of the conversation so far.
        sampling: sampling of the answer.
        stop_ids: tokens that end an answer.
        max_tokens: longest answer in tokens.
    """

    prompt_ids: tuple[int, ...]
    sampling: Sampling
    stop_ids: frozenset[int]
    max_tokens: int


@dataclass(frozen=True)
class AnswerRecord:
    """An answer of one system with its times, which exclude the bench's own work between passes.

    Attributes:
        token_ids: tokens of the answer, including the stop token.
        finish_reason: reason for the end of the answer.
        ttft_s: seconds from the request to the first token: prefill and first step.
        decode_s: seconds from the first token to the last.
        num_passes: number of target passes that emitted tokens.
        first_tokens: number of tokens that the first of these passes emitted.
        cached_tokens: number of prompt tokens that were in the KV cache.
        steps: step records of the engine; empty for other systems.
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
        """Seconds from the request to the last token."""
        return self.ttft_s + self.decode_s

    @property
    def tok_per_s(self) -> float:
        """Tokens of the answer per second, including prefill."""
        return len(self.token_ids) / self.total_s

    @property
    def decode_tok_per_s(self) -> float | None:
        """Tokens per second after the first pass; None if there was only one."""
        return (len(self.token_ids) - self.first_tokens) / self.decode_s if self.decode_s > 0 else None

    @property
    def tokens_per_step(self) -> float:
        """Mean number of tokens that a target pass emitted."""
        return len(self.token_ids) / self.num_passes


@dataclass(frozen=True)
class Run:
    """One answer of one system to one turn.

    Attributes:
        system: `OWN` or name of a baseline.
        question: question of this conversation.
        turn: number of the turn, from 1.
        repeat: number of the repetition, from 1.
        sampling: sampling of the answer.
        prompt_ids: tokens of the conversation before the answer.
        answer: tokens and times of the answer.
        text: text of the answer without special tokens.
    """

    system: str
    question: Question
    turn: int
    repeat: int
    sampling: Sampling
    prompt_ids: tuple[int, ...]
    answer: AnswerRecord
    text: str

    @property
    def temperature(self) -> float:
        """Temperature of the sampling; 0 is greedy."""
        return self.sampling.temperature

    @property
    def prompt(self) -> tuple[str, int, float]:
        """Question, turn and temperature, by which the runs of two systems are paired."""
        return self.question.question_id, self.turn, self.temperature

    @property
    def distinct_4gram(self) -> float:
        """Share of distinct 4-grams among all of the answer's 4-grams; 1 for answers of fewer than four tokens."""
        ids = self.answer.token_ids
        grams = [ids[i : i + _GRAM] for i in range(len(ids) - _GRAM + 1)]
        return len(set(grams)) / len(grams) if grams else 1.0

    @property
    def counted(self) -> bool:
        """Whether the run counts in means. Repetitive text does not, because it is too easy to guess."""
        return self.distinct_4gram >= MIN_DISTINCT


@dataclass(frozen=True)
class Measurement:
    """All runs of a measurement, and what was left out.

    Attributes:
        runs: runs of all systems, in order of time.
        num_questions: number of questions that were asked.
        too_long: number of turns left out because they do not fit into the context.
        not_begun: number of questions left out because the time limit was reached.
        partial: whether the answers were interrupted.
        missing: names of the parts that an interruption left out.
    """

    runs: tuple[Run, ...]
    num_questions: int
    too_long: int
    not_begun: int
    partial: bool
    missing: tuple[str, ...] = ()

    def of(self, system: str) -> tuple[Run, ...]:
        """Return the runs of one system."""
        return tuple(run for run in self.runs if run.system == system)
