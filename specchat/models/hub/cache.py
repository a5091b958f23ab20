"""The hub's local cache: complete snapshots, found without the network."""

import re
from fnmatch import fnmatchcase
from pathlib import Path

from specchat.errors import (
    CorruptCheckpointError,
    ModelNotCachedError,
    ModelNotFoundError,
    PickledCheckpointError,
)
from specchat.files import read_regular
from specchat.models.catalog.ref import ModelRef
from specchat.models.checkpoint.safetensors import MISTRAL_PREFIX, weight_files
from specchat.models.hub.errors import hub_errors
from specchat.models.hub.gguf_files import find_file, variants
from specchat.records.model import ModelSource

# Fixed patterns allow a completeness check of a cached snapshot without the hub's list of files.
ALLOW = [
    "*.json",
    "*.safetensors",
    "*.jinja",
    "tokenizer.model",
    "*.tiktoken",
    "merges.txt",
    "vocab.txt",
]

_NO_FILE = "no file"  # matches nothing
_COMMIT = re.compile("[0-9a-f]{40}")

# Subfolders hold other formats (original/, onnx/, ...). Mistral's own layout duplicates the weights.
IGNORE = ["*/*", f"{MISTRAL_PREFIX}*"]


def cached_models() -> list[str]:
    """List MODEL arguments that the local cache can load offline, sorted: org/name, or org/name@revision."""
    from huggingface_hub import constants

    names: set[str] = set()
    # Old ids without an organization, such as "gpt2", are left out: a MODEL argument cannot name them.
    for repo in Path(constants.HF_HUB_CACHE).glob("models--*--*"):
        repo_id = repo.name.removeprefix("models--").replace("--", "/")
        labels = _labels(repo)
        for snapshot in filter(_is_complete, (repo / "snapshots").glob("*")):
            found = labels.get(snapshot.name, [snapshot.name])
            names |= {repo_id if label == "main" else f"{repo_id}@{label}" for label in found}
    return sorted(names)


def cached_gguf() -> list[str]:
    """List the GGUF files in the local cache as MODEL arguments, sorted: org/name:QUANT, of the default branch."""
    from huggingface_hub import constants

    names: set[str] = set()
    for repo in Path(constants.HF_HUB_CACHE).glob("models--*--*"):
        repo_id = repo.name.removeprefix("models--").replace("--", "/")
        main = _recorded(repo / "refs" / "main")
        if main is not None and _COMMIT.fullmatch(main):
            names |= {f"{repo_id}:{variant}" for variant in variants(repo / "snapshots" / main)}
    return sorted(names)


def look_up_cached(ref: ModelRef) -> ModelSource:
    """Return the complete cached snapshot of `ref`.

    Raises:
        ModelNotCachedError: the cache holds no complete snapshot.
    """
    from huggingface_hub import constants

    snapshot = find_snapshot(ref)
    if snapshot is None:
        revision = f" --revision {ref.revision}" if ref.revision else ""
        raise ModelNotCachedError(
            f"{ref.text} is missing or incomplete in the local cache {constants.HF_HUB_CACHE}",
            hint=f"while online, run: hf download {ref.repo_id}{revision}",
        )
    return snapshot_source(ref, snapshot)


def snapshot_source(ref: ModelRef, snapshot: Path) -> ModelSource:
    """Return a cached snapshot as a source with the commit as its revision."""
    # The cache names each snapshot's folder after its commit.
    return ModelSource(name=ref.text, path=snapshot, revision=snapshot.name)


def find_snapshot(ref: ModelRef) -> Path | None:
    """Find the complete cached snapshot of `ref` without the network; None if there is none."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    assert ref.repo_id is not None
    with hub_errors(ref):
        try:
            folder = snapshot_download(
                ref.repo_id,
                revision=_commit_of(ref) or ref.revision,
                local_files_only=True,
                # The checks below look for the weights: the library does not know which of them text needs.
                allow_patterns=ALLOW if ref.variant is None else [_NO_FILE],
                ignore_patterns=[*IGNORE, "*.safetensors"],
            )
        except LocalEntryNotFoundError:
            return None
    if ref.variant is not None:
        return None if find_file(Path(folder), ref.variant) is None else Path(folder)
    return Path(folder) if _is_complete(Path(folder)) else None


def _commit_of(ref: ModelRef) -> str | None:
    """Return the commit that the cache records for a branch or tag; None without a record.

    huggingface_hub takes the record literally, so it does not find a commit with a line break after it, as an editor or
    `git` writes it.
    """
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    assert ref.repo_id is not None
    repo = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=ref.repo_id, repo_type="model")
    commit = _recorded(repo / "refs" / (ref.revision or "main"))
    return commit if commit is not None and _COMMIT.fullmatch(commit) else None


def _labels(repo: Path) -> dict[str, list[str]]:
    """Return the branches and tags of each commit that the cache records for a repository."""
    labels: dict[str, list[str]] = {}
    for file in (repo / "refs").rglob("*"):
        commit = _recorded(file)
        if commit is not None:
            labels.setdefault(commit, []).append(file.relative_to(repo / "refs").as_posix())
    return labels


def _recorded(file: Path) -> str | None:
    try:
        return read_regular(file).decode("utf-8-sig").strip()
    except (OSError, UnicodeDecodeError):  # missing, a folder, or damaged
        return None


def _is_complete(snapshot: Path) -> bool:
    """Return whether config.json and all weights exist; other programs may cache only a part."""
    try:
        return (snapshot / "config.json").is_file() and all(file.is_file() for file in weight_files(snapshot))
    except (CorruptCheckpointError, ModelNotFoundError, PickledCheckpointError):
        return False


def matches(name: str, patterns: list[str]) -> bool:
    """Match names as huggingface_hub does: `*` also matches slashes."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)
