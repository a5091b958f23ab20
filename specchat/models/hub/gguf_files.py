"""The GGUF files of a repository: one model in several quantizations, each one file or a set of split ones."""

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath

from specchat.errors import ModelNotFoundError
from specchat.models.catalog.ref import ModelRef
from specchat.models.checkpoint.gguf import split_files
from specchat.units import format_bytes

GGUF_PATTERNS = ["*.gguf"]
# The quantization is the last such word in the name: Qwen3-8B-UD-Q4_K_XL.gguf, x.IQ3_M-00001-of-00002.gguf.
_VARIANT = re.compile(
    r"(?:^|[-._])(?P<name>(?:UD-)?(?:I?Q\d\w*|TQ\d_\d|BF16|F16|FP16|F32|MXFP4\w*|NVFP4\w*))"
    r"(?:-\d{5}-of-\d{5})?\.gguf$",
    re.IGNORECASE,
)
_NOT_MODELS = ("mmproj", "imatrix")


def means_gguf(ref: ModelRef, names: Iterable[str]) -> bool:
    """Return whether a model is read from GGUF files: a quantization is named, or the repository has nothing else."""
    names = list(names)
    has_weights = any(name.endswith(".safetensors") and "/" not in name for name in names)
    return ref.variant is not None or (not has_weights and bool(_sets(names)))


def choose_files(ref: ModelRef, sizes: Mapping[str, int]) -> tuple[str, ...]:
    """Return the files of the quantization that a MODEL argument names, or of the only one.

    Args:
        ref: parsed hub id.
        sizes: bytes of each file in the repository.

    Raises:
        ModelNotFoundError: no such quantization, or several and none is named; the message lists them with sizes.
    """
    sets = _sets(sizes)
    if not sets:
        raise ModelNotFoundError(
            f"{ref.repo_id} has no GGUF files", hint=f"name the model without a quantization: {ref.repo_id}"
        )
    wanted = None if ref.variant is None else ref.variant.lower()
    if wanted is None and len(sets) == 1:
        return next(iter(sets.values()))
    for name, files in sets.items():
        if name.lower() == wanted:
            return files
    by_size = {name: sum(sizes[file] for file in files) for name, files in sets.items()}
    names = sorted(by_size, key=by_size.__getitem__)
    listed = ", ".join(f"{name} ({format_bytes(by_size[name])})" for name in names)
    problem = "has several quantizations" if wanted is None else f"has no quantization '{ref.variant}'; it has"
    example = "Q4_K_M" if "Q4_K_M" in sets else names[0]
    raise ModelNotFoundError(f"{ref.repo_id} {problem}: {listed}", hint=f"choose one: {ref.repo_id}:{example}")


def find_file(folder: Path, variant: str | None) -> Path | None:
    """Return the first GGUF file of a quantization below a folder; None if it is missing, incomplete or ambiguous."""
    found = [file for name, file in _first_files(folder) if variant is None or name.lower() == variant.lower()]
    return found[0] if len(found) == 1 and is_whole(found[0]) else None


def variants(folder: Path) -> dict[str, Path]:
    """Return the first GGUF file of each complete quantization below a folder, by the quantization's name."""
    return {name: file for name, file in _first_files(folder) if is_whole(file)}


def is_whole(file: Path) -> bool:
    """Return whether all files of a GGUF file's set exist."""
    return all(each.is_file() for each in split_files(file))


def _first_files(folder: Path) -> Iterator[tuple[str, Path]]:
    names = [str(path.relative_to(folder)) for path in folder.rglob("*.gguf")]
    return ((name, folder / files[0]) for name, files in _sets(names).items())


def _sets(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Return the files of each quantization, sorted; a file without a known one counts under its own name."""
    sets: dict[str, list[str]] = {}
    for name in sorted(names):
        file = PurePosixPath(name)
        if file.suffix.lower() == ".gguf" and not any(word in file.name.lower() for word in _NOT_MODELS):
            match = _VARIANT.search(file.name)
            sets.setdefault(match["name"] if match else file.stem, []).append(name)
    return {variant: tuple(files) for variant, files in sets.items()}
