"""Which saved chat goes on, and what it brings along."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from specchat.chat import transcript
from specchat.chat.transcript import Saved
from specchat.cli.options import RunOptions
from specchat.cli.settings import Layer
from specchat.errors import UsageError
from specchat.records.model import ModelSource

# What a session says of its model; with another model it would mean something else.
_OF_THE_MODEL = ("draft", "quant", "dtype", "ctx")


def resumed(session_id: str | None, *, continues: bool) -> Saved | None:
    """The saved chat that was asked for; None if none was, or if there is none of that name yet.

    Raises:
        UsageError: there is nothing to go on with, or two chats were asked for.
        SessionError: it cannot be read.
    """
    if continues and session_id is not None:
        raise UsageError("--continue and --session cannot be combined", hint="--session ID goes on with that chat")
    if continues:
        last = transcript.last_session()
        if last is None:
            raise UsageError("there is no saved chat to go on with", hint="specchat run MODEL begins one")
        return transcript.read(last)
    if session_id is None:
        return None
    path = transcript.path_of(session_id)
    return transcript.read(path) if transcript.has_begun(path) else None


def layers(saved: Saved | None, model: str | None) -> list[Layer]:
    """The settings of a chat that goes on, as they were when it was left.

    Args:
        saved: the chat.
        model: as given on the command line.
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
    """A MODEL that means the same in every folder."""
    is_folder = model.startswith((".", "/", "~"))
    return str(Path(model).expanduser().resolve()) if is_folder else model


def model_of(saved: Saved) -> str:
    """The model that a chat was with last, and its revision, for the hub may have another one by now."""
    setup = saved.opened.setup
    name = str(setup["model"]).partition("@")[0]
    return str(setup["model"]) if setup["revision"] is None else f"{name}@{setup['revision']}"


def was_with(saved: Saved, target: ModelSource) -> bool:
    """Whether a chat was with this very model."""
    setup = saved.opened.setup
    same_name = str(setup["model"]).partition("@")[0] == lasting(target.name).partition("@")[0]
    return same_name and setup["revision"] == target.revision


def path_for(options: RunOptions, *, interactive: bool) -> Path | None:
    """The file that the chat is appended to, or None. Single answers are kept only where that was asked for."""
    if not options.saves:
        return None
    if options.resume is not None:
        return options.resume.path
    if options.session_id is not None:
        return transcript.path_of(options.session_id)
    return transcript.path_of(transcript.new_id()) if interactive else None
