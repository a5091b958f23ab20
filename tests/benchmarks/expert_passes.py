"""What passes cost that read single experts, beside passes that read whole layers, in the same memory.

    PYTHONPATH=.:tests python tests/benchmarks/expert_passes.py FOLDER [LAYERS] [PASSES] [ROWS ...]

A model of Qwen3-30B-A3B's experts (128, 8 of them for a row) in 12 layers, 3.6 GB in bf16, is written into FOLDER once,
and a pack for whole layers. A synthetic router chooses the experts. Both read past the page cache. Prints for 1, 8, 16
and 64 rows the bytes and the median seconds of a pass, with a quarter of the experts in memory and as many bytes of
whole layers, without and with experts that are read ahead, of which a given share are right. Not a test: run it on a
quiet machine.
"""

import json
import os
import statistics
import sys
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from support.loading import load_model, prepare
from support.routing import COMMITTED, Router
from transformers import Qwen3MoeConfig

from specchat.engine.layout import PassLayout, RowLayout
from specchat.engine.model import TreeModel
from specchat.engine.tree import ROOT, TokenTree
from specchat.models.sizes.describe import describe
from specchat.planner.experts import expert_options
from specchat.records.model import ModelSource
from specchat.records.plan import ExpertSlots

EXPERTS, PER_ROW, HIDDEN, INNER, VOCAB = 128, 8, 1024, 384, 4096
CONTEXT, WARM = 40, 30
RECALL = 0.85  # of the experts of a row that the router of the next layer names ahead; published: 0.84 to 0.87
ROWS = (1, 8, 16, 64)
_FILL_S = 0.6  # until the slots of the next pass over whole layers are full, which takes the disk and a core


