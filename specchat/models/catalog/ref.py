"""What a MODEL argument means, and which models are known to go together. Looks at names only, never at the network."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from specchat.errors import ModelNotFoundError
from specchat.models.catalog.families import known_families
from specchat.models.catalog.shape import Shape, parse_shape
from specchat.records.model import ModelSource

DEMO = "demo"
TOY_LABEL = "a toy model for exercising the software"
SHAPE_PREFIX = "shape:"

# The hub's own rules for names; revisions are branches, tags or commits.
_HUB_ID = re.compile(r"(?P<repo>\w[\w.-]{0,95}/\w[\w.-]{0,95})(?:@(?P<revision>.+))?", re.ASCII)
_REVISION = re.compile(r"\w[\w./+-]*", re.ASCII)
_HUB_URL = re.compile(r"https?://(?:huggingface\.co|hf\.co)/([^/?#]+/[^/?#]+)")
_FORMS = "MODEL is demo, a folder such as ./x, a hub id such as org/name, or a shape such as shape:llama-8b"


@dataclass(frozen=True)
class ModelRef:
    """A MODEL argument, understood but not looked up.

    Attributes:
        text: what the user typed.
        kind: which of the other attributes count.
        path: the folder, `~` expanded; only for "folder".
        repo_id: org/name; only for "hub".
        revision: branch, tag or commit; None is the default branch; only for "hub".
        shape: of the synthetic model; only for "shape".
    """

    text: str
    kind: Literal["demo", "folder", "hub", "shape"]
    path: Path | None = None
    repo_id: str | None = None
    revision: str | None = None
    shape: Shape | None = None


def parse_model(text: str) -> ModelRef:
    """What `text` refers to; whether it exists is found out later.

    Raises:
        ModelNotFoundError: none of the forms, with the nearest one as a hint.
        UsageError: a shape that there is not, or that cannot hold the demo target.
    """
    if text == DEMO:
        return ModelRef(text, "demo")
    if text in (".", "..") or text.startswith(("./", "../", "/", "~")):
        return ModelRef(text, "folder", path=_expand(text))
    if text.startswith(SHAPE_PREFIX):
        return ModelRef(text, "shape", shape=parse_shape(text.removeprefix(SHAPE_PREFIX)))
    match = _HUB_ID.fullmatch(text)
    if match and _is_repo_id(match["repo"]):
        return ModelRef(text, "hub", repo_id=match["repo"], revision=_check_revision(text, match["revision"]))
    raise ModelNotFoundError(f"'{text}' is not a model", hint=_guess(text))


def demo_source(role: Literal["target", "draft"]) -> ModelSource:
    """One of the embedded pair, which every output must call a toy.

    Raises:
        ModelNotFoundError: the package data are missing from this installation.
    """
    path = Path(__file__).parents[2] / "demo" / role
    if not (path / "config.json").is_file():
        raise ModelNotFoundError(f"the demo's files are missing from {path}", hint="install specchat again")
    return ModelSource(name=DEMO if role == "target" else "demo draft", path=path, label=TOY_LABEL)


def known_draft(ref: ModelRef) -> ModelSource | None:
    """The embedded draft where it suits: shapes write what the demo target writes."""
    return demo_source("draft") if ref.kind in ("demo", "shape") else None


def draft_candidates(ref: ModelRef) -> list[ModelRef]:
    """Drafts on the hub that are known to suit `ref`, the one to prefer first.

    The target's own publisher's come before other copies of the same; of a folder, the name counts.
    """
    family = known_families().family_of(str(ref.path) if ref.kind == "folder" else ref.text)
    drafts = () if family is None else family.drafts
    publisher = None if ref.repo_id is None else ref.repo_id.partition("/")[0]
    return [parse_model(draft) for draft in sorted(drafts, key=lambda draft: draft.partition("/")[0] != publisher)]


def _expand(text: str) -> Path:
    try:
        return Path(text).expanduser()
    except RuntimeError as exc:
        raise ModelNotFoundError(f"'{text}' names no home folder here", hint="write the folder out: /home/...") from exc


def _is_repo_id(repo_id: str) -> bool:
    """What the name pattern cannot say: no part ends in a dot or dash, and none has two in a row."""
    parts = repo_id.split("/")
    return not any(part.endswith((".", "-", ".git")) or "--" in part or ".." in part for part in parts)


def _check_revision(text: str, revision: str | None) -> str | None:
    """`revision` if git could have such a ref; it becomes a path in the cache, so it must not climb."""
    if revision is not None and (not _REVISION.fullmatch(revision) or ".." in revision or "//" in revision):
        raise ModelNotFoundError(
            f"'{text}' asks for the revision '{revision}', which is no branch, tag or commit",
            hint="write org/name@main, org/name@v1.0 or org/name@<commit>",
        )
    return revision


def _guess(text: str) -> str:
    """The likeliest meaning of a MODEL that is none."""
    if text.strip().lower() == DEMO:
        return f"did you mean {DEMO}?"
    if url := _HUB_URL.match(text):
        return f"did you mean {url[1]}?"
    if text and _is_folder(Path(text)):
        return f"did you mean ./{text}?"
    return f"{_FORMS}; demo always works"


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):  # a name too long for a file, or with a NUL in it
        return False
