"""Environment settings that libraries read at import."""

import os
import warnings


def prepare_threads() -> None:
    """Let the threads of products sleep while they wait; OpenMP reads this when torch is imported, and never again.

    OpenMP threads spin while they wait for each other. If another busy program displaces one of them, the others keep
    the processors and wait for its whole time slice, many times in each layer. With as many busy programs as cores, a
    pass over 8 layers (0.9 GB) took 185 ms and 119 ms of processor time; with threads that sleep 45 and 30 ms.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


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
