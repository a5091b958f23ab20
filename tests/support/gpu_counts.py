"""What a step asks of a GPU and its host, counted on a pretended one by parts of the step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from specchat.bench.prompts import BUILT_IN
from specchat.engine.drafting.device_growth import DeviceGrowth
from specchat.engine.drafting.draft_model import DraftModel
from specchat.engine.drafting.pass_graphs import PassGraphs
from specchat.engine.drafting.policy import AdaptivePolicy
from specchat.engine.layout import PassLayout, RowLayout
from specchat.engine.tree import TokenTree
from specchat.models.catalog.ref import demo_source
from specchat.models.checkpoint import layout
from specchat.models.hf.norms import fuse_norms
from specchat.models.hf.tokenizer import load_tokenizer
from specchat.records.chat import Message
from specchat.records.generation import Sampling
from specchat.records.model import ModelSource, Quant
from specchat.records.plan import Plan
from support.engines import NOTHING, make_plan, random_prompt
from support.loading import load_engine, load_model
from support.plans import changed
from support.pretended_gpu import PretendedGpu
from support.tiny_models import ARCHITECTURES, BASE, VOCAB, hf, perturbed, random_model, save

GPU = torch.device("cuda:0")
SAMPLED = Sampling(temperature=0.7, seed=5)
NUM_LAYERS = 4
_PREFIX = 20  # of the pass that is counted; its kernels do not depend on it
# Rows of passes and of head blocks: a target's matrices are dequantized, a draft's are multiplied as they are stored.
TARGET_ROWS, DRAFT_ROWS, HEAD_ROWS = 80, 32, 32
KERNELS = ("fused", "triton")  # taken for the fastest


@dataclass(frozen=True)
class PassCounts:
    """Kernels of a pass over a tree.

    Attributes:
        layer: kernels of a layer whose matrices are dequantized at once.
        piece: kernels that each further piece of a matrix adds.
        beside: kernels of the pass besides its layers and the head.
        head: kernels of the head.
    """

    layer: float
    piece: float
    beside: float
    head: float

    def of(self, num_layers: int, pieces: float = 0) -> float:
        """Kernels of a pass without the head, with so many further pieces in each layer."""
        return num_layers * (self.layer + pieces * self.piece) + self.beside


@dataclass(frozen=True)
class StepCounts:
    """What a step asks for besides its passes; means over steps.

    Attributes:
        growing: kernels of each draft pass besides the draft model's own.
        filling: further kernels of each draft pass that is a graph, which takes its values from fixed places.
        draft_copies, draft_waits: small copies to the GPU, and waits of the host, while a tree grows.
        pass_copies: small copies to the GPU for the target's pass.
        block: kernels of the walk for each block of nodes, without the head's.
        walk_copies, walk_waits: small copies to the GPU, and waits, for each block.
        kept, kept_copies: kernels and small copies to the GPU after the walk.
    """

    growing: float
    filling: float
    draft_copies: float
    draft_waits: float
    pass_copies: float
    block: float
    walk_copies: float
    walk_waits: float
    kept: float
    kept_copies: float


@dataclass(frozen=True)
class DemoCounts:
    """Draft passes of a step of the demo pair, and tokens that a block of the walk brings."""

    passes: float
    visits: float


def count_pass(architecture: str, quant: Quant, folder: Path, rows: int = TARGET_ROWS) -> PassCounts:
    """Count the kernels of a pass of an architecture."""
    few = _kernels_of_pass(architecture, quant, folder / "few", rows, num_layers=2)
    many = _kernels_of_pass(architecture, quant, folder / "many", rows, num_layers=4)
    layer = (many[0] - few[0]) / 2
    with _small_pieces():
        cut = _kernels_of_pass(architecture, quant, folder / "cut", rows, num_layers=2)
    added = cut[2] - few[2]
    return PassCounts(layer, 0.0 if quant == "none" else (cut[0] - few[0]) / added, few[0] - 2 * layer, few[1])


def count_step(architecture: str, quant: Quant, folder: Path) -> StepCounts:
    """Count the steps of an answer, without the first one, which reads the prompt, and the last one."""
    model = random_model(_config(architecture, NUM_LAYERS))
    pair = save(model, folder / "target"), save(perturbed(model, 0.03), folder / "draft")
    plan = make_plan(*pair, num_layers=NUM_LAYERS, resident=(), tree_budget=64)
    plan = changed(plan, device="cuda:0", dtype="bf16", quant=quant, in_ram=range(NUM_LAYERS), head_rows=32)
    run, grown = DeviceGrowth.run, list[int]()
    without_graphs = mock.patch.object(PassGraphs, "serves", staticmethod(lambda _: False))
    with PretendedGpu(kernels=KERNELS) as gpu, without_graphs, load_engine(plan, *pair) as engine:
        score, blocks = engine.target.logits, list[int]()
        with (
            mock.patch.object(DeviceGrowth, "run", lambda self: (run(self), grown.append(self.passes))[0]),
            mock.patch.object(engine.target, "logits", lambda hidden: (score(hidden), blocks.append(1))[0]),
        ):
            begins = list[int]()
            for _ in engine.generate(random_prompt(30, VOCAB), SAMPLED, stop_ids=NOTHING, max_tokens=24):
                if not begins:
                    grown.clear()
                    blocks.clear()
                begins.append(len(gpu.events))
            events, passes, num_blocks, steps = gpu.events[begins[0] :], sum(grown), len(blocks), len(begins) - 1

    def total(kind: str, phase: str) -> int:
        small = [each for each in events if each.kind == kind and (kind != "h2d" or each.stream == "compute")]
        return sum(each.phase == phase for each in small)

    draft = count_pass(architecture, "none", folder, DRAFT_ROWS)
    target = count_pass(architecture, quant, folder)
    return StepCounts(
        growing=total("kernel", "drafting") / passes - draft.of(NUM_LAYERS) - draft.head,
        filling=_kernels_of_filling(pair[1]),
        draft_copies=total("h2d", "drafting") / steps,
        draft_waits=total("wait", "drafting") / steps,
        pass_copies=total("h2d", "verifying") / steps,
        block=total("kernel", "sampling") / num_blocks - target.head,
        walk_copies=total("h2d", "sampling") / num_blocks,
        walk_waits=total("wait", "sampling") / num_blocks,
        kept=total("kernel", "rest") / steps,
        kept_copies=total("h2d", "rest") / steps,
    )


def count_demo(plan: Plan, questions: int = 4, tokens: int = 60) -> DemoCounts:
    """Count the demo's steps at temperature 0.7, whose trees grow as on a GPU.

    They end where the policy of a plan finds that another pass is not worth its time, by the times that the plan
    expects; which nodes are accepted is learned.
    """
    target, draft = demo_source("target"), demo_source("draft")
    tokenizer = load_tokenizer(target.path)
    own = make_plan(target, draft, num_layers=8, tree_budget=plan.work.tree_budget)
    own = changed(own, head_rows=plan.work.head_rows, adaptive=plan.adaptive, expected=plan.expected)
    passes, blocks, num_tokens = list[int](), list[int](), 0
    run = DeviceGrowth.run
    with (
        mock.patch.object(DraftModel, "grows_on_device", new=True),
        mock.patch.object(DeviceGrowth, "run", lambda self: (run(self), passes.append(self.passes))[0]),
        mock.patch.object(AdaptivePolicy, "record_draft_pass", lambda *_: None),
        mock.patch.object(AdaptivePolicy, "record_pass", _learn_acceptance),
        load_engine(own, target, draft) as engine,
    ):
        score = engine.target.logits
        with mock.patch.object(engine.target, "logits", lambda hidden: (score(hidden), blocks.append(1))[0]):
            for seed, question in enumerate(BUILT_IN[:questions]):
                prompt = tokenizer.encode(tokenizer.render([Message("user", question.turns[0])]))
                sampling = Sampling(temperature=0.7, seed=seed)
                for step in engine.generate(prompt, sampling, stop_ids=NOTHING, max_tokens=tokens):
                    num_tokens += len(step.token_ids)
    return DemoCounts(sum(passes) / len(passes), num_tokens / len(blocks))


def _learn_acceptance(
    policy: AdaptivePolicy, _: Any, trees: Sequence[TokenTree], paths: Sequence[Sequence[int]]
) -> None:
    """Learn which nodes are accepted, but no times, which are this machine's."""
    for tree, path in zip(trees, paths, strict=True):
        policy._acceptance.add(tree, path)


