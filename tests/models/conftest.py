"""Fixtures for whatever asks the hub."""

import threading
from http.server import ThreadingHTTPServer

import pytest
from huggingface_hub.utils import close_session
from support.fake_hub import FakeHub, Handler, point_to


@pytest.fixture
def server():
    hub = FakeHub()
    handler = type("BoundHandler", (Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        httpd.daemon_threads = True
        hub.url = f"http://127.0.0.1:{httpd.server_address[1]}"
        thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        yield hub
        httpd.shutdown()


@pytest.fixture
def hub(server, tmp_path, monkeypatch):
    point_to(monkeypatch, server.url, tmp_path / "hub")
    yield server
    close_session()
