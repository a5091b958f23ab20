"""A model by itself, found or obtained, as commands do it with a pair."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from specchat.models.catalog.ref import ModelRef
from specchat.models.hub.download import Download, agree
from specchat.models.locate import look_up, obtain
from specchat.records.model import ModelSource

LOG = logging.getLogger(__name__)


def locate(
    ref: ModelRef,
    *,
    offline: bool,
    confirm: Callable[[Sequence[Download]], bool],
    progress: Callable[[int, int], None] | None = None,
    warn: Callable[[str], None] = LOG.warning,
) -> ModelSource:
    """What was looked up, agreed to and obtained."""
    found = look_up(ref, offline=offline, warn=warn)
    if isinstance(found, ModelSource):
        return found
    if isinstance(found, Download):
        agree([found], confirm)
    return obtain(found, progress=progress, warn=warn)
