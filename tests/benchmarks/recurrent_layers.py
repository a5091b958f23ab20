"""Seconds of one recurrent layer: a tree pass, the rows of a tree in sequence, and the module's own chunked prefill.

    PYTHONPATH=.:tests python -m benchmarks.recurrent_layers [rows]

Layers have a hidden size of 2048 and, per family, the heads of a model of that size; float32, one thread, best of 7 in
processor time.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable

import torch
import transformers as hf
from support.recurrent import CPU, layout_of, random_parents

from specchat.engine.recurrent.cache import RecurrentCache
from specchat.models.hf.mixers import bind_mixers, mixers_of, release_mixers
from specchat.records.model import StateShape

_SIZES = {"hidden_size": 2048, "num_hidden_layers": 4, "num_attention_heads": 16, "vocab_size": 64}
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_HEADS = {"linear_num_key_heads": 16, "linear_num_value_heads": 32}
CASES = {
    "gated delta net": (
        hf.Qwen3_5TextConfig(**_SIZES, **_HEADS, intermediate_size=64),
        StateShape(8192, 4, 16, 32, 128, 128),
    ),
    "Kimi Delta Attention": (
        hf.KimiLinearConfig(**_SIZES, **_TOKENS, linear_num_heads=16, intermediate_size=64, moe_intermediate_size=64),
        StateShape(6144, 4, 16, 16, 128, 128, decays=128),
    ),
    "Mamba2": (
        hf.GraniteMoeHybridConfig(
            **_SIZES, mamba_n_heads=64, mamba_d_head=64, mamba_d_state=128, num_local_experts=0, intermediate_size=64
        ),
        StateShape(4352, 4, 1, 64, 128, 64),
    ),
}


def main() -> None:
    torch.set_num_threads(1)
    counts = [int(text) for text in sys.argv[1:]] or [64, 256]
    for name, (config, shape) in CASES.items():
        config._attn_implementation = "eager"
        model = hf.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        layer = model.get_decoder().layers[0]
        for num_rows in counts:
            measure(name, layer, shape, num_rows)


@torch.inference_mode()
def measure(name: str, layer: torch.nn.Module, shape: StateShape, num_rows: int) -> None:
    (mixer,) = mixers_of(layer)
    rows = torch.randn(1, num_rows, mixer.hidden_size)
    own = best(lambda: mixer(rows))
    found = []
    for linear in (1, num_rows):
        parents = random_parents(num_rows - linear, random.Random(1))
        cache = RecurrentCache([shape], num_rows, grows=False, num_points=0, dtype=torch.float32, devices=[CPU])
        bind_mixers([layer], cache.layers)
        layout = layout_of(0, linear, parents)
        layout.select(0, num_rows)

        def run(cache: RecurrentCache = cache, layout: object = layout) -> None:
            cache.truncate(0, 0)
            cache.begin(layout)
            mixer(rows)

        found.append(best(run))
    release_mixers([layer])
    tree, sequence = found
    print(
        f"{name}, {num_rows} rows: tree {1e3 * tree:.1f} ms, in sequence {1e3 * sequence:.1f} ms, "
        f"own prefill {1e3 * own:.1f} ms, tree / own {tree / own:.2f}"
    )


def best(run: Callable[[], object], repeats: int = 7) -> float:
    times = []
    for _ in range(repeats):
        begin = time.process_time()
        run()
        times.append(time.process_time() - begin)
    return min(times)


if __name__ == "__main__":
    main()
