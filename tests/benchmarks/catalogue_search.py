"""How long it takes to plan for every known model on every machine of tests/machines.

    PYTHONPATH=.:tests python tests/benchmarks/catalogue_search.py

Prints milliseconds for all models together and for the slowest one: cold is the first search of a process, warm the
median of the next ones.
"""

import statistics
import sys
import time

from support.machines import MACHINES, MachineFile, read_machine

from specchat.errors import DoesNotFitError
from specchat.models.known_models import known_models
from specchat.planner.offers import ANYTHING, find_offers, offer_of
from specchat.planner.rates import rates_of

_REPEATS = 2


def seconds(work) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def main() -> None:
    first = True
    for name in MACHINES:
        file = read_machine(name)
        rates, typical = (rates_of(file.hardware, file.machine, measured) for measured in (file.measured, None))

        def search(file: MachineFile = file, rates=rates, typical=typical) -> None:
            find_offers(ANYTHING, file.machine, rates, typical, free_disk_bytes=file.hardware.disk.free_bytes)

        def one(model, file=file, rates=rates, typical=typical) -> None:
            try:
                offer_of(model, ANYTHING, file.machine, rates, typical)
            except DoesNotFitError:
                return

        cold = f"cold {seconds(search) * 1e3:6.0f}, " if first else ""
        warm = statistics.median(seconds(search) for _ in range(_REPEATS))
        slowest = max((seconds(lambda m=model: one(m)), model.id) for model in known_models().values())
        print(f"{name:32} {cold}all {warm * 1e3:6.0f} ms, slowest {slowest[0] * 1e3:4.0f} ms ({slowest[1]})")
        first = False
    print("torch was imported" if "torch" in sys.modules else "without torch")


if __name__ == "__main__":
    main()
