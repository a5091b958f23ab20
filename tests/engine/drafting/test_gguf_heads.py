"""EAGLE-3 and DFlash heads in GGUF files guess as those in safetensors: the same weights, the same scores."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.dflash import Reader, load_pair, save_dflash
from support.eagle3 import KINDS, Eagle3Follower, save_eagle3
from support.engines import make_plan, random_prompt, write
from support.gguf_files import find
from support.gguf_heads import save_head_gguf, write_head
from support.loading import load_engine
from support.tiny_models import VOCAB, make_config, random_model, save

from specchat.cli.app import run_command_line
from specchat.errors import CorruptCheckpointError, UnsupportedModelError
from specchat.models.catalog.ref import parse_model
from specchat.models.hf.pairing import check_pair
from specchat.models.hub.gguf_files import choose_files, smallest_head
from specchat.models.sizes.describe import describe
from specchat.records.generation import Sampling
from specchat.records.model import ModelSource


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    return save(random_model(make_config("qwen3")), tmp_path_factory.mktemp("target") / "qwen3")


def eagle3_scores(target: ModelSource, head: ModelSource) -> torch.Tensor:
    text = random_prompt(21, VOCAB)
    follower = Eagle3Follower(target, head)
    follower.read(text[:-1], text[-1])
    return follower.chain(text[-1], [5, 9])


def dflash_scores(target: ModelSource, head: ModelSource) -> torch.Tensor:
    text = random_prompt(21, VOCAB)
    reader = Reader(load_pair(target, head))
    reader.read(text[:-1], text[-1])
    return reader.levels(text[-1])


@pytest.mark.parametrize("kind", ["specforge", "speculators"])  # with the usual layers, and with all that may differ
def test_eagle3_heads_score_alike(target: ModelSource, kind: str, tmp_path: Path):
    saved = save_eagle3(64, tmp_path / "head", KINDS[kind]).source
    found = save_head_gguf(saved, tmp_path / "eagle3-x.gguf")
    assert found.part == "eagle3" and found.path != saved.path
    check_pair(target, found)
    ours, theirs = (eagle3_scores(target, each) for each in (found, saved))
    assert torch.equal(ours, theirs) and theirs.std() > 0.1
    assert replace(describe(found), name="", dtype="fp32") == replace(describe(saved), name="", dtype="fp32")


def test_blocks_of_heads_are_dequantized(target: ModelSource, tmp_path: Path):
    saved = save_eagle3(64, tmp_path / "head", KINDS["specforge"]).source
    theirs = eagle3_scores(target, saved)
    known = theirs > theirs.amin(-1, keepdim=True)
    error = (eagle3_scores(target, save_head_gguf(saved, tmp_path / "x.gguf", "Q8_0")) - theirs)[known].abs().max()
    assert 0 < error < 0.1 * theirs.abs().max()


@pytest.mark.parametrize("sliding", [False, True])
def test_dflash_heads_score_alike(target: ModelSource, sliding: bool, tmp_path: Path):
    saved = save_dflash(tmp_path / "head", sliding=sliding).source
    found = save_head_gguf(saved, tmp_path / "x.gguf")
    assert found.part == "dflash"
    check_pair(target, found)
    ours, theirs = (dflash_scores(target, each) for each in (found, saved))
    # files do not say whether rows see later ones in sliding windows
    assert torch.equal(ours, theirs) != sliding and theirs.std() > 0.1


def test_texts_and_steps_are_the_same(target: ModelSource, tmp_path: Path):
    saved = save_eagle3(64, tmp_path / "head", KINDS["specforge"]).source
    written = []
    for head in (saved, save_head_gguf(saved, tmp_path / "x.gguf")):
        with load_engine(make_plan(target, head, num_layers=4, resident=()), target, head) as engine:
            text, steps = write(engine, random_prompt(20, VOCAB), Sampling(), 12)
        written.append((text, len(steps)))
    assert written[0] == written[1]


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "a norm before fc": ("eagle3", {"norm_before_fc": True}, "norms the joined states"),
    "no layers": ("eagle3", {"target_layers": None}, "eagle3.target_layers is None"),
    "no block": ("dflash", {"block_size": None}, "dflash.block_size is None"),
    "DFlash2": ("dflash", {"tensors": {"selector_hidden.weight": (4, 64)}}, "is a DFlash2 head, which"),
    "DSpark": ("dflash", {"tensors": {"markov_w1.weight": (4, 64)}}, "is a DSpark head, which"),
}


def save_part(part: str, folder: Path) -> ModelSource:
    return (save_eagle3(64, folder, KINDS["specforge"]) if part == "eagle3" else save_dflash(folder)).source


@pytest.mark.parametrize("what", REFUSED)
def test_other_heads_are_refused_by_name(what: str, tmp_path: Path):
    part, changes, message = REFUSED[what]
    write_head(save_part(part, tmp_path / "head"), tmp_path / "x.gguf", **changes)
    with pytest.raises((UnsupportedModelError, CorruptCheckpointError), match=message):
        find(tmp_path / "x.gguf")


def test_unknown_tensors_of_heads_are_refused(target: ModelSource, tmp_path: Path):
    saved = save_part("eagle3", tmp_path / "head")
    found = save_head_gguf(saved, tmp_path / "x.gguf", tensors={"blk.0.attn_sinks.weight": (4,)})
    with pytest.raises(UnsupportedModelError, match=r"'blk\.0\.attn_sinks\.weight' .* is not one that specchat knows"):
        eagle3_scores(target, found)


def test_whole_names_choose_heads_on_the_hub():
    sizes = {"x-Q8_0.gguf": 9, "eagle3-x-Q8_0.gguf": 2, "x-dflash-Q8_0.gguf": 3, "mmproj-x.gguf": 1}
    for name in ("eagle3-x-Q8_0", "x-dflash-Q8_0"):
        assert choose_files(parse_model(f"org/x:{name}"), sizes) == (f"{name}.gguf",)
        assert choose_files(parse_model(f"org/x:{name}"), {f"{name}.gguf": 1}) == (f"{name}.gguf",)
    assert choose_files(parse_model("org/x:Q8_0"), sizes) == ("x-Q8_0.gguf",)
    assert smallest_head(sizes) is None  # only an MTP layer is the model's own


@pytest.mark.parametrize("is_gguf", [True, False])
def test_a_head_is_no_model(
    is_gguf: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    saved = save_part("eagle3", tmp_path / "head")
    write_head(saved, tmp_path / "eagle3-x.gguf")
    name = str(tmp_path / "eagle3-x.gguf") if is_gguf else str(saved.path)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO()))
    assert run_command_line(("run", name, "hi", "--offline")) > 0
    assert f"{name} is a head that drafts for a model, and not a model" in capfd.readouterr().err
