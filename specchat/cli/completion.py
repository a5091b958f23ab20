"""Shell completion: fast, and silent about errors."""

import os
from collections.abc import Callable
from pathlib import Path

# Typer's own completion options guess the shell and write to its start-up files. So specchat calls the private
# functions that these options use.
from typer._completion_classes import completion_init
from typer._completion_shared import get_completion_script

from specchat.chat import transcript
from specchat.errors import SpecchatError, UsageError

SHELLS = ("bash", "zsh", "fish")
# Set by the shell when specchat must complete a command line, not run it.
_VARIABLE = "_SPECCHAT_COMPLETE"
_PATH_STARTS = ("./", "../", "/", "~")


def prepare() -> None:
    """Let typer answer a shell that asks for completions."""
    if _VARIABLE in os.environ:
        completion_init()


def script(shell: str) -> str:
    """Return the completion script for a shell.

    Raises:
        UsageError: no script exists for this shell.
    """
    if shell not in SHELLS:
        raise UsageError(f"--show-completion must be {', '.join(SHELLS[:-1])} or {SHELLS[-1]}, not '{shell}'")
    return get_completion_script(prog_name="specchat", complete_var=_VARIABLE, shell=shell)


def models(incomplete: str) -> list[str]:
    """Complete MODEL: the demo, aliases, cached models, or folders if the text looks like a path."""
    if incomplete.startswith(_PATH_STARTS):
        return _folders(incomplete)
    return _matching(["demo", *_aliases(), *_cached()], incomplete)


def drafts(incomplete: str) -> list[str]:
    """Complete --draft."""
    return _matching(["auto", "retrieval", "mtp", "self", "none"], incomplete) + models(incomplete)


def sessions(incomplete: str) -> list[str]:
    """Complete the IDs of saved chats, the newest first."""
    return _matching([path.stem for path in transcript.all_sessions()], incomplete)


def installed(incomplete: str) -> list[str]:
    """Complete the models and packs on this disk."""
    from specchat.models.packs.installed import find_installed

    return _matching(sorted({each.name for each in find_installed()}), incomplete)


def words(*known: str) -> Callable[[str], list[str]]:
    """Return a completer for a fixed list of words."""

    def complete(incomplete: str) -> list[str]:
        return _matching([*known], incomplete)

    return complete


def lists(*known: str) -> Callable[[str], list[str]]:
    """Return a completer for lists of these words, separated by commas."""

    def complete(incomplete: str) -> list[str]:
        before, comma, last = incomplete.rpartition(",")
        rest = [word for word in known if word not in before.split(",")]
        return [f"{before}{comma}{word}" for word in _matching(rest, last)]

    return complete


def _matching(candidates: list[str], incomplete: str) -> list[str]:
    return [candidate for candidate in candidates if candidate.startswith(incomplete)]


def _aliases() -> list[str]:
    from specchat.cli.settings import config_file

    try:
        return list(config_file(None)[1])
    except SpecchatError:  # reported when a command runs
        return []


def _cached() -> list[str]:
    from specchat.loading.locate import names_here

    return names_here()


def _folders(incomplete: str) -> list[str]:
    parent, _, name = incomplete.rpartition("/")
    try:
        found = sorted(path.name for path in Path(f"{parent}/").expanduser().iterdir() if path.is_dir())
    except (OSError, RuntimeError):
        return []
    return [f"{parent}/{each}/" for each in found if each.startswith(name)]