def write_model(folder: Path, num_layers: int) -> ModelSource:
    config = Qwen3MoeConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=num_layers, num_attention_heads=8,
        num_key_value_heads=2, head_dim=128, intermediate_size=4 * INNER, moe_intermediate_size=INNER,
        num_experts=EXPERTS,
        num_experts_per_tok=PER_ROW, norm_topk_prob=True, max_position_embeddings=4096, tie_word_embeddings=True,
        dtype="bfloat16", architectures=["Qwen3MoeForCausalLM"],
    )  # fmt: skip
    if (folder / "config.json").exists():
        return ModelSource("experts", folder)
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(HIDDEN * INNER * 2, generator=generator).to(torch.bfloat16) * 0.03

    def matrix(rows: int, cols: int) -> torch.Tensor:
        shift = int(torch.randint(0, noise.numel() // 2, (1,), generator=generator))
        flat = noise.roll(shift).repeat(-(-rows * cols // noise.numel()))[: rows * cols]
        return flat.view(rows, cols).clone()

    def ones(width: int) -> torch.Tensor:
        return torch.ones(width, dtype=torch.bfloat16)

    for layer in range(num_layers):
        name, tensors = f"model.layers.{layer}.", {}
        for each, rows in (("q_proj", 1024), ("k_proj", 256), ("v_proj", 256), ("o_proj", HIDDEN)):
            tensors[f"{name}self_attn.{each}.weight"] = matrix(rows, 1024)
        tensors |= {f"{name}self_attn.{each}_norm.weight": ones(128) for each in "qk"}
        tensors |= {f"{name}{each}_layernorm.weight": ones(HIDDEN) for each in ("input", "post_attention")}
        tensors[f"{name}mlp.gate.weight"] = matrix(EXPERTS, HIDDEN)
        for expert in range(EXPERTS):
            for each, shape in (("gate", (INNER, HIDDEN)), ("up", (INNER, HIDDEN)), ("down", (HIDDEN, INNER))):
                tensors[f"{name}mlp.experts.{expert}.{each}_proj.weight"] = matrix(*shape)
        if layer == 0:
            tensors |= {"model.embed_tokens.weight": matrix(VOCAB, HIDDEN), "model.norm.weight": ones(HIDDEN)}
        save_file(tensors, folder / f"model-{layer + 1:05d}-of-{num_layers:05d}.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config.to_dict(), default=str))
    return ModelSource("experts", folder)


class Routed:
    """Lets a synthetic router choose the experts of a model."""

    def __init__(self, model: TreeModel, seed: int) -> None:
        layers = model.skeleton.layers
        self.router = Router(len(layers), EXPERTS, PER_ROW, seed)
        self._ids = torch.zeros(0)
        for index, layer in enumerate(layers):
            layer.mlp.gate.forward = lambda hidden, index=index: self._route(index, hidden)

    def choose(self, rows: int) -> None:
        self._ids = torch.from_numpy(self.router.tree(rows))

    def _route(self, layer: int, hidden: torch.Tensor) -> tuple[None, torch.Tensor, torch.Tensor]:
        ids = self._ids[layer] if len(self._ids) else torch.zeros(len(hidden), PER_ROW, dtype=torch.int64)
        ids = ids if len(ids) == len(hidden) else ids[:1].expand(len(hidden), -1)
        return None, torch.full(ids.shape, 1 / PER_ROW, dtype=hidden.dtype), ids


def spoil(model: TreeModel) -> None:
    """Let the guesses of a pool be as good as those of trained models: the synthetic router repeats itself."""
    pool, rng = model.streamer, torch.Generator().manual_seed(1)
    likely = pool._likely

    def spoiled(position: int) -> torch.Tensor | None:
        ids = likely(position)
        if ids is None:
            return None
        others = torch.randint(0, EXPERTS, ids.shape, generator=rng)
        return torch.where(torch.rand(ids.shape, generator=rng) < RECALL, ids, others)

    pool._likely = spoiled


def run_pass(model: TreeModel, routed: Routed, rows: int) -> tuple[float, int]:
    """Return seconds and bytes of a pass over a root and a chain of nodes."""
    model.cache.truncate(0, CONTEXT)
    routed.choose(rows)
    tree = TokenTree(tuple(range(5, 4 + rows)), tuple(range(ROOT, rows - 2)))
    positions = torch.tensor([CONTEXT, *(CONTEXT + depth for depth in tree.depths)])
    layout = PassLayout.single(RowLayout(CONTEXT, 1, tree.ancestors, positions))
    before, begin = model.streamer.counters(), time.perf_counter()
    model.forward([4, *tree.tokens], layout)
    seconds = time.perf_counter() - begin
    after = model.streamer.counters()
    routed.router.commit(COMMITTED[rows])
    return seconds, after.num_bytes - before.num_bytes


def main() -> None:
    folder, num_layers = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 12
    num_passes = int(sys.argv[3]) if len(sys.argv) > 3 else 9
    source = write_model(folder, num_layers)
    os.environ["SPECCHAT_CACHE_DIR"] = str(folder / "cache")
    pack = prepare(source, "bf16", progress=lambda _: None, warn=print)
    if num_passes == 0:
        return
    spec = describe(source)
    options = expert_options(spec, "bf16")
    assert options is not None
    slots = ExpertSlots(EXPERTS // 4, EXPERTS)
    layer_bytes = options.tier.num_experts * options.tier.read_bytes + (options.beside_bytes // num_layers)
    resident = max(options.nbytes(slots.quota) // layer_bytes - 2, 0)
    given = {"cache_rows": 256, "dtype": torch.bfloat16, "tree_budget": 64}
    kept = range(0, num_layers, max(num_layers // max(resident, 1), 1))[:resident]
    print(f"{options.tier.all_bytes / 1e6:.0f} MB of experts; {slots}; {len(kept)} layers resident beside 2 slots")
    with (
        closing(load_model(source, **given, experts=replace(slots, looks_ahead=False))) as pooled,
        closing(load_model(source, **given, experts=slots)) as ahead,
        closing(load_model(source, **given, resident=kept, num_slots=2, pack=pack)) as layered,
    ):
        spoil(ahead)
        for rows in [int(each) for each in sys.argv[4:]] or ROWS:
            ways = [(model, Routed(model, seed=rows)) for model in (pooled, ahead, layered)]
            for model, routed in ways:
                model.cache.truncate(0, 0)
                model.append(range(5, 5 + CONTEXT))
                for _ in range(1 if model is layered else WARM):
                    run_pass(model, routed, rows)
            found: list[list[tuple[float, int]]] = [[] for _ in ways]
            for _ in range(num_passes):  # interleaved
                for each, (model, routed) in zip(found, ways, strict=True):
                    time.sleep(_FILL_S)
                    each.append(run_pass(model, routed, rows))
            report(rows, found)


def report(rows: int, found: list[list[tuple[float, int]]]) -> None:
    *pools, layers = [(statistics.median(s for s, _ in each), statistics.mean(n for _, n in each)) for each in found]
    best = [min(s for s, _ in each) for each in found]
    print(f"{rows:3d} rows: layers {layers[1] / 1e6:6.0f} MB {layers[0]:.3f} s (best {best[-1]:.3f})")
    for name, (seconds, num_bytes), least in zip(("experts", "and ahead"), pools, best, strict=False):
        print(
            f"  {name:9s} {num_bytes / 1e6:6.0f} MB {seconds:.3f} s (best {least:.3f}): "
            f"{num_bytes / layers[1]:.2f} of the bytes, {layers[0] / seconds:.1f} times as fast",
            flush=True,
        )


if __name__ == "__main__":
    main()
