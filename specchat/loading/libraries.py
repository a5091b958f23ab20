"""Settings that libraries read when they are first imported."""

import os
import warnings


def prepare_libraries() -> None:
    """Settings that libraries read when they are first imported.

    Their warnings and progress bars mean nothing to a user; SPECCHAT_DEBUG=1 lets them through.
    """
    # OpenMP's threads spin while they wait for each other. With another busy program beside them, one that is not
    # running is waited for all its time slice long: tens of times slower, many times in each layer.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    if os.environ.get("SPECCHAT_DEBUG") == "1":
        return
    warnings.simplefilter("ignore")
    for variable in ("TRANSFORMERS_VERBOSITY", "HF_HUB_VERBOSITY"):
        os.environ[variable] = "error"
    os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"
    os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"
