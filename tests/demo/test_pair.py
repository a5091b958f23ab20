"""The shipped pair agrees with its model cards and the README."""

import json
from pathlib import Path

import pytest
import torch

import specchat.demo
from specchat.demo.train.checkpoint import load
from specchat.demo.train.tokenizer import SPECIAL_TOKENS, ChatTokenizer

DEMO = Path(specchat.demo.__file__).parent
PAIR = ("target", "draft")
CHAT = [
    {"role": "system", "content": "You are kind."},
    {"role": "user", "content": "  Tell me a story about a fox's den:\n\nshort, please! "},
    {"role": "assistant", "content": "Once upon a time... naïve 🙂"},
    {"role": "assistant", "content": ""},
]


def test_the_weights_are_small_enough_to_ship():
    sizes = [path.stat().st_size for name in PAIR for path in (DEMO / name).rglob("*") if path.is_file()]
    assert sum(sizes) < 32e6


def test_target_and_draft_share_one_tokenizer():
    target, draft = ((DEMO / name / "tokenizer.json").read_bytes() for name in PAIR)
    assert target == draft


@pytest.mark.parametrize("name", PAIR)
def test_replies_are_sampled_by_default(name):
    settings = json.loads((DEMO / name / "generation_config.json").read_text())
    assert (settings["do_sample"], settings["temperature"], settings["top_p"]) == (True, 0.7, 0.95)


@pytest.mark.parametrize("name", PAIR)
def test_the_card_says_toy(name):
    card = (DEMO / name / "README.md").read_text()
    assert "A toy for exercising the software" in card
    assert "tags: [toy" in card


@pytest.mark.parametrize("page", ["README.md", "SOURCES.md", "target/README.md", "draft/README.md"])
def test_pages_name_only_shipped_files(page):
    text = (DEMO / page).read_text()
    for gone in ("prepare_data", "train.py", "evaluate.py", "corpus.txt", "chats.jsonl.gz", "heldout_chats"):
        assert gone not in text
    assert "SOURCES.md" in text or page == "SOURCES.md"


@pytest.mark.parametrize("name", PAIR)
def test_transformers_and_the_lean_model_agree(name):
    from transformers import AutoModelForCausalLM

    ids = torch.tensor([ChatTokenizer(DEMO / name).encode_chat(CHAT).ids])
    with torch.inference_mode():
        expected = AutoModelForCausalLM.from_pretrained(DEMO / name, dtype=torch.float32)(ids).logits
        actual = load(DEMO / name, torch.device("cpu"))(ids)
    torch.testing.assert_close(actual, expected, atol=2e-4, rtol=1e-4)


def test_lean_tokenizer_formats_chats_like_the_template():
    from transformers import AutoTokenizer

    template = AutoTokenizer.from_pretrained(DEMO / "target")
    chat = ChatTokenizer(DEMO / "target").encode_chat(CHAT)
    assert chat.ids == template.apply_chat_template(CHAT, tokenize=True, return_dict=True)["input_ids"]
    replies = [token for token, is_reply in zip(chat.ids, chat.is_reply, strict=True) if is_reply]
    assert template.decode(replies) == "Once upon a time... naïve 🙂<|im_end|><|im_end|>"
    assert tuple(template.convert_ids_to_tokens(range(4))) == SPECIAL_TOKENS
