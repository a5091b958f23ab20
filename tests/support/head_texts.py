"""Texts that heads in repositories of their own draft: what the tests of each kind of head share."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from specchat.engine.engine import Engine
from specchat.records.generation import Step
from specchat.records.model import ModelSource
from support.engines import make_plan, random_prompt, write
from support.loading import load_engine
from support.targets import SAMPLINGS, Targets, check_head
from support.tiny_models import VOCAB, make_config, random_model, save


@dataclass(frozen=True)
class Case:
    """One combination of the cross; `str` names it.

    Attributes:
        architecture: architecture of the target.
        kind: kind of head.
        streaming: which layers stream: all, half or none.
        budget: nodes of a tree.
        sampling: name of the sampling.
        retrieval: whether nodes also come from the text.
    """

    architecture: str
    kind: str
    streaming: str
    budget: int
    sampling: str
    retrieval: bool

    def __str__(self) -> str:
        values = (self.architecture, self.kind, self.streaming, self.budget, self.sampling, self.retrieval)
        return "-".join(map(str, values))


def cross(architectures: Iterable[str], kinds: Iterable[str]) -> list[Case]:
    """All cases of some architectures and kinds."""
    columns = architectures, kinds, ("all", "half", "none"), (1, 16, 64), SAMPLINGS, (False, True)
    return [Case(*values) for values in itertools.product(*columns)]


@dataclass
class HeadWorld:
    """Targets, and the heads beside them, made on first use.

    Attributes:
        name: name of the head as a source of draft nodes.
        num_layers: layers of each target.
        targets: targets and their texts.
        save_head: saves a head of a kind for an architecture in a folder.
        make_engine: returns the engine of a target and its head, with the settings of `engine_beside`.
    """

    name: str
    num_layers: int
    targets: Targets
    save_head: Callable[[Path, str, str], ModelSource]
    make_engine: Callable[..., Engine]
    _heads: dict[tuple[str, str], ModelSource] = field(default_factory=dict)

    def head(self, architecture: str, kind: str) -> ModelSource:
        key = architecture, kind
        if key not in self._heads:
            self._heads[key] = self.save_head(
                self.targets.root / f"{self.name}-{architecture}-{kind}", kind, architecture
            )
        return self._heads[key]

    def engine(self, architecture: str, kind: str, **settings: object) -> Engine:
        source = self.targets.source(architecture)
        return self.make_engine(source, self.head(architecture, kind), self.num_layers, **settings)

    def check(self, case: Case, inspect: Callable[[Engine], None] | None = None) -> list[Step]:
        """Compare a text with the target's own, let `inspect` look at the engine, and return the steps."""
        resident = {"all": (), "half": range(0, self.num_layers, 2), "none": None}[case.streaming]
        with self.engine(
            case.architecture,
            case.kind,
            budget=case.budget,
            resident=resident,
            chunk_rows=24,
            retrieval=case.retrieval,
        ) as engine:
            expected, streams = self.targets.text(case.architecture, case.sampling), case.streaming != "none"
            steps = check_head(engine, expected, case.sampling, self.name, streams=streams, retrieval=case.retrieval)
            if inspect is not None:
                inspect(engine)
            return steps


def make_world(
    tmp_path_factory: pytest.TempPathFactory,
    name: str,
    num_layers: int,
    save_head: Callable[[Path, str, str], ModelSource],
    make_engine: Callable[..., Engine],
) -> HeadWorld:
    """A world of random targets of any architecture in `tiny_models`."""
    targets = Targets(
        tmp_path_factory.mktemp(name),
        lambda architecture: random_model(make_config(architecture)),
        lambda model, folder, _: save(model, folder),
    )
    return HeadWorld(name, num_layers, targets, save_head, make_engine)


def check_given_up(
    source: ModelSource, head: ModelSource, num_layers: int, num_tokens: int = 20
) -> tuple[list[Step], int]:
    """Two answers with a head that guesses by chance: the target's own texts, one warning, and retrieval goes on.

    Returns:
        The steps, and the number of the one that warns.
    """
    prompt = random_prompt(60, VOCAB)
    plan = make_plan(source, head, num_layers=num_layers, tree_budget=16, retrieval=True)
    with load_engine(plan, source, None) as engine:
        plain = write(engine, prompt, SAMPLINGS["greedy"], num_tokens)[0]
    with load_engine(plan, source, head) as engine:
        ours, steps = write(engine, prompt, SAMPLINGS["greedy"], num_tokens)
        again, later = write(engine, prompt, SAMPLINGS["greedy"], num_tokens)
    assert ours == again == plain
    steps += later
    (given_up,) = [place for place, step in enumerate(steps) if step.warning is not None]
    warning = steps[given_up].warning
    assert warning is not None and head.name in warning and "by chance" in warning
    assert offering(steps[given_up:]) <= {"retrieval", "recycling"}
    assert offering(steps[given_up:])
    return steps, given_up


def offering(steps: Sequence[Step]) -> set[str]:
    """Sources that offered nodes."""
    return {guess.source for step in steps for guess in step.guesses if guess.offered}
