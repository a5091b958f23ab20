"""Look-up on the hub, and downloads after the user's consent.

HF_HOME, HF_HUB_CACHE, HF_TOKEN, HF_HUB_OFFLINE and HF_ENDPOINT have their usual meaning. huggingface_hub reads them on
first import. Functions import it, because the import takes a third of a second.
"""

import logging
import shutil
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from specchat.errors import (
    DoesNotFitError,
    ModelError,
    ModelNotFoundError,
    PickledCheckpointError,
    UsageError,
)
from specchat.models.catalog.ref import ModelRef
from specchat.models.checkpoint.safetensors import INDEX_FILE, PICKLE_SUFFIXES, SINGLE_FILE, read_weight_map
from specchat.models.checkpoint.text_parts import shards_beside_text
from specchat.models.hub.cache import ALLOW, IGNORE, find_snapshot, matches, snapshot_source
from specchat.models.hub.errors import hub_errors, not_a_hub
from specchat.models.hub.gguf_files import GGUF_PATTERNS, choose_files, means_gguf, smallest_head
from specchat.models.hub.model_card import CARD, tagged_bases
from specchat.records.model import ModelSource
from specchat.units import format_bytes

_T = TypeVar("_T")

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Download:
    """A download that needs the user's consent.

    Attributes:
        ref: model that the user asked for.
        revision: commit.
        num_bytes: size of all files of the model.
        cached_bytes: size of the files that are already cached.
        free_disk_bytes: free space on the cache's disk.
        folder: folder of the cache.
        has_older: whether the cache holds a complete older copy.
        skipped: shards that hold nothing that text needs.
        files: GGUF files to download; empty for a model in safetensors.
        weights: files of the weights to download, for a model in safetensors.
        bases: names of the models that the model was made from.
        head: name of the GGUF file beside the model that holds its MTP layer; None without one.
    """

    ref: ModelRef
    revision: str
    num_bytes: int
    cached_bytes: int
    free_disk_bytes: int
    folder: Path
    has_older: bool = False
    skipped: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()
    bases: tuple[str, ...] = ()
    head: str | None = None

    @property
    def name(self) -> str:
        """Name as the user typed it."""
        return self.ref.text

    @property
    def missing_bytes(self) -> int:
        """Bytes to download."""
        return self.num_bytes - self.cached_bytes


def agree(downloads: Sequence[Download], confirm: Callable[[Sequence[Download]], bool]) -> None:
    """Ask once for consent to all downloads.

    Args:
        downloads: possible downloads; complete ones need no consent.
        confirm: returns the user's answer; called once at most.

    Raises:
        DoesNotFitError: the disk is too small.
        UsageError: the user declined.
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
            hint=f"add --yes to download without a question{or_cached}",
        )


def look_up_online(ref: ModelRef, warn: Callable[[str], None]) -> ModelSource | Download:
    """Return the cached snapshot of `ref` if it is the newest, else the download of the newest.

    Args:
        ref: parsed hub id.
        warn: receives a one-line warning when a cached copy is used because the hub is unreachable.
    """
    snapshot = find_snapshot(ref)
    if snapshot is not None and snapshot.name == ref.revision:  # a commit never changes
        return snapshot_source(ref, snapshot)
    try:
        found = _resolve(ref)
        if snapshot is not None and snapshot.name == found.commit:
            return snapshot_source(ref, snapshot)
        measure = _measure_gguf if found.is_gguf else _measure
        return replace(measure(ref, found.commit, has_older=snapshot is not None), bases=found.bases)
    except ModelError as exc:
        if snapshot is None:
            raise
        warn(f"using the cached copy of {ref.text}: {exc.message}")
        return snapshot_source(ref, snapshot)


@dataclass(frozen=True)
class _Resolved:
    """What the hub says of a model: its commit, whether GGUF files are meant, and the models it was made from."""

    commit: str
    is_gguf: bool
    bases: tuple[str, ...]


def _resolve(ref: ModelRef) -> _Resolved:
    """Return what the hub says of `ref`, after checking that files can be read."""
    from huggingface_hub import HfApi, constants

    assert ref.repo_id is not None
    with hub_errors(ref):
        info = HfApi().model_info(ref.repo_id, revision=ref.revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    if info.sha is None or info.siblings is None:
        raise not_a_hub(None)
    names = [sibling.rfilename for sibling in info.siblings]
    if not all(isinstance(name, str) for name in names):
        raise not_a_hub(None)
    is_gguf = means_gguf(ref, names)
    if not is_gguf:
        _check_files(ref, names)
    return _Resolved(info.sha, is_gguf, tagged_bases(info.tags or ()))


def _check_files(ref: ModelRef, names: list[str]) -> None:
    wanted = [name for name in names if matches(name, ALLOW) and not matches(name, IGNORE)]
    if not any(name.endswith(".safetensors") for name in wanted):
        pickles = sorted(name for name in names if "/" not in name and name.endswith(PICKLE_SUFFIXES))
        if pickles:
            raise PickledCheckpointError(
                f"{ref.text} has its weights only as pickles ({pickles[0]}), which may run code when opened",
                hint="convert it at https://huggingface.co/spaces/safetensors/convert",
            )
        raise ModelNotFoundError(
            f"{ref.text} has no weights in the transformers layout (*.safetensors)",
            hint="choose the repository with the original weights or GGUF files, not one with adapters",
        )
    if "config.json" not in wanted:
        raise ModelNotFoundError(
            f"{ref.text} has no config.json", hint="choose a repository in the transformers layout"
        )


def _measure(ref: ModelRef, commit: str, *, has_older: bool) -> Download:
    """Return the sizes of the files; each is requested, so a gated repository fails before the user's consent."""
    assert ref.repo_id is not None
    with hub_errors(ref):
        files = _list_files(ref, commit, ALLOW, IGNORE)
        skipped = _shards_to_skip(ref.repo_id, commit, [file.filename for file in files])
    files = [file for file in files if file.filename not in skipped]
    weights = sorted(file.filename for file in files if file.filename.endswith(".safetensors"))
    download = _download_of(ref, commit, files, has_older=has_older)
    return replace(download, skipped=tuple(sorted(skipped)), weights=tuple(weights))


