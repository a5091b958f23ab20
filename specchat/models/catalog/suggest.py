"""Answers for a MODEL argument that is no model: what was probably meant."""

import difflib
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path

from specchat.files import open_regular
from specchat.models.catalog.families import known_families
from specchat.models.catalog.known_models import known_models

FORMS = "MODEL is demo, a folder or GGUF file such as ./x, a hub id such as org/name, or a shape such as shape:llama-8b"
# Endings of files that lie in a model's folder. No name on the hub ends like this.
_FILE_ENDINGS = (".json", ".safetensors", ".gguf", ".bin", ".pth", ".pt")
_GGUF_MAGIC = b"GGUF"
_MOST_SHOWN = 3
_LONGEST_QUOTE = 48
_DEMO = "demo"
_LIKE = 0.75  # the least similarity of a misspelt name, from 0 to 1
# Sizes such as 8b, 8x7b and 270m, version numbers such as 3.2, and words.
_TOKEN = re.compile(r"(?:\d+x)?\d+(?:\.\d+)?[bkm](?![a-z])|\d+(?:\.\d+)?|[a-z]+")


def names_file(text: str) -> bool:
    """Return whether a MODEL argument names an existing file of a model."""
    return text.lower().endswith(_FILE_ENDINGS) and _exists(Path(text), Path.is_file)


def is_gguf(path: Path) -> bool:
    """Return whether a path has the ending of GGUF files, or a file the beginning of one (as ollama names them)."""
    if path.suffix.lower() == ".gguf":
        return True
    try:
        if not path.is_file():
            return False
        with open_regular(path) as stream:
            return stream.read(len(_GGUF_MAGIC)) == _GGUF_MAGIC
    except (OSError, ValueError):
        return False


def no_such_path(path: Path) -> tuple[str, str]:
    """Return what is wrong with the path of a model that is neither a folder nor a file, and a hint."""
    if _exists(path, Path.exists):
        return f"{path} is neither a folder nor a file", FORMS
    what = "file" if path.name.lower().endswith(_FILE_ENDINGS) else "folder"
    if not _exists(path.parent, Path.is_dir):
        return f"{what} {path} does not exist", f"there is no folder {path.parent} either"
    close = difflib.get_close_matches(path.name, _names_in(path.parent), n=1, cutoff=_LIKE)
    if close:
        return f"{what} {path} does not exist", f"did you mean {_as_path(path.parent / close[0])}?"
    return f"{what} {path} does not exist", "check the path; a hub id has the form org/name, without ./"


def _names_in(folder: Path) -> list[str]:
    """List what a folder holds that may be a model: folders and files of weights; nothing if it cannot be read."""
    try:
        return [each.name for each in folder.iterdir() if each.suffix.lower() == ".gguf" or each.is_dir()]
    except OSError:
        return []


def _as_path(path: Path) -> str:
    """Return a path in a form that MODEL takes as one."""
    shown = str(path)
    return shown if path.is_absolute() or shown.startswith(".") else f"./{shown}"


def folder_hint(path: Path) -> str:
    """Return the hint for a file that was given in place of its model's folder."""
    return f"did you mean its folder, {_as_path(path.parent)}?"


def looks_like_prompt(text: str) -> bool:
    """Return whether a text has several words, as no MODEL has; a hub id may only be misspelt."""
    words = text.split()
    return len(words) > 1 and "/" not in words[0]


def quoted(text: str) -> str:
    """Return a text in quotes, in one line and cut to a readable length."""
    line = " ".join(text.split())
    return f"'{line}'" if len(line) <= _LONGEST_QUOTE else f"'{line[:_LONGEST_QUOTE].rstrip()}...'"


def guess(text: str, names_here: Callable[[], Iterable[str]]) -> str:
    """Return the hint for an invalid MODEL: the likeliest models, or else all forms of MODEL.

    Args:
        text: invalid MODEL.
        names_here: lists aliases and cached models; they come before models that must be downloaded.
    """
    if text and _exists(Path(text), Path.is_dir):
        return f"did you mean ./{text}?"
    likely = likely_models(text, [*names_here(), _DEMO])
    return f"did you mean {_listed(likely)}?" if likely else f"{FORMS}; demo always works"


def likely_models(text: str, names_here: Iterable[str] = ()) -> list[str]:
    """Return the models that a short name such as `llama3.2` or `qwen2.5:7b` may stand for, likeliest first.

    Where no model has all parts of the name, the last parts are left out. Where even that finds nothing, the name may
    be misspelt.

    Args:
        text: short name.
        names_here: aliases and cached models.
    """
    names = list(dict.fromkeys(chain(names_here, _known_names())))
    wanted = _tokens(text)
    for count in range(len(wanted), 0, -1):
        if len(wanted[:count]) == 1 and len(wanted[0]) < 3:
            break
        found = {
            name: extra for name in names if (extra := _num_extra(wanted[:count], _tokens(_last(name)))) is not None
        }
        if found:
            exact = [name for name, extra in found.items() if not extra]
            return (exact or sorted(found, key=found.__getitem__))[:_MOST_SHOWN]
    return _misspelt(text, names)


def _known_names() -> Iterator[str]:
    """Yield the models and drafts that specchat knows by name."""
    yield from (model.id for model in known_models().values() if model.offered)
    yield from (draft for family in known_families().families for draft in family.drafts)


def _tokens(text: str) -> list[str]:
    return _TOKEN.findall(text.lower())


def _last(name: str) -> str:
    return name.rpartition("/")[2].partition("@")[0]


def _num_extra(wanted: list[str], tokens: list[str]) -> int | None:
    """Return how many tokens of a name were not asked for; None if a wanted token is missing or out of order."""
    rest = iter(tokens)
    return len(tokens) - len(wanted) if all(any(_agrees(each, token) for token in rest) for each in wanted) else None


def _agrees(wanted: str, token: str) -> bool:
    """Return whether a token is the wanted one, a longer word, or a later release of the wanted version."""
    if wanted.isalpha():
        return token == wanted or (len(wanted) > 2 and token.startswith(wanted))
    return token == wanted or token.startswith(f"{wanted}.")


def _misspelt(text: str, names: list[str]) -> list[str]:
    by_last = {_last(name).lower(): name for name in reversed(names)}
    close = difflib.get_close_matches(_last(text).lower(), by_last, n=_MOST_SHOWN, cutoff=_LIKE)
    return [by_last[each] for each in close]


def _listed(names: list[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} or {last}" if first else last


def _exists(path: Path, check: Callable[[Path], bool]) -> bool:
    try:
        return check(path)
    except (OSError, ValueError):  # the name is too long, or contains NUL
        return False
