"""Secrets never reach an error, a warning or a traceback."""

import io

import pytest

from specchat.errors import ModelError, UsageError
from specchat.masking import masked
from specchat.ui.console import Talk

TOKEN = "hf_" + "aB3" * 11 + "x"
SECRETS = {
    "token": (f"the token {TOKEN} is invalid", "the token *** is invalid"),
    "oauth": (f"hf_oauth_eyJ{'a' * 20}.eyJ.sig-x ends", "*** ends"),
    "organisation": (f"api_org_{'a' * 34}", "***"),
    "header": (f"{{'authorization': 'Bearer {TOKEN}'}}", "{'authorization': 'Bearer ***'}"),
    "unusual token": ("Authorization: Bearer my-own.token/1+2==", "Authorization: Bearer ***"),
    "password": ("cannot reach http://me:pa@ss@hub.local:80/a", "cannot reach http://***@hub.local:80/a"),
    "user": ("https://secret@hub/a and http://x:y@b", "https://***@hub/a and http://***@b"),
    "signature": ("GET /x?X-Amz-Signature=0aF&a=1&Policy=e30_", "GET /x?X-Amz-Signature=***&a=1&Policy=***"),
    "variable": ("the hub says: who is opensesame?", "the hub says: who is ***?"),
}
PLAIN = [
    "hf_quant_config.json, hf_transfer and hf_xet",
    "https://hub.local/org/name@main/tree?path=a@b&key=1",
    "the bearer of news",
    "mail a@b.example",
    "a long word_hf_in_a_name",
]


@pytest.fixture(autouse=True)
def _token(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", " opensesame\n")
    monkeypatch.setenv("HUGGING_FACE_HUB_TOKEN", "e")


@pytest.mark.parametrize("name", SECRETS)
def test_secrets_are_masked(name):
    text, shown = SECRETS[name]
    assert masked(text) == masked(shown) == shown


@pytest.mark.parametrize("text", PLAIN)
def test_plain_text_stays(text):
    assert masked(text) == text


def test_errors_are_masked():
    error = ModelError(f"cannot reach http://u:p@hub: {TOKEN}", hint="opensesame")
    assert str(error) == error.message == "cannot reach http://***@hub: ***"
    assert error.hint == "***" and UsageError("x").hint is None


def test_warnings_are_masked():
    stream = io.StringIO()
    Talk(stream).warn(f"a request failed: HTTPError: 403 for http://u:p@hub/?token={TOKEN}")
    assert stream.getvalue() == "warning: a request failed: HTTPError: 403 for http://***@hub/?token=***\n"
