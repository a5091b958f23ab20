"""The hub's local cache: complete snapshots, found without the network."""

from fnmatch import fnmatchcase
from pathlib import Path

from specchat.errors import (
    CorruptCheckpointError,
    ModelNotCachedError,
    ModelNotFoundError,
    PickledCheckpointError,
)
from specchat.models.catalog.ref import ModelRef
from specchat.models.checkpoint.safetensors import MISTRAL_PREFIX, weight_files
from specchat.models.hub.errors import hub_errors
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

# Subfolders hold other formats (original/, onnx/, ...). Mistral's own layout duplicates the weights.
IGNORE = ["*/*", f"{MISTRAL_PREFIX}*"]


def cached_models() -> list[str]:
    """List MODEL arguments that the local cache can load offline, sorted: org/name, or org/name@revision."""
    from huggingface_hub import constants, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repos = scan_cache_dir(constants.HF_HUB_CACHE).repos
    except CacheNotFound:
        return []
    names = set()
    for repo in repos:
        for revision in repo.revisions:
            # Skip old ids without an organization, such as "gpt2": a MODEL argument cannot name them.
            if repo.repo_type == "model" and "/" in repo.repo_id and _is_complete(revision.snapshot_path):
                labels = revision.refs or {revision.commit_hash}
                names |= {repo.repo_id if label == "main" else f"{repo.repo_id}@{label}" for label in labels}
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
                revision=ref.revision,
                local_files_only=True,
                allow_patterns=ALLOW,
                # `_is_complete` looks for the weights: the library does not know which of them text needs.
                ignore_patterns=[*IGNORE, "*.safetensors"],
            )
        except LocalEntryNotFoundError:
            return None
    return Path(folder) if _is_complete(Path(folder)) else None


def _is_complete(snapshot: Path) -> bool:
    """Return whether config.json and all weights exist; other programs may cache only a part."""
    try:
        return (snapshot / "config.json").is_file() and all(file.is_file() for file in weight_files(snapshot))
    except (CorruptCheckpointError, ModelNotFoundError, PickledCheckpointError):
        return False


def matches(name: str, patterns: list[str]) -> bool:
    """Match names as huggingface_hub does: `*` also matches slashes."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)
