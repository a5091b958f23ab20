"""Settings for the engine's tests."""

import pytest


@pytest.fixture(autouse=True, scope="module")
def _tiny_layers_are_read_ahead():
    """As large ones are: by threads, into slots. Tests of small layers set their own limit."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("specchat.engine.slots.SMALL_LAYER_BYTES", 0)
        yield
