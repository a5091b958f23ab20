"""From a model's name to a folder with its files: local folders, and the hub through huggingface_hub alone.

HF_HOME, HF_HUB_CACHE, HF_TOKEN, HF_HUB_OFFLINE and HF_ENDPOINT mean what they mean to huggingface_hub, which reads them
when it is first imported; it is imported inside functions, since it takes a third of a second.
"""

import errno
import logging
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from specchat.config import ModelSource
from specchat.errors import (
    CorruptCheckpointError,
    DoesNotFitError,
    ModelError,
    ModelGatedError,
    ModelNotCachedError,
    ModelNotFoundError,
    PickledCheckpointError,
    SpecchatError,
    UsageError,
)
from specchat.models.catalog.ref import SHAPE_PREFIX, ModelRef, demo_source
from specchat.models.catalog.shape import Shape
from specchat.models.checkpoint.safetensors import MISTRAL_PREFIX, PICKLE_SUFFIXES, weight_files
from specchat.units import format_bytes

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

_T = TypeVar("_T")
LOG = logging.getLogger(__name__)

# Fixed patterns, so that a cached snapshot can be checked for completeness without the hub's list of files.
_ALLOW = [
    "*.json",
    "*.safetensors",
    "*.jinja",
    "tokenizer.model",
    "*.tiktoken",
    "merges.txt",
    "vocab.txt",
]
# Folders hold other formats (original/, onnx/, ...); Mistral's own layout repeats the weights.
_IGNORE = ["*/*", f"{MISTRAL_PREFIX}*"]


@dataclass(frozen=True)
class Download:
    """What would be downloaded, to be agreed to.

    Attributes:
        ref: what the user asked for.
        revision: the commit.
        num_bytes: all files of the model.
        cached_bytes: those of them that are in the cache already.
        free_disk_bytes: free space where the cache is.
        folder: the cache.
        has_older: whether an older copy is complete in the cache.
    """

    ref: ModelRef
    revision: str
    num_bytes: int
    cached_bytes: int
    free_disk_bytes: int
    folder: Path
    has_older: bool = False

    @property
    def name(self) -> str:
        """What the user typed."""
        return self.ref.text

    @property
    def missing_bytes(self) -> int:
        """What has to come over the network and onto the disk."""
        return self.num_bytes - self.cached_bytes


# What a model needs before it can be used: a download, or to be made.
Missing = Download | Shape


def look_up(ref: ModelRef, *, offline: bool, warn: Callable[[str], None] = LOG.warning) -> ModelSource | Missing:
    """Where the files of `ref` are, or what it takes to have them; nothing is downloaded or made.

    Args:
        ref: from `parse_model`.
        offline: the network is not touched (HF_HUB_OFFLINE=1 has the same effect).
        warn: told in one line when the hub cannot be asked and a cached copy is used.

    Raises:
        ModelNotFoundError: no such folder, repository or revision, or no weights in it.
        ModelGatedError: a login or an accepted licence is needed.
        ModelNotCachedError: offline, and not completely in the cache.
        PickledCheckpointError: weights only as pickles.
        ModelError: the hub cannot be reached or failed.
    """
    if ref.kind == "demo":
        return demo_source("target")
    if ref.kind == "folder":
        return _look_up_folder(ref)
    if ref.kind == "shape":
        assert ref.shape is not None
        return ref.shape
    from huggingface_hub import constants

    if offline or constants.HF_HUB_OFFLINE:
        return _look_up_cached(ref)
    return _look_up_online(ref, warn)


