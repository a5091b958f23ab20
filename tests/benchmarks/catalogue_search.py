"""How long it takes to plan for every known model on every machine of tests/machines.

    PYTHONPATH=.:tests python tests/benchmarks/catalogue_search.py

Prints milliseconds for all models together, as in a `probe` that begins: the median over processes that have imported
everything and searched for nothing yet; then in a process that has searched before, and the slowest single model there.
Fails where the first takes longer than 200 ms. Not a test: run it on a quiet machine.
"""

import statistics
import sys
import time
from multiprocessing import get_context

from support.machines import MACHINES, MachineFile, read_machine

from specchat.errors import DoesNotFitError
from specchat.models.catalog.known_models import known_models
from specchat.planner.rates import rates_of
from specchat.planner.recommendations import ANYTHING, find_recommendations, recommend

MOST_S = 0.2
_REPEATS = 5


def seconds(work) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def rates(file: MachineFile):
    return tuple(rates_of(file.hardware, file.machine, measured) for measured in (file.measured, None))


def search(file: MachineFile) -> None:
    find_recommendations(ANYTHING, file.machine, *rates(file), free_disk_bytes=file.hardware.disk.free_bytes)


def one(file: MachineFile, model) -> None:
    try:
        recommend(model, ANYTHING, file.machine, *rates(file))
    except DoesNotFitError:
        return


def cold_s(name: str) -> float:
    file = read_machine(name)
    return seconds(lambda: search(file))


def warm_s(name: str) -> tuple[float, float, str]:
    """All models, and the slowest of them."""
    file = read_machine(name)
    search(file)
    all_s = statistics.median(seconds(lambda: search(file)) for _ in range(_REPEATS))
    each = [(seconds(lambda model=model: one(file, model)), model.id) for model in known_models().values()]
    return all_s, *max(each)


def apart(function, name: str):
    """What it returns in a process of its own."""
    with get_context("fork").Pool(1) as pool:
        return pool.apply(function, (name,))


def main() -> int:
    slowest_s = 0.0
    for name in MACHINES:
        cold = statistics.median(apart(cold_s, name) for _ in range(_REPEATS))
        warm, longest, model = apart(warm_s, name)
        print(f"{name:32} {cold * 1e3:4.0f} ms, again {warm * 1e3:4.0f} ms, slowest {longest * 1e3:4.1f} ms ({model})")
        slowest_s = max(slowest_s, cold)
    print("torch was imported" if "torch" in sys.modules else "without torch")
    print(f"at most {slowest_s * 1e3:.0f} ms (limit {MOST_S * 1e3:.0f})")
    return int(slowest_s > MOST_S)


if __name__ == "__main__":
    sys.exit(main())
