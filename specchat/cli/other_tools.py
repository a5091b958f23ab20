"""Answers to the commands of similar tools, in a command's place and in a model's."""

import shlex
from collections.abc import Container

from specchat.errors import UsageError
from specchat.models.catalog.suggest import looks_like_prompt

COMMANDS = ("run", "bench", "probe", "serve", "worker", "models", "sessions")

# Commands of similar tools, and what does the same here.
_ELSEWHERE = {
    **dict.fromkeys(("list", "ls", "ps"), "`specchat models` lists the models on this disk"),
    **dict.fromkeys(("pull", "download", "get"), "`specchat run MODEL` downloads a missing model after asking"),
    **dict.fromkeys(("rm", "remove", "delete"), "`specchat models rm NAME` removes a model"),
    **dict.fromkeys(("logs", "history", "chats"), "`specchat sessions` lists the saved chats"),
    **dict.fromkeys(("show", "info"), "`specchat probe MODEL` shows the plan and the speed of a model"),
    **dict.fromkeys(("chat", "generate", "start"), "`specchat run MODEL` starts a chat"),
    **dict.fromkeys(("server", "api", "listen"), "`specchat serve MODEL` is a server that speaks OpenAI's API"),
    "help": "`specchat --help` lists the commands",
    "version": "`specchat --version` prints the version",
}


def hint_for_command(word: str) -> str | None:
    """Return the hint for a model, a prompt or another tool's command in a command's place; None for other words."""
    if word == "demo" or "/" in word:
        return f"did you mean specchat run {shlex.quote(word)}?"
    return "usage: specchat run MODEL [PROMPT]" if looks_like_prompt(word) else _ELSEWHERE.get(word)


def refuse_command(model: str | None, aliases: Container[str]) -> None:
    """Refuse a command in the place of MODEL, such as `list`, and name the command that does the same.

    Args:
        model: MODEL argument, or None.
        aliases: names that the user gave to models.

    Raises:
        UsageError: the argument is a command, and no model has its name.
    """
    if model is None or model in aliases:
        return
    hint = f"did you mean specchat {model}?" if model in COMMANDS else _ELSEWHERE.get(model)
    if hint is None:
        return
    from specchat.models.hub.stores import listed_name

    if listed_name(model) is None:
        raise UsageError(f"'{model}' is a command, not a model", hint=hint)