def agree(downloads: Sequence[Download], confirm: Callable[[Sequence[Download]], bool]) -> None:
    """Asks before anything is downloaded, once for all of it.

    Args:
        downloads: what is missing; nothing is asked if no byte is.
        confirm: asked once at most.

    Raises:
        DoesNotFitError: the disk is too small.
        UsageError: no.
    """
    downloads = [each for each in downloads if each.missing_bytes]
    if not downloads:
        return
    names = " and ".join(download.name for download in downloads)
    missing, free = sum(each.missing_bytes for each in downloads), downloads[0].free_disk_bytes
    or_cached = ", or --offline to use the older copy in the cache" * any(each.has_older for each in downloads)
    if missing > free:
        raise DoesNotFitError(
            f"{names} needs {format_bytes(missing)} on the disk of {downloads[0].folder}, "
            f"where {format_bytes(free)} are free",
            hint=f"free some space, or set HF_HOME to a folder on a larger disk{or_cached}",
        )
    if not confirm(downloads):
        raise UsageError(
            f"the download of {names} ({format_bytes(missing)}) was not confirmed",
            hint=f"add --yes to download without being asked{or_cached}",
        )


def obtain(
    missing: Missing,
    *,
    progress: Callable[[int, int], None] | None = None,
    warn: Callable[[str], None] = LOG.warning,
) -> ModelSource:
    """Downloads or makes what `look_up` found missing, once the user has agreed.

    Args:
        missing: from `look_up`.
        progress: told (bytes done, bytes to download or to write), maybe from other threads, one at a time.
        warn: told in one line what is written for a shape.

    Raises:
        ModelError: the hub cannot be reached or failed.
        DoesNotFitError: the disk is too small.
    """
    if isinstance(missing, Download):
        return _snapshot_source(missing.ref, _fetch(missing, progress))
    from specchat.models.synthetic.layers import materialise  # with torch

    return materialise(missing, progress=progress, warn=warn)


def sketch(missing: Missing, folder: Path) -> ModelSource:
    """The configuration of what `look_up` found missing: enough to plan for it, at the cost of one small file.

    Args:
        missing: from `look_up`.
        folder: an existing one, for the configuration of a shape.

    Raises:
        ModelError: the hub cannot be reached or failed.
    """
    if isinstance(missing, Download):
        from huggingface_hub import hf_hub_download

        ref = missing.ref
        assert ref.repo_id is not None
        with _hub_errors(ref):
            config = hf_hub_download(ref.repo_id, "config.json", revision=missing.revision)
        return _snapshot_source(ref, Path(config).parent)
    from specchat.models.synthetic.layers import LABEL, shape_files  # with torch

    path = folder / missing.label.replace("/", "-")
    path.mkdir()
    (path / "config.json").write_bytes(shape_files(missing)["config.json"])
    return ModelSource(name=f"{SHAPE_PREFIX}{missing.label}", path=path, label=LABEL)


def cached_models() -> list[str]:
    """MODEL arguments that the local hub cache can serve offline, sorted: org/name, or org/name@revision."""
    from huggingface_hub import constants, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repos = scan_cache_dir(constants.HF_HUB_CACHE).repos
    except CacheNotFound:
        return []
    names = set()
    for repo in repos:
        for revision in repo.revisions:
            # Old ids without an organization cannot be written as a MODEL.
            if repo.repo_type == "model" and "/" in repo.repo_id and _is_complete(revision.snapshot_path):
                labels = revision.refs or {revision.commit_hash}
                names |= {repo.repo_id if label == "main" else f"{repo.repo_id}@{label}" for label in labels}
    return sorted(names)


def _look_up_folder(ref: ModelRef) -> ModelSource:
    assert ref.path is not None
    if not ref.path.is_dir():
        raise ModelNotFoundError(f"there is no folder {ref.path}", hint="a hub id has the form org/name, without ./")
    if not (ref.path / "config.json").is_file():
        raise ModelNotFoundError(f"{ref.path} has no config.json", hint="give the folder that holds config.json")
    return ModelSource(name=ref.text, path=ref.path)


def _look_up_cached(ref: ModelRef) -> ModelSource:
    from huggingface_hub import constants

    snapshot = _find_snapshot(ref)
    if snapshot is None:
        revision = f" --revision {ref.revision}" if ref.revision else ""
        raise ModelNotCachedError(
            f"{ref.text} is not, or not completely, in the local cache {constants.HF_HUB_CACHE}",
            hint=f"while online, run: hf download {ref.repo_id}{revision}",
        )
    return _snapshot_source(ref, snapshot)


