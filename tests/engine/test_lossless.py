"""The main guarantee: the text is what the target alone writes, for every draft, placement and budget.

Float32, against transformers' own `generate`. The default run takes a covering set of pairs of factor values; `-m slow`
takes the full cross. A difference is excused only at a near-tie of the two best scores.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import pytest
from support import reference
from support.engines import make_plan, random_prompt, write
from support.loading import load_engine
from support.tiny_models import ARCHITECTURES, VOCAB, make_config, perturbed, random_model, save

from specchat.records.generation import Sampling
from specchat.records.model import ModelSource

DRAFTS = ("random", "identical", "perturbed")
BUDGETS = (1, 16, 64, 512)
STREAMING = ("all", "half", "none")
SOURCES = ("model", "retrieval", "model+retrieval")
SAMPLINGS = {
    "greedy": Sampling(),
    "greedy-penalty": Sampling(repetition_penalty=1.3),
    "t0.8-top_p": Sampling(temperature=0.8, top_p=0.9, seed=5),
    "t1.2-all": Sampling(temperature=1.2, top_k=40, top_p=0.95, min_p=0.02, repetition_penalty=1.1, seed=6),
}
NUM_TOKENS = 24
Case = tuple[str, str, int, str, str, str]


@dataclass
class Zoo:
    """Models and reference texts, created on first use."""

    root: Path
    sources: dict[tuple[str, str], ModelSource] = field(default_factory=dict)
    texts: dict[tuple[str, str], reference.Reference] = field(default_factory=dict)
    num_tokens: int = 0
    excused: list[str] = field(default_factory=list)

    def source(self, architecture: str, role: str) -> ModelSource:
        if (architecture, role) not in self.sources:
            self._make(architecture)
        return self.sources[architecture, role]

    def text(self, architecture: str, sampling: str) -> reference.Reference:
        self.source(architecture, "target")
        return self.texts[architecture, sampling]

    def _make(self, architecture: str) -> None:
        config = make_config(architecture)
        model = random_model(config)
        prompt = random_prompt(30, VOCAB)
        for name, sampling in SAMPLINGS.items():
            self.texts[architecture, name] = reference.generate(model, prompt, sampling, NUM_TOKENS)
        for role, each in {"target": model, "perturbed": perturbed(model, 0.03)}.items():
            self.sources[architecture, role] = save(each, self.root / architecture / role)
        self.sources[architecture, "identical"] = self.sources[architecture, "target"]
        self.sources[architecture, "random"] = self._random

    @cached_property
    def _random(self) -> ModelSource:
        """Return the unrelated draft that all targets share."""
        return save(random_model(make_config("llama"), 77), self.root / "random")


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory):
    zoo = Zoo(tmp_path_factory.mktemp("zoo"))
    yield zoo
    print(f"\n{zoo.num_tokens} tokens compared, {len(zoo.excused)} near-ties excused: {zoo.excused}")
    assert len(zoo.excused) <= max(1, zoo.num_tokens // 10_000)


def full_cross(samplings: Iterable[str]) -> list[Case]:
    return list(itertools.product(ARCHITECTURES, DRAFTS, BUDGETS, STREAMING, samplings, SOURCES))


def covering_set() -> list[Case]:
    """Choose cases greedily, so that any two values of any two factors meet in some case."""
    rng = random.Random(1)
    cases = full_cross(SAMPLINGS)
    rng.shuffle(cases)
    missing = {pair for case in cases for pair in _pairs(case)}
    chosen = []
    while missing:
        best = max(rng.sample(cases, 200), key=lambda case: len(missing & _pairs(case)))
        gained = missing & _pairs(best)
        if gained:
            chosen.append(best)
            missing -= gained
    return chosen


def _pairs(case: Case) -> set[tuple[tuple[int, object], tuple[int, object]]]:
    return set(itertools.combinations(enumerate(case), 2))


def check(zoo: Zoo, case: Case) -> None:
    architecture, draft_kind, budget, streaming, sampling, sources = case
    target = zoo.source(architecture, "target")
    draft = None if sources == "retrieval" else zoo.source(architecture, draft_kind)
    num_layers = make_config(architecture).num_hidden_layers
    resident = {"all": (), "half": range(0, num_layers, 2), "none": range(num_layers)}[streaming]
    chunk_rows = 24 if budget < 100 else 160  # several chunks in either case
    plan = make_plan(
        target,
        draft,
        num_layers=num_layers,
        resident=resident,
        tree_budget=budget,
        chunk_rows=chunk_rows,
        retrieval=sources != "model",
    )
    expected = zoo.text(architecture, sampling)
    with load_engine(plan, target, draft) as engine:
        ours, steps = write(engine, expected.prompt, SAMPLINGS[sampling], NUM_TOKENS)
    zoo.num_tokens += len(ours)
    difference = expected.first_difference(ours)
    if difference is not None:
        assert expected.is_near_tie(difference), f"token {difference} differs: {ours} is not {expected.tokens}"
        zoo.excused.append(f"{case} token {difference} margin {expected.margins[difference]:.1e}")
    elif draft_kind == "identical" and sampling == "greedy" and sources == "model":
        # an identical draft's best guess is right: two tokens a step from one node, and never fewer from more (where
        # the scores are flat, a larger tree is broad and no deeper)
        assert len(steps) == NUM_TOKENS // 2 if budget == 1 else len(steps) <= NUM_TOKENS // 2
    assert (steps[0].streamed_bytes > 0) == (streaming != "none")


@pytest.mark.parametrize("case", covering_set(), ids=lambda case: "-".join(map(str, case)))
def test_text_is_the_targets_own(zoo: Zoo, case: Case):
    check(zoo, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", full_cross(["greedy", "t0.8-top_p"]), ids=lambda case: "-".join(map(str, case)))
def test_text_is_the_targets_own_full_cross(zoo: Zoo, case: Case):
    check(zoo, case)
