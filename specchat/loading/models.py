"""The models of a request: their parsed names, and what was found of them."""

from dataclasses import dataclass

from specchat.models.catalog.ref import ModelRef
from specchat.models.locate import Missing
from specchat.records.model import ModelSource


@dataclass(frozen=True)
class Refs:
    """Parsed MODEL arguments; `draft` is None for plain decoding and for "auto"."""

    target: ModelRef
    draft: ModelRef | None


@dataclass(frozen=True)
class Models:
    """The models of an engine.

    Attributes:
        target: model that writes the text.
        draft: model that drafts trees, or None.
        draft_note: reason for plain decoding; empty with a draft.
        heads: heads of the target that may draft instead of `draft`.
        copy: the target's own low-bit copy that may draft instead of `draft`; None to leave it out.
    """

    target: ModelSource
    draft: ModelSource | None
    draft_note: str
    heads: tuple[ModelSource, ...] = ()
    copy: ModelSource | None = None


@dataclass(frozen=True)
class Found:
    """The models of a request, each with its files or its missing parts.

    Attributes:
        target: target, present or missing.
        draft: draft, present or missing; None without one.
        draft_note: reason for having no draft.
        heads: heads of the catalog or in the cache that may draft instead of `draft`.
    """

    target: ModelSource | Missing
    draft: ModelSource | Missing | None
    draft_note: str
    heads: tuple[ModelSource | Missing, ...] = ()

    @property
    def are_here(self) -> bool:
        """Whether the files of all models exist."""
        found = (self.target, self.draft, *self.heads)
        return all(each is None or isinstance(each, ModelSource) for each in found)
