"""OpenMP reads how its threads wait when torch is imported, so every command must have said it by then."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from specchat.loading import libraries

ROOT = Path(__file__).parents[2]
COMMANDS = {
    "run": ["run", "demo", "Hi", "--no-save"],
    "prompts": ["run", "demo", "--prompts", "{prompts}", "-o", "{prompts}.out"],
    "serve": ["serve", "demo", "--port", "0"],
    "probe": ["probe"],
    "bench": ["bench", "demo", "--baseline", "none", "--limit", "1"],
    "bench of batches": ["bench", "demo", "--batch", "1,2"],
}
PASSIVE = ("['PASSIVE', '2000']", "['PASSIVE', None]")
# Prints the environment at the first import of torch, and ends there.
FIRST_IMPORT = """
import os, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            os.write(1, repr([os.environ.get(each) for each in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")]).encode())
            os._exit(0)
sys.meta_path.insert(0, Finder())
{rest}
"""


def policy_at_import(code, tmp_path, **variables):
    environment = {"PYTHONPATH": str(ROOT), "HOME": str(tmp_path), "PATH": "/usr/bin:/bin"} | variables
    done = subprocess.run(
        [sys.executable, "-c", FIRST_IMPORT.replace("{rest}", code)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=60,
        check=False,
    )
    assert done.stdout, done.stderr
    return done.stdout.splitlines()[-1]


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_say_how_threads_wait_before_torch_is_imported(name, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "Hi"}\n')
    arguments = [each.replace("{prompts}", str(prompts)) for each in COMMANDS[name]]
    code = f"from specchat.cli.app import run_command_line\nrun_command_line({arguments!r})"
    assert policy_at_import(code, tmp_path) in PASSIVE


def test_python_interface_says_it_too(tmp_path):
    assert policy_at_import("import specchat\nspecchat.load('demo')", tmp_path) in PASSIVE


@pytest.mark.parametrize(
    ("load", "spins"), [("0.1 3.0 4.0 1/345 99\n", "2000"), ("0.1 0.1 0.1 2/345 99\n", None), ("?", None)]
)
def test_threads_spin_for_a_moment_where_nothing_else_runs(load, spins, tmp_path, monkeypatch):
    (tmp_path / "loadavg").write_text(load)
    monkeypatch.setattr(libraries, "_LOAD", tmp_path / "loadavg")
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.setenv(name, "")  # restored after the test
        monkeypatch.delenv(name)
    libraries.prepare_threads()
    assert (os.environ["OMP_WAIT_POLICY"], os.environ.get("GOMP_SPINCOUNT")) == ("PASSIVE", spins)


def test_a_policy_of_the_user_stays(tmp_path):
    found = policy_at_import("import specchat\nspecchat.load('demo')", tmp_path, OMP_WAIT_POLICY="ACTIVE")
    assert found == "['ACTIVE', None]"
