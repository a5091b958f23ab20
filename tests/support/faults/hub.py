"""Faults of a hub's answers: statuses, contents, sizes, names, and transfers that end early."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from support.fake_hub import FakeHub
from support.faults.fault import ASK, NESTED, Fault

_ASK = tuple("org/fox" if each == "{model}" else each for each in ASK)
_HUGE = 1 << 80
_WRITES = {"writes": ("hub",)}


def faults() -> Iterator[Fault]:
    for name, make in _makers().items():
        yield Fault(f"hub: {name}", (*_ASK, "--yes"), codes=(3,), hub=make, **_WRITES)
    yield Fault("hub: as it should be", (*_ASK, "--yes"), codes=(0,), hub=lambda _: None, **_WRITES)
    clock = {"order": {"clock_step_s": -86_400.0}}
    yield Fault("hub: clock that jumps back", (*_ASK, "--yes"), codes=(0,), hub=lambda _: None, **clock, **_WRITES)
    yield Fault("hub: a file that nobody needs is cut", (*_ASK, "--yes"), codes=(0, 3), hub=_cut("README"), **_WRITES)


def _makers() -> dict[str, Callable[[FakeHub], None]]:
    makers: dict[str, Callable[[FakeHub], None]] = {
        f"status {status}": partial(_set, status=status)
        for status in (400, 401, 403, 404, 410, 418, 429, 500, 502, 503)
    }
    bodies = {
        "empty": b"",
        "text": b"<html>Please sign in to the network</html>",
        "not UTF-8": b"\xff\xfe\x00",
        "NUL": bytes(64),
        "list": b"[]",
        "number": b"3",
        "null": b"null",
        "nested": NESTED.encode(),
        "cut": b'{"id": "org/fox", "sha"',
    }
    makers |= {f"body {name}": partial(_set, body=body) for name, body in bodies.items()}
    listings: dict[str, Any] = {
        "without a commit": {"id": "org/fox", "siblings": [{"rfilename": "config.json"}]},
        "commit number": {"id": "org/fox", "sha": _HUGE, "siblings": []},
        "commit of another place": {"id": "org/fox", "sha": "../../../up", "siblings": [{"rfilename": "config.json"}]},
        "no files": {"id": "org/fox", "sha": "0" * 40, "siblings": []},
        "files text": {"id": "org/fox", "sha": "0" * 40, "siblings": "config.json"},
        "file number": {"id": "org/fox", "sha": "0" * 40, "siblings": [{"rfilename": 3}]},
        "only pickles": {"id": "org/fox", "sha": "0" * 40, "siblings": [{"rfilename": "pytorch_model.bin"}]},
        "escape": {"id": "org/fox", "sha": "0" * 40, "siblings": [{"rfilename": "\x1b[31m\u202e.safetensors"}]},
        "parent": {"id": "org/fox", "sha": "0" * 40, "siblings": [{"rfilename": "../config.json"}]},
        "absolute": {"id": "org/fox", "sha": "0" * 40, "siblings": [{"rfilename": "/etc/passwd.safetensors"}]},
        "many": {"id": "org/fox", "sha": "0" * 40, "siblings": [{"rfilename": f"{n}.json"} for n in range(20_000)]},
    }
    for name, listing in listings.items():
        makers[f"listing {name}"] = partial(_answer, "/api/models", 200, json.dumps(listing).encode())
    files = {"config": "config.json", "tokenizer": "tokenizer.json", "weights": "model.safetensors"}
    for what, name in files.items():
        makers[f"{what} cut"] = _cut("/cdn/" if what == "weights" else name)
        makers[f"{what} missing"] = partial(_answer, "/resolve/", 404, b"") if what == "weights" else _without(name)
        makers[f"{what} of another kind"] = partial(_publish, name, b"\x80\x02}q.")
        makers[f"{what} empty"] = partial(_publish, name, b"")
    makers["redirects for ever"] = partial(_answer, "/resolve/", 302, b"", Location="/org/fox/resolve/main/config.json")
    makers["redirect to a file"] = partial(_answer, "/resolve/", 302, b"", Location="file:///etc/passwd")
    makers["redirect to nowhere"] = partial(_answer, "/cdn/", 302, b"", Location="http://127.0.0.1:9/x")
    return makers


def _set(hub: FakeHub, **values: Any) -> None:
    for name, value in values.items():
        setattr(hub, name, value)


def _answer(part: str, status: int, body: bytes, hub: FakeHub, **headers: str) -> None:
    hub.answers[part] = (status, body, headers)


def _cut(part: str) -> Callable[[FakeHub], None]:
    return partial(_set, cuts=part)


def _without(name: str) -> Callable[[FakeHub], None]:
    def make(hub: FakeHub) -> None:
        (files,) = hub.repos["org/fox"].values()
        hub.publish("org/fox", {each: content for each, content in files.items() if each != name})

    return make


def _publish(name: str, content: bytes, hub: FakeHub) -> None:
    (files,) = hub.repos["org/fox"].values()
    hub.publish("org/fox", files | {name: content})
