"""Embeddings of GGUF files stay in their blocks: rows are decoded when they are looked up, tied heads use the table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from support import reference
from support.engines import make_plan, random_prompt, write
from support.gguf_files import dequantized, save_gguf
from support.loading import load_engine, load_model, plan_request
from support.planning import plan_for
from support.plans import changed
from support.tiny_models import BASE, VOCAB, perturbed, random_model

from specchat.engine.model import TreeModel
from specchat.hardware.machine import Machine
from specchat.models.hf.skeleton import lookup_embeddings
from specchat.models.quant.lookup import QuantEmbedding
from specchat.models.quant.modules import QuantLinear
from specchat.models.sizes.describe import describe
from specchat.models.sizes.geometry import head_copy_bytes
from specchat.planner.memory import host_embeddings
from specchat.records.generation import Sampling
from specchat.records.model import ModelSource
from specchat.records.plan import Workload
from specchat.units import GIB

NUM_TOKENS = 24
WIDE = {"hidden_size": 128, "intermediate_size": 192, "head_dim": 32, "num_hidden_layers": 3}
GEMMA = {"layer_types": None, "query_pre_attn_scalar": 32}
PROMPT = random_prompt(45, VOCAB)


def model_of(config: str, *, tied: bool) -> Any:
    values = GEMMA if config.startswith("Gemma") else {}
    return random_model(getattr(hf, config)(**{**BASE, **WIDE, **values, "tie_word_embeddings": tied}))


def load(source: ModelSource, *, on_host: bool = False, chunk_rows: int = 512) -> TreeModel:
    return load_model(
        source,
        dtype=torch.float32,
        device=torch.device("cpu"),
        cache_rows=64,
        chunk_rows=chunk_rows,
        host_embeddings=on_host,
    )


# Gemma scales the rows after the lookup.
@pytest.mark.parametrize(
    ("config", "tied", "kind"),
    [("LlamaConfig", True, "Q8_0"), ("LlamaConfig", False, "Q5_0"), ("Gemma3TextConfig", True, "Q8_0")],
)
def test_text_is_that_of_the_dequantized_model(config: str, tied: bool, kind: str, tmp_path: Path):
    model = model_of(config, tied=tied)
    source = save_gguf(model, tmp_path / "x.gguf", kind)
    draft = save_gguf(perturbed(model, 0.02), tmp_path / "draft.gguf", kind)
    dequantized(model, kind)
    text = reference.generate(model, PROMPT, Sampling(), NUM_TOKENS)
    for resident in ((), (0, 1, 2)):
        plan = make_plan(source, draft, num_layers=3, resident=resident)
        with load_engine(plan, source, draft) as engine:
            table = engine._target.skeleton.model.get_input_embeddings()
            assert isinstance(table, QuantEmbedding)
            tokens, steps = write(engine, PROMPT, Sampling(), NUM_TOKENS)
        assert text.first_difference(tokens) is None
        assert len(steps) < NUM_TOKENS


@pytest.mark.parametrize("tied", [False, True])
def test_the_table_is_in_memory_once_as_it_is_in_the_file(tied: bool, tmp_path: Path):
    model = model_of("LlamaConfig", tied=tied)
    source = save_gguf(model, tmp_path / "x.gguf", "Q8_0")
    loaded = load(source).skeleton.model
    embeddings, head = loaded.get_input_embeddings(), loaded.get_output_embeddings()
    assert isinstance(head, QuantLinear)
    assert (head is embeddings.table) == tied
    nbytes = VOCAB * 128 // 32 * 34
    outside = [size for size in describe(source).other_params if size.item_bytes == 1]
    assert [size.count for size in outside] == [nbytes] * (1 if tied else 2)
    assert sum(p.nbytes for p in embeddings.parameters()) == nbytes
    assert not [name for name, p in loaded.named_parameters() if p.is_meta]
    ids = torch.tensor([[3, 0, VOCAB - 1], [3, 3, 7]])
    rows = dequantized(model, "Q8_0").get_input_embeddings().weight
    assert torch.equal(embeddings(ids), rows[ids])


def test_plain_tables_stay_plain(tmp_path: Path):
    source = save_gguf(model_of("LlamaConfig", tied=True), tmp_path / "x.gguf", "BF16")
    assert isinstance(load(source).skeleton.model.get_input_embeddings(), torch.nn.Embedding)


@pytest.mark.parametrize("chunk_rows", [7, 512])
def test_tables_in_host_memory_give_the_same_bits(chunk_rows: int, tmp_path: Path):
    source = save_gguf(model_of("LlamaConfig", tied=False), tmp_path / "x.gguf", "Q8_0")
    expected, model = (load(source, on_host=on_host, chunk_rows=chunk_rows) for on_host in (False, True))
    assert torch.equal(model.append(PROMPT), expected.append(PROMPT))
    module = lookup_embeddings(model.skeleton)
    nbytes = VOCAB * 128 // 32 * 34
    assert expected.nbytes - model.nbytes == nbytes == module.table.stored_bytes
    work = Workload("cuda:0", "fp32", 96, 16, 32, 32, host_embeddings=True)
    items = {item.item: item.bytes for item in host_embeddings(describe(source), work)}
    assert items["input embeddings"] == nbytes


@pytest.mark.parametrize("tied", [False, True])
def test_a_copy_of_the_head_writes_the_same_text(tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("specchat.models.quant.kernels.packed.MIN_NUMBERS", 1)
    model = random_model(
        hf.LlamaConfig(**{**BASE, **WIDE, "vocab_size": 512, "hidden_size": 128, "tie_word_embeddings": tied})
    )
    source = save_gguf(model, tmp_path / "x.gguf", "Q8_0")
    size = head_copy_bytes(describe(source), "fp32")
    assert size == 4 * 512 * 128
    texts, sizes = [], []
    for copied in (0, size):
        plan = changed(make_plan(source, None, num_layers=3), head_copy_bytes=copied)
        with load_engine(plan, source, None) as engine:
            head = engine.target.skeleton.model.get_output_embeddings()
            assert isinstance(head, QuantLinear) and head.held_bytes == copied
            texts.append(write(engine, PROMPT, Sampling(), NUM_TOKENS)[0])
            sizes.append(engine.target.nbytes)
    assert texts[0] == texts[1]
    assert sizes[1] - sizes[0] <= size


def test_plans_copy_the_head_where_layers_are_expanded(tmp_path: Path):
    source = save_gguf(model_of("LlamaConfig", tied=True), tmp_path / "x.gguf", "Q8_0")
    spec, machine = describe(source), Machine("cpu", 8 * GIB, 8 * GIB, fast_bf16=False)
    rich = plan_for(plan_request(source, None, ctx=256), machine, spec, None)
    assert rich.placement.head_copy_bytes == head_copy_bytes(spec, rich.work.dtype) > 0
    assert {item.item: item.bytes for item in rich.ledger}["copy of the head"] == rich.placement.head_copy_bytes
    for missing, copies in ((1, True), (rich.placement.expanded_bytes, False)):
        request = plan_request(source, None, ctx=256, vram_bytes=rich.device_bytes - missing)
        poor = plan_for(request, machine, spec, None)
        assert (poor.placement.head_copy_bytes > 0) == bool(poor.placement.expanded) == copies
        assert poor.device_bytes <= request.choices.vram_bytes
