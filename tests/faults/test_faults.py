"""The campaign of faults: each ends with the promised exit code and in one to three lines, and changes no file.

The default suite runs every sixth one of those that are refused before a model is looked at. The whole table is slow:
`pytest -m slow tests/faults`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.faults import hub, models, saved, system
from support.faults.fault import Fault
from support.faults.server import Server, may_mount

FAULTS = [*models.faults(), *saved.faults(), *system.faults(), *hub.faults()]
QUICK = [fault for fault in FAULTS if fault.is_quick][::6]


@pytest.fixture(scope="module")
def quick_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("quick") / "cache", answers=False)
    yield server
    server.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("all") / "cache", answers=True)
    yield server
    server.close()


def name_of(fault: Fault) -> str:
    return fault.name


def test_the_table_is_large_and_names_are_its_own():
    assert len(FAULTS) >= 200
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)


@pytest.mark.parametrize("fault", QUICK, ids=name_of)
def test_refused_early(fault: Fault, quick_server: Server, tmp_path: Path):
    assert not fault.broken_promises(quick_server, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS, ids=name_of)
def test_promises_are_kept(fault: Fault, server: Server, tmp_path: Path):
    if "mounts" in fault.order and not may_mount():
        pytest.skip("this system lets no process mount a file system")
    assert not fault.broken_promises(server, tmp_path / "run")


def test_a_broken_promise_is_found(quick_server: Server, tmp_path: Path):
    """The campaign sees another exit code, a missing word, and a changed file."""

    def make(folder: Path) -> None:
        (folder / "diary.txt").write_text("Dear diary")

    fault = Fault("x", ("run", "demo", "Hi", "--vram=x"), make, codes=(3,), words="elephant")
    assert fault.broken_promises(quick_server, tmp_path / "run") == [
        "ends with 2, not (3,)",
        "does not say 'elephant'",
    ]

    def make_pipe(folder: Path) -> None:
        os.mkfifo(folder / "pipe")  # nobody writes: opening it waits forever

    late = Fault("x", ("run", "demo", "Hi"), make_pipe, codes=(2,), order={"timeout_s": 0.1, "stdin": "pipe"})
    assert late.broken_promises(quick_server, tmp_path / "late")[0].startswith("hangs")
