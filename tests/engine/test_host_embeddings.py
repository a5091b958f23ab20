"""Input embeddings in host memory give the same bits, only their rows cross the link, and the ledgers count them apart.

The device here knows only shapes and places, and refuses to mix devices; test_cuda.py checks the bits on a real GPU.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.cuts import cut_short
from support.engines import make_plan, random_prompt, write
from support.loading import load_engine, load_model, prepare
from support.plans import changed
from support.tiny_models import VOCAB, make_config, perturbed, random_model, save
from torch._subclasses.fake_tensor import FakeTensorMode

from specchat.engine.attention import tree_attention
from specchat.engine.kv_cache import TreeCache
from specchat.engine.model import TreeModel
from specchat.engine.streaming.base import NoStreamer
from specchat.errors import CorruptCheckpointError
from specchat.models.checkpoint.safetensors import open_checkpoint
from specchat.models.hf.config import kv_shapes, load_config
from specchat.models.hf.skeleton import build_skeleton, lookup_embeddings
from specchat.models.sizes.describe import describe
from specchat.models.weights.choose_recipe import choose_recipe
from specchat.models.weights.open import open_reader
from specchat.planner.memory import build_ledger, host_embeddings
from specchat.records.generation import Sampling
from specchat.records.model import ModelSource, Quant
from specchat.records.plan import WEIGHT_ITEMS, Plan, Workload

# A second device with shapes and no values; without CUDA, torch has no fake DEVICE either.
CPU, DEVICE = torch.device("cpu"), torch.device("cpu:1")
PROMPT = random_prompt(45, VOCAB)


def load(
    source: ModelSource, *, host_embeddings: bool, chunk_rows: int, quant: Quant = "none", **kwargs: Any
) -> TreeModel:
    return load_model(
        source,
        dtype=kwargs.pop("dtype", torch.bfloat16),
        device=CPU,
        cache_rows=64,
        chunk_rows=chunk_rows,
        host_embeddings=host_embeddings,
        quant=quant,
        **kwargs,
    )


# A quantized head is never tied to the embeddings, whatever the checkpoint declares; Gemma scales the embeddings.
@pytest.mark.parametrize(
    ("architecture", "quant"), [("llama", "none"), ("mixtral", "none"), ("gemma2", "int8"), ("llama_tied", "int4")]
)
@pytest.mark.parametrize("chunk_rows", [7, 45, 512])
def test_embeddings_on_the_host_give_the_same_bits(architecture: str, quant: Quant, chunk_rows: int, tmp_path: Path):
    source = save(random_model(make_config(architecture)), tmp_path / "m")
    expected, model = (
        load(source, host_embeddings=on_host, chunk_rows=chunk_rows, quant=quant) for on_host in (False, True)
    )
    looked_up = list[int]()
    module = lookup_embeddings(model.skeleton)
    module.register_forward_hook(lambda _, __, rows: looked_up.append(rows.shape[1]))
    assert torch.equal(model.append(PROMPT), expected.append(PROMPT))
    assert looked_up == [len(PROMPT)]
    assert expected.nbytes - model.nbytes == module.weight.nbytes + sum(b.nbytes for b in module.buffers())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc")
@pytest.mark.parametrize("packed", [False, True], ids=["shards", "pack"])
def test_streamable_embeddings_stay_mapped_to_their_file(packed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Only embeddings in their stored dtype are mapped; writes to the mapping do not change the file."""
    monkeypatch.setenv("SPECCHAT_CACHE_DIR", str(tmp_path / "cache"))
    source = save(random_model(make_config("llama")), tmp_path / "m")
    quant: Quant = "int8" if packed else "none"
    warn: Any = lambda _: None  # noqa: E731
    pack = prepare(source, "fp32", quant, progress=warn, warn=warn) if packed else None
    folder = source.path if pack is None else pack.folder
    for dtype, is_mapped in ((torch.float32, True), *(() if packed else ((torch.bfloat16, False),))):
        on_host, plain = (
            load(source, host_embeddings=each, chunk_rows=16, quant=quant, dtype=dtype, pack=pack)
            for each in (True, False)
        )
        weight = on_host.skeleton.model.get_input_embeddings().weight
        assert (mapped_file(weight) is not None and mapped_file(weight).parent == folder) == is_mapped
        assert mapped_file(plain.skeleton.model.get_input_embeddings().weight) is None
        assert torch.equal(on_host.append(PROMPT), plain.append(PROMPT))
        weight.data.zero_()
    again = load(source, host_embeddings=True, chunk_rows=16, quant=quant, dtype=torch.float32, pack=pack)
    assert torch.equal(
        again.append(PROMPT),
        load(source, host_embeddings=False, chunk_rows=16, quant=quant, dtype=torch.float32, pack=pack).append(PROMPT),
    )


@pytest.mark.parametrize("num_tokens", [5, 45], ids=["a chunk", "several"])
def test_embeddings_whose_file_is_cut_short_end_the_pass(num_tokens: int, tmp_path: Path):
    source = save(random_model(make_config("llama")), tmp_path / "m")
    model = load(source, host_embeddings=True, chunk_rows=16, dtype=torch.float32)
    model.append(PROMPT[:num_tokens])
    (file,) = source.path.glob("*.safetensors")
    cut_short(file, 4096)
    with pytest.raises(CorruptCheckpointError, match=r"is truncated|another program writes to"):
        model.append(PROMPT[:num_tokens])
    model.close()