def _measure_gguf(ref: ModelRef, commit: str, *, has_older: bool) -> Download:
    """Return the sizes of the GGUF files that `ref` names."""
    with hub_errors(ref):
        files = _list_files(ref, commit, GGUF_PATTERNS, None)
    sizes = {file.filename: file.file_size or 0 for file in files}
    chosen = choose_files(ref, sizes)
    files = [file for file in files if file.filename in chosen]
    download = _download_of(ref, commit, files, has_older=has_older)
    return replace(download, files=chosen, head=smallest_head(sizes))


def _list_files(ref: ModelRef, commit: str, patterns: list[str], ignored: list[str] | None) -> list[Any]:
    from huggingface_hub import snapshot_download

    assert ref.repo_id is not None
    return snapshot_download(
        ref.repo_id,
        revision=commit,
        allow_patterns=patterns,
        ignore_patterns=ignored,
        dry_run=True,
        tqdm_class=silent_bars(),
    )


def _download_of(ref: ModelRef, commit: str, files: Sequence[Any], *, has_older: bool) -> Download:
    from huggingface_hub import constants

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


def _shards_to_skip(repo_id: str, commit: str, names: Sequence[str]) -> frozenset[str]:
    """Return the shards that hold nothing that text needs; the index, a small file, is downloaded to see that."""
    if INDEX_FILE not in names or SINGLE_FILE in names:
        return frozenset()
    from huggingface_hub import hf_hub_download

    weight_map = read_weight_map(Path(hf_hub_download(repo_id, INDEX_FILE, revision=commit)))
    return shards_beside_text(weight_map, with_head=True)


def _free_disk_bytes(folder: Path) -> int:
    """Return the free bytes on the disk where `folder` is or would be created."""
    folder = folder.absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def fetch(download: Download, progress: Callable[[int, int], None] | None) -> Path:
    """Download the commit, and let the revision's name in the cache point to it."""
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
            allow_patterns=[*(download.files or ALLOW), CARD],
            ignore_patterns=None if download.files else [*IGNORE, *download.skipped],
            tqdm_class=_bar_class(report, stop),
        )

    with hub_errors(ref):
        snapshot = Path(_run_until_interrupted(work, stop))
        _point_to(snapshot, ref.revision or "main")
    report(download.missing_bytes)  # the sum may be lower, because identical files are downloaded once
    return snapshot


def _run_until_interrupted(work: Callable[[], _T], stop: threading.Event) -> _T:
    """Run `work` in a thread, because huggingface_hub would finish its files before it handles Ctrl-C.

    An interrupt sets `stop`, and the progress bars then abort each download at its next chunk.
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
    """Abort hf_xet's transfers, which run outside Python and only report to the bars."""
    try:
        from huggingface_hub.utils._xet import abort_xet_session
    except ImportError:  # not public: without it, Ctrl-C waits for the current files
        return
    abort_xet_session()  # type: ignore[no-untyped-call]


def _point_to(snapshot: Path, revision: str) -> None:
    """Record in the cache's documented layout (refs/, snapshots/) that `revision` is this snapshot.

    huggingface_hub records it before the download. If that fails or is interrupted, later offline uses would not find
    the older, complete snapshot.
    """
    if revision == snapshot.name:
        return
    file = snapshot.parent.parent / "refs" / revision
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f"{file.name}.specchat")
    temporary.write_text(snapshot.name)
    temporary.replace(file)


class _StoppedError(Exception):
    """Aborts a download from within its progress bar; only huggingface_hub's threads see it."""


def silent_bars() -> type[Any]:
    """Create a tqdm that shows nothing, for downloads of small files."""
    return _bar_class(lambda done: None, threading.Event())


def _bar_class(report: Callable[[int], None], stop: threading.Event) -> type[Any]:
    """Create a silent tqdm that passes the bytes of its byte bars to `report`, from one thread at a time."""
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
                # There may be two byte bars, for the network and for the disk: report the one that is ahead.
                if self._counts_bytes and self.n > most:
                    most = int(self.n)
                    report(most)

    return Bar
