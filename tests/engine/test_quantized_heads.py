"""Heads in 8 and 4 bits: their matrices are quantized, they still draft, and the text is the target's own."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support.assistants import load_assistant, save_assistant
from support.dflash import load_dflash, save_dflash
from support.dflash2 import save_dflash2
from support.eagle3 import KINDS, load_eagle3, save_eagle3
from support.heads import LAYOUTS, engine_beside, head_of, load_head, random_target, save_with_mtp
from support.targets import SAMPLINGS, Targets, check_head
from support.tiny_models import save as save_plain

from specchat.engine.drafting.assistant import Assistant
from specchat.engine.drafting.dflash import DFlashHead
from specchat.engine.drafting.eagle3 import Eagle3Head
from specchat.engine.drafting.mtp import MtpHead
from specchat.models.quant.modules import quant_linears
from specchat.records.model import ModelSource, Quant

NUM_LAYERS = 4
# How a head is saved for a target, its modules are loaded, and its source is made.
Kind = tuple[Callable[[ModelSource, Path], ModelSource], Callable[..., Any], Callable[..., Any], str]
HEADS: dict[str, Kind] = {
    "mtp": (lambda target, _: target, load_head, MtpHead, "mtp"),
    "eagle3": (lambda _, folder: save_eagle3(64, folder, KINDS["specforge"]).source, load_eagle3, Eagle3Head, "eagle3"),
    "dflash": (lambda _, folder: save_dflash(folder).source, load_dflash, DFlashHead, "dflash"),
    "dflash2": (lambda _, folder: save_dflash2(folder).source, load_dflash, DFlashHead, "dflash"),
    "assistant": (lambda _, folder: save_assistant(folder).source, load_assistant, Assistant, "assistant"),
}
ASSISTED = "gemma4_shared"
CASES = [case for case in itertools.product(HEADS, ("int8", "int4"), SAMPLINGS) if case != ("dflash", "int4", "greedy")]


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> Targets:
    root = tmp_path_factory.mktemp("quantized")
    return Targets(root, random_target, _saved)


def _saved(model: Any, folder: Path, name: str) -> ModelSource:
    return save_with_mtp(model, folder, LAYOUTS[name]) if name in LAYOUTS else save_plain(model, folder)


def check(targets: Targets, tmp_path: Path, name: str, quant: Quant, sampling: str) -> None:
    architecture = ASSISTED if name == "assistant" else "qwen3"
    target, expected = targets.source(architecture), targets.text(architecture, sampling)
    num_layers = 6 if name == "assistant" else NUM_LAYERS
    save, load, make, source = HEADS[name]
    head = save(target, tmp_path / "head")
    loaded = partial(load, head, quant=quant)
    with engine_beside(
        target,
        head_of(target) if name == "mtp" else head,
        num_layers,
        loaded,
        make,
        budget=16,
        resident=range(0, num_layers, 2),
    ) as engine:
        skeleton = engine._drafter.models[0].skeleton
        assert sum(1 for _ in quant_linears(skeleton.model)) >= 7, "the layer's matrices"
        check_head(engine, expected, sampling, source, streams=True, retrieval=False)


def test_a_head_of_few_bits_drafts(targets: Targets, tmp_path: Path):
    check(targets, tmp_path, "dflash", "int4", "greedy")


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_every_kind_of_head_in_few_bits(targets: Targets, tmp_path: Path, case: tuple[str, Quant, str]):
    check(targets, tmp_path, *case)
