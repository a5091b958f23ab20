"""Two processes at the same time: on one pack, on one saved chat, and on one download."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.fake_hub import serving
from support.faults.fault import DEMO, make_model
from support.faults.server import Ended, Server

from specchat.chat import transcript
from specchat.models.packs.pack import list_packs
from specchat.models.packs.verify import verify_pack

pytestmark = pytest.mark.slow

_COMMON = ("--device", "cpu", "--ctx", "128", "--draft", "none", "--dtype", "fp32", "--temperature", "0")
_STREAMED = ("--vram", "6MiB", "--ram", "64MiB", "--quant", "int8", *_COMMON, "--max-tokens", "4", "--no-save")
_ANSWER = ("--vram", "1GiB", *_COMMON, "-q", "--max-tokens", "40")
_ROUNDS = 6


class Both:
    """Two forking processes, which run a command line at the same time.

    Args:
        folder: folder of what they find out about models.
    """

    def __init__(self, folder: Path) -> None:
        self._servers = [Server(folder / str(number) / "cache", answers=True) for number in range(2)]
        self._pool = ThreadPoolExecutor(2)

    def run(self, folder: Path, arguments: Sequence[Sequence[str]], **env: str) -> list[Ended]:
        order = {
            "env": {"SPECCHAT_STATE_DIR": str(folder / "state"), "SPECCHAT_CACHE_DIR": str(folder / "cache"), **env},
            "constants": {"specchat.models.packs.prepare.SMALL_BYTES": 0},
            "timeout_s": 120,
        }

        def run(number: int) -> Ended:
            own = folder / f"out-{number}"
            own.mkdir(exist_ok=True)
            return self._servers[number].run(own, arguments[number], **order)

        return list(self._pool.map(run, range(2)))

    def close(self) -> None:
        self._pool.shutdown()
        for server in self._servers:
            server.close()


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Both]:
    both = Both(tmp_path_factory.mktemp("servers"))
    yield both
    both.close()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPECCHAT_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("SPECCHAT_CACHE_DIR", str(tmp_path / "cache"))
    make_model(tmp_path)
    return tmp_path


def check_no_traces(ended: Ended) -> None:
    assert b"Traceback" not in ended.err and b"internal" not in ended.err, ended.err


def test_two_processes_pack_one_model(both: Both, folder: Path):
    """One of them packs while the other waits or finds the pack; both answer the same."""
    arguments = ("run", str(folder / "model"), "Tell me a story", *_STREAMED)
    waited = 0
    for _ in range(_ROUNDS):
        shutil.rmtree(folder / "cache" / "packs", ignore_errors=True)
        ends = both.run(folder, [arguments, arguments])
        for ended in ends:
            check_no_traces(ended)
            assert ended.code == 0, ended.err
            waited += b"waiting for another specchat" in ended.err
        assert ends[0].out == ends[1].out and ends[0].out
        (pack,) = list_packs(pytest.fail)
        assert not verify_pack(pack) and not list(pack.folder.glob("*.tmp"))
    print(f"{waited} of {_ROUNDS} rounds waited for the other process")


def test_two_processes_on_one_session(both: Both, folder: Path):
    """One of them has the chat, the other says so; every answer that was given is saved, whole and once."""
    session = ("--session", "fox", "--overflow", "drop-oldest")
    path, given, refused = folder / "state" / "sessions" / "fox.jsonl", [], 0
    for number in range(_ROUNDS):
        questions = [f"question {number} of {who}" for who in range(2)]
        model = str(folder / "model")
        ends = both.run(folder, [("run", model, question, *_ANSWER, *session) for question in questions])
        for question, ended in zip(questions, ends, strict=True):
            check_no_traces(ended)
            assert ended.code in (0, 1), ended.err
            if ended.code:
                assert b"another specchat" in ended.err  # has it open, or has begun or changed it meanwhile
                refused += 1
            elif b"cannot save" in ended.err or b"is open in another" in ended.err:
                refused += 1
            else:
                given.append(question)
        saved = transcript.read(path)
        assert saved.repair is None
        asked = [record.exchange.question for record in saved.records if hasattr(record, "exchange")]
        assert sorted(asked) == sorted(given)
    assert refused and len(given) >= _ROUNDS


def test_two_processes_download_one_model(both: Both, folder: Path):
    files = {path.name: path.read_bytes() for path in DEMO.iterdir()}
    with serving() as hub:
        hub.publish("org/fox", files)
        env = {"HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(folder / "hub"), "NO_PROXY": "127.0.0.1,localhost"}
        arguments = ("run", "org/fox", "Tell me a story", *_ANSWER, "--no-save", "--yes")
        for _ in range(_ROUNDS):
            shutil.rmtree(folder / "hub", ignore_errors=True)
            ends = both.run(folder, [arguments, arguments], **env)
            for ended in ends:
                check_no_traces(ended)
                assert ended.code == 0, ended.err
            assert ends[0].out == ends[1].out
            snapshot = next((folder / "hub").glob("models--org--fox/snapshots/*"))
            found = {path.name: path.read_bytes() for path in snapshot.iterdir()}
            assert found.keys() >= {"config.json", "model.safetensors", "tokenizer.json"}
            assert all(files[name] == content for name, content in found.items())
