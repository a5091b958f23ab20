"""Random delays in passes and in reads of layers: a test that fails with them depends on how fast the machine is.

    TEST_DELAYS=SEED pytest tests/engine

Programs that tests start are delayed as well, where they inherit PYTHONPATH. A test's delays depend on the seed and on
its name, so it can be repeated alone; which thread draws which delay is left to chance.
"""

from __future__ import annotations

import os
import random
import sys
import time
from collections.abc import Sequence
from functools import wraps
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

VARIABLE = "TEST_DELAYS"
_SITE = Path(__file__).with_name("slowed")

# A test is slow all the time, now and then, or nearly never: what adapts to time sees each of these.
_SHARES = (0.01, 0.05, 0.25)
_SHORT_S, _LONG_S = 0.03, 0.2
_LONG_SHARE = 0.01

# What is delayed, by module: functions, or methods of classes.
DELAYED = {
    "specchat.engine.model": ("TreeModel.forward", "TreeModel.logits"),
    "specchat.engine.streaming.slots": ("SlotQueue.take", "SlotQueue._run"),
    "specchat.engine.streaming.readers": ("read_fully",),
    "specchat.models.weights.reader": ("WeightReader.read_layer",),
    "support.fake_engine": ("FakeEngine._step",),
}


class Delays:
    """Sleeps now and then.

    Args:
        seed: of everything that is drawn.
    """

    def __init__(self, seed: str) -> None:
        self._seed = seed
        self.begin("")

    def begin(self, name: str) -> None:
        """Draw anew, for the test of this name."""
        self._random = random.Random(f"{self._seed} {name}")
        self._share = self._random.choice(_SHARES)

    def sleep(self) -> None:
        if self._random.random() < self._share:
            is_long = self._random.random() < _LONG_SHARE
            time.sleep(_LONG_S if is_long else self._random.uniform(0, _SHORT_S))

    def slow(self, module: ModuleType, names: Sequence[str]) -> None:
        """Put a delay before every call of the named functions of a module."""
        for name in names:
            *owners, attribute = name.split(".")
            owner: Any = getattr(module, owners[0]) if owners else module
            setattr(owner, attribute, self._slowed(getattr(owner, attribute)))

    def _slowed(self, function: Any) -> Any:
        @wraps(function)
        def slowed(*arguments: Any, **named: Any) -> Any:
            self.sleep()
            return function(*arguments, **named)

        return slowed


class _Finder(MetaPathFinder):
    """Slows modules when they are imported, as importing them here would take seconds."""

    def __init__(self, delays: Delays) -> None:
        self._delays = delays

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in DELAYED:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self._delays)
        return spec


class _Loader(Loader):
    def __init__(self, loader: Any, delays: Delays) -> None:
        self._loader = loader
        self._delays = delays

    def __getattr__(self, name: str) -> Any:  # what runpy and inspect ask for
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self._loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        self._delays.slow(module, DELAYED[module.__name__])


def install() -> Delays | None:
    """Delay this process and the programs that it starts, if the environment asks for it."""
    seed = os.environ.get(VARIABLE)
    if not seed:
        return None
    delays = Delays(seed)
    sys.meta_path.insert(0, _Finder(delays))
    for name in DELAYED.keys() & sys.modules.keys():
        delays.slow(import_module(name), DELAYED[name])
    os.environ["PYTHONPATH"] = python_path()
    return delays


def python_path(*folders: Path | str) -> str:
    """PYTHONPATH of a program with these folders first, delayed if this process is."""
    inherited = [each for each in os.environ.get("PYTHONPATH", "").split(os.pathsep) if each and each != str(_SITE)]
    hooks = [_SITE] if os.environ.get(VARIABLE) else []
    return os.pathsep.join(str(each) for each in (*folders, *hooks, *inherited))
