"""Settings for the engine's tests, and what several of them share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.streamed import PackedModel


@pytest.fixture(autouse=True, scope="module")
def _tiny_layers_are_read_ahead():
    """As large ones are: by threads, into slots. Tests of small layers set their own limit."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("specchat.engine.slots.SMALL_LAYER_BYTES", 0)
        yield


@pytest.fixture(scope="module")
def packed_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PackedModel]:
    """Packed, though it is tiny."""
    folder = tmp_path_factory.mktemp("packed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPECCHAT_CACHE_DIR", str(folder / "cache"))
        patch.setattr("specchat.models.prepare.SMALL_BYTES", 0)
        yield PackedModel(folder)