def _config(architecture: str, num_layers: int) -> object:
    name, extra = ARCHITECTURES[architecture]
    return getattr(hf, name)(**{**BASE, **extra, "num_hidden_layers": num_layers})


def _kernels_of_pass(
    architecture: str, quant: Quant, folder: Path, num_rows: int, *, num_layers: int
) -> tuple[int, int, int]:
    """Return the kernels of a pass without its head, those of the head, and the pieces of the layers' matrices."""
    source = save(random_model(_config(architecture, num_layers)), folder)
    seen = torch.eye(num_rows, dtype=torch.bool)
    with PretendedGpu(kernels=KERNELS) as gpu:
        model = load_model(source, cache_rows=128, dtype=torch.bfloat16, device=GPU, quant=quant)
        if num_rows == DRAFT_ROWS:
            fuse_norms(model.skeleton.model)  # as drafts have them
        model.append(random_prompt(_PREFIX, VOCAB))
        for _ in range(2):  # what the first pass allocates and chooses is not counted
            model.cache.truncate(0, _PREFIX)
            rows = RowLayout(_PREFIX, 0, seen.to(GPU), torch.full((num_rows,), _PREFIX, device=GPU))
            ids = torch.arange(num_rows, device=GPU)
            gpu.events.clear()
            hidden = model.forward(ids, PassLayout.single(rows))
            kernels = gpu.counts()["kernel"]
            model.logits(hidden[:HEAD_ROWS])
        linears = [each for each in model.skeleton.layers.modules() if hasattr(each, "out_features")]
        pieces = sum(num_pieces(each.out_features, each.in_features) for each in linears)
        scored = gpu.counts()["kernel"] - kernels
        model.close()
    return kernels, scored, pieces


