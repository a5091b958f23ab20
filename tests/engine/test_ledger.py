"""The planner's ledger against the engine's memory, counted tensor by tensor."""

from __future__ import annotations

import json
import subprocess
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.assistants import save_assistant
from support.dflash import save_dflash
from support.dflash2 import save_dflash2
from support.eagle3 import KINDS, save_eagle3
from support.engines import NOTHING, make_plan, random_prompt
from support.heads import LAYOUTS, head_of, random_target, save_with_mtp
from support.loading import load_engine
from support.plans import changed
from support.quantized import Kind, awq, block_fp8, compressed, gptq, save_quantized
from support.threads import watched_threads
from support.tiny_models import VOCAB, make_config, perturbed, random_model, save
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from specchat.engine.drafting.head_check import HeadCheck
from specchat.errors import AllocationError
from specchat.models.sizes.describe import describe
from specchat.models.sizes.geometry import dequantize_bytes
from specchat.planner.memory import build_ledger, with_trees
from specchat.records.generation import Request, Sampling
from specchat.records.limits import COPY_PROMPT_ROWS, HEAD_BLOCK_ROWS
from specchat.records.model import Dtype, ModelSource, Quant
from specchat.records.plan import LedgerItem, Plan

WEIGHTS = {"resident layers", "slots", "embeddings and head", "KV cache", "draft", "draft KV cache"}
CHUNK_ROWS = 128


