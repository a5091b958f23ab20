"""Drafts that are found without being named: small models and heads, from the catalog or in the cache."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from specchat.errors import ModelError, UsageError
from specchat.models.catalog.known_heads import heads_for
from specchat.models.catalog.ref import ModelRef, draft_candidates, known_draft, parse_model
from specchat.models.checkpoint.assistant import is_assistant
from specchat.models.checkpoint.dflash import is_dflash
from specchat.models.checkpoint.eagle3 import is_eagle3
from specchat.models.checkpoint.json_file import read_json
from specchat.models.checkpoint.safetensors import has_weights, weight_files
from specchat.models.gguf.folder import model_folder
from specchat.models.gguf.heads import find_head, heads_beside, is_head_alone
from specchat.models.hf.pairing import check_pair
from specchat.models.hub.cache import cached_models
from specchat.models.hub.download import Download
from specchat.models.hub.model_card import written_bases
from specchat.models.locate import Missing, look_up
from specchat.records.model import ModelSource

# A draft reads all its weights several times per target pass, so it must be much smaller.
_LARGEST_SHARE = 0.25


@dataclass(frozen=True)
class DraftChoice:
    """A draft, or the reason for plain decoding.

    Attributes:
        found: draft, present or missing; None for plain decoding.
        note: one line about plain decoding and its reason, shown instead of a draft.
    """

    found: ModelSource | Missing | None
    note: str = ""


def choose_draft(ref: ModelRef, *, offline: bool, warn: Callable[[str], None]) -> DraftChoice:
    """Choose the catalog's draft for a target; a cached draft comes before one that must be downloaded.

    Args:
        ref: target.
        offline: whether the network must not be used.
        warn: receives a one-line warning about a cached copy that cannot be checked for updates.
    """
    embedded = known_draft(ref)
    candidates = draft_candidates(ref)
    if embedded is not None or not candidates:
        return DraftChoice(embedded, "plain decoding: no draft known for this model")
    for candidate in candidates:
        try:
            return DraftChoice(look_up(candidate, offline=True))
        except ModelError:
            continue
    reason = f"{candidates[0].text} is not in the cache"
    for candidate in [] if offline else candidates:
        try:
            return DraftChoice(look_up(candidate, offline=False, warn=warn))
        except ModelError as error:
            reason = error.message
    return DraftChoice(None, f"plain decoding: {reason}")


def relative_in_cache(target: ModelSource) -> ModelSource | None:
    """Return the smallest cached model that has the target's type and vocabulary and is small enough for a draft.

    None is found for a target whose weights are not here.
    """
    if not has_weights(target.path):
        return None
    largest_bytes = _LARGEST_SHARE * _num_bytes(target)
    small = [source for source in _cached_like(target) if _num_bytes(source) <= largest_bytes]
    return next((source for source in sorted(small, key=_num_bytes) if fits(target, source)), None)


def known_heads_of(ref: ModelRef, target: ModelSource | Missing, *, offline: bool) -> list[ModelSource | Missing]:
    """Return the catalog's heads for a target or one of its base models: those in the cache, else those on the hub.

    Args:
        ref: parsed name of the target.
        target: the target, present or missing.
        offline: whether the network must not be used.
    """
    if ref.kind not in ("hub", "folder"):
        return []
    bases = written_bases(target.path) if isinstance(target, ModelSource) else ()
    bases = target.bases if isinstance(target, Download) else bases
    heads = [parse_model(head.id) for head in heads_for((str(ref.path or ref.text), *bases))]
    cached = _looked_up(heads, offline=True)
    return cached or (_looked_up(heads, offline=False) if not offline else [])


def head_on_hub(target: ModelSource | Missing) -> list[ModelSource | Missing]:
    """Return the MTP layer in a GGUF file beside those of a target that must be downloaded; nothing without one."""
    if not isinstance(target, Download) or target.head is None:
        return []
    revision = f"@{target.ref.revision}" if target.ref.revision else ""
    return _looked_up([parse_model(f"{target.ref.repo_id}:{target.head}{revision}")], offline=False)


def _looked_up(refs: Sequence[ModelRef], *, offline: bool) -> list[ModelSource | Missing]:
    found = list[ModelSource | Missing]()
    for ref in refs:
        with suppress(ModelError):  # not in the cache, or not on the hub
            found.append(look_up(ref, offline=offline))
    return found


def heads_in_cache(target: ModelSource) -> list[ModelSource]:
    """Return the cached heads whose sizes fit a target; heads with unreadable files are skipped."""
    found = list[ModelSource]()
    for name in cached_models():
        with suppress(UsageError, ModelError):
            source = look_up(parse_model(name), offline=True)
            head = as_draft(source) if isinstance(source, ModelSource) else None
            if head is not None and head.is_head and fits(target, head):
                found.append(head)
    return found


def as_draft(source: ModelSource) -> ModelSource:
    """Return a draft's source, which says so if the files are a head, or an MTP layer alone.

    Raises:
        UnsupportedModelError: a kind of head that is not read.
    """
    if source.part:
        return source
    if is_head_alone(source.path):
        return replace(source, part="mtp")
    if is_dflash(source.path):
        return replace(source, part="dflash")
    if is_assistant(source.path):
        return replace(source, part="assistant")
    return replace(source, part="eagle3") if is_eagle3(source.path) else source


def mtp_head(target: ModelSource) -> ModelSource | None:
    """Return the MTP head among a target's files or in a GGUF file beside them; None without one."""
    if find_head(target.path) is not None:
        return replace(target, name="mtp", part="mtp")
    for file in heads_beside(target.path):
        head = ModelSource("mtp", model_folder(file), part="mtp")
        if fits(target, head):
            return head
    return None


def head_in(target: ModelSource) -> ModelSource:
    """Return the MTP head among a target's files or beside them.

    Raises:
        UsageError: there is none.
    """
    head = mtp_head(target)
    if head is not None:
        return head
    raise UsageError(
        f"{target.name} has no MTP layer in its files",
        hint="use --draft auto, MODEL or retrieval; quantized copies of a model often leave the layer out",
    )


def copy_of(target: ModelSource) -> ModelSource:
    """Return a target's own low-bit copy, whether or not the target can have one."""
    return replace(target, name="self", part="self")


def own_copy(target: ModelSource) -> ModelSource:
    """Return the low-bit copy that the user asked for.

    Raises:
        UsageError: the target is quantized already.
    """
    from specchat.models.weights.choose_recipe import is_prequantized  # imports torch

    if is_prequantized(target):
        raise UsageError(
            f"{target.name} is pre-quantized, so it cannot have a copy in lower precision as its draft",
            hint="use --draft auto, MODEL, mtp or retrieval",
        )
    return copy_of(target)


def _cached_like(target: ModelSource) -> Iterator[ModelSource]:
    """Yield the cached models of the target's type; models with unreadable files are skipped."""
    kind = _model_type(target)
    for name in cached_models():
        with suppress(UsageError, ModelError):
            source = look_up(parse_model(name), offline=True)
            if isinstance(source, ModelSource) and _model_type(source) == kind:
                yield source


def fits(target: ModelSource, draft: ModelSource) -> bool:
    """Return whether target and draft have readable files and one vocabulary."""
    try:
        check_pair(target, draft)
    except (UsageError, ModelError):
        return False
    return True


def _num_bytes(source: ModelSource) -> int:
    return sum(file.stat().st_size for file in weight_files(source.path))


def _model_type(source: ModelSource) -> object:
    return read_json(source.path / "config.json").get("model_type")
