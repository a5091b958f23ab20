"""Fixtures for tests that use the hub."""

import pytest
from huggingface_hub.utils import close_session
from support.fake_hub import point_to, serving


@pytest.fixture
def server():
    with serving() as hub:
        yield hub


@pytest.fixture
def hub(server, tmp_path, monkeypatch):
    point_to(monkeypatch, server.url, tmp_path / "hub")
    yield server
    close_session()
