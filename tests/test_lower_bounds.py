"""The versions of the job on the lower bounds are the lower bounds."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
_UNTESTED = {"mypy", "ruff"}  # they check the sources, which do not depend on versions


def test_every_lower_bound_is_tested():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = [
        *project["dependencies"],
        *(line for extra in project["optional-dependencies"].values() for line in extra),
    ]
    bounds = dict(re.findall(r"^([\w-]+)(?:\[[\w,]*\])?>=([\d.]+)", "\n".join(needed), re.MULTILINE))
    tested = dict(re.findall(r"^([\w-]+)==([\d.]+)", (ROOT / ".ci" / "lower-bounds.txt").read_text(), re.MULTILINE))
    assert tested.keys() == bounds.keys() - _UNTESTED
    for name, version in tested.items():
        assert f"{version.rstrip('.')}.".startswith(f"{bounds[name]}."), name