def _look_up_online(ref: ModelRef, warn: Callable[[str], None]) -> ModelSource | Download:
    snapshot = _find_snapshot(ref)
    if snapshot is not None and snapshot.name == ref.revision:  # a commit never changes
        return _snapshot_source(ref, snapshot)
    try:
        commit = _resolve(ref)
        if snapshot is not None and snapshot.name == commit:
            return _snapshot_source(ref, snapshot)
        return _measure(ref, commit, has_older=snapshot is not None)
    except ModelError as exc:
        if snapshot is None:
            raise
        warn(f"using the cached copy of {ref.text}: {exc.message}")
        return _snapshot_source(ref, snapshot)


def _snapshot_source(ref: ModelRef, snapshot: Path) -> ModelSource:
    # The cache names each snapshot's folder after its commit.
    return ModelSource(name=ref.text, path=snapshot, revision=snapshot.name)


def _find_snapshot(ref: ModelRef) -> Path | None:
    """The complete cached snapshot of `ref`, or None; touches no network."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    assert ref.repo_id is not None
    with _hub_errors(ref):
        try:
            folder = snapshot_download(
                ref.repo_id,
                revision=ref.revision,
                local_files_only=True,
                allow_patterns=_ALLOW,
                ignore_patterns=_IGNORE,
            )
        except LocalEntryNotFoundError:
            return None
    return Path(folder) if _is_complete(Path(folder)) else None


def _is_complete(snapshot: Path) -> bool:
    """Whether config.json and all weights are there; other programs may have cached a part only."""
    try:
        return (snapshot / "config.json").is_file() and all(file.is_file() for file in weight_files(snapshot))
    except (CorruptCheckpointError, ModelNotFoundError, PickledCheckpointError):
        return False


def _resolve(ref: ModelRef) -> str:
    """The commit that the hub has for `ref`; refuses what could not be run before anything is downloaded."""
    from huggingface_hub import HfApi, constants

    assert ref.repo_id is not None
    with _hub_errors(ref):
        try:
            info = HfApi().model_info(ref.repo_id, revision=ref.revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        except KeyError as exc:
            raise _not_a_hub(exc) from exc
    if info.sha is None or info.siblings is None:
        raise _not_a_hub(None)
    _check_files(ref, [sibling.rfilename for sibling in info.siblings])
    return info.sha


def _check_files(ref: ModelRef, names: list[str]) -> None:
    wanted = [name for name in names if _matches(name, _ALLOW) and not _matches(name, _IGNORE)]
    if not any(name.endswith(".safetensors") for name in wanted):
        pickles = sorted(name for name in names if "/" not in name and name.endswith(PICKLE_SUFFIXES))
        if pickles:
            raise PickledCheckpointError(
                f"{ref.text} has its weights only as pickles ({pickles[0]}), which may run code when opened",
                hint="convert it at https://huggingface.co/spaces/safetensors/convert",
            )
        raise ModelNotFoundError(
            f"{ref.text} has no weights in the transformers layout (*.safetensors)",
            hint="choose the repository with the original weights, not one of GGUF files or adapters",
        )
    if "config.json" not in wanted:
        raise ModelNotFoundError(
            f"{ref.text} has no config.json", hint="choose a repository in the transformers layout"
        )


def _matches(name: str, patterns: list[str]) -> bool:
    """As huggingface_hub matches them: `*` also takes slashes."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _measure(ref: ModelRef, commit: str, *, has_older: bool) -> Download:
    """Sizes of the files; asks for each one, so a gated repository shows here and not after the user's yes."""
    from huggingface_hub import constants, snapshot_download

    assert ref.repo_id is not None
    with _hub_errors(ref):
        files = snapshot_download(
            ref.repo_id,
            revision=commit,
            allow_patterns=_ALLOW,
            ignore_patterns=_IGNORE,
            dry_run=True,
            tqdm_class=_bar_class(lambda done: None, threading.Event()),
        )
    folder = Path(constants.HF_HUB_CACHE)
    return Download(
        ref=ref,
        revision=commit,
        num_bytes=sum(file.file_size or 0 for file in files),
        cached_bytes=sum(file.file_size or 0 for file in files if file.is_cached),
        free_disk_bytes=_free_disk_bytes(folder),
        folder=folder,
        has_older=has_older,
    )


