"""Paths as users type them: expanded, or refused in words wherever a path may be given."""

import sys
from pathlib import Path

import pytest

from specchat.cli.options import system_prompt
from specchat.errors import ModelNotFoundError, UsageError
from specchat.models.catalog.ref import parse_model
from specchat.paths import cache_folder, state_folder, user_path

IMPOSSIBLE = ["~nosuchuser", "~nosuchuser/x", "~\0", "a\0b", "~\ud800", "./\ud800"]


def test_home_is_expanded():
    assert user_path("~/x") == Path.home() / "x"


def test_chosen_folders_need_no_platformdirs(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "platformdirs", None)  # so that importing it fails
    monkeypatch.setenv("SPECCHAT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("SPECCHAT_STATE_DIR", str(tmp_path / "state"))
    assert cache_folder() == tmp_path / "cache" and state_folder() == tmp_path / "state"


@pytest.mark.parametrize("text", IMPOSSIBLE)
def test_impossible_paths_are_refused_with_a_hint(text):
    with pytest.raises(UsageError) as caught:
        user_path(text)
    assert caught.value.hint and "\0" not in caught.value.message


@pytest.mark.parametrize("text", ["~nosuchuser", "~\0", "~\ud800"])
def test_every_place_of_a_path_refuses_them(text):
    with pytest.raises(ModelNotFoundError):
        parse_model(text)
    with pytest.raises(UsageError):
        system_prompt("--system", f"@{text}")
