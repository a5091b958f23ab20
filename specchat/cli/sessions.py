"""Saved chats on the command line: which one to resume, and the settings it restores."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from specchat.chat import transcript
from specchat.chat.transcript import Saved
from specchat.cli.options import RunOptions
from specchat.cli.settings import Layer
from specchat.errors import UsageError
from specchat.records.model import ModelSource

# Settings of a session that are valid only for its own model.
_OF_THE_MODEL = ("draft", "quant", "dtype", "ctx")


def resumed(session_id: str | None, *, continues: bool) -> Saved | None:
    """Return the saved chat to resume, or None if no chat was named or the name is new.

    Raises:
        UsageError: no chat was saved yet, or two chats were named.
        SessionError: the saved chat cannot be read, or the name is that of another file.
    """
    if continues and session_id is not None:
        raise UsageError(
            "--continue and --session cannot be combined", hint="use --session ID alone to resume that chat"
        )
    if continues:
        last = transcript.last_session()
        if last is None:
            raise UsageError("there is no saved chat to resume", hint="start one with specchat run MODEL")
        return transcript.read(last)
    if session_id is None:
        return None
    path = transcript.path_of(session_id)
    if transcript.has_begun(path):
        return transcript.read(path)
    transcript.check_unused(path)
    return None


def layers(saved: Saved | None, model: str | None) -> list[Layer]:
    """Return the settings of a resumed chat as they were at its end.

    Args:
        saved: the resumed chat, or None.
        model: the MODEL argument, or None.
    """
    if saved is None:
        return []
    setup, state = saved.opened.setup, saved.state
    values: dict[str, Any] = {
        **asdict(state.sampling),
        "max_tokens": state.max_tokens,
        "system": state.system,
        "think": state.thinking,
        "stop": tuple(setup["stop"]),
        "overflow": setup["overflow"],
    }
    if model is None or lasting(model) in (setup["model"], model_of(saved)):
        values |= {"model": model_of(saved), **{key: setup[key] for key in _OF_THE_MODEL if setup[key] is not None}}
    name = f"session {saved.session_id}"
    return [Layer(values, lambda _key: name, is_parsed=True)]


def lasting(model: str) -> str:
    """Return a MODEL that is valid in every working folder, with an absolute path."""
    is_folder = model.startswith((".", "/", "~"))
    return str(Path(model).expanduser().resolve()) if is_folder else model


def model_of(saved: Saved) -> str:
    """Return the model of a chat with its exact revision, because the hub may have a newer one."""
    setup = saved.opened.setup
    name = str(setup["model"]).partition("@")[0]
    return str(setup["model"]) if setup["revision"] is None else f"{name}@{setup['revision']}"


def was_with(saved: Saved, target: ModelSource) -> bool:
    """Return whether a chat used this model in this revision."""
    setup = saved.opened.setup
    same_name = str(setup["model"]).partition("@")[0] == lasting(target.name).partition("@")[0]
    return same_name and setup["revision"] == target.revision


def path_for(options: RunOptions, *, interactive: bool) -> Path | None:
    """Return the file that the chat is saved to, or None. Single answers are saved only into a named session."""
    if not options.saves:
        return None
    if options.resume is not None:
        return options.resume.path
    if options.session_id is not None:
        return transcript.path_of(options.session_id)
    return transcript.path_of(transcript.new_id()) if interactive else None
