"""Architectures that cannot run are refused by name, in one line of words, before a plan is shown."""

import builtins
import json

import pytest
import torch
import transformers as hf

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


@pytest.mark.parametrize("kind", REASONS)
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
