"""Imports go down only, and heavy libraries stay in the packages that are their homes."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "specchat"
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__main__.py")
# From the bottom up; those on one floor do not import each other. `demo` trains the toy pair and stands aside.
FLOORS = [
    {"__init__"},
    {"errors"},
    {"units", "config", "closing", "files", "threads"},
    {"hardware", "models"},
    {"planner", "engine"},
    {"chat"},
    {"bench"},
    {"ui"},
    {"cli"},
]
FLOOR_OF = {name: i for i, names in enumerate(FLOORS) for name in names} | {"demo": len(FLOORS)}
HOMES = {
    "torch": ("engine/", "models/", "hardware/", "demo/"),
    # hf_baselines is what the engine is measured against: transformers used as anyone would, nothing of ours in it.
    "transformers": ("models/hf_compat.py", "models/hf_baselines.py", "demo/"),
    "triton": ("models/formats/triton_affine.py",),
    "rich": ("ui/",),
    "prompt_toolkit": ("ui/",),
    "typer": ("cli/",),
}


def imports(path):
    """Dotted names of all modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            yield node.module
            if node.module == "specchat":
                yield from (f"specchat.{alias.name}" for alias in node.names)


def part(module):
    """The floor's name in specchat.<part>.<...>; the root itself counts as __init__."""
    names = module.split(".")
    return names[1] if len(names) > 1 and names[1] in FLOOR_OF else "__init__"


def name_of(path):
    return str(path.relative_to(PACKAGE))


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_go_down(path):
    own = Path(name_of(path)).parts[0].removesuffix(".py")
    for module in imports(path):
        if module.split(".")[0] == "specchat" and part(module) != own:
            assert FLOOR_OF[part(module)] < FLOOR_OF[own], f"{name_of(path)} imports {module}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_libraries_stay_at_home(path):
    for module in imports(path):
        homes = HOMES.get(module.split(".")[0])
        assert homes is None or name_of(path).startswith(homes), f"{name_of(path)} imports {module}"
