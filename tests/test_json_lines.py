"""Lines of JSON carry every text, and none that a terminal would obey."""

from __future__ import annotations

import json
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specchat.json_lines import to_json


@given(st.text(st.characters()))
def test_the_text_comes_back_and_the_line_is_safe(text: str):
    line = to_json({"text": text})
    assert json.loads(line) == {"text": text}
    line.encode()  # lone surrogates too
    bidi = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
    assert not any(unicodedata.category(each) in ("Cc", "Cs", "Zl", "Zp") for each in line)
    assert not any(unicodedata.bidirectional(each) in bidi for each in line)


def test_ordinary_text_stays_readable():
    assert to_json({"text": "naïve 日本語 🙂"}) == '{"text": "naïve 日本語 🙂"}'


def test_not_a_number_is_refused():
    with pytest.raises(ValueError, match="JSON"):
        to_json({"x": float("nan")})
