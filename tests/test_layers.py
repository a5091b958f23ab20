"""Imports go down only, no files import each other in a circle, and heavy libraries stay in their homes.

Imports inside functions count like all others: a circle that only closes at run time is a circle.
"""

import ast
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "specchat"
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__main__.py")
# From the bottom up; those on one floor do not import each other. `demo` trains the toy pair and stands aside.
FLOORS = [
    {"version", "masking"},
    {"errors"},
    {"units", "closing", "compiler", "files", "terminal", "threads", "json_lines", "paths"},
    {"records"},
    {"hardware", "models"},
    {"planner", "engine"},
    {"loading"},
    {"chat"},
    {"batch", "bench", "serve", "api"},
    {"ui"},
    {"cli"},
    {"__init__"},  # the public names; nothing of ours imports them
]
# The folders and files inside larger folders, from the bottom up; no two of them import each other.
FOLDERS = {
    "models": [
        {"catalog", "checkpoint"},
        {"quant", "hub"},
        {"hf", "gguf"},
        {"weights"},
        {"packs", "sizes"},
        {"synthetic"},
        {"locate"},
        {"drafts"},
    ],
    "models/quant": [
        {"kernels"},
        {"formats"},
        {"autotune", "schemes"},
        {"modules", "packing"},
        {"experts", "lookup"},
    ],
    "engine": [
        {"device", "layout", "linear", "pipeline", "sampling", "taps", "tree", "warming"},
        {"fixed_layout", "streaming"},
        {"attention", "experts", "hops", "recurrent", "requests", "sequence"},
        {"kv_cache"},
        {"model"},
        {"drafting", "loading", "relief", "seats", "selfcheck", "walk"},
        {"stages", "stats", "workers"},
        {"drafters"},
        {"engine"},
        {"measuring"},
    ],
}
FLOOR_OF = {name: i for i, names in enumerate(FLOORS) for name in names} | {"demo": len(FLOORS)}
HOMES = {
    "torch": ("engine/", "models/", "hardware/", "bench/baselines.py", "demo/"),
    # The baselines are what the engine is measured against: transformers used as anyone would, nothing of ours in it.
    "transformers": ("models/hf/", "bench/baselines.py", "demo/"),
    "llama_cpp": ("bench/llama_worker.py",),
    "starlette": ("serve/",),
    "uvicorn": ("serve/",),
    "triton": ("models/quant/kernels/triton_",),
    "numba": (
        "models/quant/kernels/numba_",
        "models/quant/formats/ggml_numba.py",
        "models/quant/formats/ggml_compiled.py",
    ),
    "llvmlite": ("models/quant/kernels/numba_",),
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
            if node.module.split(".")[0] == "specchat":
                yield from (f"{node.module}.{alias.name}" for alias in node.names)  # a module or a name in one


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


def module_name(path):
    """The dotted name of a file or a package."""
    names = ("specchat", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(names[:-1] if names[-1] == "__init__" else names)


@cache
def dependencies():
    """File -> the files of ours that it imports; `from package import module` counts for the module."""
    modules = {module_name(path): path for path in FILES}
    return {path: {modules[name] for name in imports(path) if name in modules} - {path} for path in FILES}


def circles(edges):
    """The sets of nodes that reach each other, each of two nodes or more.

    Args:
        edges: node -> the nodes that it points to.
    """
    reached = {node: reachable(edges, node) for node in edges}
    found = {frozenset({node, *(other for other in reached[node] if node in reached[other])}) for node in edges}
    return {circle for circle in found if len(circle) > 1}


def reachable(edges, start):
    """All nodes on ways out of a node."""
    seen, open_nodes = set(), [start]
    while open_nodes:
        for node in edges.get(open_nodes.pop(), ()):
            if node not in seen:
                seen.add(node)
                open_nodes.append(node)
    return seen


def test_circles_are_found():
    assert circles({1: {2}, 2: {3}, 3: {1}, 4: {1}}) == {frozenset({1, 2, 3})}
    assert circles({1: {2, 3}, 2: {3}, 3: set()}) == set()


def test_no_files_import_each_other():
    assert not [sorted(map(name_of, circle)) for circle in circles(dependencies())]


@pytest.mark.parametrize("package", FOLDERS)
def test_folders_keep_their_order(package):
    floor_of = {name: i for i, names in enumerate(FOLDERS[package]) for name in names}
    depth = len(Path(package).parts)
    inside = {
        path for path in FILES if name_of(path).startswith(f"{package}/") and path != PACKAGE / package / "__init__.py"
    }
    for path in inside:
        own = Path(name_of(path)).parts[depth].removesuffix(".py")
        for other in dependencies()[path] & inside:
            theirs = Path(name_of(other)).parts[depth].removesuffix(".py")
            assert theirs == own or floor_of[theirs] < floor_of[own], f"{name_of(path)} imports {name_of(other)}"


def test_models_stays_surveyable():
    tops = {Path(name_of(path)).parts[1] for path in FILES if name_of(path).startswith("models/")}
    assert len(tops - {"__init__.py"}) <= 12
