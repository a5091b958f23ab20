"""The GGUF files of a repository: one model in several quantizations, each one file or a set of split ones.

Beside them may lie heads in files of their own, which draft for the model. Only their whole names name them.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath

from specchat.errors import ModelNotFoundError
from specchat.models.catalog.ref import ModelRef
from specchat.models.checkpoint.gguf import drafts, is_mtp_alone, lies_beside, split_files
from specchat.units import format_bytes

GGUF_PATTERNS = ["*.gguf"]
# The quantization is the last such word in the name: Qwen3-8B-UD-Q4_K_XL.gguf, x.IQ3_M-00001-of-00002.gguf,
# x-Q8_0-mtp.gguf.
_VARIANT = re.compile(
    r"(?:(?<=[-._/])|^)(?:UD-)?"
    r"(?:I?Q\d(?:_[0-9A-Z]+)*|TQ\d_\d|BF16|F16|FP16|F32|MXFP4\w*|NVFP4\w*)(?=[-.])",
    re.IGNORECASE,
)
_NUMBER = re.compile(r"-\d{5}-of-\d{5}$")


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
    found = _named(sizes, ref.variant)
    if len(found) == 1:
        return found[0]
    sets = _sets(sizes)
    if not sets:
        raise ModelNotFoundError(
            f"{ref.repo_id} has no GGUF files", hint=f"name the model without a quantization: {ref.repo_id}"
        )
    by_size = {name: sum(sizes[file] for file in files) for name, files in sets.items()}
    names = sorted(by_size, key=by_size.__getitem__)
    listed = ", ".join(f"{name} ({format_bytes(by_size[name])})" for name in names)
    problem = "has several quantizations" if ref.variant is None else f"has no quantization '{ref.variant}'; it has"
    example = "Q4_K_M" if "Q4_K_M" in sets else names[0]
    raise ModelNotFoundError(f"{ref.repo_id} {problem}: {listed}", hint=f"choose one: {ref.repo_id}:{example}")


def smallest_head(sizes: Mapping[str, int]) -> str | None:
    """Return the name of the smallest file that holds an MTP layer alone; None without one.

    Args:
        sizes: bytes of each file in the repository.
    """
    heads = [name for name in sizes if is_mtp_alone(PurePosixPath(name).name)]
    return _own_name(min(heads, key=sizes.__getitem__)) if heads else None


def find_file(folder: Path, variant: str | None) -> Path | None:
    """Return the first GGUF file of a quantization below a folder; None if it is missing, incomplete or ambiguous."""
    found = [folder / files[0] for files in _named(_names(folder), variant)]
    return found[0] if len(found) == 1 and is_whole(found[0]) else None


def variants(folder: Path) -> dict[str, Path]:
    """Return the first GGUF file of each complete quantization below a folder, by the quantization's name."""
    found = {name: folder / files[0] for name, files in _sets(_names(folder)).items()}
    return {name: file for name, file in found.items() if is_whole(file)}


def is_whole(file: Path) -> bool:
    """Return whether all files of a GGUF file's set exist."""
    return all(each.is_file() for each in split_files(file))


def _names(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in folder.rglob("*.gguf")]


def _named(names: Iterable[str], variant: str | None) -> list[tuple[str, ...]]:
    """Return the files of the models or heads of a name; of all models without one."""
    names = list(names)
    sets = _sets(names)
    if variant is None:
        return list(sets.values())
    wanted = variant.lower()
    if found := [files for name, files in sets.items() if name.lower() == wanted]:
        return found
    if found := [files for files in (*sets.values(), *_heads(names)) if _own_name(files[0]).lower() == wanted]:
        return found
    return [files for name, files in sets.items() if name.lower() == f"ud-{wanted}"]


def _sets(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Return the files of each model by its quantization; by its own name if that is not known, or not the only one."""
    by_stem: dict[tuple[str, str], list[str]] = {}
    for name in sorted(names):
        file = PurePosixPath(name)
        if file.suffix.lower() == ".gguf" and not lies_beside(file.name):
            words = list(_VARIANT.finditer(file.name))
            variant = words[-1][0] if words else ""
            key = _own_name(name).replace(variant, "", 1) if variant else file.stem, variant
            by_stem.setdefault(key, []).append(name)
    variants = Counter(variant.lower() for _, variant in by_stem)
    return {
        variant if variant and variants[variant.lower()] == 1 else _own_name(files[0]): tuple(files)
        for (_, variant), files in by_stem.items()
    }


def _heads(names: Iterable[str]) -> list[tuple[str]]:
    """Return the files that only draft for a model."""
    return [(name,) for name in sorted(names) if drafts(PurePosixPath(name).name)]


def _own_name(name: str) -> str:
    """Return the name of a file or of the first of a split set, without its number and suffix."""
    return _NUMBER.sub("", PurePosixPath(name).stem)