def mapped_file(weight: torch.Tensor) -> Path | None:
    """Return the file that a tensor is mapped from; None if it is not mapped."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, *_, name = line.split(maxsplit=5)
        begin, end = (int(address, 16) for address in span.split("-"))
        if begin <= weight.data_ptr() < end:
            return Path(name.strip()) if name.strip().startswith("/") else None
    return None


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc")
@pytest.mark.parametrize(("architecture", "quant"), [("llama", "none"), ("gemma2", "int8")])
def test_all_but_the_host_embeddings_are_on_the_device(architecture: str, quant: Quant, tmp_path: Path):
    source = save(random_model(make_config(architecture)), tmp_path / "m")
    skeleton = build_skeleton(load_config(source.path), torch.float32)
    recipe = choose_recipe(source, skeleton, quant)
    with open_reader(skeleton, open_checkpoint(source.path), recipe) as reader:
        embeddings, before = lookup_embeddings(skeleton), dict(skeleton.model.named_buffers())
        reader.read_rest(torch.device("cpu:1"), on_host=embeddings)  # copies what it moves
    own = {id(buffer) for buffer in embeddings.buffers()}
    assert mapped_file(embeddings.weight) is not None
    assert all((b is before[name]) == (id(b) in own) for name, b in skeleton.model.named_buffers())


def test_tied_embeddings_cannot_stay_on_the_host():
    for architecture, is_apart in (("llama", True), ("llama_tied", False), ("gemma2", False)):
        skeleton = build_skeleton(make_config(architecture), torch.bfloat16)
        assert (lookup_embeddings(skeleton) is not None) == is_apart


def divided_model(architecture: str, *, looks_up_on_host: bool = True) -> TreeModel:
    """Return a model without weight values: embeddings on the host, everything else on the device."""
    skeleton = build_skeleton(make_config(architecture), torch.bfloat16, tree_attention)
    embeddings = lookup_embeddings(skeleton)
    for module in skeleton.model.modules():
        place = CPU if module is embeddings else DEVICE
        for name, parameter in module.named_parameters(recurse=False):
            weight = torch.empty(parameter.shape, dtype=parameter.dtype, device=place)
            module._parameters[name] = torch.nn.Parameter(weight, requires_grad=False)
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=place)
    cache = TreeCache(kv_shapes(skeleton.config), 64, torch.bfloat16, DEVICE)
    return TreeModel(skeleton, cache, NoStreamer(), (), 16, DEVICE, embeddings if looks_up_on_host else None)


@pytest.mark.skipif(torch.__version__ < "2.13", reason="fake parameters of torch 2.11 cannot be put on meta again")
@pytest.mark.parametrize("architecture", ["llama", "mistral", "phi3", "gpt_oss", "deepseek_v3"])
def test_only_embedding_rows_cross_to_the_device(architecture: str):
    with FakeTensorMode():
        model = divided_model(architecture)
        for num_rows in (5, 40):  # a chunk, and several
            hidden = model.append(PROMPT[:num_rows])
            assert hidden.device == DEVICE and hidden.shape[0] == num_rows
        assert model.logits(hidden).device == DEVICE
        with pytest.raises(RuntimeError, match="cpu:1"):
            divided_model(architecture, looks_up_on_host=False).append([1, 2, 3])


def planned(source: ModelSource, draft: ModelSource, *, on_host: bool) -> Plan:
    spec = describe(source)
    plan = make_plan(source, draft, num_layers=spec.num_layers, resident=(0,), ctx=96, tree_budget=16, chunk_rows=32)
    plan = changed(plan, host_embeddings=on_host)
    return changed(plan, ledger=build_ledger(spec, describe(draft), plan.work, plan.placement))


def test_host_embeddings_move_to_the_host_ledger(tmp_path: Path):
    """The device ledger is right to the byte without the embeddings; its other items and the text do not change."""
    target = random_model(make_config("llama"))
    source, draft = save(target, tmp_path / "target"), save(perturbed(target, 0.03), tmp_path / "draft")
    texts, ledgers = [], []
    for on_host in (False, True):
        plan = planned(source, draft, on_host=on_host)
        ledgers.append({item.item: item.bytes for item in plan.ledger})
        with load_engine(plan, source, draft) as engine:
            caches = sum(size for item, size in ledgers[-1].items() if item.endswith("KV cache"))
            weights = sum(size for item, size in ledgers[-1].items() if item in WEIGHT_ITEMS)
            assert engine.memory().device_peak_bytes == weights + caches
            texts.append(write(engine, PROMPT, Sampling(temperature=0.8, seed=2), 30)[0])
    assert texts[0] == texts[1]
    table = 4 * target.get_input_embeddings().weight.numel()
    assert ledgers[1].pop("head") == ledgers[0].pop("embeddings and head") - table
    assert ledgers[0] == ledgers[1]
    work = Workload("cpu", "fp32", 96, 16, 32, 32, host_embeddings=True)
    rows = 2 * 32 * target.config.hidden_size
    in_fp32, in_bf16 = (
        {item.item: item.bytes for item in host_embeddings(describe(source), replace(work, dtype=dtype))}
        for dtype in ("fp32", "bf16")
    )
    assert in_fp32 == {"embeddings in the page cache": table, "rows of embeddings": 4 * rows}
    assert in_bf16 == {"input embeddings": table // 2, "rows of embeddings": 2 * rows}
    assert not host_embeddings(describe(source), replace(work, host_embeddings=False))
