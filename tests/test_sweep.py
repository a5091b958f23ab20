"""The sweep over transformers' model types: types run or are refused as docs/models.md says, and none fails."""

import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from support.delays import python_path
from support.sweep.page import BEGIN, PAGE

TESTS = Path(__file__).parent

# A plain type, one with sizes in parts of its configuration, and a text half whose head has an owner of its own.
RUN = ("llama", "dbrx", "qwen2_5_omni")
REFUSED = {
    "mamba": "linear_attention layers",
    "bart": "encoder",
    "bloom": "ALiBi",
    "codegen": "its own attention masks",
    "longcat_flash": "no plain list of decoder layers",
    "paligemma": "in both directions",
}


def sweep(folder, *arguments):
    """Map types to the outcomes of the command."""
    file = folder / "outcomes.json"
    environment = os.environ | {"PYTHONPATH": python_path(TESTS, TESTS.parent)}
    command = [sys.executable, "-m", "support.sweep", *arguments, "--json", str(file)]
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    return {outcome["kind"]: outcome for outcome in json.loads(file.read_text())}


def documented():
    """Map types to "run", "refused" or "fail", as the sections of the page name them."""
    results, section = {}, ""
    for line in PAGE.read_text().partition(BEGIN)[2].splitlines():
        if line.startswith("## "):
            section = next(result for result in ("refused", "fail", "run") if result in line)
        elif found := re.match(r"\| `([\w.-]+)` \|", line):
            results[found[1]] = section
    return results


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    return sweep(tmp_path_factory.mktemp("sweep"), *RUN, *REFUSED, "--jobs", "1")


@pytest.mark.slow
def test_types_that_run_write_what_transformers_writes(outcomes):
    assert {kind: outcomes[kind] for kind in RUN if outcomes[kind]["result"] != "exact"} == {}


@pytest.mark.slow
@pytest.mark.parametrize("kind", REFUSED)
def test_types_that_are_refused_say_why(outcomes, kind):
    assert outcomes[kind]["result"] == "refused" and REFUSED[kind] in outcomes[kind]["detail"]


@pytest.mark.slow
def test_page_agrees_with_the_sweep(outcomes):
    words = {"exact": "run", "refused": "refused"}
    page = documented()
    assert {kind: page[kind] for kind in outcomes} == {kind: words[each["result"]] for kind, each in outcomes.items()}


def test_page_names_every_type():
    """Compare with the installed transformers if the page was written with the same one."""
    from support.sweep.configs import all_types

    if f"transformers {version('transformers')}" in PAGE.read_text():
        assert set(documented()) == set(all_types())


@pytest.mark.slow
def test_no_type_fails(tmp_path):
    from support.sweep.configs import causal_types, composite_types

    found = sweep(tmp_path)
    assert [each for each in found.values() if each["result"] == "broken"] == []
    exact = {kind for kind, each in found.items() if each["result"] == "exact"}
    assert len(exact & set(causal_types())) >= 94
    assert len(exact & set(composite_types())) >= 60
