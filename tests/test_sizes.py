"""Sizes as people type and read them."""

import pytest

from specchat.units import parse_size, size_text


@pytest.mark.parametrize("text", ["8GiB", "12GB", "900MiB", "1500MB", "7B"])
def test_sizes_are_shown_as_they_are_typed(text):
    assert size_text(parse_size(text)) == text
