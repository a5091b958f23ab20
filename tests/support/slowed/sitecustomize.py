"""Delays a program that a test starts; Python imports this at its start where this folder is on PYTHONPATH."""

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

_spec = spec_from_file_location("_delays", Path(__file__).parents[1] / "delays.py")
assert _spec is not None and _spec.loader is not None
_delays = module_from_spec(_spec)
_spec.loader.exec_module(_delays)
_delays.install()
