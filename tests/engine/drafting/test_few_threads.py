"""Tiny drafts compute on one thread, and all threads are back afterwards."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.acceptance import load_demo
from support.engines import make_plan, random_prompt, write
from support.loading import load_engine, load_model
from support.tiny_models import VOCAB, make_config, random_model, save

from specchat.engine.drafting import few_threads
from specchat.engine.drafting.few_threads import are_tiny
from specchat.engine.drafting.growth import Growth
from specchat.models.catalog.ref import demo_source
from specchat.records.generation import Sampling


@pytest.fixture
def two_threads():
    count = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(count)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("limit", [few_threads._TINY, 0])
def test_trees_of_a_tiny_draft_grow_on_one_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int):
    source = save(random_model(make_config("llama")), tmp_path / "llama")
    plan, seen, run = make_plan(source, source, num_layers=4, tree_budget=8), set[int](), Growth.run
    monkeypatch.setattr(few_threads, "_TINY", limit)
    monkeypatch.setattr(Growth, "run", lambda growth: (seen.add(torch.get_num_threads()), run(growth))[1])
    with load_engine(plan, source, source) as engine:
        write(engine, random_prompt(10, VOCAB), Sampling(), 6)
    assert seen == {1 if limit else 2}
    assert torch.get_num_threads() == 2


def test_the_demos_draft_is_tiny_but_its_target_is_not():
    draft, target = load_demo("draft", 16), load_demo("target", 16)
    assert are_tiny([draft]) and not are_tiny([target]) and not are_tiny([draft, target]) and not are_tiny([])
    assert not are_tiny([load_model(demo_source("draft"), cache_rows=16, quant="int8")]), (
        "kernels are chosen by threads"
    )
