"""A fault and what is promised for it, and the folders in which faults are made."""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import specchat
from support.fake_hub import FakeHub, serving
from support.faults.server import Ended, Server

DEMO = Path(specchat.__file__).parent / "demo" / "draft"
_PLAN = ("--device", "cpu", "--vram", "1GiB", "--ctx", "128", "--draft", "none", "--dtype", "fp32")
ASK = ("run", "{model}", "Tell me", *_PLAN, "--max-tokens", "2", "--temperature", "0", "--no-save", "-q")
REFUSED = (2, 3, 4)
ANY = (0, *REFUSED)  # answered all the same, or refused in words

# Escapes, C1 controls, DEL and what reorders text; a report on a terminal must hold none of them.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
# What Rust itself says of a panic that becomes an error.
_PANIC = re.compile(
    r"^(thread .* panicked at .*:\n.*|note: .*RUST_BACKTRACE.*|stack backtrace:|\s+\d+: .*|\s+at .*)\n", re.M
)
_MOST_LINES = 3
_OUTPUTS = ("stdout", "stderr")

Make = Callable[[Path], None]


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        name: group and fault, with a colon between.
        arguments: command line; {model} is the model's folder.
        make: makes the fault in the run's folder, which has the demo's draft as `model`.
        codes: promised exit codes.
        words: text that the report must contain.
        order: further fields of the server's order.
        writes: files and folders that the run may change.
        prints: whether a refused run may print on stdout.
        is_quick: whether the fault belongs to the default suite.
        hub: makes the hub's faults, for models that must be downloaded; the demo is published as org/fox.
    """

    name: str
    arguments: tuple[str, ...] = ASK
    make: Make = lambda _: None
    codes: tuple[int, ...] = REFUSED
    words: str = ""
    order: Mapping[str, Any] = field(default_factory=dict)
    writes: tuple[str, ...] = ()
    prints: bool = False
    is_quick: bool = False
    hub: Callable[[FakeHub], None] | None = None

    def broken_promises(self, server: Server, folder: Path) -> list[str]:
        """Make the fault in an empty folder, run the command line, and return what was not as promised."""
        if self.hub is None:
            return self._broken_promises(server, folder, {})
        with serving() as hub:
            hub.publish("org/fox", {path.name: path.read_bytes() for path in DEMO.iterdir()})
            self.hub(hub)
            env = {"HF_ENDPOINT": hub.url, "NO_PROXY": "127.0.0.1,localhost", "HF_HUB_DOWNLOAD_TIMEOUT": "2"}
            return self._broken_promises(server, folder, env)

    def _broken_promises(self, server: Server, folder: Path, hub: Mapping[str, str]) -> list[str]:
        make_model(folder)
        self.make(folder)
        before = dict(contents(folder, self.writes))
        env = {
            # The cache is shared, because it keeps what was found out about a config for seconds.
            **{"SPECCHAT_STATE_DIR": f"{folder}/state", "SPECCHAT_CACHE_DIR": f"{folder.parent}/cache"},
            **{"XDG_CONFIG_HOME": f"{folder}/config", "HF_HUB_CACHE": f"{folder}/hub", "SPECCHAT_DEBUG": None},
            **hub,
            **self.order.get("env", {}),
        }
        arguments = [each.replace("{model}", str(folder / "model")) for each in self.arguments]
        ended = server.run(folder, arguments, **{**self.order, "env": env})
        after = dict(contents(folder, self.writes))
        changed = [name for name in before if after.get(name) != before[name]]
        added = [name for name in after if name not in before]
        broken = [f"changes {name}" for name in changed] + [f"writes {name}" for name in added]
        return broken + list(self._broken_by(ended))

    def _broken_by(self, ended: Ended) -> Iterator[str]:
        err = _PANIC.sub("", ended.err.decode(errors="replace"))
        if ended.code is None:
            yield f"hangs; stderr: {err[-3000:]}"
            return
        if ended.code not in self.codes:
            yield f"ends with {ended.code}, not {self.codes}"
        for word in ("Traceback", "internal error"):
            if word in err:
                yield f"says {word}: {err[-3000:]}"
        if _CONTROLS.search(err):
            yield "writes controls"
        if " ".join(self.words.split()) not in " ".join(err.split()):
            yield f"does not say {self.words!r}"
        lines = [line for line in err.splitlines() if line.strip() and not line.startswith("warning: ")]
        if ended.code not in (0, 130):
            if not any(line.startswith("error: ") for line in lines):
                yield "names no error"
            if len(lines) > _MOST_LINES:
                yield f"says {len(lines)} lines"
            if ended.out and not self.prints:
                yield "prints on stdout"
        if max(map(len, lines), default=0) > 1200:
            yield "says a line of more than 1,200 characters"


def make_model(folder: Path) -> None:
    """Make a model of links to the demo's files."""
    (folder / "model").mkdir(parents=True)
    for file in DEMO.iterdir():
        (folder / "model" / file.name).symlink_to(file)


def contents(folder: Path, writes: tuple[str, ...]) -> Iterator[tuple[str, object]]:
    """Yield the name of each file below a folder, and what it is; cache, state and `writes` are left out."""
    left_out = {"cache", *_OUTPUTS, *writes}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if name in left_out or any(name.startswith(f"{each}/") for each in left_out):
            continue
        status = path.lstat()
        digest = hashlib.sha1(path.read_bytes()).hexdigest() if stat.S_ISREG(status.st_mode) else ""
        link = str(path.readlink()) if path.is_symlink() else ""
        yield name, (stat.S_IFMT(status.st_mode), digest, link)


# --- makers ------------------------------------------------------------------------------------------------------


def put(name: str, content: bytes | str) -> Make:
    """Return a maker that writes a file in place of what is there."""

    def make(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.write_bytes(content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content)

    return make


def put_json(name: str, values: object) -> Make:
    return put(name, json.dumps(values))


def change(name: str, without: tuple[str, ...] = (), **values: Any) -> Make:
    """Return a maker that changes values of one of the model's JSON files."""

    def make(folder: Path) -> None:
        before = json.loads((DEMO / name).read_text()) if (DEMO / name).exists() else {}
        kept = {key: value for key, value in before.items() if key not in without}
        put_json(f"model/{name}", kept | values)(folder)

    return make


def special(name: str, kind: str) -> Make:
    """Return a maker of what is no regular file: one of `KINDS`, or "missing". The device never ends."""

    def make(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        match kind:
            case "fifo":
                os.mkfifo(path)
            case "device":
                path.symlink_to("/dev/zero")
            case "folder":
                path.mkdir()
            case "dangling":
                path.symlink_to(folder / "nowhere")
            case "loop":
                path.symlink_to(path)
            case _:
                assert kind == "missing"

    return make


def all_of(*makes: Make) -> Make:
    def make(folder: Path) -> None:
        for each in makes:
            each(folder)

    return make


KINDS = ("fifo", "device", "folder", "dangling", "loop")
NESTED = "[" * 100_000 + "]" * 100_000
