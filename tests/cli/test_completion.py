"""Completion in real shells, if installed, with the script that `--show-completion` prints."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CASES = [
    ("specchat ", {"run", "bench", "probe"}),
    ("specchat run d", {"demo"}),
    ("specchat run b", {"big"}),
    ("specchat run demo --sess", {"--session"}),
    ("specchat run demo --session ", {"fox", "bear"}),
    ("specchat run demo --dtype b", {"bf16"}),
    ("specchat run demo --overflow ", {"stop", "drop-oldest"}),
    ("specchat run demo --tree-budget ", {"auto"}),
    ("specchat bench demo -o j", {"json", "jsonl"}),
    ("specchat bench demo --baseline plain,a", {"plain,accelerate", "plain,assisted"}),
    (f"specchat run {ROOT}/spec", {f"{ROOT}/specchat/"}),
]
# Commands that print the completions of the command line in $1.
ASK = {
    "bash": 'COMP_WORDS=($1); [ "${1% }" = "$1" ] || COMP_WORDS+=(""); COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); '
    '_specchat_completion specchat; printf "%s\\n" "${COMPREPLY[@]}"',
    "fish": "complete -C $argv[1]",
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Return a home folder with `specchat` on the path, an alias and two sessions."""
    home = tmp_path_factory.mktemp("home")
    (home / "config" / "specchat").mkdir(parents=True)
    (home / "config" / "specchat" / "config.toml").write_text('[aliases]\nbig = "org/name"\n')
    (home / "state" / "sessions").mkdir(parents=True)
    for name in ("fox", "bear"):
        (home / "state" / "sessions" / f"{name}.jsonl").touch()
    command = home / "specchat"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m specchat "$@"\n')
    command.chmod(0o755)
    return home


def environment(home):
    return os.environ | {
        "PATH": f"{home}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "XDG_CONFIG_HOME": str(home / "config"),
        "SPECCHAT_STATE_DIR": str(home / "state"),
    }


def output(home, *command):
    done = subprocess.run(command, env=environment(home), capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stderr == ""
    return done.stdout


@pytest.mark.parametrize("shell", ["bash", "fish"])
def test_shell_completes_options_models_and_sessions(home, shell):
    if shutil.which(shell) is None:
        pytest.skip(f"there is no {shell} here")
    script = home / f"completion.{shell}"
    script.write_text(output(home, "specchat", "--show-completion", shell))
    for line, expected in CASES if shell == "bash" else CASES[::3]:  # both shells ask the same program
        out = output(home, shell, "-c", f"source {script}; {ASK[shell]}", *(["bash"] if shell == "bash" else []), line)
        offered = {each.split("\t")[0] for each in out.splitlines()}
        assert expected <= offered, line
        assert line != "specchat run d" or offered == {"demo"}


def test_zsh_script_is_valid(home):
    script = home / "completion.zsh"
    script.write_text(output(home, "specchat", "--show-completion", "zsh"))
    assert script.read_text().lstrip().startswith("#compdef specchat")
    if shutil.which("zsh"):
        output(home, "zsh", "-n", str(script))
    asked = environment(home) | {
        "_SPECCHAT_COMPLETE": "complete_zsh",
        "_TYPER_COMPLETE_ARGS": "specchat run demo --session f",
    }
    done = subprocess.run(["specchat"], env=asked, capture_output=True, text=True, check=True)
    assert '"fox"' in done.stdout


def test_completion_ignores_a_broken_config_file(home, tmp_path):
    path = tmp_path / "config.toml"
    path.write_text("nonsense")
    asked = environment(home) | {
        "_SPECCHAT_COMPLETE": "complete_bash",
        "COMP_WORDS": "specchat run d",
        "COMP_CWORD": "2",
    }
    done = subprocess.run(
        ["specchat"], env=asked | {"SPECCHAT_CONFIG": str(path)}, capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("demo\n", "")


@pytest.mark.parametrize("asked", [{"_SPECCHAT_COMPLETE": "complete_bash"}, {}], ids=["completion", "command"])
def test_ctrl_c_during_the_imports_leaves_no_traceback(tmp_path, asked):
    """Use a typer whose import takes ten minutes."""
    (tmp_path / "typer.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(600)\n")
    paths = {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    command = [sys.executable, "-m", "specchat", "run", "demo"]
    with subprocess.Popen(
        command, env=os.environ | paths | asked, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "importing\n"
        process.send_signal(signal.SIGINT)
        assert process.communicate()[1] == ""
    assert process.returncode == (-signal.SIGINT if asked else 130)
