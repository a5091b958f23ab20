"""Downloads and errors against a loopback server with enough of the hub's protocol; no real network."""

import json
import os
import signal
import struct
import subprocess
import sys
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import constants
from support.fake_hub import TOKEN, FakeHub, Handler, point_to
from support.locating import locate

from specchat.errors import (
    DoesNotFitError,
    HubUnreachableError,
    ModelError,
    ModelGatedError,
    ModelNotCachedError,
    ModelNotFoundError,
    PickledCheckpointError,
    UsageError,
)
from specchat.models.catalog.ref import parse_model
from specchat.models.checkpoint.safetensors import open_checkpoint
from specchat.models.hub.cache import cached_models
from specchat.models.hub.download import Download
from specchat.models.locate import look_up, sketch

TESTS = Path(__file__).parents[2]


def shard(num_bytes: int, key: str = "w") -> bytes:
    header = json.dumps({key: {"dtype": "U8", "shape": [num_bytes], "data_offsets": [0, num_bytes]}}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(num_bytes)


MODEL = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b"{}",
    "tokenizer_config.json": b"{}",
    "chat_template.jinja": b"hello",
    "model.safetensors": shard(5000),
    "pytorch_model.bin": b"never fetched",
    "README.md": b"---\nbase_model: org/base\n---\nwords",
    "notes.txt": b"never fetched",
    "original/consolidated.00.pth": b"never fetched",
    "onnx/config.json": b"never fetched",
    "consolidated.safetensors": shard(6000),
}
WANTED = {"config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "model.safetensors"}
WANTED_BYTES = sum(len(MODEL[name]) for name in WANTED)
FETCHED = WANTED | {"README.md"}  # the card is not counted


@pytest.fixture
def dead_url():
    """An address that refuses connections."""
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as httpd:
        port = httpd.server_address[1]
    return f"http://127.0.0.1:{port}"


def ask(text: str, **options):
    """`locate`, agreeing to everything; a warning fails unless the test takes it."""
    options = {"offline": False, "confirm": lambda download: True, "warn": pytest.fail} | options
    confirm = options.pop("confirm")
    return locate(parse_model(text), confirm=lambda downloads: confirm(*downloads), **options)


def refuse(download: Download) -> bool:
    pytest.fail(f"asked for {download}")


def files_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}


# ---------------------------------------------------------------- folders and the demo


