"""Experts that are read ahead: routers are found in every architecture, and no guess changes a bit."""

from __future__ import annotations

import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from support.loading import load_model
from support.moe import ARCHITECTURES, NUM_EXPERTS, passes, save_moe

from specchat.engine.experts.batch import ReadThreads
from specchat.models.hf import routers
from specchat.models.hf.routers import Routers
from specchat.records.plan import ExpertSlots

GIVEN: dict[str, Any] = {"cache_rows": 256, "tree_budget": 64}
ELSEWHERE = [pytest.param(name, marks=pytest.mark.slow) for name in ARCHITECTURES if name != "gemma4_moe"]


@pytest.mark.parametrize("architecture", ["gemma4_moe", *ELSEWHERE])
def test_routers_name_experts_one_layer_ahead(architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Each layer's router is found; on the states that its own norm reads, it chooses the experts of the layer."""
    found: list[Routers] = []
    make = Routers.__init__

    def made(self: Routers, *args: Any) -> None:
        make(self, *args)
        found.append(self)

    monkeypatch.setattr(Routers, "__init__", made)
    source = save_moe(architecture, tmp_path)
    with closing(load_model(source, **GIVEN, experts=ExpertSlots(2, NUM_EXPERTS))) as model:
        chosen: list[torch.Tensor] = []
        (own,) = found
        saw = own.saw
        monkeypatch.setattr(own, "saw", lambda position, ids: (saw(position, ids), chosen.append(ids))[0])
        model.append(range(5, 12))
        num_layers = len(chosen)
        assert own.num_found == num_layers >= 3
        chosen.clear()
        monkeypatch.setattr(model.streamer, "_likely", lambda position: None)  # which would take the states
        model.append([40, 41])
        for position, ids in enumerate(chosen):
            route, states = own._routes[position], own._states[position]
            assert route is not None and states is not None
            with torch.inference_mode():
                assert torch.equal(route.choose(states), ids)


@pytest.mark.parametrize(
    "architecture", ["gpt_oss", *(pytest.param(each, marks=pytest.mark.slow) for each in ARCHITECTURES)]
)
@pytest.mark.parametrize("kind", ["right", pytest.param("wrong", marks=pytest.mark.slow)])
def test_guesses_change_no_bit(architecture: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = save_moe(architecture, tmp_path)
    for chunk_rows in (16, 128):
        given = {**GIVEN, "chunk_rows": chunk_rows}
        with closing(load_model(source, **given)) as model:
            expected = list(passes(model))
        if kind == "wrong":
            rng = torch.Generator().manual_seed(2)
            monkeypatch.setattr(
                Routers, "likely", lambda *_, rng=rng: torch.randint(0, NUM_EXPERTS + 1, (9, 2), generator=rng)
            )
        for quota in (0, 5):
            with closing(load_model(source, **given, experts=ExpertSlots(quota, NUM_EXPERTS))) as model:
                found, counters = list(passes(model)), model.streamer.counters()
            assert all(map(torch.equal, expected, found))
            assert counters.useful_guesses if kind == "right" else counters.useless_guesses


def test_a_router_that_chooses_otherwise_is_not_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    choose = routers._Route.choose
    monkeypatch.setattr(routers._Route, "choose", lambda self, states: choose(self, states).flip(0))
    source = save_moe("qwen3_moe", tmp_path)
    with closing(load_model(source, **GIVEN, experts=ExpertSlots(2, NUM_EXPERTS))) as model:
        for _ in range(3):
            model.append([5, 6, 7])
        counters = model.streamer.counters()
    assert counters.expert_misses and not counters.useful_guesses and not counters.useless_guesses


def test_reads_are_taken_back_until_they_begin():
    begun: list[int] = []
    with closing(ReadThreads(1)) as threads:
        gate = threading.Lock()
        gate.acquire()
        first = threads.begin([gate.acquire])
        second = threads.begin([lambda: begun.append(2)])
        assert second.withdraw() and second.is_over
        gate.release()
        first.wait()
        assert not first.withdraw() and first.is_over
        third = threads.begin([lambda: begun.append(3)])
        third.wait()
        second.wait()
    assert begun == [3]
