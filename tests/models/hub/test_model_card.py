"""Base models, by the tags of the hub and by the cards in folders."""

from pathlib import Path

import pytest

from specchat.models.hub.model_card import CARD, tagged_bases, written_bases


def test_tags_name_each_base_once():
    tags = ["text-generation", "base_model:org/base", "base_model:finetune:org/base", "base_model:merge:org/other"]
    assert tagged_bases(tags) == ("org/base", "org/other")


@pytest.mark.parametrize(
    ("card", "bases"),
    [
        ("---\nlicense: mit\nbase_model: org/base\ntags:\n- a/b\n---\n# base_model: org/other\n", ("org/base",)),
        ('---\nbase_model:\n- "org/base"\n  - org/x.1-y\nlanguage:\n- en\n---\n', ("org/base", "org/x.1-y")),
        ("---\r\nbase_model: org/base\r\n---\r\n", ("org/base",)),
        ("---\nlicense: mit\n---\nbase_model: org/base\n", ()),
        ("base_model: org/base\n", ()),
    ],
)
def test_cards_name_bases_in_their_head(tmp_path: Path, card: str, bases: tuple[str, ...]):
    (tmp_path / CARD).write_bytes(card.encode())
    assert written_bases(tmp_path) == bases


def test_missing_and_damaged_cards_name_none(tmp_path: Path):
    assert written_bases(tmp_path) == ()
    (tmp_path / CARD).write_bytes(b"\xff\xfe---")
    assert written_bases(tmp_path) == ()
