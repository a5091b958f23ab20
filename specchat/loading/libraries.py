"""Environment settings that libraries read at import."""

import os
import warnings


def prepare_libraries() -> None:
    """Set the environment variables that libraries read at import, and silence their warnings.

    Warnings and progress bars of libraries mean nothing to a user; SPECCHAT_DEBUG=1 keeps them.
    """
    # OpenMP threads spin while they wait for each other. If another busy program displaces one of them, the others wait
    # for its whole time slice: tens of times slower, many times in each layer.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    if os.environ.get("SPECCHAT_DEBUG") == "1":
        return
    warnings.simplefilter("ignore")
    for variable in ("TRANSFORMERS_VERBOSITY", "HF_HUB_VERBOSITY"):
        os.environ[variable] = "error"
    os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"
    os.environ["RUST_BACKTRACE"] = "0"  # of a panic in tokenizers, which is reported as an error
    os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"
