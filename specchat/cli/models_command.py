"""`specchat models`: list and remove what models take on this disk."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from specchat.cli.actions import checked_action
from specchat.cli.ask import asker
from specchat.cli.output import print_line
from specchat.errors import UsageError
from specchat.files import local_time
from specchat.json_lines import to_json
from specchat.models.catalog.ref import DEMO
from specchat.units import format_bytes

if TYPE_CHECKING:
    from specchat.models.packs.installed import Installed

# The words that each action needs.
NEEDED = {"list": "", "rm": "NAME"}
ACTIONS = tuple(NEEDED)
_VERSION = 1


@dataclass(frozen=True)
class ModelsOptions:
    """Checked options of `specchat models`.

    Attributes:
        action: task to do, from `ACTIONS`.
        names: models or packs to remove.
        json: whether to print one JSON object.
        yes: whether to remove without asking.
    """

    action: str = "list"
    names: tuple[str, ...] = ()
    json: bool = False
    yes: bool = False


def check(action: str | None, names: Sequence[str] | None, *, json: bool, yes: bool) -> ModelsOptions:
    """Check the arguments.

    Raises:
        UsageError: the action is unknown, or its names are missing.
    """
    return ModelsOptions(*checked_action("models", action, names, NEEDED), json, yes)


def manage_models(options: ModelsOptions) -> int:
    """Run `specchat models` and return the exit code."""
    from specchat.models.packs.installed import find_installed
    from specchat.ui.console import talk
    from specchat.ui.lists_view import print_models

    if options.action == "rm":
        _remove(options)
        return 0
    found = find_installed()
    if options.json:
        print_line(to_json({"schema_version": _VERSION, "models": [_object(each) for each in found]}))
    elif found:
        print_models(found)
    else:
        talk().say("no models on this disk; demo is always there, and specchat probe names models that run here")
    return 0


def _remove(options: ModelsOptions) -> None:
    from specchat.models.packs.installed import installed_named, remove_installed
    from specchat.ui.console import talk

    if DEMO in options.names:
        raise UsageError(f"{DEMO} is a part of specchat and cannot be removed", hint="leave it out")
    entries = list(dict.fromkeys(each for name in options.names for each in installed_named(name)))
    what = ", ".join(f"the {each.kind} {each.name} ({format_bytes(each.nbytes)})" for each in entries)
    if not asker(yes=options.yes)(f"remove {what}?"):
        raise UsageError(f"removing {what} was not confirmed", hint="add --yes to remove without a question")
    remove_installed(entries)
    talk().say(f"removed {what}")


def _object(each: "Installed") -> dict[str, Any]:
    used = None if each.used_at is None else local_time(each.used_at)
    return {
        "name": each.name,
        "kind": each.kind,
        "origin": each.origin,
        "bytes": each.nbytes,
        "used": None if used is None else used.isoformat(timespec="seconds"),
        "path": str(each.path),
        "note": each.note or None,
    }
