"""MTP layers in GGUF files of their own, as converters write them beside the model: found, asked for, and refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.fake_hub import FakeHub, serving_here
from support.gguf_files import save_gguf
from support.heads import LAYOUTS, head_tensors, random_target, save_with_mtp
from support.loading import Quiet, model_request
from support.tiny_models import random_model

from specchat.errors import ModelNotFoundError, UnsupportedModelError
from specchat.loading.locate import locate_models, parse_models
from specchat.loading.models import Models
from specchat.loading.planning import make_plan
from specchat.models.catalog.ref import parse_model
from specchat.models.checkpoint.gguf import gguf_files, is_mtp_alone, lies_beside, listed_files
from specchat.models.hub.gguf_files import choose_files
from specchat.records.model import ModelSource

REPO = "org/tiny-GGUF"
MODEL, HEAD = "tiny-Q4_K_M.gguf", "tiny-MTP-ONLY-Q4_K_M.gguf"
HEAD_NAME = HEAD.removesuffix(".gguf")
LAYERS = 10  # drafts pay for a target of many layers


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with serving_here(monkeypatch, tmp_path / "hub") as served:
        yield served


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, bytes]:
    """A model without its MTP layer, and the layer alone."""
    folder = tmp_path_factory.mktemp("gguf")
    config = random_target("glm4_moe").config
    config.num_hidden_layers = LAYERS
    model = random_model(config)
    saved = save_with_mtp(model, folder / "saved", LAYOUTS["glm4_moe"])
    save_gguf(model, folder / MODEL)
    save_gguf(model, folder / HEAD, head=head_tensors(saved, LAYERS), is_alone=True)
    return {name: (folder / name).read_bytes() for name in (MODEL, HEAD)}


def locate(model: str, *, asked: list[str], **changes) -> Models:
    """Find the models; every question is answered by yes."""

    def ask(question: str) -> bool:
        asked.append(question)
        return True

    request = model_request(**{"model": model} | changes)
    return locate_models(request, parse_models(request), Quiet(), ask)


def test_the_layer_beside_a_model_is_in_the_one_question(hub: FakeHub, files):
    hub.publish(REPO, files)
    asked: list[str] = []
    models = locate(f"{REPO}:Q4_K_M", asked=asked)
    assert len(asked) == 1 and f"{REPO}:{HEAD_NAME} (" in asked[0] and ", an MTP layer)" in asked[0]
    assert [head.part for head in models.heads] == ["mtp"]
    assert file_of(models.target) == MODEL and file_of(models.heads[0]) == HEAD
    planned = make_plan(model_request(model=f"{REPO}:Q4_K_M", tree_budget=16), models, Quiet())
    assert planned.models.draft == models.heads[0]
    hub.requests.clear()
    for changes in ({}, {"draft": "mtp"}, {"draft": f"{REPO}:{HEAD_NAME}"}):
        again = locate(f"{REPO}:Q4_K_M", asked=asked, offline=True, **changes)
        assert file_of(again.draft or again.heads[0]) == HEAD and (again.draft or again.heads[0]).part == "mtp"
    assert len(asked) == 1 and not hub.requests


def test_a_layer_alone_is_no_model(hub: FakeHub, files, tmp_path: Path):
    hub.publish(REPO, files)
    (tmp_path / HEAD).write_bytes(files[HEAD])
    for name in (f"{REPO}:{HEAD_NAME}", str(tmp_path / HEAD)):
        with pytest.raises(UnsupportedModelError, match="holds the MTP layer of a model") as caught:
            locate(name, asked=[], draft="none")
        assert caught.value.hint == f"use it as a draft: --draft {name}"
    assert hub.weight_bytes == 0
    (tmp_path / MODEL).write_bytes(files[MODEL])
    assert [file.name for file in gguf_files(tmp_path)] == [MODEL]


def file_of(source: ModelSource) -> str:
    files = listed_files(source.path)
    assert files is not None
    return files[0].name


@pytest.mark.parametrize(
    ("name", "is_beside", "is_head"),
    [
        ("mtp-Qwen3.6-27B-BF16.gguf", True, True),
        ("Qwen3.8-27B-MTP-ONLY-Q6_K.gguf", True, True),
        ("Qwen3.6-27B-MTP-IQ4_XS.gguf", False, False),
        ("Qwen3.6-27B-Q5_K_M-mtp.gguf", False, False),
        ("eagle3-Qwen3-8B-Q8_0.gguf", True, False),
        ("Qwen3-8B-DFlash-BF16.gguf", True, False),
        ("dspark-x.gguf", True, False),
        ("mmproj-F16.gguf", True, False),
        ("x.imatrix.gguf", True, False),
        ("Dflashy-Q4_0.gguf", False, False),
    ],
)
def test_files_beside_a_model_are_known_by_their_names(name: str, is_beside: bool, is_head: bool):
    assert (lies_beside(name), is_mtp_alone(name)) == (is_beside, is_head)


def test_files_of_one_quantization_are_not_mixed():
    """Two models of one quantization are two choices, and a layer alone is none."""
    one = {"Q4_0/a-it-Q4_0-00001-of-00002.gguf": 1, "Q4_0/a-it-Q4_0-00002-of-00002.gguf": 1, HEAD: 1, MODEL: 1}
    assert choose_files(parse_model("org/a:Q4_K_M"), one) == (MODEL,)
    assert choose_files(parse_model("org/a:Q4_0"), one) == tuple(one)[:2]
    two = one | {"a-pt-Q4_0.gguf": 1}
    with pytest.raises(ModelNotFoundError, match=r"a-it-Q4_0 \(2 B\)") as caught:
        choose_files(parse_model("org/a:Q4_0"), two)
    assert HEAD_NAME not in caught.value.message
    assert choose_files(parse_model("org/a:a-it-q4_0"), two) == tuple(one)[:2]


@pytest.mark.parametrize(
    ("file", "variant"),
    [
        ("Qwen3.8-27B-UD-Q4_K_XL.gguf", "UD-Q4_K_XL"),
        ("Qwen3.8-27B-UD-Q4_K_XL.gguf", "q4_k_xl"),
        ("Qwen3.6-27B-Q5_K_M-mtp.gguf", "Q5_K_M"),
        ("Qwen3.6-27B-NVFP4-Q4_K_M-mtp.gguf", "Q4_K_M"),
        ("Qwen3.6-27B-MTP-IMAT-IQ4_XS-Q8nextn.gguf", "IQ4_XS"),
        ("gpt-oss-20b-mxfp4.gguf", "MXFP4"),
        ("BF16/x-BF16-00001-of-00001.gguf", "BF16"),
        ("tiny.gguf", "tiny"),
    ],
)
def test_quantizations_are_known_by_the_last_word_of_a_name(file: str, variant: str):
    assert choose_files(parse_model(f"org/a:{variant}"), {file: 1, "other-Q2_K.gguf": 1}) == (file,)
