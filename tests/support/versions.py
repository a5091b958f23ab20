"""Tests that hold figures or results of the newest transformers, and are left out with older ones."""

import pytest
import transformers
from packaging.version import Version

NEWEST = "5.23"


def newest_only(reason: str) -> pytest.MarkDecorator:
    """A mark for a test that older versions of transformers cannot pass."""
    return pytest.mark.skipif(Version(transformers.__version__) < Version(NEWEST), reason=reason)
