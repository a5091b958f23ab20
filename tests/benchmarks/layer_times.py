"""What a layer takes on this machine's CPU with everything resident, beside what products alone would: by rows.

    PYTHONPATH=. python tests/benchmarks/layer_times.py [MODEL ...]

Rates come from the last `specchat probe`. Prints for each model and number of rows the milliseconds of a layer (the
median over passes), the part that is predicted for products, and the rest. Models are the demo and shapes that need
1.5 GB of disk (SPECCHAT_CACHE_DIR), or those named. Takes two minutes. Not a test: run it on a quiet machine.
"""

import statistics
import sys
import time
from dataclasses import replace

import torch
from support.loading import Quiet, load_model, model_request, yes

from specchat.engine.model import TreeModel
from specchat.hardware.probe import find_hardware, find_machine, probe
from specchat.loading import planning
from specchat.loading.engine import make_packs
from specchat.loading.libraries import prepare_libraries
from specchat.loading.locate import locate_models, parse_models
from specchat.models.checkpoint.dtypes import torch_dtype
from specchat.models.sizes.describe import describe
from specchat.paths import cache_folder
from specchat.planner.acceptance import DEMO_ACCEPTANCE
from specchat.planner.cost import CostModel
from specchat.planner.placement import TierSizes
from specchat.planner.rates import Rates, rates_of

MODELS = (
    "demo",
    "shape:hidden=256,layers=24,heads=4,kv_heads=2,head_dim=64,mlp=704",
    "shape:hidden=1024,layers=24,heads=8,kv_heads=4,head_dim=128,mlp=3584",
    "shape:hidden=2048,layers=12,heads=16,kv_heads=4,head_dim=128,mlp=7168",
)
ROWS = (1, 4, 16, 64)
PASSES, CONTEXT = 25, 100


def layer_s(model: TreeModel, rows: int) -> float:
    """Of a pass behind a short context."""
    seconds = []
    for _ in range(PASSES):
        model.cache.truncate(0, CONTEXT)
        begin = time.perf_counter()
        model.append(range(5, 5 + rows))
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds) / len(model.skeleton.layers)


def measure(name: str, rates: Rates) -> None:
    options = model_request(model=name, device="cpu", draft="none")
    models = locate_models(options, parse_models(options), Quiet(), yes)
    plan = planning.make_plan(
        replace(options, choices=replace(options.choices, ctx=512)), models, Quiet(), as_given=True
    ).plan
    pack, _ = make_packs(models.target, models.draft, plan, Quiet())
    spec = describe(models.target)
    # with any draft, so that passes may have more rows than one
    products = CostModel(spec, spec, plan.work.dtype, "cpu", replace(rates, layer_s=0.0), DEMO_ACCEPTANCE)
    resident = TierSizes(spec.num_layers, 0, 0, 0, 0, 0)
    model = load_model(
        models.target,
        dtype=torch_dtype(plan.work.dtype),
        device=torch.device("cpu"),
        cache_rows=CONTEXT + max(ROWS),
        chunk_rows=max(ROWS),
        pack=pack,
    )
    try:
        model.append(range(5, 5 + CONTEXT))
        for rows in ROWS:
            took_s = layer_s(model, rows)
            products_s = products.predict(resident, rows - 1, adaptive=False).compute_s / spec.num_layers
            parts = f"{products_s * 1e3:6.2f} of products, {(took_s - products_s) * 1e3:5.2f} beside"
            print(f"{name[:28]:<28} {rows:3} rows: {took_s * 1e3:6.2f} ms a layer, {parts}", flush=True)
    finally:
        model.close()


def main() -> None:
    prepare_libraries()
    machine, folder = find_machine("cpu"), cache_folder()
    rates = rates_of(find_hardware(folder), machine, probe(folder, "cpu").measured)
    for name in sys.argv[1:] or MODELS:
        measure(name, rates)


if __name__ == "__main__":
    main()