def _kernels_of_filling(source: ModelSource) -> int:
    with PretendedGpu() as gpu:
        model = load_model(source, cache_rows=128, dtype=torch.bfloat16, device=GPU)
        graphs = PassGraphs(model)
        model.append(random_prompt(_PREFIX, VOCAB))
        seen = torch.eye(DRAFT_ROWS, dtype=torch.bool).to(GPU)
        rows = RowLayout(_PREFIX, 0, seen, torch.full((DRAFT_ROWS,), 0, device=GPU))
        ids = torch.arange(DRAFT_ROWS, device=GPU)
        for _ in range(3):  # the first is computed, the second is recorded
            model.cache.truncate(0, _PREFIX)
            gpu.events.clear()
            graphs.compute(0, ids, rows)
        return gpu.counts()["kernel"] - 1


def num_pieces(rows: int, cols: int) -> int:
    """Pieces in which a GPU dequantizes a matrix to 16 bits."""
    return -(-rows // layout.dequantized_rows(rows, cols, 2, "cuda"))


@contextmanager
def _small_pieces() -> Iterator[None]:
    """Let a GPU dequantize the matrices of tiny models in several pieces."""
    with mock.patch.dict(layout._CHUNK_BYTES, cuda=16 * 64 * 2), mock.patch.object(layout, "_ROW_BLOCK", 16):
        yield
