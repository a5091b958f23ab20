"""The main guarantee: the text is what the target alone writes, for every draft, placement and budget.

Float32, against transformers' own `generate`. The default run takes a covering set of pairs of factor values; `-m slow`
takes the full cross. A difference is excused only at a near-tie of the two best scores.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable

import pytest
from support import reference
from support.crosses import DRAFTS, STREAMING, Case, Zoo, check_steps, opened_zoo, pairs
from support.engines import random_prompt, write
from support.loading import load_engine
from support.tiny_models import ARCHITECTURES, VOCAB, make_config, random_model

from specchat.records.generation import Sampling

BUDGETS = (1, 16, 64, 512)
SOURCES = ("model", "retrieval", "model+retrieval")
SAMPLINGS = {
    "greedy": Sampling(),
    "greedy-penalty": Sampling(repetition_penalty=1.3),
    "t0.8-top_p": Sampling(temperature=0.8, top_p=0.9, seed=5),
    "t1.2-all": Sampling(temperature=1.2, top_k=40, top_p=0.95, min_p=0.02, repetition_penalty=1.1, seed=6),
}
NUM_TOKENS = 24
SourcesCase = tuple[*Case, str]  # sources of draft nodes


def transformers_text(model: object, sampling: str) -> reference.Reference:
    return reference.generate(model, random_prompt(30, VOCAB), SAMPLINGS[sampling], NUM_TOKENS)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory):
    root = tmp_path_factory.mktemp("zoo")
    with opened_zoo(Zoo(root, lambda name: random_model(make_config(name)), transformers_text)) as zoo:
        yield zoo


def full_cross(samplings: Iterable[str]) -> list[SourcesCase]:
    return list(itertools.product(ARCHITECTURES, DRAFTS, BUDGETS, STREAMING, samplings, SOURCES))


def covering_set() -> list[SourcesCase]:
    """Choose cases greedily, so that any two values of any two factors meet in some case."""
    rng = random.Random(1)
    cases = full_cross(SAMPLINGS)
    rng.shuffle(cases)
    missing = {pair for case in cases for pair in pairs(case)}
    chosen = []
    while missing:
        best = max(rng.sample(cases, 200), key=lambda case: len(missing & pairs(case)))
        gained = missing & pairs(best)
        if gained:
            chosen.append(best)
            missing -= gained
    return chosen


def check(zoo: Zoo, case: SourcesCase) -> None:
    *first, sources = case
    shared: Case = tuple(first)
    architecture, draft, budget, streaming, sampling = shared
    expected = zoo.text(architecture, sampling)
    chunk_rows = 24 if budget < 100 else 160  # several chunks in either case
    plan = zoo.plan(shared, chunk_rows, sources=sources)
    source = None if sources == "retrieval" else zoo.source(architecture, draft)
    with load_engine(plan, zoo.source(architecture, "target"), source) as engine:
        ours, steps = write(engine, expected.prompt, SAMPLINGS[sampling], NUM_TOKENS)
    if zoo.compare(case, expected, ours) and sources == "model":
        check_steps(shared, steps, NUM_TOKENS)
    assert (steps[0].streamed_bytes > 0) == (streaming != "none")


@pytest.mark.parametrize("case", covering_set(), ids=lambda case: "-".join(map(str, case)))
def test_text_is_the_targets_own(zoo: Zoo, case: SourcesCase):
    check(zoo, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", full_cross(["greedy", "t0.8-top_p"]), ids=lambda case: "-".join(map(str, case)))
def test_text_is_the_targets_own_full_cross(zoo: Zoo, case: SourcesCase):
    check(zoo, case)
