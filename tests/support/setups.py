"""Setups of saved chats."""

from __future__ import annotations

from typing import Any


def setup(**changes: Any) -> dict[str, Any]:
    """What a chat was opened with, as `specchat run` records it."""
    usual = {
        "model": "demo",
        "revision": None,
        "draft": "auto",
        "quant": "none",
        "dtype": "fp32",
        "device": "cpu",
        "ctx": None,
        "stop": [],
        "overflow": "stop",
        "base": False,
    }
    return {**usual, **changes}
