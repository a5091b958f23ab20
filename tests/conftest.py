"""Settings for the whole suite."""

import gc
import os
import shutil
import signal
import tempfile
from pathlib import Path

# Set before any library reads them: tests never reach the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
from hypothesis import HealthCheck, settings
from support import delays

_DELAYS = delays.install()

# How long an example takes says nothing about the code where other programs share the machine.
settings.register_profile("specchat", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("specchat")

# Nobody's own chats and settings are read or written; programs under test inherit this.
for variable in [name for name in os.environ if name.startswith("SPECCHAT_") and name != "SPECCHAT_CACHE_DIR"]:
    del os.environ[variable]
_HOME = tempfile.mkdtemp(prefix="specchat-tests-")
os.environ |= {"XDG_STATE_HOME": f"{_HOME}/state", "XDG_CONFIG_HOME": f"{_HOME}/config"}
os.environ.setdefault("SPECCHAT_CACHE_DIR", f"{_HOME}/cache")
# Compiled loops are kept for the next run: all of them take some seconds to compile.
os.environ.setdefault("NUMBA_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "compiled"))
os.environ |= {"OLLAMA_MODELS": f"{_HOME}/ollama", "LLAMA_CACHE": f"{_HOME}/llama.cpp"}

# Whoever starts the suite may ignore hang-ups (nohup does), and the programs under test would inherit that.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells make programs in the background ignore it


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Tiny matrices are slower on several threads, and much slower where the cores are shared."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _delays(request):
    """With TEST_DELAYS=SEED, passes and reads are slow at random: no test's outcome may depend on that."""
    if _DELAYS is not None:
        _DELAYS.begin(request.node.nodeid)


@pytest.fixture(autouse=True)
def _no_statistics():
    """Plans do not depend on what other tests' answers have shown."""
    yield
    Path(_HOME, "state", "specchat", "statistics.json").unlink(missing_ok=True)


def pytest_collection_finish():
    """Collections of garbage need not look at the tests and the modules, of which none is freed."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    shutil.rmtree(_HOME, ignore_errors=True)
