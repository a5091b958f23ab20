"""Settings and shared fixtures of the engine's tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.streamed import PackedModel, tiny_packs


@pytest.fixture(autouse=True, scope="module")
def _tiny_layers_are_read_ahead():
    """Read small layers like large ones, by threads into slots; tests of small layers set their own limit."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("specchat.engine.streaming.slots.SMALL_LAYER_BYTES", 0)
        yield


@pytest.fixture
def packs_tiny_models(tmp_path: Path) -> Iterator[None]:
    """Use a cache folder of the test's own."""
    with tiny_packs(tmp_path):
        yield


@pytest.fixture(scope="module")
def packed_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PackedModel]:
    """Pack a model although it is tiny."""
    folder = tmp_path_factory.mktemp("packed")
    with tiny_packs(folder):
        yield PackedModel(folder)
