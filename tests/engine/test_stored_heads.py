"""Tied configurations whose files hold a head of their own, or only the head: the text is that of transformers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from support import reference
from support.engines import make_plan, random_prompt, write
from support.loading import load_engine, plan_here, plan_request, prepare
from support.plans import changed
from support.tiny_models import make_config, random_model, save

from specchat.models.hf.config import load_config
from specchat.models.sizes.describe import describe
from specchat.records.generation import Sampling
from specchat.records.model import ModelSource

NUM_TOKENS = 24
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture
def source(tmp_path: Path) -> ModelSource:
    """A tied model with large embeddings, so that its texts do not repeat one token."""
    return save(random_model(make_config("llama_tied")), tmp_path / "model")


def store(source: ModelSource, **heads: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """Change the stored embeddings and head; None removes them."""
    file = source.path / "model.safetensors"
    names = {"embedding": EMBEDDING, "head": HEAD}
    tensors = load_file(file) | {names[name]: tensor for name, tensor in heads.items()}
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(tensors, file, metadata={"format": "pt"})
    return tensors


def other_head(seed: int = 5) -> torch.Tensor:
    config = make_config("llama_tied")
    return torch.randn(config.vocab_size, config.hidden_size, generator=torch.Generator().manual_seed(seed))


def loaded(source: ModelSource) -> Any:
    return hf.AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32).eval()


def check_text(source: ModelSource, resident: list[int] | None = None, **changes: Any) -> None:
    """Compare with transformers' text after transformers has loaded the same files."""
    prompt = random_prompt(20, 211)
    expected = reference.generate(loaded(source), prompt, Sampling(), NUM_TOKENS)
    plan = changed(make_plan(source, None, num_layers=5, resident=resident), **changes)
    with load_engine(
        plan, source, None, prepare(source, "fp32", warn=lambda _: None, progress=lambda _: None)
    ) as engine:
        tokens, _ = write(engine, prompt, Sampling(), NUM_TOKENS)
    assert expected.first_difference(tokens) is None
    assert len(set(tokens)) > 1


@pytest.mark.parametrize("resident", [None, [0]], ids=["resident", "streamed"])
def test_a_head_of_its_own_is_used(source: ModelSource, resident: list[int] | None):
    store(source, head=other_head())
    model = loaded(source)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    check_text(source, resident)


def test_embeddings_beside_a_head_of_their_own_may_stay_on_the_host(source: ModelSource):
    store(source, head=other_head())
    check_text(source, host_embeddings=True)


def test_an_equal_head_stays_tied(source: ModelSource):
    tensors = store(source)
    store(source, head=tensors[EMBEDDING].clone())
    model = loaded(source)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    check_text(source)
    assert describe(source).lookup_params == 0


def test_a_head_alone_fills_both(source: ModelSource):
    store(source, embedding=None, head=other_head())
    model = loaded(source)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    check_text(source)


@pytest.mark.parametrize("alone", [False, True], ids=["own head", "head alone"])
@pytest.mark.parametrize("quant", ["int8", "int4"])
def test_quantized_heads_come_from_the_same_tensor(source: ModelSource, quant: str, alone: bool):
    """The untied twin, written out, has the same text."""
    head = other_head()
    tensors = store(source, head=head, **({"embedding": None} if alone else {}))
    texts = []
    twin = source.path.with_name("twin")
    config = make_config("llama_tied")
    config.tie_word_embeddings = False
    config.save_pretrained(twin)
    save_file({EMBEDDING: head.clone(), **tensors}, twin / "model.safetensors", metadata={"format": "pt"})
    for each in (source, ModelSource("twin", twin)):
        (each.path / "tokenizer.json").write_bytes((source.path / "tokenizer.json").read_bytes())
        plan = plan_here(plan_request(each, None, "cpu", quant=quant, dtype="fp32", ctx=64, vram_bytes=1 << 28))
        pack = prepare(each, "fp32", quant, warn=lambda _: None, progress=lambda _: None)
        with load_engine(plan, each, None, pack) as engine:
            texts.append(write(engine, random_prompt(12, 211), Sampling(), NUM_TOKENS)[0])
    assert texts[0] == texts[1]
    assert len(set(texts[0])) > 1


def test_the_plan_counts_a_head_of_its_own(source: ModelSource):
    """The description changes with the files, not only with config.json."""
    tied = describe(source)
    head = other_head()
    store(source, head=head)
    own = describe(source)
    assert own.num_params == tied.num_params + head.numel()
    assert (tied.lookup_params, own.lookup_params) == (0, head.numel())
    assert load_config(source.path).tie_word_embeddings  # the file itself says so


def test_the_dtype_of_the_files_counts_if_none_is_named(source: ModelSource):
    tensors = store(source)
    save_file(
        {name: tensor.bfloat16() for name, tensor in tensors.items()},
        source.path / "model.safetensors",
        metadata={"format": "pt"},
    )
    config = json.loads((source.path / "config.json").read_text())
    for name, expected in (("float16", "fp16"), (None, "bf16"), ("auto", "bf16"), ("torch.float32", "fp32")):
        (source.path / "config.json").write_text(json.dumps(config | {"dtype": name}))
        assert describe(source).dtype == expected
        if name in ("float16", None):
            model = hf.AutoModelForCausalLM.from_pretrained(source.path, dtype="auto")
            assert str(model.dtype).removeprefix("torch.") == {"fp16": "float16", "bf16": "bfloat16"}[expected]