def test_a_folder_needs_a_config(tmp_path):
    with pytest.raises(ModelNotFoundError, match="does not exist"):
        ask(str(tmp_path / "none"))
    with pytest.raises(ModelNotFoundError, match=r"no config\.json"):
        ask(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    source = ask(str(tmp_path), offline=True, confirm=refuse)
    assert (source.name, source.path, source.revision, source.is_toy) == (str(tmp_path), tmp_path, None, False)


def test_demo_needs_no_network(monkeypatch, dead_url, tmp_path):
    point_to(monkeypatch, dead_url, tmp_path)
    assert ask("demo", confirm=refuse).is_toy


def test_the_password_of_an_endpoint_is_masked(monkeypatch, dead_url, tmp_path):
    point_to(monkeypatch, dead_url.replace("http://", "http://me:hunter2@"), tmp_path)
    with pytest.raises(ModelError) as caught:
        ask("org/name")
    assert "http://***@127.0.0.1" in caught.value.message
    assert "hunter2" not in f"{caught.value} {caught.value.hint}"


# ---------------------------------------------------------------- downloads


@pytest.mark.parametrize("end", ["\n", "\r\n", " "])
def test_a_line_break_after_a_recorded_commit(hub, tmp_path, end):
    hub.publish("org/name", MODEL)
    source = ask("org/name")
    (record,) = tmp_path.rglob("refs/main")
    record.write_text(f"{record.read_text()}{end}")
    assert ask("org/name", offline=True, confirm=refuse) == source
    assert cached_models() == ["org/name"]
    assert ask("org/name", confirm=refuse) == source


def test_only_needed_files_are_downloaded(hub, tmp_path):
    commit = hub.publish("org/name", MODEL)
    asked, told = [], []

    def confirm(download: Download) -> bool:
        assert hub.num_downloads() == 0
        asked.append(download)
        return True

    source = ask("org/name", confirm=confirm, progress=lambda done, total: told.append((done, total)))
    assert (source.name, source.revision, source.is_toy) == ("org/name", commit, False)
    assert files_in(source.path) == FETCHED
    assert set(open_checkpoint(source.path).tensors) == {"w"}
    (download,) = asked
    assert (download.name, download.revision, download.folder) == ("org/name", commit, tmp_path / "hub")
    assert (download.num_bytes, download.cached_bytes, download.missing_bytes) == (WANTED_BYTES, 0, WANTED_BYTES)
    assert download.free_disk_bytes > 0
    assert told == sorted(told)
    assert told[-1] == (WANTED_BYTES, WANTED_BYTES)
    assert cached_models() == ["org/name"]


def test_the_hub_is_asked_for_the_model_alone(hub):
    """huggingface_hub would also fetch a list of programs, to say which one runs here, and keep it."""
    hub.publish("org/name", MODEL)
    hub.answers["agent-harnesses"] = (200, b"3", {})
    ask("org/name")
    ask("org/name")
    assert hub.requests and all("org/name" in request or "/cdn/" in request for request in hub.requests)


ODD_NAME = b'{"id": "org/name", "sha": "0", "siblings": [{"rfilename": 3}]}'


def test_an_answer_of_another_form_is_no_hubs(hub):
    for body in (b"[]", b"3", b'"x"', b"null", b'{"siblings": 3}', ODD_NAME):
        hub.body = body
        with pytest.raises(ModelError, match="does not respond like a hub"):
            ask("org/name")


def test_a_second_run_makes_one_request_and_no_question(hub):
    hub.publish("org/name", MODEL)
    first = ask("org/name")
    hub.requests.clear()
    assert ask("org/name", confirm=refuse) == first
    assert len(hub.requests) == 1


def test_offline_uses_the_cache_without_a_request(hub, monkeypatch):
    hub.publish("org/name", MODEL)
    first = ask("org/name")
    hub.requests.clear()
    assert ask("org/name", offline=True, confirm=refuse) == first
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert ask("org/name", confirm=refuse) == first
    assert not hub.requests


def test_a_cached_commit_needs_no_request(hub):
    commit = hub.publish("org/name", MODEL)
    first = ask(f"org/name@{commit}")
    assert cached_models() == [f"org/name@{commit}"]
    hub.requests.clear()
    assert ask(f"org/name@{commit}", confirm=refuse) == first
    assert not hub.requests


def test_a_revision_is_downloaded(hub):
    hub.publish("org/name", MODEL)
    commit = hub.publish("org/name", MODEL | {"config.json": b'{"new": 1}'}, branch="refs/pr/1")
    source = ask("org/name@refs/pr/1")
    assert source.revision == commit
    assert (source.path / "config.json").read_bytes() == b'{"new": 1}'
    assert ask("org/name@refs/pr/1", offline=True) == source
    assert cached_models() == ["org/name@refs/pr/1"]


def test_an_update_fetches_only_what_changed(hub):
    hub.publish("org/name", MODEL)
    ask("org/name")
    commit = hub.publish("org/name", MODEL | {"config.json": b'{"new": 1}'})
    asked = []
    source = ask("org/name", confirm=lambda download: bool(asked.append(download)) or True)
    assert source.revision == commit
    assert asked[0].missing_bytes == len(b'{"new": 1}')
    assert ask("org/name", offline=True) == source


def test_a_declined_download_keeps_the_older_copy(hub):
    hub.publish("org/name", MODEL)
    with pytest.raises(UsageError, match="not confirmed") as caught:
        ask("org/name", confirm=lambda download: False)
    assert "--yes" in caught.value.hint
    assert hub.num_downloads() == 0
    old = ask("org/name")
    hub.publish("org/name", MODEL | {"config.json": b'{"new": 1}'})
    with pytest.raises(UsageError) as caught:
        ask("org/name", confirm=lambda download: False)
    assert "--offline" in caught.value.hint
    assert ask("org/name", offline=True) == old


def test_a_failed_update_keeps_the_older_copy(hub, monkeypatch):
    hub.publish("org/name", MODEL)
    old = ask("org/name")
    hub.publish("org/name", MODEL | {"model.safetensors": shard(9000)})
    real = huggingface_hub.snapshot_download

    def fails(*args, **options):
        if options.get("dry_run") or options.get("local_files_only"):
            return real(*args, **options)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fails)
    with pytest.raises(DoesNotFitError, match="full"):
        ask("org/name")
    monkeypatch.undo()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(old.path.parents[2]))
    assert ask("org/name", offline=True) == old