class Living(TorchDispatchMode):
    """Counts the bytes of live storages that operations created; `peak` is the maximum."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        old = {id(t.untyped_storage()) for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)}
        for tensor in tree_flatten(out)[0]:
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and id(storage) not in old and not hasattr(storage, "is_counted"):
                storage.is_counted = True
                self._add(storage.nbytes())
                weakref.finalize(storage, self._add, -storage.nbytes())
        return out

    def _add(self, num_bytes):
        self.now += num_bytes
        self.peak = max(self.peak, self.now)


@dataclass(frozen=True)
class Case:
    architecture: str
    ctx: int
    tree_budget: int
    dtype: Dtype
    num_resident: int = 1
    head_rows: int = HEAD_BLOCK_ROWS
    seats: int = 1


# Context and tree together are full chunks, so that the pass that the ledger counts with can come about.
CASES = [
    Case("llama", 240, 16, "fp32"),
    Case("llama_tied", 448, 64, "bf16", num_resident=0),
    Case("llama", 176, 80, "fp32", head_rows=81),  # rows in chunks of 128
    Case("gemma2", 352, 32, "fp32"),
    Case("gemma3", 224, 32, "bf16"),
    Case("phi3", 240, 16, "bf16", num_resident=4),
    Case("mixtral", 336, 48, "fp32"),
    Case("qwen3_moe", 480, 32, "bf16"),
    Case("gpt_oss", 224, 32, "fp32"),
    Case("deepseek_v3", 224, 32, "fp32"),
    Case("cohere2", 384, 128, "fp32"),
]


def pair(case: Case, folder: Path) -> tuple[ModelSource, ModelSource]:
    target = random_model(make_config(case.architecture))
    return save(target, folder / "target"), save(perturbed(target, 0.05), folder / "draft")


def planned(
    case: Case, target: ModelSource, draft: ModelSource, quant: Quant = "none", draft_quant: Quant = "none"
) -> Plan:
    spec, draft_spec = describe(target, quant), describe(draft, draft_quant)
    resident = tuple(range(case.num_resident))
    plan = make_plan(
        target,
        draft,
        num_layers=spec.num_layers,
        resident=resident,
        ctx=case.ctx,
        tree_budget=case.tree_budget,
        chunk_rows=CHUNK_ROWS,
        seats=case.seats,
    )
    work = replace(plan.work, dtype=case.dtype, shares_cache=draft.is_copy, tapped_width=draft_spec.tapped_width)
    ledger = build_ledger(spec, draft_spec, work, plan.placement)
    plan = replace(plan, work=work, quant=quant, draft_quant=draft_quant, ledger=ledger)
    larger = with_trees(plan, spec, draft_spec, case.tree_budget, case.head_rows)
    return plan if case.head_rows == HEAD_BLOCK_ROWS else larger


def total(items: tuple[LedgerItem, ...], *, weights: bool) -> int:
    return sum(item.bytes for item in items if (item.item in WEIGHTS) == weights)


# Each takes seconds: by default a dense model, sliding windows in 16 bit, a latent cache; the others when asked for.
QUICK = (CASES[2], CASES[9])


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=() if case in QUICK else pytest.mark.slow) for case in CASES],
    ids=lambda case: f"{case.architecture}-{case.dtype}-{case.head_rows}",
)
def test_ledger_and_memory(case: Case, tmp_path: Path):
    check_ledger(case, *pair(case, tmp_path))


def check_ledger(
    case: Case, target: ModelSource, draft: ModelSource, quant: Quant = "none", draft_quant: Quant = "none"
) -> tuple[LedgerItem, ...]:
    """Compare promised and measured bytes, and return the ledger.

    Pre-quantized checkpoints need bytes per read (6 MiB at most), which are planned on top of the peak.
    """
    plan, spec = planned(case, target, draft, quant, draft_quant), describe(target, quant)
    ours = dequantize_bytes(replace(spec, quant="int8"), case.dtype, "cpu")
    pieces = dequantize_bytes(spec, case.dtype, "cpu") - ours
    with load_engine(plan, target, draft) as engine:
        assert engine.memory().device_peak_bytes == total(plan.ledger, weights=True)
        living = Living()
        with living:
            prompts = [random_prompt(case.ctx - left, VOCAB, seed=left) for left in (72, 9)]
            if draft.is_copy:  # and one whose new tokens the copy reads for a first tree
                new = COPY_PROMPT_ROWS["cpu"]
                prompts.append([*prompts[-1][:-new], *random_prompt(new, VOCAB, seed=1)])
            for prompt in prompts:  # one fills the noise, one has the longest pass
                for _ in engine.generate(prompt, Sampling(temperature=0.8, top_p=0.9, seed=1), stop_ids=NOTHING):
                    pass
    promised = total(plan.ledger, weights=False)
    print(f"{case}: measured {living.peak:,}, promised {promised:,}, {promised / living.peak:.3f}")
    assert living.peak <= promised <= 1.25 * living.peak + pieces
    return plan.ledger


HEAD_CASES = [Case("qwen3", 240, 16, "fp32"), Case("deepseek_v3", 224, 32, "fp32"), Case("qwen3", 240, 16, "bf16")]


@pytest.mark.slow
@pytest.mark.parametrize("num_heads", [1, 3])
@pytest.mark.parametrize("case", HEAD_CASES, ids=lambda case: f"{case.architecture}-{case.dtype}-{case.tree_budget}")
def test_ledger_and_memory_of_a_head(case: Case, num_heads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A head reads the states of a whole prompt before its first tree, and hands the outputs of a layer to the next."""
    monkeypatch.setattr(HeadCheck, "compare", lambda *_: None)  # a random head would be given up
    model, layout = random_target(case.architecture), LAYOUTS[case.architecture]
    target = save_with_mtp(model, tmp_path / "target", layout, num_layers=num_heads)
    check_ledger(case, target, head_of(target))


OTHER_CASES = [Case("qwen3", 240, 16, "fp32"), Case("llama", 240, 16, "bf16")]


