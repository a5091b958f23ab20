"""Turn texts and chats into token files and a tokenizer.

    python -m specchat.demo.train.prepare --texts FOLDER --chats FILE.jsonl --tokenizer specchat/demo/target --out data

Writes OUT/tokenizer, and OUT/texts.npy and OUT/chats.npy with the documents as uint16 token ids, one after another.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np

from specchat.demo.train.options import parse
from specchat.demo.train.tokenizer import ChatTokenizer, Message, copy_tokenizer, train_tokenizer
from specchat.errors import UsageError

MAX_VOCABULARY = 1 << 16  # ids are stored as uint16


@dataclass(frozen=True)
class PrepareOptions:
    """Turn a folder of texts and a file of chats into token files."""

    out: Annotated[Path, "folder to write"]
    texts: Annotated[Path | None, "folder of .txt files, one document each; subfolders are searched too"] = None
    chats: Annotated[Path | None, 'file of lines {"messages": [{"role", "content"}, ...]}'] = None
    tokenizer: Annotated[Path | None, "folder with a tokenizer like the pair's; without it, one is trained"] = None
    vocabulary: Annotated[int, "entries of a newly trained tokenizer"] = 4096


def prepare(options: PrepareOptions) -> dict[str, int]:
    """Write the token files and the tokenizer; return the number of tokens per file.

    Raises:
        UsageError: there are neither texts nor chats, or the vocabulary exceeds uint16.
    """
    texts = read_texts(options.texts) if options.texts else []
    chats = read_chats(options.chats) if options.chats else []
    if not texts and not chats:
        raise UsageError("there is no text to learn from", hint="name a folder of .txt files with --texts")
    folder = options.out / "tokenizer"
    if options.tokenizer:
        copy_tokenizer(options.tokenizer, folder)
    else:
        train_tokenizer(_tokenizer_sample(texts, chats), options.vocabulary, folder)
    tokenizer = ChatTokenizer(folder)
    if tokenizer.vocab_size > MAX_VOCABULARY:
        raise UsageError(f"a vocabulary of {tokenizer.vocab_size} is too large", hint=f"use at most {MAX_VOCABULARY}")
    counts = {}
    if texts:
        counts["texts"] = write_tokens(options.out / "texts.npy", map(tokenizer.encode_document, texts))
    if chats:
        counts["chats"] = write_tokens(options.out / "chats.npy", (tokenizer.encode_chat(chat).ids for chat in chats))
    return counts


def read_texts(folder: Path) -> list[str]:
    """Read the .txt files of a folder in the order of their names; leave out empty ones."""
    documents = (path.read_text(encoding="utf-8").strip() for path in sorted(folder.rglob("*.txt")))
    return [document for document in documents if document]


def read_chats(path: Path) -> list[list[Message]]:
    """Read the chats of a JSON Lines file.

    Raises:
        UsageError: a line is not a chat.
    """
    with path.open(encoding="utf-8") as lines:
        return [_parse_chat(line, f"{path}:{number}") for number, line in enumerate(lines, start=1) if line.strip()]


def write_tokens(path: Path, documents: Iterable[list[int]]) -> int:
    """Store documents one after another as uint16 and return the number of tokens."""
    tokens = np.concatenate([np.asarray(ids, dtype=np.uint16) for ids in documents])
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, tokens, allow_pickle=False)
    return len(tokens)


def _parse_chat(line: str, place: str) -> list[Message]:
    try:
        messages = json.loads(line)["messages"]
        chat = [Message(role=message["role"], content=message["content"]) for message in messages]
        if not all(isinstance(value, str) for message in chat for value in message.values()):
            raise TypeError("roles and contents are text")
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{place} is not a chat", hint='write {"messages": [{"role", "content"}, ...]}') from error
    return chat


def _tokenizer_sample(texts: list[str], chats: list[list[Message]]) -> Iterator[str]:
    yield from texts
    for chat in chats:
        for message in chat:
            yield message["role"] + "\n"  # makes each role one token
            yield message["content"]


if __name__ == "__main__":
    print(json.dumps(prepare(parse(PrepareOptions))))
