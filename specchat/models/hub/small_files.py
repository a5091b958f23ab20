"""Small files of a repository, such as those of a tokenizer: downloaded without a question."""

from collections.abc import Sequence
from pathlib import Path

from specchat.errors import ModelNotFoundError
from specchat.models.catalog.ref import ModelRef
from specchat.models.hub.download import silent_bars
from specchat.models.hub.errors import hub_errors


def fetch_small(ref: ModelRef, names: Sequence[str], *, offline: bool) -> Path:
    """Download small files, or find them in the cache, and return their folder.

    Args:
        ref: parsed hub id.
        names: files to download; not all need exist.
        offline: whether only the cache is searched.

    Raises:
        ModelNotFoundError: the repository has none of the files.
        ModelError: the hub cannot be reached, or the files are not cached while offline.
    """
    from huggingface_hub import snapshot_download

    assert ref.repo_id is not None
    with hub_errors(ref):
        folder = Path(
            snapshot_download(
                ref.repo_id,
                revision=ref.revision,
                allow_patterns=list(names),
                local_files_only=offline,
                tqdm_class=silent_bars(),
            )
        )
    if not any((folder / name).is_file() for name in names):
        raise ModelNotFoundError(f"{ref.text} has no tokenizer files", hint="name the original model")
    return folder