@pytest.mark.slow
@pytest.mark.parametrize("case", OTHER_CASES, ids=lambda case: f"{case.architecture}-{case.dtype}-{case.tree_budget}")
def test_ledger_and_memory_of_an_eagle3_head(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Taps keep a row of the head's width for each row of a prompt."""
    monkeypatch.setattr(HeadCheck, "count", lambda *_: None)  # a random head would be given up
    target = save(random_model(make_config(case.architecture)), tmp_path / "target")
    check_ledger(case, target, save_eagle3(64, tmp_path / "head", KINDS["specforge"]).source)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", OTHER_CASES[:1], ids=lambda case: f"{case.architecture}-{case.dtype}-{case.tree_budget}"
)
@pytest.mark.parametrize("save_head", [save_dflash, save_dflash2])
def test_ledger_and_memory_of_a_dflash_head(
    case: Case, save_head: Callable[[Path], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The scores of all levels are held while a tree grows; small trees, because no tree grows beside a prompt."""
    monkeypatch.setattr(HeadCheck, "count", lambda *_: None)
    target = save(random_model(make_config(case.architecture)), tmp_path / "target")
    check_ledger(case, target, save_head(tmp_path / "head").source)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["gemma4_shared", "gemma4_k_eq_v"])
def test_ledger_and_memory_of_an_assistant(architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Nothing is cached, and no prompt is read."""
    monkeypatch.setattr(HeadCheck, "count", lambda *_: None)
    target = save(random_model(make_config(architecture)), tmp_path / "target")
    case = Case(architecture, 240, 16, "fp32")
    head = save_assistant(tmp_path / "head", architecture, clusters=VOCAB).source
    assert all(item.item != "draft KV cache" for item in check_ledger(case, target, head))


# Small trees: the ledger counts a tree beside the longest prompt, which retrieval may grow, but a copy does not.
COPY_CASES = [Case("llama", 240, 16, "fp32"), Case("gemma3", 240, 16, "bf16"), Case("deepseek_v3", 368, 16, "fp32")]


@pytest.mark.slow
@pytest.mark.parametrize("quant", ["int8", "int4"])
@pytest.mark.parametrize("case", COPY_CASES, ids=lambda case: f"{case.architecture}-{case.dtype}-{case.tree_budget}")
def test_ledger_and_memory_of_an_own_copy(case: Case, tmp_path: Path, quant: Quant):
    """A copy has nothing but the streamed layers; its trees take rows of the target's cache."""
    target = save(random_model(make_config(case.architecture)), tmp_path / "target")
    check_ledger(case, target, replace(target, name="self", part="self"), draft_quant=quant)


SHARED_CASES = [
    Case("llama", 240, 16, "fp32", seats=3),
    Case("gemma3", 224, 32, "bf16", seats=3),
    Case("deepseek_v3", 224, 32, "fp32", seats=3),
    Case("gpt_oss", 224, 32, "fp32", seats=10),
]


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=() if i == 0 else pytest.mark.slow) for i, case in enumerate(SHARED_CASES)],
    ids=lambda case: f"{case.architecture}-{case.seats}",
)
def test_ledger_and_memory_of_many_seats(case: Case, tmp_path: Path):
    """A prompt that fills the context joins the trees of all other seats."""
    target, draft = pair(case, tmp_path)
    plan = planned(case, target, draft)
    lengths = [case.ctx - 100 - index for index in range(case.seats - 1)]
    long = Request(tuple(random_prompt(case.ctx - 9, VOCAB)), Sampling(temperature=0.8, top_p=0.9, seed=1))
    others = [
        replace(long, prompt_ids=tuple(random_prompt(length, VOCAB, seed=length)), max_tokens=80) for length in lengths
    ]
    with load_engine(plan, target, draft) as engine:
        assert engine.memory().device_peak_bytes == total(plan.ledger, weights=True)
        living = Living()
        with living:
            steps = list(engine.generate_many([*others, long, *others]))
    assert any(step.num_sharing == case.seats and step.new_rows == case.ctx - 9 for _, step in steps)
    promised = total(plan.ledger, weights=False)
    print(f"{case}: measured {living.peak:,}, promised {promised:,}, {promised / living.peak:.3f}")
    assert living.peak <= promised <= 1.25 * living.peak