def _free_disk_bytes(folder: Path) -> int:
    """Free bytes on the disk where `folder` is or would be made."""
    folder = folder.absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _fetch(download: Download, progress: Callable[[int, int], None] | None) -> Path:
    """Downloads the agreed commit and lets the cache's name for the revision point to it."""
    from huggingface_hub import snapshot_download

    ref, stop = download.ref, threading.Event()
    repo_id = ref.repo_id
    assert repo_id is not None

    def report(done: int) -> None:
        if progress is not None:
            progress(min(done, download.missing_bytes), download.missing_bytes)

    def work() -> str:
        return snapshot_download(
            repo_id,
            revision=download.revision,
            allow_patterns=_ALLOW,
            ignore_patterns=_IGNORE,
            tqdm_class=_bar_class(report, stop),
        )

    with _hub_errors(ref):
        snapshot = Path(_run_until_interrupted(work, stop))
        _point_to(snapshot, ref.revision or "main")
    report(download.missing_bytes)  # less has come where two files are the same
    return snapshot


def _run_until_interrupted(work: Callable[[], _T], stop: threading.Event) -> _T:
    """The result of `work`, run in a thread: huggingface_hub would finish its files before it lets Ctrl-C through.

    An interrupt sets `stop`, and the progress bars then end each download at its next chunk.
    """
    with ThreadPoolExecutor(max_workers=1) as pool:
        future = pool.submit(work)
        try:
            return future.result()
        except BaseException:
            stop.set()
            _abort_xet()
            raise


def _abort_xet() -> None:
    """Ends hf_xet's transfers, which run outside Python and only report to the bars."""
    try:
        from huggingface_hub.utils._xet import abort_xet_session
    except ImportError:  # not public: without it, Ctrl-C waits for the files under way
        return
    abort_xet_session()  # type: ignore[no-untyped-call]


def _point_to(snapshot: Path, revision: str) -> None:
    """Records in the cache that `revision` is this snapshot, as its documented layout has it (refs/, snapshots/).

    Not left to huggingface_hub, which does it before the download: one that fails or is interrupted would then hide the
    older, complete snapshot from every later offline use.
    """
    if revision == snapshot.name:
        return
    file = snapshot.parent.parent / "refs" / revision
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f"{file.name}.specchat")
    temporary.write_text(snapshot.name)
    temporary.replace(file)


class _StoppedError(Exception):
    """Ends a download from within its progress bar; seen by huggingface_hub's threads only."""


def _bar_class(report: Callable[[int], None], stop: threading.Event) -> type[Any]:
    """A silent tqdm that hands the bytes of its byte bars to `report`, which is called by one thread at a time."""
    from huggingface_hub.utils.tqdm import tqdm

    lock = threading.Lock()
    most = 0

    class Bar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._counts_bytes = kwargs.get("unit") == "B"
            kwargs["disable"] = True
            super().__init__(*args, **kwargs)  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> None:
            nonlocal most
            if self._counts_bytes and stop.is_set():
                raise _StoppedError
            with lock:
                self.n += n or 0
                # There may be two such bars, for the network and for the disk: the one that is ahead counts.
                if self._counts_bytes and self.n > most:
                    most = int(self.n)
                    report(most)

    return Bar


