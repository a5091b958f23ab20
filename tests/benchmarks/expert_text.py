"""A mixture of experts that writes the demo's text: its speed by single experts and by whole layers.

    PYTHONPATH=.:tests python tests/benchmarks/expert_text.py FOLDER [REPEATS]

Writes a model of 8 layers with 128 experts, 8 of them for a row, 3.6 GB in bf16, into FOLDER once. Each expert holds
the demo target's MLP, so the text is the demo's, whatever a random router chooses from real hidden states. Then writes
an answer in turn, with the demo's draft: as planned, without a draft, and by whole layers through two slots. Not a
test: run it on a quiet machine.
"""

import json
import os
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from support.loading import Quiet, model_request, yes

from specchat.loading.engine import load_planned
from specchat.loading.libraries import prepare_libraries
from specchat.loading.locate import locate_models, parse_models
from specchat.loading.planning import Planned, make_plan
from specchat.models.catalog.ref import demo_source
from specchat.models.catalog.shape import parse_shape
from specchat.models.hf.tokenizer import load_tokenizer
from specchat.models.synthetic.layers import ShapeLayers, shape_files
from specchat.records.generation import Sampling

SHAPE = parse_shape("hidden=768,layers=8,heads=4,kv_heads=2,head_dim=64,mlp=768")
EXPERTS, PER_ROW = 128, 8
VRAM = 1_600_000_000  # a quarter of the experts beside caches and workspaces
NUM_TOKENS = 120
PROMPT = "Tell me a story about a fox and a hen."


def write_model(folder: Path) -> None:
    if (folder / "config.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    source, generator = ShapeLayers(SHAPE), torch.Generator().manual_seed(0)
    for layer in range(SHAPE.layers):
        tensors = {}
        for name, tensor in source.read_layer(layer).items():
            if not name.startswith("mlp."):
                tensors[name] = tensor.clone()
        moe = source.read_layer(layer)
        tensors["block_sparse_moe.gate.weight"] = torch.randn(EXPERTS, SHAPE.hidden, generator=generator).bfloat16()
        for expert in range(EXPERTS):
            for name, own in (("w1", "gate"), ("w3", "up"), ("w2", "down")):
                tensors[f"block_sparse_moe.experts.{expert}.{name}.weight"] = moe[f"mlp.{own}_proj.weight"].clone()
        full = {f"model.layers.{layer}.{name}": tensor for name, tensor in tensors.items()}
        if layer == 0:
            full |= source.rest()
        save_file(full, folder / f"model-{layer + 1:05d}-of-{SHAPE.layers:05d}.safetensors", {"format": "pt"})
    for name, data in shape_files(SHAPE).items():
        (folder / name).write_bytes(data)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "sliding_window": None}
    config |= {"num_local_experts": EXPERTS, "num_experts_per_tok": PER_ROW}
    (folder / "config.json").write_text(json.dumps(config))


@dataclass(frozen=True)
class Found:
    """An answer: tokens, seconds of decoding, and what its passes did."""

    tokens: tuple[int, ...]
    decode_s: float
    num_steps: int
    num_nodes: int
    num_bytes: int
    hit_rate: float | None


def plan(folder: Path, draft: str, slots: int | None) -> Planned:
    request = model_request(
        str(folder),
        draft=draft,
        device="cpu",
        slots=slots,
        vram_bytes=VRAM,
        ram_bytes=0,
        ctx=512,
        dtype="bf16",
        quant="none",
    )
    return make_plan(request, locate_models(request, parse_models(request), Quiet(), yes), Quiet())


def answer(planned: Planned) -> Found:
    models = planned.models
    prompt = load_tokenizer(models.target.path).encode(PROMPT)
    with load_planned(models.target, models.draft, planned.plan, Quiet()) as engine:
        steps = list(engine.generate(prompt, Sampling(), stop_ids=frozenset(), max_tokens=NUM_TOKENS))
        hit_rate = engine.memory().expert_hit_rate
    later = steps[1:]
    return Found(
        tuple(token for step in steps for token in step.token_ids),
        sum(step.pass_s for step in later),
        len(later),
        sum(step.tree_nodes for step in later),
        sum(step.streamed_bytes for step in later),
        hit_rate,
    )


def main() -> None:
    folder, repeats = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 3
    os.environ["SPECCHAT_CACHE_DIR"] = str(folder / "cache")
    write_model(folder)
    prepare_libraries()
    draft = str(demo_source("draft").path)
    plans = {
        "experts": plan(folder, draft, None),
        "experts without a draft": plan(folder, "none", None),
        "whole layers": plan(folder, draft, 2),
    }
    found: dict[str, list[Found]] = {name: [] for name in plans}
    for _ in range(repeats):
        for name, planned in plans.items():
            found[name].append(answer(planned))
    for name, answers in found.items():
        rates = [(len(each.tokens) - 1) / each.decode_s for each in answers]
        last, planned = answers[-1], plans[name]
        hits = "" if last.hit_rate is None else f", {last.hit_rate:.0%} of experts in memory"
        print(
            f"{name}: {statistics.median(rates):.2f} tok/s ({', '.join(f'{rate:.2f}' for rate in sorted(rates))}; "
            f"predicted {planned.chosen.prediction.tok_per_s:.2f}), {len(last.tokens) / last.num_steps:.1f} tokens "
            f"a pass of {last.num_nodes / last.num_steps:.0f} nodes, {last.num_bytes / last.num_steps / 1e6:.0f} MB "
            f"a pass (predicted {planned.plan.streamed_bytes_per_step / 1e6:.0f}){hits}"
        )
    print(f"{len({each.tokens for answers in found.values() for each in answers})} different texts")


if __name__ == "__main__":
    main()