# What the target's matrices are stored in; the draft is plain, or int8 beside int4.
LOWER_QUANTS: dict[str, Kind | None] = {
    "int8": None,
    "int4": None,
    "gptq": gptq(act_order=True),
    "fp8": block_fp8((32, 32)),
    "awq": awq(),
    "int8-channel": compressed("int-quantized", bits=8, strategy="channel", sym=False),
}
QUANTIZED_CASES = [
    ("int8", Case("llama", 112, 16, "fp32")),
    ("int4", Case("llama", 112, 16, "bf16", num_resident=0)),
    ("gptq", Case("llama", 112, 16, "bf16")),
    ("fp8", Case("llama", 112, 16, "fp32")),
    ("awq", Case("llama", 112, 16, "bf16")),
    ("int4", Case("mixtral", 112, 16, "fp32")),
    ("int8-channel", Case("llama", 112, 16, "bf16", num_resident=0)),
]


@pytest.mark.parametrize(
    ("quant", "case"),
    [pytest.param(*each, marks=() if i == 0 else pytest.mark.slow) for i, each in enumerate(QUANTIZED_CASES)],
    ids=lambda value: value if isinstance(value, str) else f"{value.architecture}-{value.dtype}",
)
def test_ledger_and_memory_of_quantized_targets(quant: str, case: Case, tmp_path: Path):
    """Matrices are so large that the dequantization scratch matters."""
    config = make_config(case.architecture)
    config.intermediate_size = 2048
    config.num_hidden_layers = 3
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:3]
    dense, kind = random_model(config), LOWER_QUANTS[quant]
    draft = save(perturbed(dense, 0.05), tmp_path / "draft")
    if kind is None:
        target = save(dense, tmp_path / "target")
        check_ledger(case, target, draft, quant)
    else:
        check_ledger(case, save_quantized(dense, tmp_path / "target", kind).quantized, draft, "none")


@pytest.mark.slow
def test_memory_stays_within_the_ledger_over_200_turns(tmp_path: Path):
    """The chat drops its oldest tokens when the context is full, and memory does not grow."""
    case = Case("llama", 96, 8, "fp32")
    target, draft = pair(case, tmp_path)
    plan = planned(case, target, draft)
    text, living, peaks = list[int](), Living(), []
    sampling = Sampling(temperature=0.8, seed=5)
    with load_engine(plan, target, draft) as engine, living:
        for turn in range(200):
            text += random_prompt(9, VOCAB, seed=turn)
            del text[: max(len(text) - (case.ctx - 16), 0)]
            living.peak = living.now
            for step in engine.generate(text, sampling, stop_ids=NOTHING, max_tokens=3):
                text += step.token_ids
            peaks.append(living.peak)
            assert engine.memory().device_peak_bytes <= plan.device_bytes
    assert max(peaks) <= total(plan.ledger, weights=False)
    assert max(peaks[100:]) <= max(peaks[:100])


def test_a_failed_allocation_raises_and_leaves_no_threads(tmp_path: Path):
    case = Case("llama", 64, 8, "fp32", num_resident=0)
    target, draft = pair(case, tmp_path)
    plan = changed(planned(case, target, draft), ctx=10**12)
    with watched_threads() as threads:
        for guesses in (draft, None):  # the draft's cache comes first, then the target's
            with pytest.raises(AllocationError, match="cannot allocate"):
                load_engine(plan, target, guesses)
    assert not threads.num_running


def test_engine_with_another_tree_budget(tmp_path: Path):
    """Caches and trees are sized as if planned, and scored in the plan's block size."""
    target, draft = pair(Case("llama", 96, 40, "fp32"), tmp_path)
    plan = planned(Case("llama", 96, 40, "fp32"), target, draft)
    specs = describe(target), describe(draft)
    wanted = planned(Case("llama", 96, 12, "fp32"), target, draft)
    assert total(with_trees(plan, *specs, 12).ledger, weights=True) == total(wanted.ledger, weights=True)
    assert with_trees(plan, *specs, 12).work.chunk_rows == 64 < plan.work.chunk_rows
    assert with_trees(plan, *specs, 400).vram_bytes >= with_trees(plan, *specs, 400).device_bytes
    texts = []
    for head_rows in (41, HEAD_BLOCK_ROWS):
        with load_engine(with_trees(plan, *specs, 40, head_rows), target, draft) as engine:
            scored, score = [], engine.target.logits
            engine.target.logits = lambda hidden, scored=scored, score=score: (
                scored.append(len(hidden)) or score(hidden)
            )
            steps = list(engine.generate(random_prompt(20, VOCAB), Sampling(), stop_ids=NOTHING, max_tokens=12))
        texts.append([token for step in steps for token in step.token_ids])
        if head_rows == 41:
            assert scored == [1 + step.tree_nodes for step in steps] and max(scored) > 20
    assert max(scored) == HEAD_BLOCK_ROWS
    assert texts[0] == texts[1]


