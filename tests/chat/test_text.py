"""Detokenizing and stop strings, for any tokenizer and any split into tokens or deltas."""

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers

from specchat.chat.text import Detokenizer, StopStrings

CORPUS = [
    "The quick brown fox jumps over the lazy dog. It didn't stop, and went on.",
    "naïve café, Ünïcode und Straße — dashes… and “quotes”",
    "日本語の文章と中文字符 한국어 🦊🦊 👩‍👩‍👧 🇩🇪",
    "e\u0301 a\u0308 combining",
]
SPECIAL = ["<pad>", "<eos>"]

text_strategy = st.text(
    alphabet=st.one_of(
        st.characters(codec="utf-8", exclude_categories=("Cs", "Cc", "Cn")),
        st.sampled_from("abc .,'\n🦊👩‍👧🇩🇪日本é\u0301\u0308\u200d\ufe0fß한"),
    ),
    max_size=40,
)


def byte_level():
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def sentencepiece_bpe():
    """Return a tokenizer like Llama 2's: spaces become ▁, unknown characters bytes; one leading space is removed."""
    tokens = SPECIAL + ["<unk>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    tokens += sorted({c for line in CORPUS for c in line.replace(" ", "▁") if ord(c) < 0x300} | set("▁"))
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("o", "n"), ("a", "n"), ("an", "d"), ("▁", "and")]
    tokens += [a + b for a, b in merges]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    model = models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return tokenizer


def metaspace_unigram():
    tokenizer = tokenizers.Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=[*SPECIAL, "<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return tokenizer


def word_piece():
    tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=True)
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=[*SPECIAL, "[UNK]"], show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def metaspace_bpe():
    """Return one like newer Llama 2 files and Mistral: a metaspace before the first word only, byte fallback."""
    backend = sentencepiece_bpe()
    backend.normalizer = None
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    return backend


def spaces_as_they_are():
    """Return a tokenizer like Gemma's: spaces become ▁ and back; none is added or removed."""
    backend = sentencepiece_bpe()
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return backend


def tekken():
    """Return a tokenizer like Tekken, Llama 3 and GPT-4: byte-level, after a split by a pattern."""
    tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=True))
    pattern = tokenizers.Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS * 2, trainer)
    return tokenizer


