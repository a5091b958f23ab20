"""Faults of arguments, streams, memory and disks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from support.faults.fault import ANY, ASK, Fault, all_of, put, put_json

_SIZES = (
    *("", "0", "-1GiB", "1e400GiB", "9" * 40 + "GiB", "nanGiB", "infGiB", "1GiBGiB", "GiB", "8 elephants", "\udcff"),
    *("\u0661GiB", "1_0GiB", "0x10GiB", "1,5GiB", "\x1b[31m1GiB", "9" * 5000),
)
_NUMBERS = ("", "-1", "1e3", "9" * 40, "9" * 5000, "\u0663", "nan", "inf", "x", "1_0", "\udcff", "+5", "0x5")


def faults() -> Iterator[Fault]:
    yield from _sizes()
    yield from _arguments()
    yield from _environment()
    yield from _streams()
    yield from _disks()


def _name(text: str) -> str:
    return ascii(text[:12])


def _sizes() -> Iterator[Fault]:
    for text in _SIZES:
        for option in ("--vram", "--ram"):
            arguments = ("run", "demo", "Hi", f"{option}={text}", "--no-save")
            codes = (2,)
            yield Fault(f"size: {option} {_name(text)}{len(text)}", arguments, codes=codes, is_quick=option == "--vram")
    for option in ("--ctx", "--max-tokens", "--seed", "--tree-budget", "--top-k", "--temperature", "--top-p"):
        for text in _NUMBERS:
            fine = {("--temperature", "1e3"), ("--seed", "+5"), ("--max-tokens", "+5")}
            if (option, text) in fine:
                continue
            arguments = (
                "run",
                "demo",
                "Hi",
                f"{option}={text}",
                "--max-tokens=2",
                "--no-save",
                "-q",
                "--device",
                "cpu",
            )
            if option == "--max-tokens":
                arguments = ("run", "demo", "Hi", f"{option}={text}", "--no-save", "-q", "--device", "cpu")
            yield Fault(f"number: {option} {_name(text)}{len(text)}", arguments, codes=ANY)


_LATE = ("prompt", "draft", "tokenizer")


def _arguments() -> Iterator[Fault]:
    bad = "caf\udce9\udcff"
    rows: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {
        "prompt": (("run", "demo", bad, "--no-save"), (2,)),
        "model": (("run", f"./{bad}", "Hi", "--no-save"), (2, 3)),
        "hub model": (("run", f"org/{bad}", "Hi", "--no-save"), (2, 3)),
        "short model": (("run", bad, "Hi", "--no-save"), (2, 3)),
        "draft": (("run", "demo", "Hi", "--draft", bad, "--no-save"), (2, 3)),
        "system": (("run", "demo", "Hi", "--system", bad, *ASK[3:]), (2,)),
        "stop": (("run", "demo", "Hi", "--stop", bad, *ASK[3:]), (2,)),
        "file": (("run", "demo", "Hi", "--file", bad, "--no-save"), (2,)),
        "config": (("run", "demo", "Hi", "--config", bad), (2,)),
        "device": (("run", "demo", "Hi", "--device", bad), (2,)),
        "option": (("run", "demo", "Hi", f"--{bad}"), (2,)),
        "command": ((bad,), (2,)),
        "sessions": (("sessions", "show", bad), (2,)),
        "models": (("models", "rm", bad, "--yes"), (2, 3)),
        "tokenizer": (("run", "demo", "Hi", "--tokenizer", bad, "--no-save"), (2, 3)),
        "home": (("run", "~nosuchuser/model", "Hi", "--no-save"), (2, 3)),
        "escape": (("run", "\x1b[31m\u202e", "Hi", "--no-save"), (2, 3)),
        "long": (("run", "org/" + "x" * 5000, "Hi", "--no-save"), (2, 3)),
        "long path": (("run", "./" + "x" * 5000, "Hi", "--no-save"), (2, 3)),
        "shape": (("run", "shape:hidden=" + "9" * 40 + ",layers=3", "Hi", "--no-save"), (2, 4)),
        "shape layers": (("run", "shape:hidden=64,layers=" + "9" * 20, "Hi", "--no-save"), (2, 4)),
        "empty model": (("run", "", "Hi"), (2, 3)),
        "empty prompt": (("run", "demo", " \n"), (2,)),
    }
    for name, (arguments, codes) in rows.items():
        yield Fault(f"argument: {name}", arguments, codes=codes, is_quick=name not in _LATE)


def _environment() -> Iterator[Fault]:
    values = {
        **{"SPECCHAT_VRAM": "x", "SPECCHAT_COLOUR": "red", "SPECCHAT_CTX": "9" * 5000, "SPECCHAT_CONFIG": "\udcff"},
        **{"SPECCHAT_TEMPERATURE": "nan", "SPECCHAT_SAVE": "perhaps", "SPECCHAT_DEVICE": "\x1b[31m"},
    }
    for name, value in values.items():
        order = {"env": {name: value}}
        yield Fault(f"variable: {name}", ("run", "demo", "Hi"), codes=(2,), order=order, is_quick=True)
    fine: dict[str, dict[str, str | None]] = {
        "no home": {"HOME": None, "XDG_CONFIG_HOME": None},
        "home that does not exist": {"HOME": "/nowhere", "XDG_CONFIG_HOME": None},
        "locale": {"LC_ALL": "C", "LANG": "C"},
        "odd locale": {"LC_ALL": "xx_YY.klingon"},
        "terminal": {"TERM": "\x1b[31m", "COLUMNS": "x", "LINES": "-1"},
        "narrow": {"COLUMNS": "1"},
    }
    for name, env in fine.items():
        yield Fault(f"variable: {name}", ASK, codes=(0,), order={"env": env})


def _streams() -> Iterator[Fault]:
    for closed in ([0], [1], [2], [0, 1, 2]):
        # Without stdout or stderr nobody can be told; the exit code still says what happened.
        codes = (0,) if closed != [1] else (0, 1)
        yield Fault(f"streams: closed {closed}", ASK, codes=codes, order={"closed": closed})
    for name in ("empty", "binary", "NUL", "long"):
        content = {"empty": b"", "binary": bytes(range(256)), "NUL": b"\0" * 99, "long": b"x " * 200_000}[name]
        codes = {"empty": (2,), "binary": (2,), "NUL": ANY, "long": (4,)}[name]
        arguments = ("run", "{model}", *ASK[3:])
        yield Fault(f"stdin: {name}", arguments, put("in", content), codes=codes, order={"stdin": "in"})
    arguments = ("run", "{model}", *ASK[3:])


def _disks() -> Iterator[Fault]:
    save = ("run", "{model}", "Tell me", *ASK[3:-2], "-q", "--session", "fox")
    answers = {"prints": True, "writes": ("state", "disk")}
    for name, env in {
        "state in a file": {"SPECCHAT_STATE_DIR": "file"},
        "state below a file": {"SPECCHAT_STATE_DIR": "file/below"},
        "state in a device": {"SPECCHAT_STATE_DIR": "/dev/null"},
    }.items():
        yield Fault(f"disk: {name}", save, put("file", "x"), codes=(0, 1), order={"env": env}, **answers)
    for name, env in {
        "cache in a file": {"SPECCHAT_CACHE_DIR": "file"},
        "cache in a device": {"SPECCHAT_CACHE_DIR": "/dev/null"},
        "cache without a home": {"SPECCHAT_CACHE_DIR": "/nowhere/at/all"},
    }.items():
        yield Fault(f"disk: {name}", ASK, put("file", "x"), codes=(0,), order={"env": env})
    limits: dict[str, Any] = {"limits": {"file bytes": 300}}
    unsaved = {"codes": (1,), "words": "cannot save the chat", **answers}  # the answer itself is complete
    yield Fault("disk: session at its limit", save, order=limits, **unsaved)
    for name, options in {"full": "size=4k", "read-only": "ro", "without names": "nr_inodes=1"}.items():
        order = {"mounts": {"disk": options}, "env": {"SPECCHAT_STATE_DIR": "disk/state"}}
        long = (*save, "--stop", "x" * 5000)  # the saved chat takes more than a page
        yield Fault(f"disk: {name} for sessions", long, order=order, **unsaved)
        order = {"mounts": {"disk": options}, "env": {"SPECCHAT_CACHE_DIR": "disk/cache"}}
        yield Fault(f"disk: {name} for the cache", ASK, codes=(0,), order=order, **answers)
        order = {"mounts": {"disk": options}}
        job = ("run", "{model}", "--prompts", "in.jsonl", "-o", "disk/out.jsonl", *ASK[3:])
        prompts = put("in.jsonl", '{"prompt": "Hi"}\n' * 3)
        yield Fault(f"disk: {name} for results", job, prompts, codes=(0, 1, 2, 4), order=order, **answers)
    for name, step_s in {"back": -86_400.0, "forth": 86_400.0, "far back": -1e10, "far forth": 1e11}.items():
        order = {"clock_step_s": step_s}
        yield Fault(f"clock: {name}", save, codes=(0,), order=order, **answers)
        yield Fault(f"clock: {name}, sessions", ("sessions",), codes=(0,), order=order, is_quick=True)
    sizes = put_json("model/config.json", {"model_type": "llama"})
    small = {"limits": {"address bytes": 1 << 20}}
    yield Fault("memory: too little to import", ("probe", "{model}"), all_of(sizes), codes=(1, 4), order=small)
