"""The actions of `specchat models` and `specchat sessions`."""

from collections.abc import Mapping, Sequence

from specchat.errors import UsageError


def checked_action(
    command: str, action: str | None, words: Sequence[str] | None, needed: Mapping[str, str]
) -> tuple[str, tuple[str, ...]]:
    """Return an action and its words; without an action, `list`.

    Args:
        command: name of the command.
        action: first argument, or None.
        words: other arguments.
        needed: name of the words that each action needs; empty for an action without words.

    Raises:
        UsageError: the action is unknown, has words that it does not need, or lacks those that it needs.
    """
    action = action or "list"
    if action not in needed:
        raise UsageError(f"specchat {command} has no '{action}'", hint=f"choose from {', '.join(needed)}")
    if bool(words) != bool(needed[action]):
        all_of_them = ", ".join(f"{name} {what}".rstrip() for name, what in needed.items())
        raise UsageError(
            f"usage: specchat {command} {action} {needed[action]}".rstrip(), hint=f"the actions are {all_of_them}"
        )
    return action, tuple(words or ())
