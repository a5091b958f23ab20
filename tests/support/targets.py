"""Tiny targets by architecture, and the texts that they write alone."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from specchat.engine.engine import Engine
from specchat.records.generation import Request, Sampling, Step
from specchat.records.model import ModelSource
from support import reference
from support.engines import NOTHING, random_prompt, write
from support.hybrids import OneByOne
from support.tiny_models import VOCAB

SAMPLINGS = {"greedy": Sampling(), "t0.8": Sampling(temperature=0.8, seed=5)}
NUM_TOKENS = 20
_HYBRIDS = {"qwen3_5_text", "qwen3_next"}


@dataclass
class Targets:
    """Targets and their texts, made on first use.

    Attributes:
        root: folder of the models.
        make: returns a random model of an architecture.
        save: saves a model in a folder; the architecture comes last.
    """

    root: Path
    make: Callable[[str], Any]
    save: Callable[[Any, Path, str], ModelSource]
    _models: dict[str, Any] = field(default_factory=dict)
    _sources: dict[str, ModelSource] = field(default_factory=dict)
    _texts: dict[tuple[str, str, int], reference.Reference] = field(default_factory=dict)

    def source(self, architecture: str) -> ModelSource:
        if architecture not in self._sources:
            model = self._models[architecture] = self.make(architecture)
            self._sources[architecture] = self.save(model, self.root / architecture, architecture)
        return self._sources[architecture]

    def text(self, architecture: str, sampling: str, seed: int = 11) -> reference.Reference:
        self.source(architecture)
        key = architecture, sampling, seed
        if key not in self._texts:
            model, prompt = self._models[architecture], random_prompt(18, VOCAB, seed)
            if architecture in _HYBRIDS:
                self._texts[key] = OneByOne(model).generate(prompt, SAMPLINGS[sampling], NUM_TOKENS)
            else:
                self._texts[key] = reference.generate(model, prompt, SAMPLINGS[sampling], NUM_TOKENS)
        return self._texts[key]


def check_text(expected: reference.Reference, ours: list[int]) -> None:
    difference = expected.first_difference(ours)
    assert difference is None or expected.is_near_tie(difference), (difference, ours, expected.tokens)


def check_head(
    engine: Engine, expected: reference.Reference, sampling: str, head: str, *, streams: bool, retrieval: bool
) -> list[Step]:
    """Compare the text that a head drafts with the target's own, and return the steps.

    Args:
        engine: target and head.
        expected: text of the target alone.
        sampling: name of the sampling.
        head: name of the head as a source of draft nodes.
        streams: whether layers of the target stream.
        retrieval: whether nodes also come from the text.
    """
    ours, steps = write(engine, expected.prompt, SAMPLINGS[sampling], NUM_TOKENS)
    check_text(expected, ours)
    assert retrieval or steps[0].tree_nodes == 0, "no states before the prompt is read"
    drafted = [guess for step in steps[1:] for guess in step.guesses if guess.source == head]
    assert sum(guess.offered for guess in drafted) > 0
    assert (steps[0].streamed_bytes > 0) == streams
    return steps


def check_batch(engine: Engine, targets: Targets, architecture: str) -> None:
    """Four requests in three seats: each answer is the text alone, although a prompt joins passes with other trees."""
    expected = [targets.text(architecture, "t0.8", seed) for seed in (11, 12, 13, 14)]
    requests = [
        Request(tuple(each.prompt), SAMPLINGS["t0.8"], NOTHING, length)
        for each, length in zip(expected, (8, NUM_TOKENS, NUM_TOKENS, NUM_TOKENS), strict=True)
    ]
    texts, drafted = [list[int]() for _ in requests], 0
    for index, step in engine.generate_many(requests):
        texts[index] += step.token_ids
        drafted += step.tree_nodes
    for each, ours, request in zip(expected, texts, requests, strict=True):
        check_text(reference.Reference(each.prompt, each.tokens[: request.max_tokens], each.margins), ours)
    assert drafted > 0


def check_interrupt_and_undo(engine: Engine, expected: reference.Reference) -> list[Step]:
    """Interrupt a greedy answer, ask again, cut the prompt and ask once more; return the steps of the last answer."""
    prompt, text = expected.prompt, expected.tokens
    cancel, taken = threading.Event(), list[int]()
    for step in engine.generate(prompt, SAMPLINGS["greedy"], stop_ids=NOTHING, max_tokens=12, cancel=cancel):
        taken += step.token_ids
        if len(taken) >= 4:
            cancel.set()
    check_text(reference.Reference(prompt, text[: len(taken)], expected.margins), taken)
    check_text(expected, write(engine, prompt, SAMPLINGS["greedy"], NUM_TOKENS)[0])  # the same question
    engine.truncate(len(prompt) // 2)
    further, steps = write(engine, prompt, SAMPLINGS["greedy"], NUM_TOKENS)
    check_text(expected, further)
    return steps
