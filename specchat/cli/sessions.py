"""Saved chats on the command line: which one to resume, and the settings it restores."""

import difflib
from collections.abc import Container
from dataclasses import asdict
from pathlib import Path
from typing import Any

from specchat.chat import transcript
from specchat.chat.transcript import Saved
from specchat.cli.options import RunOptions
from specchat.cli.settings import Layer
from specchat.errors import ModelNotFoundError, SpecchatError, UsageError
from specchat.models.catalog.ref import parse_model
from specchat.models.catalog.suggest import looks_like_prompt
from specchat.records.model import ModelSource

# Settings of a session that are valid only for its own model.
_OF_THE_MODEL = ("draft", "quant", "dtype", "ctx")
_MOST_SHOWN = 3


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
            raise UsageError(
                "there is no saved chat to resume",
                hint="start one with specchat run MODEL; an answer to a PROMPT is saved only with --session NAME",
            )
        return transcript.read(last)
    if session_id is None:
        return None
    path = transcript.path_of(session_id)
    if transcript.has_begun(path):
        return transcript.read(path)
    transcript.check_unused(path)
    return None


def arguments(
    model: str | None, prompt: str | None, resumed: Saved | None, aliases: Container[str]
) -> tuple[str | None, str | None]:
    """Return MODEL and PROMPT; a lone argument beside a resumed chat is its PROMPT, unless it has the form of a model.

    Args:
        model: first argument, or None.
        prompt: second argument, or None.
        resumed: the chat to resume, or None.
        aliases: names that the user gave to models.
    """
    is_alone = resumed is not None and model is not None and prompt is None
    if not is_alone or model in aliases or (model is not None and _may_be_model(model)):
        return model, prompt
    return None, model


def _may_be_model(text: str) -> bool:
    """Return whether a text has the form of a model, or is a short name such as llama3.2 that stands for one."""
    try:
        parse_model(text)
    except ModelNotFoundError:
        return not looks_like_prompt(text) and any(character.isdigit() or character in "/:" for character in text)
    except SpecchatError:  # a shape or a path with a fault in it is meant as a model
        return True
    return True


def check_new(session_id: str | None, resumed: Saved | None, model: str | None) -> None:
    """Refuse to begin a chat under a new name without a model: the name is probably misspelt.

    Args:
        session_id: name of the chat, or None.
        resumed: the saved chat of this name, or None.
        model: MODEL from the arguments or the settings, or None.

    Raises:
        UsageError: the name is new, and no model is given.
    """
    if session_id is not None and resumed is None and model is None:
        raise UsageError(f"there is no saved chat '{session_id}'", hint=_hint(session_id))


def new_chat_note(session_id: str) -> str:
    """Return the note about a chat that begins under a name, with the saved chat that may have been meant."""
    others = [name for name in _names() if name != session_id]  # its own file may exist, with nothing in it
    close = difflib.get_close_matches(session_id, others, n=1)
    return f"session {session_id}: a new chat" + (f" (did you mean {close[0]}?)" if close else "")


def resume_command(session_id: str) -> str:
    """Return the command that resumes a chat: the short one if the chat is the last one."""
    last = transcript.last_session()
    is_last = last is not None and last.stem == session_id
    return f"specchat run {'-c' if is_last else f'--session {session_id}'}"


def _hint(session_id: str) -> str:
    names = _names()
    close = difflib.get_close_matches(session_id, names, n=1)
    if close:
        return f"did you mean {close[0]}?"
    if not names:
        return "start one with specchat run MODEL"
    more = f" and {len(names) - _MOST_SHOWN} more" if len(names) > _MOST_SHOWN else ""
    return f"the last ones are {', '.join(names[:_MOST_SHOWN])}{more}; to begin a new chat, name a MODEL"


def _names() -> list[str]:
    return [path.stem for path in transcript.all_sessions()]


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
        "stop": state.stops,
        "overflow": state.overflow,
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
