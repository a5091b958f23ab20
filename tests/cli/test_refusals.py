"""Architectures that cannot run are refused by name, in one line of words, before a plan is shown."""

import builtins
import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers as hf
from support.versions import newest_only

import specchat as public

DEMO = Path(public.__file__).parent / "demo"
RUN = "cannot run with specchat's attention"
MASKS = "its own attention masks"
FUNCTIONS = "its own choice of attention functions"
SMALL = {"vocab_size": 211, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
DECODER = {**SMALL, "intermediate_size": 96, "max_position_embeddings": 128, "is_decoder": True}
REASONS = {
    "bart": (SMALL, "encoder"),
    "big_bird": (DECODER, MASKS),
    "blt": ({}, "no plain list of decoder layers"),
    "codegen": (
        {"vocab_size": 211, "n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8},
        MASKS,
    ),
    "cpmant": ({**SMALL, "dim_head": 16, "dim_ff": 96}, RUN),
    "diffusion_gemma": ({}, "token by token"),
    "doge": (DECODER, "attention masks in its layers"),
    "falcon": (SMALL, FUNCTIONS),
    "gpt_neo": (
        {"vocab_size": 211, "hidden_size": 64, "num_layers": 2, "num_heads": 4, "attention_types": [[["global"], 2]]},
        FUNCTIONS,
    ),
    "gptj": ({"vocab_size": 211, "n_embd": 64, "n_layer": 2, "n_head": 4}, FUNCTIONS),
    "musicgen": ({}, "not a model that generates text"),
    "openai-gpt": (
        {"vocab_size": 211, "n_embd": 64, "n_layer": 2, "n_head": 4},
        RUN,
    ),
    "prophetnet": ({}, "encoder"),
    "reformer": ({}, "from which transformers cannot build the model"),
    "t5gemma2": ({}, "encoder"),
    "trocr": ({"vocab_size": 211, "d_model": 64, "decoder_layers": 2, "decoder_attention_heads": 4}, "its own"),
    "xlm": ({"vocab_size": 211, "emb_dim": 64, "n_layers": 2, "n_heads": 4}, RUN),
    "xlnet": ({"vocab_size": 211, "d_model": 64, "n_layer": 2, "n_head": 4, "d_inner": 96}, "scores trees differently"),
    "xmod": (DECODER, RUN),
}
EXCEPTIONS = {name for home in (builtins, torch) for name in dir(home) if name.endswith("Error")} | {"StopIteration"}


_MUSICGEN = pytest.param("musicgen", marks=newest_only("older ones refuse its configuration alone"))


@pytest.mark.parametrize("kind", [_MUSICGEN if kind == "musicgen" else kind for kind in REASONS])
def test_refusals_say_why(specchat, tmp_path, kind):
    values, reason = REASONS[kind]
    config = {"model_type": kind} if kind == "musicgen" else hf.CONFIG_MAPPING[kind](**values).to_dict()
    (tmp_path / "config.json").write_text(json.dumps(config, default=str))
    arguments = ("run", str(tmp_path), "hi", "--device", "cpu", "--draft", "none")
    planned, ran = specchat(*arguments, "--plan"), specchat(*arguments)
    assert (planned.code, planned.err) == (ran.code, ran.err)
    assert ran.code == 2 and ran.out == planned.out == ""
    error, *hints = ran.err.splitlines()
    assert f"'{kind}'" in error and reason in error
    assert not [name for name in EXCEPTIONS if name in error]
    assert all(line.startswith("hint: ") for line in hints) and len(hints) <= 1


def plans_and_runs_alike(specchat, *arguments):
    """Return the error of `--plan`, which is that of the run, too; neither shows a plan."""
    planned, ran = specchat("run", *arguments, "hi", "--plan"), specchat("run", *arguments, "hi")
    assert (planned.code, planned.out, planned.err) == (ran.code, ran.out, ran.err)
    assert ran.out == "" and ran.code == 2
    return ran.err


def test_a_model_without_template_is_refused_before_it_is_loaded(specchat, tmp_path):
    folder = tmp_path / "target"
    shutil.copytree(DEMO / "target", folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    weights = folder / "model.safetensors"
    arguments = (str(folder), "--draft", "none", "--device", "cpu")
    assert "hint: pass --base" in plans_and_runs_alike(specchat, *arguments)
    assert weights.is_file() and specchat("run", *arguments, "hi", "--plan", "--base").code == 0


def test_a_draft_with_another_vocabulary_is_refused_before_it_is_loaded(specchat, tmp_path):
    folder = tmp_path / "draft"
    shutil.copytree(DEMO / "draft", folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = dict(zip(vocabulary, reversed(vocabulary.values()), strict=True))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    error = plans_and_runs_alike(specchat, "demo", "--draft", str(folder), "--device", "cpu")
    assert "has another vocabulary than 'demo'" in error and "--draft none" in error


SMALL_SHAPE = "shape:hidden=256,layers=8,heads=4,kv_heads=2,head_dim=64,mlp=704"


def test_a_large_synthetic_model_is_not_written_without_a_question(specchat, monkeypatch, tmp_path):
    monkeypatch.setenv("SPECCHAT_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("specchat.loading.locate._LARGE_BYTES", 1 << 20)
    arguments = ("run", SMALL_SHAPE, "hi", "--device", "cpu", "--max-tokens", "1", "--quant", "none")
    refused = specchat(*arguments)
    assert (refused.code, refused.out) == (2, "")
    assert "was not confirmed" in refused.err and "hint: add --yes to write it without a question" in refused.err
    assert not list(tmp_path.rglob("*.safetensors"))
    assert specchat(*arguments, "--plan").code == 0  # a plan writes nothing
    assert specchat(*arguments, "--yes").code == 0
    assert specchat(*arguments).code == 0  # it is there now
