"""OpenMP reads how its threads wait when torch is imported, so every command must have said it by then."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMANDS = {
    "run": ["run", "demo", "Hi", "--no-save"],
    "prompts": ["run", "demo", "--prompts", "{prompts}", "-o", "{prompts}.out"],
    "serve": ["serve", "demo", "--port", "0"],
    "probe": ["probe"],
    "bench": ["bench", "demo", "--baseline", "none", "--limit", "1"],
    "bench of batches": ["bench", "demo", "--batch", "1,2"],
}
# Prints the environment at the first import of torch, and ends there.
FIRST_IMPORT = """
import os, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            os.write(1, os.environ.get("OMP_WAIT_POLICY", "none").encode())
            os._exit(0)
sys.meta_path.insert(0, Finder())
{rest}
"""


def policy_at_import(code, tmp_path):
    environment = {"PYTHONPATH": str(ROOT), "HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
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
    assert policy_at_import(code, tmp_path) == "PASSIVE"


def test_python_interface_says_it_too(tmp_path):
    assert policy_at_import("import specchat\nspecchat.load('demo')", tmp_path) == "PASSIVE"
