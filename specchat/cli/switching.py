"""`/model NAME` in a chat: the options with which another model goes on with it."""

from dataclasses import replace
from pathlib import Path

from specchat.chat import transcript
from specchat.chat.state import ChatState, ValueSet, state_of
from specchat.chat.transcript import Saved, Transcript
from specchat.cli.options import RunOptions
from specchat.loading.request import ModelRequest


def switched(options: RunOptions, model: str, chat: Transcript) -> RunOptions:
    """Return the options for another model that goes on with a chat.

    The user's choices stay; what belonged to the first model (its draft and its precision) is chosen anew.

    Args:
        options: options of the chat so far.
        model: MODEL of the other model, or its alias.
        chat: transcript of the chat so far, closed.
    """
    state = state_of(chat.records)
    changed = {record.key for record in chat.records if isinstance(record, ValueSet)}
    own = {key: getattr(state.sampling, key) for key in changed if hasattr(options.sampling, key)}
    return replace(
        options,
        models=_request(options, model),
        seed=state.sampling.seed,
        sampling=replace(options.sampling, **own),
        stops=state.stops,
        max_tokens=state.max_tokens,
        system=state.system,
        think=state.thinking,
        overflow=state.overflow,
        resume=_saved(chat, state) or options.resume,
        files=(),
    )


def _request(options: RunOptions, model: str) -> ModelRequest:
    choices = replace(options.models.choices, dtype="auto", quant="auto", draft_quant="auto", tree_budget=None)
    return replace(options.models, model=options.aliases.get(model, model), draft="auto", choices=choices)


def _saved(chat: Transcript, state: ChatState) -> Saved | None:
    """Return the chat as a saved one; None if nothing of it was written or said."""
    if chat.path is not None:
        return transcript.read(chat.path) if chat.is_on_disk else None
    return Saved(Path("unsaved"), tuple(chat.records), 0, 0) if state.exchanges else None