MEMORY_OF_A_PROCESS = """
import ctypes, gc, json, sys
from pathlib import Path
from typing import Any
from support.loading import Quiet, load_engine, model_request, yes
from specchat.loading.engine import make_packs
from specchat.loading.locate import locate_models, parse_models
from specchat.loading.planning import make_plan
from specchat.records.generation import Request, Sampling
from specchat.engine.engine import Engine
from specchat.models.hf.tokenizer import load_tokenizer

def held():
    lines = Path("/proc/self/status").read_text().splitlines()
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith("Rss")}

vram, ram, quant = sys.argv[1:]
options = model_request(
    model="shape:hidden=512,layers=12,heads=8,kv_heads=4,head_dim=64,mlp=2048,dtype=fp32", device="cpu", dtype="fp32",
    vram_bytes=int(vram), ram_bytes=int(ram), quant=quant, ctx=256, tree_budget=16)
found = locate_models(options, parse_models(options), Quiet(), yes)
plan = make_plan(options, found, Quiet(), as_given=True).plan
pack, _ = make_packs(found.target, found.draft, plan, Quiet())
ids = load_tokenizer(found.target.path).encode("Tell me a story about a fox. " * 20)
gc.collect()
ctypes.CDLL(None).malloc_trim(0)  # else what planning freed would be taken again, and nothing would grow
before = held()
with load_engine(plan, found.target, found.draft, pack) as engine:
    for _ in engine.generate(ids[:200], Sampling(), stop_ids=frozenset(), max_tokens=24):
        pass
    after = held()
print(json.dumps({"before": before, "after": after, "device": plan.device_bytes,
    "host": {item.item: item.bytes for item in plan.host_ledger}, "disk": plan.placement.tiers.count("disk"),
    "slots": sum(item.bytes for item in plan.ledger if item.item == "slots"),
    "ram": len(plan.placement.in_ram), "pack": pack is not None}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc")
@pytest.mark.parametrize(
    ("vram", "ram", "quant"),
    [(60 << 20, 1 << 20, "none"), (60 << 20, 1 << 30, "none"), (60 << 20, 1 << 30, "int8"), (1 << 30, 1 << 20, "none")],
    ids=["disk", "page cache", "mapped", "resident"],
)
def test_process_memory_grows_by_the_ledgers(vram: int, ram: int, quant: str):
    """Anonymous memory grows by the ledger, file memory by the mapped bytes; libraries match their own item."""
    command = [sys.executable, "-c", MEMORY_OF_A_PROCESS, str(vram), str(ram), quant]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
    before, after, host = found["before"], found["after"], found["host"]
    print(found)
    grown = {kind: after[kind] - before[kind] for kind in ("RssAnon", "RssFile")}
    reading, mib = host.get("reading", 0), 1 << 20
    # what allocators keep, and code of libraries that is used for the first time
    assert grown["RssAnon"] <= found["device"] + reading + 32 * mib
    slots = found["slots"] if not found["disk"] else 0  # where all layers are mapped, nothing is read into them
    assert grown["RssAnon"] >= 0.5 * (found["device"] - slots)
    mapped = host.get("layers in the page cache", 0) if found["pack"] else 0
    assert 0.95 * mapped <= grown["RssFile"] <= mapped + 48 * mib
    assert sum(before.values()) == pytest.approx(host["Python and libraries"], rel=0.25)