def test_a_partial_cache_is_completed(hub):
    commit = hub.publish("org/name", MODEL)
    huggingface_hub.hf_hub_download("org/name", "config.json")
    assert cached_models() == []
    with pytest.raises(ModelNotCachedError) as caught:
        ask("org/name", offline=True)
    assert "hf download org/name" in caught.value.hint
    asked = []
    source = ask("org/name", confirm=lambda download: bool(asked.append(download)) or True)
    assert source.revision == commit
    assert asked[0].cached_bytes == len(MODEL["config.json"])


def test_a_missing_shard_makes_the_cache_incomplete(hub):
    index = json.dumps({"weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}).encode()
    files = MODEL | {
        "model.safetensors.index.json": index,
        "a.safetensors": shard(10, "a"),
        "b.safetensors": shard(10, "b"),
    }
    del files["model.safetensors"]
    hub.publish("org/name", files)
    source = ask("org/name")
    assert set(open_checkpoint(source.path).tensors) == {"a", "b"}
    (source.path / "b.safetensors").unlink()
    with pytest.raises(ModelNotCachedError):
        ask("org/name", offline=True)
    assert ask("org/name") == source


def test_files_of_images_and_draft_heads_stay_on_the_hub(hub):
    index = {"model.norm.weight": "a.safetensors", "visual.x": "b.safetensors", "mtp.y": "b.safetensors"}
    files = MODEL | {
        "model.safetensors.index.json": json.dumps({"weight_map": index}).encode(),
        "a.safetensors": shard(10, "model.norm.weight"),
        "b.safetensors": shard(5000, "visual.x"),
    }
    del files["model.safetensors"]
    hub.publish("org/name", files)
    asked = []
    source = ask("org/name", confirm=lambda download: bool(asked.append(download)) or True)
    assert asked[0].missing_bytes < 2000
    assert set(open_checkpoint(source.path).tensors) == {"model.norm.weight"}
    assert "b.safetensors" not in files_in(source.path)
    assert ask("org/name", confirm=refuse) == ask("org/name", offline=True) == source


def test_too_little_disk_is_an_error_before_the_question(hub, monkeypatch):
    hub.publish("org/name", MODEL)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=100))
    with pytest.raises(DoesNotFitError, match="100 B are free"):
        ask("org/name", confirm=refuse)
    assert hub.num_downloads() == 0


# ---------------------------------------------------------------- refusals


def error_of(kind: type[Exception], text: str = "org/name", **options) -> str:
    """Message and hint of the error, which must be one line each."""
    with pytest.raises(kind) as caught:
        ask(text, confirm=refuse, **options)
    assert type(caught.value) is kind
    assert "\n" not in caught.value.message + caught.value.hint
    return f"{caught.value.message} | {caught.value.hint}"


def test_an_unknown_repository_is_an_error(hub, tmp_path, monkeypatch):
    assert "hf auth login" in error_of(ModelNotFoundError)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert "did you mean ./org/name?" in error_of(ModelNotFoundError)


def test_an_unknown_revision_is_an_error(hub):
    hub.publish("org/name", MODEL)
    assert "no revision 'v9'" in error_of(ModelNotFoundError, "org/name@v9")


