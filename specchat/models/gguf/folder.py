"""The folder of small files that stands for a GGUF file: config.json, tokenizer, and a list of the GGUF files.

The folder lies in the cache and holds no weights. Everything that reads a model's folder also reads this one. It may be
deleted at any time.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from specchat.errors import ModelError
from specchat.models.checkpoint.gguf import FILE_LIST, GgufFile, open_gguf
from specchat.models.gguf.config import config_values, generation_values
from specchat.models.gguf.draft_config import draft_values, is_draft_head
from specchat.models.gguf.tokenizer import tokenizer_files
from specchat.paths import cache_folder

_VERSION = 4  # of the content; raise it when the tables change
_MOST_FOLDERS = 64
# The files of a tokenizer that replaces the one in the metadata.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


def model_folder(file: Path, tokenizer: Path | None = None) -> Path:
    """Return the folder that stands for a GGUF file, and write it unless it exists.

    Args:
        file: GGUF file; any file of a split set names the set.
        tokenizer: folder of the tokenizer to use; None for the one in the metadata.

    Raises:
        ModelNotFoundError: a missing file.
        CorruptCheckpointError: an invalid header.
        UnsupportedModelError: an architecture or a tokenizer that specchat does not know.
        ModelError: a file cannot be read or written.
    """
    file = file.absolute()  # links of the hub's cache stay, because split files are known by their names
    found = open_gguf(file)
    folder = cache_folder() / "gguf" / _key(found.files, tokenizer)
    if not (folder / FILE_LIST).is_file():
        _write(folder, found, tokenizer)
    return folder


def _key(files: Sequence[Path], tokenizer: Path | None) -> str:
    """Return a name that changes with the files."""
    stamps = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    facts = [_VERSION, stamps, None if tokenizer is None else str(tokenizer.resolve())]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def _write(folder: Path, file: GgufFile, tokenizer: Path | None) -> None:
    is_head = is_draft_head(file)  # whose tokenizer is the target's
    contents = {
        "config.json": json.dumps((draft_values if is_head else config_values)(file), indent=1),
        "generation_config.json": json.dumps(generation_values(file)),
        FILE_LIST: json.dumps({"files": [str(each) for each in file.files]}),
        **(tokenizer_files(file) if tokenizer is None and not is_head else {}),
    }
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _drop_oldest(folder.parent)
        temporary = Path(tempfile.mkdtemp(prefix="new-", dir=folder.parent))
        try:
            for name, content in contents.items():
                (temporary / name).write_text(content, encoding="utf-8")
            for name in () if tokenizer is None else TOKENIZER_FILES:
                if (tokenizer / name).is_file():  # type: ignore[operator]  # None has no names
                    shutil.copyfile(tokenizer / name, temporary / name)  # type: ignore[operator]
            _move(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as exc:
        raise ModelError(
            f"cannot write the configuration of {file.files[0]} to {folder}: {exc.strerror or exc}",
            hint="set SPECCHAT_CACHE_DIR to a folder that can be written",
        ) from exc


def _move(temporary: Path, folder: Path) -> None:
    """Move a finished folder to its place, unless another process was faster."""
    try:
        temporary.rename(folder)
    except OSError:
        if not (folder / FILE_LIST).is_file():
            raise


def _drop_oldest(folder: Path) -> None:
    """Delete the oldest folders; the files that they stand for may be gone."""
    folders = sorted(folder.iterdir(), key=lambda each: each.stat().st_mtime_ns, reverse=True)
    for each in folders[_MOST_FOLDERS:]:
        shutil.rmtree(each, ignore_errors=True)
