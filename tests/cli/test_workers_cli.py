"""`--workers` and `specchat worker`: what is refused before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from specchat.errors import UsageError, WrongTokenError
from specchat.loading.tokens import find_token, parse_workers, workers_choice


@pytest.mark.parametrize("text", ["", "host", "host:", ":7000", "host:x", "host:70000", "a:1,,b:2"])
def test_addresses_are_checked(text: str):
    with pytest.raises(UsageError, match="--workers must be HOST:PORT"):
        parse_workers("--workers", text)


def test_addresses_are_parsed_once_each():
    assert parse_workers("--workers", "a:1, [::1]:2") == (("a", 1), ("::1", 2))
    with pytest.raises(UsageError, match="names a:1 twice"):
        parse_workers("--workers", "a:1,a:1")


def test_a_token_is_needed_and_never_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("SPECCHAT_TOKEN", raising=False)
    with pytest.raises(WrongTokenError, match="workers need a token"):
        find_token(None)
    monkeypatch.setenv("SPECCHAT_TOKEN", "short")
    with pytest.raises(WrongTokenError, match="at least 16 characters"):
        find_token(None)
    file = tmp_path / "token"
    file.write_text("a token in a file, long\n")
    choice = workers_choice((("a", 1),), str(file))
    assert choice is not None and choice.token == b"a token in a file, long"
    assert "token in a file" not in repr(choice)
    assert workers_choice((), None) is None