def test_a_gated_repository_fails_before_the_question_and_works_with_a_token(hub, monkeypatch):
    hub.publish("org/name", MODEL)
    hub.gated.add("org/name")
    text = error_of(ModelGatedError)
    assert f"{hub.url}/org/name" in text
    assert "hf auth login" in text
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert ask("org/name").revision


def test_a_private_repository_is_an_error(hub, monkeypatch):
    hub.publish("org/name", MODEL)
    hub.private.add("org/name")
    error_of(ModelNotFoundError)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert ask("org/name").revision


@pytest.mark.parametrize(
    ("files", "kind", "words"),
    [
        ({"config.json": b"{}", "pytorch_model.bin": b"x"}, PickledCheckpointError, "pickles"),
        ({"config.json": b"{}", "mmproj-F16.gguf": b"x"}, ModelNotFoundError, "no weights"),
        ({"params.json": b"{}", "consolidated.safetensors": b"x"}, ModelNotFoundError, "no weights"),
        ({"model.safetensors": b"x"}, ModelNotFoundError, "config.json"),
        ({}, ModelNotFoundError, "no weights"),
    ],
)
def test_repositories_without_usable_weights(hub, files, kind, words):
    hub.publish("org/name", files)
    assert words in error_of(kind)
    assert hub.num_downloads() == 0


def test_an_uncached_model_offline_is_an_error(hub):
    hub.publish("org/name", MODEL)
    assert "hf download org/name --revision v1" in error_of(ModelNotCachedError, "org/name@v1", offline=True)
    assert not hub.requests
    assert cached_models() == []


@pytest.mark.parametrize(("status", "kind"), [(500, ModelError), (429, ModelError), (403, ModelGatedError)])
def test_http_errors_become_named_errors(hub, status, kind):
    hub.status = status
    assert str(status) in error_of(kind)


@pytest.mark.parametrize("body", [b"<html>please log in</html>", b"{}"])
def test_an_endpoint_that_is_no_hub_is_an_error(hub, body):
    hub.body = body
    assert "does not respond like a hub" in error_of(HubUnreachableError)


def test_an_unreachable_hub_is_an_error(monkeypatch, dead_url, tmp_path):
    point_to(monkeypatch, dead_url, tmp_path)
    assert f"cannot reach {dead_url}" in error_of(HubUnreachableError)


def test_an_unwritable_cache_is_an_error(hub, tmp_path):
    hub.publish("org/name", MODEL)
    (tmp_path / "hub").write_text("a file where the folder should be")
    with pytest.raises(ModelError) as caught:
        ask("org/name")
    assert "HF_HOME" in caught.value.hint


@pytest.mark.parametrize("trouble", ["unreachable", "failing", "gated", "gone"])
def test_the_cached_copy_is_used_when_the_hub_fails(hub, monkeypatch, dead_url, trouble):
    hub.publish("org/name", MODEL)
    first = ask("org/name")
    if trouble == "unreachable":
        point_to(monkeypatch, dead_url, Path(constants.HF_HUB_CACHE))
    elif trouble == "failing":
        hub.status = 503
    elif trouble == "gated":
        hub.publish("org/name", MODEL | {"config.json": b'{"new": 1}'})
        hub.gated.add("org/name")
    else:
        hub.repos.clear()
    warnings = []
    assert ask("org/name", confirm=refuse, warn=warnings.append) == first
    assert len(warnings) == 1
    assert "cached copy of org/name" in warnings[0]
    assert "\n" not in warnings[0]


# ---------------------------------------------------------------- the environment, and Ctrl-C

CLIENT = """
import signal, sys
from specchat.errors import SpecchatError
from specchat.models.catalog.ref import parse_model
from specchat.models.hub.cache import cached_models
from support.locating import locate
signal.signal(signal.SIGINT, signal.default_int_handler)
def progress(done, total):
    print("progress", done, flush=True)
try:
    source = locate(parse_model(sys.argv[1]), offline=False, confirm=lambda download: True, progress=progress)
    print("path", source.path, *cached_models())
except SpecchatError as error:
    print(type(error).__name__)
except KeyboardInterrupt:
    print("interrupted")
"""


