"""Measure passes whose layers arrive over several links of one process: dealt in turn, and in ranges.

    PYTHONPATH=.:tests python tests/benchmarks/woven_links.py

A tiny model of 20 layers streams completely. Each device is the CPU, with slots and a reader of its own that sleeps as
long as its link would take for a layer: 60 ms over a link of rate 1. Prints the least time of three passes, and its
share of the time of one link of rate 1.
"""

import sys
import tempfile
from pathlib import Path

from engine.test_devices import LOAD_S, NUM_LAYERS, pair_of, pass_s
from support.tiny_models import make_config, random_model

from specchat.planner.dealing import deal
from specchat.planner.placement import Share

SECONDS = 3 * LOAD_S


def main() -> int:
    config = make_config("llama")
    config.num_hidden_layers = NUM_LAYERS
    half = NUM_LAYERS // 2
    cases = {
        "one link": ([1.0], [0] * NUM_LAYERS),
        "two links, ranges": ([1.0] * 2, [0] * half + [1] * half),
        "two links, woven": ([1.0] * 2, deal([Share(0, half)] * 2).owner),
        "four links, woven": ([1.0] * 4, deal([Share(0, NUM_LAYERS // 4)] * 4).owner),
        "links of 4 and 1, woven": ([4.0, 1.0], deal([Share(0, 16), Share(0, 4)]).owner),
    }
    with tempfile.TemporaryDirectory() as folder:
        models = pair_of(random_model(config), Path(folder))
        for name, (rates, owner) in cases.items():
            found = pass_s(models, rates, owner, SECONDS)
            print(f"{name}: {found:.3f} s, {found / (NUM_LAYERS * SECONDS):.2f} of one link", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