def whole_words():
    """Return a tokenizer without a decoder: tokens are joined with spaces."""
    words = sorted({word for line in CORPUS for word in line.split()})
    tokenizer = tokenizers.Tokenizer(models.WordLevel({w: i for i, w in enumerate([*SPECIAL, "?", *words])}, "?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return tokenizer


MAKERS = (
    byte_level,
    sentencepiece_bpe,
    metaspace_unigram,
    word_piece,
    metaspace_bpe,
    spaces_as_they_are,
    tekken,
    whole_words,
)
KINDS = {make.__name__: make() for make in MAKERS}


class Wrapped:
    """The interface of specchat's Tokenizer that text.py uses; `rust=False` hides the Rust backend."""

    def __init__(self, backend, rust=True):
        self._backend = backend
        self.backend = backend if rust else None

    def decode(self, token_ids, *, skip_special_tokens=True):
        return self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)


def stream(tokenizer, token_ids, complete):
    detokenizer = Detokenizer(tokenizer)
    deltas = [detokenizer.feed(token_id) for token_id in token_ids]
    return deltas, detokenizer.flush(complete=complete)


every_kind = pytest.mark.parametrize("kind", KINDS)
every_backend = pytest.mark.parametrize("rust", [True, False], ids=["rust", "python"])


@every_kind
@every_backend
@settings(deadline=None, max_examples=40)
@given(text=text_strategy, special_at=st.integers(0, 40))
def test_deltas_join_to_the_full_decode(kind, rust, text, special_at):
    tokenizer = Wrapped(KINDS[kind], rust)
    ids = KINDS[kind].encode(text, add_special_tokens=False).ids
    ids.insert(min(special_at, len(ids)), KINDS[kind].token_to_id("<eos>"))
    deltas, rest = stream(tokenizer, ids, complete=True)
    assert "".join(deltas) + rest == tokenizer.decode(ids)


@every_kind
@every_backend
@settings(deadline=None, max_examples=40)
@given(text=text_strategy.filter(lambda text: "\ufffd" not in text))
def test_shown_text_is_never_taken_back(kind, rust, text):
    """After each token the shown text is a prefix of the final text and has no replacement character."""
    tokenizer = Wrapped(KINDS[kind], rust)
    ids = KINDS[kind].encode(text, add_special_tokens=False).ids
    deltas, rest = stream(tokenizer, ids, complete=True)
    assert not any("\ufffd" in delta for delta in [*deltas, rest])
    full = tokenizer.decode(ids)
    shown = ""
    for delta in deltas:
        shown += delta
        assert full.startswith(shown)


@every_kind
@every_backend
@settings(deadline=None, max_examples=40)
@given(text=text_strategy.filter(lambda text: "\ufffd" not in text), share=st.floats(0, 1))
def test_truncated_answer_ends_at_a_whole_character(kind, rust, text, share):
    tokenizer = Wrapped(KINDS[kind], rust)
    ids = KINDS[kind].encode(text, add_special_tokens=False).ids
    deltas, rest = stream(tokenizer, ids[: round(share * len(ids))], complete=False)
    shown = "".join(deltas) + rest
    assert "\ufffd" not in shown
    assert tokenizer.decode(ids).startswith(shown)


@every_backend
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_arbitrary_byte_level_tokens(rust, data):
    backend = KINDS["byte_level"]
    ids = data.draw(st.lists(st.integers(0, backend.get_vocab_size() - 1), max_size=30))
    deltas, rest = stream(Wrapped(backend, rust), ids, complete=True)
    assert "".join(deltas) + rest == backend.decode(ids)


@every_kind
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_arbitrary_tokens_do_not_stop_the_stream(kind, data):
    backend = KINDS[kind]
    ids = data.draw(st.lists(st.integers(0, backend.get_vocab_size() - 1), max_size=30))
    stream(Wrapped(backend), ids, complete=True)


def test_emoji_appears_with_its_last_byte():
    backend = KINDS["byte_level"]
    ids = backend.encode("a🦊", add_special_tokens=False).ids
    deltas, rest = stream(Wrapped(backend), ids, complete=False)
    assert len(ids) > 2
    assert (deltas, rest) == (["a", *[""] * (len(ids) - 2), "🦊"], "")
    deltas, rest = stream(Wrapped(backend), ids[:-1], complete=False)
    assert "".join(deltas) + rest == "a"


def test_bytes_that_turn_invalid_keep_the_shown_text():
    backend = KINDS["sentencepiece_bpe"]
    ids = [backend.token_to_id(f"<0x{byte:02X}>") for byte in "日".encode() + b"\xff"] + [backend.token_to_id("a")]
    deltas, rest = stream(Wrapped(backend), ids, complete=True)
    assert "".join(deltas) + rest == "日\ufffda"


# --- stop strings ------------------------------------------------------------------------------------------------


def cut(text, stops):
    """Cut at the first stop string, one character at a time: the reference version."""
    for end in range(len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            longest = max(complete, key=len)
            return text[: end - len(longest)], longest
    return text, None


@settings(deadline=None, max_examples=300)
@given(
    text=st.text(alphabet="abc", max_size=30),
    stops=st.lists(st.text(alphabet="abc", min_size=1, max_size=5), max_size=4),
    data=st.data(),
)
def test_stop_cut_does_not_depend_on_the_deltas(text, stops, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    deltas = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    watch = StopStrings(stops)
    shown = ""
    for delta in deltas:
        shown += watch.feed(delta)
        expected, found = cut(text, stops)
        assert expected.startswith(shown)
    assert (shown + watch.flush(), watch.matched) == (expected, found)


@settings(deadline=None, max_examples=100)
@given(text=text_strategy, stop=st.text(alphabet="🦊é\u0301 a", min_size=1, max_size=3))
def test_stop_strings_of_any_script(text, stop):
    watch = StopStrings([stop])
    shown = "".join(watch.feed(character) for character in text) + watch.flush()
    assert (shown, watch.matched) == cut(text, [stop])


def test_possible_stop_string_is_held_back_then_released():
    watch = StopStrings(["\nUser:"])
    assert watch.feed("Hello\nUs") == "Hello"
    assert watch.feed("ual") == "\nUsual"
    assert watch.feed("\nUser: hi") == ""
    assert watch.matched == "\nUser:"
    assert (watch.feed("more"), watch.flush()) == ("", "")


def test_overlapping_stop_strings():
    watch = StopStrings(["abcd", "bc"])
    assert watch.feed("xab") == "x"
    assert (watch.feed("cd"), watch.matched) == ("a", "bc")


def test_without_stop_strings_nothing_is_held_back():
    watch = StopStrings([])
    assert (watch.feed("abc"), watch.flush(), watch.matched) == ("abc", "", None)


def test_decoder_error_does_not_stop_the_stream():
    """The text continues with the tokens that were not shown yet, whatever `tokenizers` raises."""
    backend = KINDS["byte_level"]
    tokenizer = Wrapped(backend)
    ids = backend.encode("fox dog", add_special_tokens=False).ids
    detokenizer = Detokenizer(tokenizer)
    text = detokenizer.feed(ids[0])
    detokenizer._stream._backend = None  # the next step raises inside `tokenizers`
    text += "".join(detokenizer.feed(token_id) for token_id in ids[1:])
    assert text + detokenizer.flush(complete=True) == "fox dog"
