"""Tiny targets by architecture, and the texts that they write alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from specchat.records.generation import Sampling
from specchat.records.model import ModelSource
from support import reference
from support.engines import random_prompt
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
