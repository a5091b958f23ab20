"""Faults of slash commands, typed on a terminal: each is answered with a message, and the chat goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.faults.fault import KINDS, special
from support.terminal import Terminal

pytestmark = pytest.mark.slow

ENTER = "\r"
_HUGE, _LONG = "9" * 400, "x" * 3000
# "@" stands for the folder of the test: the program does not run there.
_PATHS = (
    *("~nosuchuser/x", "~nosuchuser", "/nowhere/at/all", "/proc/self/mem", "/dev/zero", "/dev/stdin", "/", "@"),
    *("@/caf\u00e9\u202e", "'@/a", "'@/a b' c", "@/a\\", "@/*", "@/-", "/" + "x" * 3000, "/" + "a/" * 900),
    *(f"@/{kind}.x" for kind in KINDS),
    *("@/binary.x", "@/long.x", "@/secret.x", "@/sessions", "@/file.x/below"),
)
_VALUES = ("", "x", "-1", "nan", "inf", "1e400", _HUGE, "0x1", "\u0663", "1_0", "none", "[]", "1,5", "'")
_KEYS = ("temperature", "top_k", "top_p", "min_p", "seed", "max_tokens", "stop", "overflow", "think", "mood", "", "=")
_WITHOUT_PATHS = (
    *("/", "/ ", "/nosuch", "/\u202e", "/" + _LONG, "/set =", "/set ==", "/set a=b=c", "/drop", "/drop -1", "/drop 0"),
    *(f"/drop {_HUGE}", "/drop x", "/undo now", "/undo", "/retry", "/continue", "/edit", "/edit \u202e", "/copy x"),
    *("/copy code", "/copy", "/think maybe", f"/think {_LONG}", "/sessions \u202e", f"/sessions {_LONG}", "/stats"),
    *(
        "/history",
        "/help me",
        "/verbose x",
        "/info x",
        "/clear it",
        "/model",
        "/model ~nosuchuser/m",
        "/model @/fifo.x",
    ),
    *(f"/model {_LONG}", "/model org/\u202e", "/model ''", "/system", "/system none", "/exit now please"),
)
COMMANDS = tuple(
    dict.fromkeys(
        (
            *_WITHOUT_PATHS,
            *(f"/{name} {path}" for name in ("read", "save", "load") for path in _PATHS),
            *(f"/set {key}={_VALUES[(i + j) % len(_VALUES)]}" for i, key in enumerate(_KEYS) for j in range(6)),
        )
    )
)
_PER_CHAT = 40


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for kind in KINDS:
        special(f"{kind}.x", kind)(tmp_path)
    (tmp_path / "binary.x").write_bytes(bytes(range(256)))
    (tmp_path / "long.x").write_text("x" * (9 << 20))
    (tmp_path / "file.x").write_text("text")
    (tmp_path / "secret.x").write_text("text")
    (tmp_path / "secret.x").chmod(0)
    (tmp_path / "sessions").mkdir()
    return tmp_path


def test_there_are_many_commands():
    assert len(COMMANDS) >= 180


@pytest.mark.parametrize("first", range(0, len(COMMANDS), _PER_CHAT))
def test_a_command_never_ends_the_chat(folder: Path, first: int):
    environment = {"SPECCHAT_STATE_DIR": str(folder / "state"), "SPECCHAT_CACHE_DIR": str(folder / "cache")}
    with Terminal("support.fake_cli", "run", "demo", environment=environment) as terminal:
        terminal.wait_for_prompt()
        for command in COMMANDS[first : first + _PER_CHAT]:
            before, command = len(terminal.raw), command.replace("@", str(folder))
            terminal.send(f"\x1b[200~{command}\x1b[201~" + ENTER)  # pasted: completion stays out of the way
            terminal.wait_for(lambda terminal, before=before: len(terminal.raw) > before)
            terminal.wait_for_prompt()
            said = terminal.raw[before:]
            assert b"Traceback" not in said and b"internal error" not in said, (command, terminal.screen)
        before = len(terminal.raw)
        terminal.send("still there?" + ENTER)  # after the files that were read
        terminal.wait_for(lambda terminal: b"tok/s" in terminal.raw[before:])
        terminal.wait_for_prompt()
        terminal.send("/exit" + ENTER)
        assert terminal.exit_code() == 0
