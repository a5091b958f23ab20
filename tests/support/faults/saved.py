"""Faults of saved chats, of settings and prompts, and of packs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from support.faults.fault import ASK, KINDS, NESTED, Fault, Make, all_of, put, special

_FILE = "state/sessions/fox.jsonl"
SHOW = ("sessions", "show", "fox")
RESUME = ("run", "--session", "fox", "And now?", "-q", "--max-tokens", "2", "--device", "cpu", "--vram", "1GiB")
_HUGE = 1 << 80


def faults() -> Iterator[Fault]:
    yield from _sessions()
    yield from _settings()
    yield from _prompts()
    yield from _packs()


# --- sessions ----------------------------------------------------------------------------------------------------

OPENED: dict[str, Any] = {
    "type": "open",
    "version": 1,
    "at": "2026-01-01T00:00:00+00:00",
    "setup": {
        **{"specchat": "0.1.0", "model": "demo", "revision": None, "draft": None, "quant": "none", "dtype": "fp32"},
        **{"device": "cpu", "ctx": None, "stop": [], "overflow": "stop", "base": False},
    },
    "system": None,
    "sampling": {
        **{"seed": 0, "temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0},
    },
    "max_tokens": None,
    "thinking": None,
}
ANSWERED: dict[str, Any] = {
    "type": "answer",
    "how": "ask",
    "exchange": {
        "question": "Who?",
        "answer": {"role": "assistant", "content": "The fox.", "reasoning": None},
        "attempt": 0,
    },
    "seed": 0,
    "token_ids": [5, 6],
    "finish_reason": "stop",
    "facts": {},
}


def lines(*records: object) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def _session_texts() -> dict[str, str | bytes]:
    def opened(**values: Any) -> str:
        return lines(OPENED | values, ANSWERED)

    def answered(**values: Any) -> str:
        return lines(OPENED, ANSWERED | values)

    setup, sampling, exchange = OPENED["setup"], OPENED["sampling"], ANSWERED["exchange"]
    return {
        "other text": "Dear diary,\nnothing happened.\n",
        "binary": bytes(range(256)) * 4,
        "nested": '{"type": ' + NESTED + "}\n" + lines(ANSWERED),
        "list": lines([], ANSWERED),
        "future version": opened(version=99),
        "huge version": opened(version=_HUGE),
        "version text": opened(version="1"),
        "answer first": lines(ANSWERED, ANSWERED),
        "unknown type": lines(OPENED, {"type": "sing"}, ANSWERED),
        "type list": lines(OPENED, {"type": ["open"]}, ANSWERED),
        "no setup": lines({k: v for k, v in OPENED.items() if k != "setup"}, ANSWERED),
        "setup text": opened(setup="x"),
        "model number": opened(setup={**setup, "model": 3}),
        "context huge": opened(setup={**setup, "ctx": _HUGE}),
        "context minus": opened(setup={**setup, "ctx": -1}),
        "stop text": opened(setup={**setup, "stop": "x"}),
        "overflow": opened(setup={**setup, "overflow": "explode"}),
        "sampling list": opened(sampling=[]),
        "seed huge": opened(sampling={**sampling, "seed": _HUGE}),
        "temperature text": opened(sampling={**sampling, "temperature": "hot"}),
        "temperature infinite": opened(sampling={**sampling, "temperature": float("inf")}),
        "sampling unknown": opened(sampling={**sampling, "mood": 1}),
        "exchange text": answered(exchange="x"),
        "question number": answered(exchange={**exchange, "question": 3}),
        "answer null": answered(exchange={**exchange, "answer": None}),
        "tokens text": answered(token_ids="x"),
        "tokens null": answered(token_ids=None),
        "reason": answered(finish_reason="bored"),
        "how": answered(how="whistle"),
        "dropped more": lines(
            OPENED, {"type": "drop", "num_exchanges": 9, "reason": "asked", "questions": []}, ANSWERED
        ),
        "rewritten nothing": lines(OPENED, {"type": "rewrite", "text": "x"}, ANSWERED),
        "set unknown": lines(OPENED, {"type": "set", "key": "mood", "value": 1}, ANSWERED),
        "set huge": lines(OPENED, {"type": "set", "key": "top_k", "value": _HUGE}, ANSWERED),
        "not UTF-8": lines(OPENED).encode() + b'{"type": "\xff"}\n' + lines(ANSWERED).encode(),
        "NUL in the middle": lines(OPENED) + "\0" * 500 + "\n" + lines(ANSWERED),
    }


def _sessions() -> Iterator[Fault]:
    for name, text in _session_texts().items():
        for command, arguments in (("show", SHOW), ("resume", RESUME)):
            if command == "show" or name in ("other text", "binary", "nested", "future version"):
                yield Fault(f"session {command}: {name}", arguments, put(_FILE, text), codes=(1,), is_quick=True)
    for kind in KINDS:
        # What cannot be read is an error or is not there; in no case is it written to.
        yield Fault(f"session show: {kind}", SHOW, special(_FILE, kind), codes=(1, 2), is_quick=True)
        named = ("run", "{model}", "Hi", "--session", "fox", *ASK[3:-2], "-q")
        yield Fault(f"session new: {kind}", named, special(_FILE, kind), codes=(1, 2), is_quick=True)
        yield Fault(f"session list: {kind}", ("sessions",), special(_FILE, kind), codes=(0,), is_quick=True)

    def link(folder: Path) -> None:
        put("diary.txt", "Dear diary\n")(folder)
        (folder / _FILE).parent.mkdir(parents=True)
        (folder / _FILE).symlink_to(folder / "diary.txt")

    named = ("run", "{model}", "Hi", "--session", "fox", *ASK[3:-2], "-q")
    yield Fault("session new: link to another file", named, link, codes=(1,), is_quick=True)
    for name in ("../fox", "/etc/passwd", "a\0b", "", "x" * 300, "\udcff", "a/b", "-"):
        arguments = ("run", "demo", "Hi", f"--session={name}", *ASK[3:])
        if "\0" not in name:
            yield Fault(f"session name: {name[:9]!a}", arguments, codes=(2,), is_quick=True)
    torn = put(_FILE, lines(OPENED, ANSWERED) + '{"type": "ans')
    yield Fault("session show: torn last line", SHOW, torn, codes=(0,), is_quick=True)
    yield Fault("session list: mode", ("sessions",), all_of(torn, _mode(_FILE, 0)), codes=(0, 1), is_quick=True)


def _mode(name: str, mode: int) -> Make:
    return lambda folder: (folder / name).chmod(mode)


# --- settings and prompts ----------------------------------------------------------------------------------------


def _settings() -> Iterator[Fault]:
    texts: dict[str, str | bytes] = {
        "nested": "x = " + "[" * 5000 + "]" * 5000,
        "deep keys": ".".join(["a"] * 5000) + " = 1",
        "not UTF-8": b"x = '\xff'",
        "NUL": "model = 'a\0b'",
        "syntax": "x = = 3",
        "unknown": "colour = 'red'",
        "table": "[vram]\na = 1",
        "huge number": "ctx = " + "9" * 5000,
        "huge float": "temperature = 1e999",
        "minus": "ctx = -5",
        "not a number": "temperature = nan",
        "date": "vram = 2026-01-01",
        "mixed list": "stop = ['a', 3]",
        "empty stop": "stop = ['']",
        "flag text": "save = 'perhaps'",
        "size": "vram = '8 elephants'",
        "escape": 'device = "\\u001b[31mcuda"',
        "alias of number": "[aliases]\na = 3",
        "alias of a command": "[aliases]\ndemo = 'x'",
        "byte-order mark": b"\xff\xfex\0",
    }
    for name, text in texts.items():
        yield Fault(f"settings: {name}", ASK, put("config/specchat/config.toml", text), codes=(2,), is_quick=True)
    for kind in KINDS:
        codes = (0, 2) if kind == "dangling" else (2,)
        make = special("config/specchat/config.toml", kind)
        yield Fault(f"settings: {kind}", ASK, make, codes=codes, is_quick=kind != "dangling")
        arguments = ("run", "demo", "Hi", "--config", "x.toml")
        yield Fault(f"settings chosen: {kind}", arguments, special("x.toml", kind), codes=(2,), is_quick=True)
        for option in ("--file", "--system"):
            path = f"@{kind}" if option == "--system" else kind
            arguments = ("run", "demo", "Hi", option, path, "--no-save")
            yield Fault(f"{option}: {kind}", arguments, special(kind, kind), codes=(2,), is_quick=True)


def _prompts() -> Iterator[Fault]:
    job = ("run", "{model}", "--prompts", "in.jsonl", "-o", "out.jsonl", *ASK[3:])
    texts: dict[str, str | bytes] = {"empty": "", "blank": "\n\n", "not UTF-8": b"\xff\xfe\n", "only NUL": b"\0\0"}
    for name, text in texts.items():
        codes = (1, 2) if name == "only NUL" else (2,)
        make, is_quick = put("in.jsonl", text), name != "only NUL"
        yield Fault(f"prompts: {name}", job, make, codes=codes, writes=("out.jsonl",), is_quick=is_quick)
    for kind in (*KINDS, "missing"):
        yield Fault(f"prompts: {kind}", job, special("in.jsonl", kind), codes=(2,), is_quick=True)
    good = put("in.jsonl", '{"id": 1, "prompt": "Hi"}\n')
    for kind in ("fifo", "device", "folder"):
        yield Fault(f"results: {kind}", job, all_of(good, special("out.jsonl", kind)), codes=(1, 2))
    yield Fault("results: other text", job, all_of(good, put("out.jsonl", "Dear diary\n")), codes=(1, 2))
    odd = {
        **{
            "nested": '{"prompt": ' + NESTED + "}",
            "number": "3",
            "no prompt": '{"id": 1}',
            "prompt list": '{"prompt": []}',
        },
        **{"huge tokens": '{"prompt": "x", "max_tokens": 1' + "0" * 30 + "}", "role": '{"messages": [{"role": "x"}]}'},
        **{"infinite": '{"prompt": "x", "temperature": 1e999}', "surrogate": '{"prompt": "\\ud800"}'},
        **{"seed": '{"prompt": "x", "seed": -1}', "unknown": '{"prompt": "x", "mood": 1}', "blank": '{"prompt": " "}'},
    }
    for name, text in odd.items():
        make = put("in.jsonl", text + "\n")
        yield Fault(f"prompt: {name}", job, make, codes=(0, 1, 2), writes=("out.jsonl",))


# --- packs -------------------------------------------------------------------------------------------------------


def _packs() -> Iterator[Fault]:
    env = {"env": {"SPECCHAT_CACHE_DIR": "packs-cache"}}
    manifest = "packs-cache/packs/0123456789abcdef0123456789abcdef/manifest.json"
    texts: dict[str, str | bytes] = {
        **{"empty": "", "nested": NESTED, "list": "[]", "no checksum": "{}", "binary": b"\xff\xfe\0", "null": "null"},
        **{"name": json.dumps({"name": {"a": [1]}, "dtype": 3}), "escape": json.dumps({"name": "\x1b[31m\u202e"})},
    }
    for name, text in texts.items():
        yield Fault(f"pack: {name}", ("models",), put(manifest, text), codes=(0,), order=env, is_quick=True)
    for kind in KINDS:
        yield Fault(f"pack: {kind}", ("models",), special(manifest, kind), codes=(0,), order=env, is_quick=True)
