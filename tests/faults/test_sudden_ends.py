"""Ends at random moments: a signal gives its exit code, and a kill loses no completed turn, pack or download.

Every test prints its seed, which TEST_SEED sets, and how many ends came at which point.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.fake_hub import serving
from support.faults.fault import DEMO, make_model
from support.faults.server import Ended, Server

from specchat.chat import transcript
from specchat.models.packs.pack import list_packs
from specchat.models.packs.verify import verify_pack

pytestmark = pytest.mark.slow

_COMMON = ("--device", "cpu", "--ctx", "128", "--draft", "none", "--dtype", "fp32", "--temperature", "0", "-q")
ANSWER = ("--vram", "1GiB", *_COMMON, "--max-tokens", "40")
STREAMED = ("--vram", "6MiB", "--ram", "64MiB", "--quant", "int8", *_COMMON, "--max-tokens", "4")


class Runs:
    """Runs of one command line, some of which are ended early.

    Args:
        server: process that forks.
        folder: folder of the runs.
        arguments: command line.
        env: variables.
    """

    def __init__(self, server: Server, folder: Path, arguments: tuple[str, ...], **env: str) -> None:
        self._server, self._folder, self._arguments = server, folder, arguments
        self._env = {"SPECCHAT_STATE_DIR": str(folder / "state"), **env}
        self.seconds = 0.0

    def run(self, *signals: tuple[float, int], prompt: str = "Tell me a story") -> Ended:
        arguments = [each.replace("{prompt}", prompt) for each in self._arguments]
        constants = {"specchat.models.packs.prepare.SMALL_BYTES": 0}
        order = {"env": self._env, "signals": signals, "constants": constants, "timeout_s": 120}
        ended = self._server.run(self._folder, arguments, **order)
        if not signals:
            assert ended.code == 0, ended.err.decode()
            self.seconds = ended.seconds
        return ended

    def kill(self, rng: random.Random, **kwargs: str) -> bool:
        """Kill a run at a random moment, and return whether it had not ended before."""
        ended = self.run((rng.uniform(0, self.seconds), signal.SIGKILL), **kwargs)
        assert ended.code in (0, -signal.SIGKILL)
        return ended.code != 0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server") / "cache", answers=True)
    yield server
    server.close()


@pytest.fixture
def rng() -> random.Random:
    seed = int(os.environ.get("TEST_SEED", random.randrange(1 << 30)))
    print(f"TEST_SEED={seed}")
    return random.Random(seed)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPECCHAT_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("SPECCHAT_CACHE_DIR", str(tmp_path / "cache"))
    make_model(tmp_path)
    return tmp_path


def test_signals_at_random_moments(server: Server, folder: Path, rng: random.Random):
    """Half of them during start-up and answer, half during packing."""
    cache = {"SPECCHAT_CACHE_DIR": str(folder / "cache")}
    model = str(folder / "model")
    answering = Runs(server, folder, ("run", model, "{prompt}", *ANSWER, "--no-save"), **cache)
    packing = Runs(server, folder, ("run", model, "{prompt}", *STREAMED, "--no-save"), **cache)
    ends, points = Counter[int](), Counter[str]()
    for what, runs in {"answering": answering, "packing": packing}.items():
        runs.run()
        shutil.rmtree(folder / "cache" / "packs", ignore_errors=True)
        runs.run()
        for _ in range(50):
            shutil.rmtree(folder / "cache" / "packs", ignore_errors=True)
            number = rng.choice((signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
            moment = rng.uniform(0, runs.seconds)
            ended = runs.run((moment, number))
            assert ended.code is not None
            # A process that starts has the system's own answer to TERM and HUP; the shell shows 128 + n for both.
            code = 128 - ended.code if ended.code in (-signal.SIGTERM, -signal.SIGHUP) else ended.code
            ends[code] += 1
            points[f"{what}, {_tenth(moment, runs.seconds)}"] += 1
            assert code in (0, 128 + number), (moment, number, ended)
            # The answer was complete, and libraries were tidying up: that is a small part of a run on a busy machine.
            late = moment > 0.75 * ended.seconds or ended.seconds <= moment + 0.5
            assert ended.code or late, f"{number!r} was lost at {moment} of {ended.seconds} s"
            assert b"Traceback" not in ended.err and b"internal" not in ended.err, ended
    print(f"{ends.total()} signals; exit codes: {_counts(ends)}; when: {_counts(points)}")
    assert len(ends) == 4


def test_kills_while_packing(server: Server, folder: Path, rng: random.Random):
    cache = {"SPECCHAT_CACHE_DIR": str(folder / "cache")}
    runs = Runs(server, folder, ("run", str(folder / "model"), "{prompt}", *STREAMED, "--no-save"), **cache)
    expected = runs.run().out
    shutil.rmtree(folder / "cache" / "packs")
    runs.run()
    points = Counter[str]()
    for _ in range(20):
        shutil.rmtree(folder / "cache" / "packs", ignore_errors=True)
        points[_point_of_pack(folder) if runs.kill(rng) else "after the end"] += 1
        assert runs.run().out == expected
        (pack,) = list_packs(pytest.fail)
        assert not verify_pack(pack) and not list(pack.folder.glob("*.tmp"))
    print(f"{points.total()} kills while packing: {_counts(points)}")


def test_kills_while_chatting(server: Server, folder: Path, rng: random.Random):
    cache = {"SPECCHAT_CACHE_DIR": str(folder / "cache")}
    arguments = ("run", str(folder / "model"), "{prompt}", *ANSWER, "--session", "fox", "--overflow", "drop-oldest")
    runs = Runs(server, folder, arguments, **cache)
    path = folder / "state" / "sessions" / "fox.jsonl"
    asked = ["first", "second"]
    for question in asked:
        runs.run(prompt=question)
    points = Counter[str]()
    for number in range(15):
        before = transcript.read(path).records
        was_killed = runs.kill(rng, prompt=f"question {number}")
        saved = transcript.read(path)
        assert saved.records[: len(before)] == before
        is_saved = saved.state.exchanges[-1].question == f"question {number}"
        assert was_killed or is_saved
        point = "within a line" if saved.repair else "after the turn was saved" if is_saved else "before it was saved"
        points[point if was_killed else "after the end"] += 1
    runs.run(prompt="last")
    assert transcript.read(path).state.exchanges[-1].question == "last"
    print(f"{points.total()} kills while chatting: {_counts(points)}")


def test_kills_while_downloading(server: Server, folder: Path, rng: random.Random):
    files = {path.name: path.read_bytes() for path in DEMO.iterdir()}
    with serving() as hub:
        hub.publish("org/fox", files)
        hub_folder = folder / "hub"
        env = {"HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(hub_folder), "NO_PROXY": "127.0.0.1,localhost"}
        cache = {"SPECCHAT_CACHE_DIR": str(folder / "cache")}
        arguments = ("run", "org/fox", "{prompt}", *ANSWER, "--no-save", "--yes")
        runs = Runs(server, folder, arguments, **env, **cache)
        expected = runs.run().out
        points = Counter[str]()
        for _ in range(15):
            shutil.rmtree(hub_folder)
            points[_point_of_download(hub_folder) if runs.kill(rng) else "after the end"] += 1
            assert runs.run().out == expected
            snapshot = next(hub_folder.glob("models--org--fox/snapshots/*"))
            assert all((snapshot / name).read_bytes() == files[name] for name in ("model.safetensors", "config.json"))
        print(f"{points.total()} kills while downloading: {_counts(points)}")


def _tenth(moment: float, seconds: float) -> str:
    return f"{10 * int(10 * moment / seconds)}%"


def _counts(points: Counter[Any]) -> str:
    return ", ".join(f"{point}: {number}" for point, number in sorted(points.items()))


def _point_of_pack(folder: Path) -> str:
    """Return how far a killed run had come with its pack."""
    files = [path for path in (folder / "cache" / "packs").glob("*/*") if path.is_file()]
    if not files:
        return "before the pack"
    return "within the pack" if not list_packs(lambda _: None) else "after the pack"


def _point_of_download(hub_folder: Path) -> str:
    """Return how far a killed run had come with its download."""
    if any(hub_folder.rglob("*.incomplete")):
        return "within a file"
    if any(hub_folder.glob("models--*/snapshots/*/model.safetensors")):
        return "after the download"
    return "between two files" if any(hub_folder.glob("models--*/blobs/*")) else "before the download"
