"""The pair's tokenizer: byte-level BPE with four special tokens and a ChatML-like chat format.

This module formats chats itself instead of using the chat template, because it must know which tokens are a reply. The
tests check that both give the same ids.
"""

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, TypedDict

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from specchat.errors import UsageError

SPECIAL_TOKENS = ("<|pad|>", "<|bos|>", "<|im_start|>", "<|im_end|>")
PAD_ID, BOS_ID, START_ID, END_ID = range(4)
SHIPPED = Path(__file__).parents[1] / "target"
VOCABULARY_FILE = "tokenizer.json"
SETTINGS_FILES = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


class Message(TypedDict):
    """One message of a chat; the role is system, user or assistant."""

    role: str
    content: str


class EncodedChat(NamedTuple):
    """The token ids of a chat, and for each token whether it belongs to a reply (end token included)."""

    ids: list[int]
    is_reply: list[bool]


class ChatTokenizer:
    """An encoder of texts and chats into token ids.

    Args:
        folder: folder with `tokenizer.json`.

    Raises:
        UsageError: the file does not exist, or its special tokens are not those of the pair.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / VOCABULARY_FILE
        if not path.is_file():
            raise UsageError(f"{path} does not exist", hint="run specchat.demo.train.prepare first")
        self._tokenizer = Tokenizer.from_file(str(path))
        if [self._tokenizer.token_to_id(token) for token in SPECIAL_TOKENS] != [PAD_ID, BOS_ID, START_ID, END_ID]:
            raise UsageError(f"{path} lacks the pair's special tokens", hint="omit --tokenizer to train one")
        self.vocab_size: int = self._tokenizer.get_vocab_size()

    def encode_document(self, text: str) -> list[int]:
        """Return the ids of a plain text, between the begin and the end token."""
        return [BOS_ID, *self._encode(text), END_ID]

    def encode_chat(self, messages: Iterable[Message]) -> EncodedChat:
        """Return the ids of a whole chat, as the chat template would format it."""
        chat = EncodedChat([BOS_ID], [False])
        for message in messages:
            head = [START_ID, *self._encode(message["role"] + "\n")]
            body = [*self._encode(message["content"].strip()), END_ID]
            tail = self._encode("\n")
            is_reply = message["role"] == "assistant"
            chat.ids.extend(head + body + tail)
            chat.is_reply.extend([False] * len(head) + [is_reply] * len(body) + [False] * len(tail))
        return chat

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids


def train_tokenizer(strings: Iterable[str], vocab_size: int, folder: Path) -> None:
    """Train a tokenizer on `strings` and write its folder. Bytes and special tokens take 260 of the entries."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=2,
        show_progress=False,
    )
    tokenizer.train_from_iterator(strings, trainer)
    copy_tokenizer(SHIPPED, folder)  # for the settings: special tokens and chat template stay the same
    tokenizer.save(str(folder / VOCABULARY_FILE))


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy only the tokenizer's files into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in (VOCABULARY_FILE, *SETTINGS_FILES):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
