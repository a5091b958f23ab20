"""Secrets in texts that are shown: access tokens, passwords in addresses, and signatures are replaced by ***."""

import os
import re

MASK = "***"

# Variables that hold a secret, whatever the secret looks like.
_SECRET_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "SPECCHAT_API_KEY", "SPECCHAT_TOKEN")
# Shorter values would be found inside ordinary words.
_FEWEST_CHARACTERS = 4

_PATTERNS = (
    # Tokens of the hub: hf_ and 34 letters and digits; other kinds have a word or dots within.
    (re.compile(r"\b(?:hf|api_org)_(?:oauth_|jwt_)?[A-Za-z0-9]{16,}[\w.-]*"), MASK),
    (re.compile(r"\b([Bb]earer|BEARER)(\s+)[\w.~+/=-]{4,}"), rf"\1\2{MASK}"),
    # User and password of an address end at its last @.
    (re.compile(r"(?<=://)[^/\s?#'\"]+@"), f"{MASK}@"),
    # Files in a content network have signed addresses, and the signature alone opens the file.
    (
        re.compile(
            r"([?&][\w-]*(?:token|signature|credential|password|secret|policy|key-pair-id|api[_-]?key)=)[^&\s'\"]+",
            re.I,
        ),
        rf"\1{MASK}",
    ),
)


def masked(text: str) -> str:
    """Return the text with all secrets replaced by `MASK`: tokens, passwords in addresses, and signatures."""
    for secret in _secrets():
        text = text.replace(secret, MASK)
    for pattern, replacement in _PATTERNS:
        text = pattern.sub(replacement, text)
    return text


def _secrets() -> list[str]:
    """Return the secrets in the environment, the longest first, because one may be a part of another."""
    values = {os.environ.get(name, "").strip() for name in _SECRET_VARIABLES}
    return sorted((value for value in values if len(value) >= _FEWEST_CHARACTERS), key=len, reverse=True)
