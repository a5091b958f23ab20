"""What people type after /set, here and in similar tools."""

from __future__ import annotations

from specchat.chat.settings import SETTABLE
from specchat.errors import UsageError

# ollama's names of our settings.
_RENAMED = {"num_predict": "max_tokens", "repeat_penalty": "repetition_penalty"}
# ollama's words without a value.
_WORDS = {"think": ("think", "on"), "nothink": ("think", "off")}
# Words of ollama that something else does here.
_ELSEWHERE = {
    **dict.fromkeys(("verbose", "quiet"), "/verbose shows or hides the figures of each pass"),
    **dict.fromkeys(("history", "nohistory"), "start with --no-save to save nothing"),
    **dict.fromkeys(("wordwrap", "nowordwrap", "format", "noformat"), "start with --raw or --json for other output"),
}
# Options that are fixed when the model is loaded, under our names and others', and their flags.
_FIXED = {
    **{name: name for name in ("ctx", "device", "draft", "dtype", "quant", "ram", "tree_budget", "vram")},
    "num_ctx": "ctx",
    "num_gpu": "vram",
    "context": "ctx",
}


def parse_assignment(text: str) -> tuple[str, str]:
    """Return the key and the value in `KEY=VALUE`, `KEY VALUE` or `parameter KEY VALUE`.

    Args:
        text: text after /set.

    Raises:
        UsageError: the value is missing, or the setting cannot be changed in a chat.
    """
    words = text.split(maxsplit=1)
    if words[0] == "parameter":
        text = words[1] if len(words) > 1 else ""
    key, value = _split(text)
    name = key.lower().replace("-", "_")
    if not value and name in _WORDS:
        return _WORDS[name]
    if name in _ELSEWHERE:
        raise UsageError(f"'{key}' is not set with /set", hint=_ELSEWHERE[name])
    if name in _FIXED:
        flag = _FIXED[name].replace("_", "-")
        raise UsageError(f"'{key}' is fixed when the model is loaded", hint=f"start the chat again with --{flag}")
    if not value:
        raise UsageError("usage: /set KEY=VALUE", hint=f"the keys are {', '.join(SETTABLE)}")
    return _RENAMED.get(name, key), value


def _split(text: str) -> tuple[str, str]:
    """Split at the first blank or equals sign, whichever comes first; blanks may surround the sign."""
    head, _, tail = text.strip().partition(" ")
    if "=" in head:
        head, _, rest = text.strip().partition("=")
        return head, rest.strip()
    tail = tail.strip()
    return head, (tail[1:].strip() if tail.startswith("=") else tail)
