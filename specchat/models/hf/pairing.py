"""Check of a draft against its target: equal token ids must mean equal tokens."""

from pathlib import Path

from specchat.errors import UsageError, VocabularyMismatchError
from specchat.models.checkpoint.assistant import assistant_config
from specchat.models.checkpoint.assistant import layer_values as assistant_values
from specchat.models.checkpoint.dflash import dflash_config
from specchat.models.checkpoint.eagle3 import LEAST_LAYERS, chosen_layers, layer_values, target_width
from specchat.models.checkpoint.json_file import read_json
from specchat.records.model import ModelSource

_FILE = "tokenizer.json"
# Related models rename a few special tokens (Llama 3 and its distillations, Gemma 2 at 2B and 27B). The target rejects
# a drafted token that has another meaning there. That costs speed, but never changes the text.
_MOST_DIFFERENT = 0.005
# Facts of its target that a head tells.
_WIDTH, _VOCABULARY, _LAYERS = "states of width", "a vocabulary of", "a number of layers of"
# Values of configurations whose layers hand on several streams of states (Gemma 3n, DeepSeek-V4).
_SEVERAL_STREAMS = ("altup_num_inputs", "hc_mult")


def check_pair(target: ModelSource, draft: ModelSource) -> None:
    """Check that two vocabularies agree, token by token, except for a few renamed tokens.

    A head has no tokenizer: its sizes must be those of a head for the target.

    Raises:
        VocabularyMismatchError: too many tokens differ.
        UsageError: the head is one for another target.
    """
    if draft.part == "assistant":
        _check_assistant(target, draft)
        return
    if draft.is_head and target.path != draft.path:
        _check_head(target, draft)
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


def _check_head(target: ModelSource, head: ModelSource) -> None:
    """Check that a head reads states of the target's width, between layers that the target has."""
    from specchat.models.hf.config import load_config

    ours = load_config(target.path)
    facts = {"dflash": _dflash_facts, "eagle3": _eagle3_facts, "mtp": _mtp_facts}
    wanted = facts[head.part](head.path)
    found = {_WIDTH: ours.hidden_size, _VOCABULARY: ours.vocab_size, _LAYERS: ours.num_hidden_layers}
    for what, number in wanted.items():
        if number is not None and number != found[what]:
            raise _other_target(head, target, f"{what} {number:,}, not {found[what]:,}")
    if head.part == "mtp":
        return
    num_layers = ours.num_hidden_layers
    if head.part == "eagle3":
        read: tuple[int, ...] = chosen_layers(head.path) or (num_layers - LEAST_LAYERS,)
    else:
        read = tuple(layer + 1 for layer in dflash_config(head.path).layers)
    if not all(0 <= layer <= num_layers for layer in read):
        raise _other_target(head, target, f"layers that a model of {num_layers} layers does not have")
    if any(getattr(ours, name, None) is not None for name in _SEVERAL_STREAMS):
        raise UsageError(
            f"the states between the layers of {target.name} are several streams, which no head reads",
            hint="use --draft auto or retrieval",
        )


def _check_assistant(target: ModelSource, head: ModelSource) -> None:
    """Check that an assistant reads keys and values that the target has."""
    from specchat.models.hf.assistant import shared_layers
    from specchat.models.hf.config import load_config
    from specchat.models.hf.config_values import make_config

    ours, theirs = load_config(target.path), make_config(head.path / "config.json", assistant_values(head.path))
    width = assistant_config(head.path).target_size
    for what, wanted, found in (
        (_WIDTH, width, ours.hidden_size),
        (_VOCABULARY, theirs.vocab_size, ours.vocab_size),
    ):
        if wanted != found:
            raise _other_target(head, target, f"{what} {wanted:,}, not {found:,}")
    shared = shared_layers(ours)
    for index, kind in enumerate(theirs.layer_types):
        if kind not in shared:
            raise _other_target(head, target, f"keys of a layer of {kind.replace('_', ' ')}, which the model lacks")
        reads, has = theirs.per_layer_config[index], ours.per_layer_config[shared[kind]]
        if reads.head_dim != has.head_dim:
            raise _other_target(head, target, f"keys of width {reads.head_dim:,}, not {has.head_dim:,}")
        num_heads, num_key_heads = reads.num_attention_heads, has.num_key_value_heads
        if num_heads % num_key_heads:
            raise _other_target(head, target, f"{num_key_heads} heads of keys with {num_heads} heads of its own")


def _eagle3_facts(folder: Path) -> dict[str, int | None]:
    """Return what an EAGLE-3 head says of its target; None where config.json does not say."""
    return {_WIDTH: target_width(folder), _VOCABULARY: layer_values(folder).get("vocab_size")}


def _dflash_facts(folder: Path) -> dict[str, int | None]:
    """Return what a DFlash head says of its target; None where config.json does not say."""
    settings = dflash_config(folder)
    vocab_size = read_json(folder / "config.json").get("vocab_size")
    return {_WIDTH: settings.target_size, _VOCABULARY: vocab_size, _LAYERS: settings.target_layers}


def _mtp_facts(folder: Path) -> dict[str, int | None]:
    """Return what the configuration of an MTP layer says of its target, which has the same."""
    from specchat.models.hf.config import load_config

    config = load_config(folder)
    return {_WIDTH: config.hidden_size, _VOCABULARY: config.vocab_size, _LAYERS: config.num_hidden_layers}


def _other_target(head: ModelSource, target: ModelSource, reads: str) -> UsageError:
    return UsageError(
        f"the head '{head.name}' is not one for {target.name}: it reads {reads}",
        hint="use the head that was trained for this model, or --draft auto",
    )


def same_tokenizer_file(target: Path, draft: Path) -> bool:
    """Return whether the tokenizer files in two model folders are equal byte for byte."""
    files = target / _FILE, draft / _FILE
    return all(file.is_file() for file in files) and files[0].read_bytes() == files[1].read_bytes()
