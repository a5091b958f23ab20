"""The cross of architectures, drafts, budgets, placements and samplings, in which the text stays the target's own."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from specchat.records.generation import Step
from specchat.records.model import ModelSource
from specchat.records.plan import Plan
from support.engines import make_plan
from support.reference import Reference
from support.tiny_models import make_config, perturbed, random_model, save

DRAFTS = ("random", "identical", "perturbed")
STREAMING = ("all", "half", "none")
Case = tuple[str, str, int, str, str]  # architecture, draft, budget, streamed layers, sampling


@dataclass
class Zoo:
    """Models and reference texts, created on first use.

    Attributes:
        root: folder of the checkpoints.
        make: function from an architecture to a random model.
        write: function from a model and the name of a sampling to the text that must come out.
        models: models by architecture.
        num_tokens: number of tokens compared.
        excused: differences at near-ties.
    """

    root: Path
    make: Callable[[str], Any]
    write: Callable[[Any, str], Reference]
    models: dict[str, Any] = field(default_factory=dict)
    num_tokens: int = 0
    excused: list[str] = field(default_factory=list)
    _sources: dict[tuple[str, str], ModelSource] = field(default_factory=dict)
    _texts: dict[tuple[str, str], Reference] = field(default_factory=dict)

    def source(self, architecture: str, role: str) -> ModelSource:
        """The checkpoint of a target, or of one of its `DRAFTS`."""
        if role == "random":
            return self._random
        if architecture not in self.models:
            model = self.models[architecture] = self.make(architecture)
            for name, each in {"target": model, "perturbed": perturbed(model, 0.03)}.items():
                self._sources[architecture, name] = save(each, self.root / architecture / name)
            self._sources[architecture, "identical"] = self._sources[architecture, "target"]
        return self._sources[architecture, role]

    def text(self, architecture: str, sampling: str) -> Reference:
        self.source(architecture, "target")
        if (architecture, sampling) not in self._texts:
            self._texts[architecture, sampling] = self.write(self.models[architecture], sampling)
        return self._texts[architecture, sampling]

    def plan(self, case: Case, chunk_rows: int, sources: str = "model") -> Plan:
        architecture, draft, budget, streaming, _ = case
        target, num_layers = self.source(architecture, "target"), self.models[architecture].config.num_hidden_layers
        resident = {"all": (), "half": range(0, num_layers, 2), "none": range(num_layers)}[streaming]
        return make_plan(
            target,
            None if sources == "retrieval" else self.source(architecture, draft),
            num_layers=num_layers,
            resident=resident,
            tree_budget=budget,
            chunk_rows=chunk_rows,
            retrieval=sources != "model",
        )

    def compare(self, name: object, expected: Reference, ours: Sequence[int]) -> bool:
        """Compare a text with the target's own, and return whether all tokens agree; near-ties are excused."""
        difference = expected.first_difference(list(ours))
        self.num_tokens += len(ours) if difference is None else difference + 1
        if difference is None:
            return True
        assert expected.is_near_tie(difference), f"token {difference} differs: {ours} is not {expected.tokens}"
        self.excused.append(f"{name} token {difference} margin {expected.margins[difference]:.1e}")
        return False

    @cached_property
    def _random(self) -> ModelSource:
        """The unrelated draft that all targets share."""
        return save(random_model(make_config("llama"), 77), self.root / "random")


@contextmanager
def opened_zoo(zoo: Zoo) -> Iterator[Zoo]:
    """Yield a zoo, and check at the end how many differences were excused."""
    yield zoo
    print(f"\n{zoo.num_tokens} tokens compared, {len(zoo.excused)} near-ties excused: {zoo.excused}")
    assert len(zoo.excused) <= max(1, zoo.num_tokens // 10_000)


def pairs(case: Case) -> set[tuple[tuple[int, object], tuple[int, object]]]:
    """The pairs of values of any two factors that meet in a case."""
    return set(itertools.combinations(enumerate(case), 2))


def check_steps(case: Case, steps: Sequence[Step], num_tokens: int) -> None:
    """Check that layers were streamed as asked, and that an identical draft is accepted."""
    _, draft, budget, streaming, sampling = case
    assert (steps[0].streamed_bytes > 0) == (streaming != "none")
    if draft == "identical" and sampling == "greedy":
        # an identical draft's best guess is right: two tokens a step from one node, and never fewer from more (where
        # the scores are flat, a larger tree is broad and no deeper)
        assert len(steps) == num_tokens // 2 if budget == 1 else len(steps) <= num_tokens // 2
