"""What stages of a chat gain: short texts with a long --ctx, beside plans without stages and with a short --ctx.

    PYTHONPATH=.:tests python tests/benchmarks/stages.py FOLDER [VRAM] [CTX] [ROUNDS]

A random Llama of 2.5 GB in bf16 is written into FOLDER once. Three engines in one process continue a text of 480 tokens
in turn, without a draft: the plan as it is, the same plan without stages, and a plan for 1,024 tokens. Prints the
resident layers of each, and the ratios of their seconds a pass in each round. Not a test: run it on a quiet machine
with room for three engines.
"""

from __future__ import annotations

import random
import shutil
import statistics
import sys
import time
from pathlib import Path
from unittest import mock

import torch
import transformers as hf

import specchat
from specchat.planner import search

LAYERS, HIDDEN, HEADS, KV_HEADS, MLP, VOCAB = 20, 2048, 16, 8, 8192, 4096
SHORT, PROMPT, TOKENS = 1024, 480, 6


def write_model(folder: Path) -> None:
    """Write the model, with the demo's tokenizer."""
    if (folder / "config.json").exists():
        return
    config = hf.LlamaConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=MLP, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, max_position_embeddings=16384, dtype="bfloat16",
        tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    hf.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    for file in (Path(specchat.__file__).parent / "demo" / "target").glob("*token*"):
        shutil.copy(file, folder)


def seconds(model: specchat.Model, prompt: list[int]) -> float:
    """Median seconds of a step after the prompt was read."""
    times, found = list[float](), model.generate(prompt, max_tokens=TOKENS, seed=1, temperature=0)
    begin = time.perf_counter()
    for _ in found:
        times.append(time.perf_counter() - begin)
        begin = time.perf_counter()
    return statistics.median(times[1:])


def main(folder: str, vram: str = "1.5GiB", ctx: str = "8192", rounds: str = "8") -> None:
    write_model(Path(folder))

    def load(num_tokens: int) -> specchat.Model:
        return specchat.load(folder, vram=vram, ctx=num_tokens, device="cpu", draft="none", quant="none", dtype="bf16")

    models = {"stages": load(int(ctx))}
    with mock.patch.object(search, "with_stages", lambda plan, *_: plan):
        models["without"] = load(int(ctx))
    models["short"] = load(SHORT)
    for name, model in models.items():
        plan = model.plan
        print(f"{name}: {len(plan.first_stage.resident)} of {LAYERS} layers resident at first, "
              f"{len(plan.placement.resident)} in the end; ctx {plan.work.ctx}", flush=True)  # fmt: skip
    times: dict[str, list[float]] = {name: [] for name in models}
    rng = random.Random(0)
    for turn in range(int(rounds) + 1):
        prompt = [rng.randrange(8, VOCAB - 8) for _ in range(PROMPT)]
        for name in [*models] if turn % 2 else [*reversed(models)]:
            passed = seconds(models[name], prompt)
            if turn:  # the first round warms up
                times[name].append(passed)
    for name in models:
        print(f"{name}: {statistics.median(times[name]):.3f} s a pass")
    for other in ("without", "short"):
        ratios = sorted(b / a for a, b in zip(times["stages"], times[other], strict=True))
        print(f"{other} / stages: median {statistics.median(ratios):.3f}, from {ratios[0]:.3f} to {ratios[-1]:.3f}")
    for model in models.values():
        model.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
