"""Whether a draft may guess for a target: the same token ids must mean the same tokens."""

from specchat.config import ModelSource
from specchat.errors import VocabularyMismatchError
from specchat.models import hf_compat

_FILE = "tokenizer.json"


def check_pair(target: ModelSource, draft: ModelSource) -> None:
    """Compares the two vocabularies, token by token.

    Raises:
        VocabularyMismatchError: they differ.
    """
    files = target.path / _FILE, draft.path / _FILE
    if all(f.is_file() for f in files) and files[0].read_bytes() == files[1].read_bytes():
        return
    ours = hf_compat.load_tokenizer(target.path).vocabulary()
    theirs = hf_compat.load_tokenizer(draft.path).vocabulary()
    if ours != theirs:
        num_different = sum(theirs.get(token) != token_id for token, token_id in ours.items())
        raise VocabularyMismatchError(
            f"draft '{draft.name}' has another vocabulary than '{target.name}' "
            f"({num_different:,} of {len(ours):,} tokens differ)",
            hint="use a draft of the same family, or --draft none",
        )
