"""Settings for the whole suite."""

import os
import signal

# Set before any library reads them: tests never reach the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

# Whoever starts the suite may ignore hang-ups (nohup does), and the programs under test would inherit that.
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Tiny matrices are slower on several threads, and much slower where the cores are shared."""
    import torch

    torch.set_num_threads(1)
