"""Check of a draft against its target: equal token ids must mean equal tokens."""

from pathlib import Path

from specchat.errors import VocabularyMismatchError
from specchat.records.model import ModelSource

_FILE = "tokenizer.json"
# Related models rename a few special tokens (Llama 3 and its distillations, Gemma 2 at 2B and 27B). The target rejects
# a drafted token that has another meaning there. That costs speed, but never changes the text.
_MOST_DIFFERENT = 0.005


def check_pair(target: ModelSource, draft: ModelSource) -> None:
    """Check that two vocabularies agree, token by token, except for a few renamed tokens.

    Raises:
        VocabularyMismatchError: too many tokens differ.
    """
    if target.path == draft.path or same_tokenizer_file(target.path, draft.path):
        return
    from specchat.models.hf.tokenizer import load_tokenizer

    ours = load_tokenizer(target.path).vocabulary()
    theirs = load_tokenizer(draft.path).vocabulary()
    num_different = sum(theirs.get(token) != token_id for token, token_id in ours.items())
    if num_different > _MOST_DIFFERENT * len(ours):
        raise VocabularyMismatchError(
            f"the draft '{draft.name}' has another vocabulary than '{target.name}' "
            f"({num_different:,} of {len(ours):,} tokens differ)",
            hint="use a draft of the same family, or --draft none",
        )


def same_tokenizer_file(target: Path, draft: Path) -> bool:
    """Return whether the tokenizer files in two model folders are equal byte for byte."""
    files = target / _FILE, draft / _FILE
    return all(file.is_file() for file in files) and files[0].read_bytes() == files[1].read_bytes()