@contextmanager
def _hub_errors(ref: ModelRef) -> Iterator[None]:
    """Turns what huggingface_hub raises into our errors."""
    from huggingface_hub.errors import DryRunError, HfHubHTTPError, LocalEntryNotFoundError

    failures: tuple[type[Exception], ...] = (*_transport_errors(), OSError, ValueError, RuntimeError)  # Runtime: hf_xet
    try:
        yield
    except failures as exc:
        # These two only say that something went wrong with the network before; their cause says what.
        wrapped = isinstance(exc, DryRunError | LocalEntryNotFoundError) and isinstance(exc.__cause__, Exception)
        cause = exc.__cause__ if wrapped else exc
        if isinstance(cause, HfHubHTTPError):
            raise _translate_answer(ref, cause) from exc
        raise _translate_failure(ref, cause) from exc


def _transport_errors() -> tuple[type[Exception], ...]:
    """The HTTP library's own base class, whichever it is: huggingface_hub changed it within the versions we allow."""
    from huggingface_hub.errors import HfHubHTTPError

    return tuple(base for base in HfHubHTTPError.__bases__ if issubclass(base, Exception))


def _translate_answer(ref: ModelRef, exc: "HfHubHTTPError") -> ModelError:
    """For an answer of the hub that is no success."""
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    if isinstance(exc, GatedRepoError):  # before RepositoryNotFoundError, of which it is a subclass
        return ModelGatedError(
            f"{ref.text} is gated: a logged-in user has to accept its licence",
            hint=f"accept it at {constants.ENDPOINT}/{ref.repo_id}, then run: hf auth login",
        )
    if isinstance(exc, RevisionNotFoundError):
        return ModelNotFoundError(
            f"{ref.repo_id} has no revision '{ref.revision}'",
            hint=f"leave @{ref.revision} out, or choose one from {constants.ENDPOINT}/{ref.repo_id}/tree/main",
        )
    if isinstance(exc, RepositoryNotFoundError):
        return ModelNotFoundError(f"{ref.repo_id} is not on the hub, or is private", hint=_not_found_hint(ref))
    status = exc.response.status_code
    if status in (401, 403):
        return ModelGatedError(f"the hub refused access to {ref.text} (HTTP {status})", hint="run: hf auth login")
    if status == 429:
        return ModelError("the hub asks to slow down (HTTP 429)", hint="wait some minutes, or run: hf auth login")
    return ModelError(f"the hub failed on {ref.text} (HTTP {status})", hint="try again later")


def _translate_failure(ref: ModelRef, exc: BaseException | None) -> SpecchatError:
    """For everything that went wrong without the hub saying so."""
    from huggingface_hub import constants
    from huggingface_hub.errors import FileMetadataError, HFValidationError

    if isinstance(exc, HFValidationError):
        return ModelNotFoundError(f"'{ref.text}' is not a hub id", hint="a hub id has the form org/name")
    if isinstance(exc, FileMetadataError | ValueError):
        return _not_a_hub(exc)
    if isinstance(exc, OSError) and exc.errno in (errno.ENOSPC, errno.EDQUOT):
        return DoesNotFitError(f"the disk of {constants.HF_HUB_CACHE} is full", hint="free some space and repeat")
    if isinstance(exc, OSError) and exc.filename is not None:
        return ModelError(
            f"cannot use {exc.filename}: {exc.strerror}", hint="check its permissions, or set HF_HOME to another folder"
        )
    return ModelError(
        f"cannot reach {constants.ENDPOINT}: {_first_line(exc)}",
        hint="check the connection and repeat; models in the cache run with --offline",
    )


def _not_a_hub(exc: BaseException | None) -> ModelError:
    from huggingface_hub import constants

    why = f": {_first_line(exc)}" if exc is not None else ""
    return ModelError(
        f"{constants.ENDPOINT} does not answer like a hub{why}", hint="check HF_ENDPOINT, and any proxy or login page"
    )


def _not_found_hint(ref: ModelRef) -> str:
    assert ref.repo_id is not None
    if Path(ref.repo_id).is_dir():
        return f"did you mean ./{ref.repo_id}?"
    return "check the spelling; for a private one run: hf auth login"


def _first_line(exc: BaseException | None) -> str:
    lines = (line.strip() for line in str(exc).splitlines())
    return next((line for line in lines if line), type(exc).__name__)