def environment(server: FakeHub, home: Path, **extra: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    path = os.pathsep.join((str(TESTS.parent), str(TESTS)))
    asked = {"HF_ENDPOINT": server.url, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1,localhost", "PYTHONPATH": path}
    return kept | asked | extra


def client(server: FakeHub, home: Path, **extra: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", CLIENT, "org/name"],
        env=environment(server, home, **extra),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )


def test_environment_variables_of_the_hub_are_respected(server, tmp_path):
    server.publish("org/name", MODEL)
    server.gated.add("org/name")
    assert client(server, tmp_path / "a").stdout == "ModelGatedError\n"
    result = client(server, tmp_path / "a", HF_TOKEN=TOKEN)
    assert f"path {tmp_path}/a/hub/models--org--name/snapshots/" in result.stdout
    assert result.stdout.endswith(" org/name\n")
    assert result.stderr == ""  # no bars of huggingface_hub's own
    server.requests.clear()
    assert "path" in client(server, tmp_path / "a", HF_HUB_OFFLINE="1").stdout
    assert client(server, tmp_path / "b", HF_HUB_OFFLINE="1").stdout == "ModelNotCachedError\n"
    assert not server.requests


PIECE_BYTES = 11_000_000


def test_ctrl_c_ends_a_download_at_its_next_chunk(server, tmp_path, monkeypatch):
    # huggingface_hub reports every 10 MiB: five pieces that hold one more each, sent when released, the last one never.
    server.publish("org/name", MODEL | {"model.safetensors": shard(55_000_000)})
    real, released = Handler.reply, threading.Semaphore(1)

    def reply(self, status, body=b"", **headers):
        if self.command == "GET" and len(body) > 1_000_000:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            with suppress(ConnectionError):  # the client leaves early
                for start in range(0, len(body), PIECE_BYTES):
                    released.acquire()
                    self.wfile.write(body[start : start + PIECE_BYTES])
        else:
            real(self, status, body, **headers)

    monkeypatch.setattr(Handler, "reply", reply)
    patient = environment(server, tmp_path, HF_HUB_DOWNLOAD_TIMEOUT="60")
    process = subprocess.Popen(
        [sys.executable, "-c", CLIENT, "org/name"], env=patient, stdout=subprocess.PIPE, text=True
    )
    lines = iter(process.stdout.readline, "")
    for line in lines:
        if line.startswith("progress") and int(line.split()[1]) > 9_000_000:
            break
    process.send_signal(signal.SIGINT)
    for _ in range(3):  # one piece is enough, unless it comes before a busy machine gets to the signal
        released.release()
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=20)
            break
    ended = process.poll() is not None
    released.release(5)
    assert ended and "interrupted\n" in list(lines)
    assert not list(tmp_path.rglob("snapshots/*/model.safetensors"))


# ---------------------------------------------------------------- plans before downloads


def test_a_plan_downloads_one_small_file(hub):
    hub.publish("org/name", MODEL)
    missing = look_up(parse_model("org/name"), offline=False, warn=pytest.fail)
    assert isinstance(missing, Download)
    source = sketch(missing, Path("/nonexistent"))
    assert (source.path / "config.json").read_bytes() == MODEL["config.json"]
    assert files_in(source.path) == {"config.json"} and source.revision == missing.revision
    # what was fetched for a plan does not pass for a model
    with pytest.raises(ModelNotCachedError):
        look_up(parse_model("org/name"), offline=True)
    assert files_in(ask("org/name").path) == FETCHED


def test_a_shape_is_planned_from_figures(tmp_path):
    ref = parse_model("shape:llama-70b")
    source = sketch(look_up(ref, offline=True), tmp_path)
    assert json.loads((source.path / "config.json").read_text())["num_hidden_layers"] == 80
    assert source.name == "shape:llama-70b" and source.is_toy
