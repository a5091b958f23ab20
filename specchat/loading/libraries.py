"""Environment settings that libraries read at import."""

import os
import warnings
from pathlib import Path

_SPINS = "2000"  # rounds of GNU's OpenMP, each some 15 ns
_LOAD = Path("/proc/loadavg")


def prepare_threads() -> None:
    """Let the threads of products sleep while they wait; OpenMP reads this when torch is imported, and never again.

    OpenMP threads spin while they wait for each other. If another busy program displaces one of them, the others keep
    the processors and wait for its whole time slice, many times in each layer. With as many busy programs as cores, a
    pass over 8 layers (0.9 GB) took 185 ms and 119 ms of processor time; with threads that sleep 45 and 30 ms.

    But waking a thread takes as long as a small operation. If nothing else runs when the program begins, threads spin
    for about 30 us before they sleep: passes over 1, 9 and 17 rows take 10, 15 and 28% less time on two cores. Beside
    three busy programs they would take 17, 30 and 60% more.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        if _num_running() == 1:
            os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)


def _num_running() -> int | None:
    """Return how many threads of all programs run or could run now, this one included; None if nobody tells."""
    try:
        return int(_LOAD.read_text().split()[3].partition("/")[0])
    except (OSError, ValueError, IndexError):
        return None


def prepare_libraries() -> None:
    """Set the environment variables that libraries read at import, and silence their warnings; call it before torch.

    Warnings and progress bars of libraries mean nothing to a user; SPECCHAT_DEBUG=1 keeps them.
    """
    prepare_threads()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    if os.environ.get("SPECCHAT_DEBUG") == "1":
        return
    warnings.simplefilter("ignore")
    for variable in ("TRANSFORMERS_VERBOSITY", "HF_HUB_VERBOSITY"):
        os.environ[variable] = "error"
    os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"
    os.environ["RUST_BACKTRACE"] = "0"  # of a panic in tokenizers, which is reported as an error
    os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"
