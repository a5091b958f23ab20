"""`specchat sessions`: list, search, show and remove saved chats."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from specchat.chat.transcript import as_markdown, read
from specchat.cli.actions import checked_action
from specchat.cli.ask import asker
from specchat.cli.output import print_line
from specchat.errors import UsageError
from specchat.json_lines import to_json

if TYPE_CHECKING:
    from specchat.chat.saved_chats import SavedChat

# The words that each action needs.
NEEDED = {"list": "", "search": "TEXT", "show": "ID", "rm": "ID"}
ACTIONS = tuple(NEEDED)
_VERSION = 1


@dataclass(frozen=True)
class SessionsOptions:
    """Checked options of `specchat sessions`.

    Attributes:
        action: task to do, from `ACTIONS`.
        words: IDs to show or remove, or the words to search for.
        json: whether to print one JSON object.
        yes: whether to remove without asking.
    """

    action: str = "list"
    words: tuple[str, ...] = ()
    json: bool = False
    yes: bool = False


def check(action: str | None, words: Sequence[str] | None, *, json: bool, yes: bool) -> SessionsOptions:
    """Check the arguments.

    Raises:
        UsageError: the action is unknown, or its words are missing.
    """
    return SessionsOptions(*checked_action("sessions", action, words, NEEDED), json, yes)


def manage_sessions(options: SessionsOptions) -> int:
    """Run `specchat sessions` and return the exit code."""
    from specchat.chat.saved_chats import find_chats

    match options.action:
        case "show":
            _show(options)
        case "rm":
            _remove(options)
        case _:
            text = " ".join(options.words)
            _list(find_chats(text), text, as_json=options.json)
    return 0


def _list(chats: "list[SavedChat]", text: str, *, as_json: bool) -> None:
    """Print the saved chats, or only those that contain a text."""
    from specchat.ui.console import talk
    from specchat.ui.lists_view import print_sessions

    if as_json:
        print_line(to_json({"schema_version": _VERSION, "sessions": [_object(chat) for chat in chats]}))
    elif chats:
        print_sessions(chats)
    else:
        talk().say("no saved chat contains that text" if text else "no saved chats")


def _show(options: SessionsOptions) -> None:
    from specchat.chat.saved_chats import chat_named

    for session_id in options.words:
        saved = read(chat_named(session_id))
        if options.json:
            turns = [{"question": each.question, **asdict(each.answer)} for each in saved.state.exchanges]
            head = {"id": session_id, "model": saved.opened.setup.get("model"), "system": saved.state.system}
            print_line(to_json({"schema_version": _VERSION, **head, "turns": turns}))
        else:
            print_line(as_markdown(saved.records).rstrip("\n"))


def _remove(options: SessionsOptions) -> None:
    from specchat.chat.saved_chats import chat_named
    from specchat.ui.console import talk

    paths = [chat_named(session_id) for session_id in options.words]
    what = "the saved chat " + ", ".join(options.words) if len(paths) == 1 else f"{len(paths)} saved chats"
    if not asker(yes=options.yes)(f"remove {what}?"):
        raise UsageError(f"removing {what} was not confirmed", hint="add --yes to remove without a question")
    for path in paths:
        path.unlink(missing_ok=True)
    talk().say(f"removed {what}")


def _object(chat: "SavedChat") -> dict[str, Any]:
    return {
        "id": chat.session_id,
        "title": chat.title,
        "model": chat.model,
        "turns": chat.turns,
        "changed": chat.changed.isoformat(timespec="seconds"),
        "bytes": chat.nbytes,
        "path": str(chat.path),
    }
