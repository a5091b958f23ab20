"""Check of a draft against its target: equal token ids must mean equal tokens."""

from pathlib import Path

from specchat.errors import UsageError, VocabularyMismatchError
from specchat.models.checkpoint.eagle3 import LEAST_LAYERS, chosen_layers, layer_values, target_width
from specchat.records.model import ModelSource

_FILE = "tokenizer.json"
# Related models rename a few special tokens (Llama 3 and its distillations, Gemma 2 at 2B and 27B). The target rejects
# a drafted token that has another meaning there. That costs speed, but never changes the text.
_MOST_DIFFERENT = 0.005
# Values of configurations whose layers hand on several streams of states (Gemma 3n, DeepSeek-V4).
_SEVERAL_STREAMS = ("altup_num_inputs", "hc_mult")


def check_pair(target: ModelSource, draft: ModelSource) -> None:
    """Check that two vocabularies agree, token by token, except for a few renamed tokens.

    A head has no tokenizer: its sizes must be those of a head for the target.

    Raises:
        VocabularyMismatchError: too many tokens differ.
        UsageError: the head is one for another target.
    """
    if draft.part == "eagle3":
        _check_eagle3(target, draft)
        return
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


def _check_eagle3(target: ModelSource, head: ModelSource) -> None:
    """Check that an EAGLE-3 head reads states of the target's width, between layers that the target has."""
    from specchat.models.hf.config import load_config

    ours = load_config(target.path)
    facts = [
        ("states of width", target_width(head.path), ours.hidden_size),
        ("a vocabulary of", layer_values(head.path).get("vocab_size"), ours.vocab_size),
    ]
    for what, wanted, found in facts:
        if wanted is not None and wanted != found:
            raise _other_target(head, target, f"{what} {wanted:,}, not {found:,}")
    num_layers = ours.num_hidden_layers
    usual = chosen_layers(head.path) or (num_layers - LEAST_LAYERS,)
    if not all(0 <= layer <= num_layers for layer in usual):
        raise _other_target(head, target, f"layers that a model of {num_layers} layers does not have")
    if any(getattr(ours, name, None) is not None for name in _SEVERAL_STREAMS):
        raise UsageError(
            f"the states between the layers of {target.name} are several streams, which no EAGLE-3 head reads",
            hint="use --draft auto or retrieval",
        )


def _other_target(head: ModelSource, target: ModelSource, reads: str) -> UsageError:
    return UsageError(
        f"the EAGLE-3 head '{head.name}' is not one for {target.name}: it reads {reads}",
        hint="use the head that was trained for this model, or --draft auto",
    )


def same_tokenizer_file(target: Path, draft: Path) -> bool:
    """Return whether the tokenizer files in two model folders are equal byte for byte."""
    files = target / _FILE, draft / _FILE
    return all(file.is_file() for file in files) and files[0].read_bytes() == files[1].read_bytes()
