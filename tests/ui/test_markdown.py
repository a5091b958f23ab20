"""Streaming Markdown: the layout does not depend on the pieces, loses no text and neutralizes control sequences."""

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from rich.cells import cell_len

from specchat.ui.markdown import MarkdownStream, PlainStream

SGR = re.compile(r"\x1b\[[0-9;]*m")
# Parts of random documents, including the borders where one type of block may be mistaken for another.
PARTS = [
    "A paragraph with **bold**, *slanted* and `code`.",
    "Another line",
    "\n",
    "\n\n",
    "# Title\n",
    "## Sub **bold**\n",
    "- one\n",
    "- two\n  still two\n",
    "   - nested\n",
    "* other\n",
    "1. first\n",
    "1. second\n",
    "3) other\n",
    "10. tenth\n\n    a paragraph in it\n",
    "> quoted\n",
    "> - list in it\n",
    "```python\ndef f():\n    '''doc\n",
    "```\n",
    "~~~\n",
    "````md\n",
    "    indented\n",
    "---\n",
    "===\n",
    "| a | b |\n|---|--:|\n",
    "| c | d |\n",
    "[link](http://x.y/z)",
    "[ref]: http://x.y\n",
    "<div>html</div>\n",
    "&amp; &#27; ~~gone~~\n",
    "日本語のテキスト 🦊 é\n",
    "\t tab\n",
    "-",
    "#",
    "`",
]
DOCUMENT = st.lists(st.sampled_from(PARTS), max_size=14).map("".join)


def plain(rows):
    return [SGR.sub("", row.shown) for row in rows]


def whole(text, width=40):
    stream = MarkdownStream()
    stream.feed(text)
    return [row.shown for row in stream.finished(width, last=True)]


def streamed(stream, text, cuts, width=40):
    rows, begin = [], 0
    for end in [*sorted(min(cut, len(text)) for cut in cuts), len(text)]:
        stream.feed(text[begin:end])
        rows += stream.finished(width)
        stream.unfinished(width)
        begin = end
    return [row.shown for row in rows + stream.finished(width, last=True)]


@given(DOCUMENT, st.lists(st.integers(0, 400), max_size=20))
@example("- a\n- b\n-x\n", [8, 9])
@example("para\n#", [6])
@example("1. a\n1. b\n1. c\n", [5, 10])
@example("```\na\n\n\nb\n```\nend", [6, 7, 8])
def test_layout_does_not_depend_on_the_pieces(text, cuts):
    pieces, at_once = streamed(MarkdownStream(), text, cuts), whole(text)
    if "```" in text or "~~~" in text:  # the colours of code may depend on later lines
        pieces, at_once = ([SGR.sub("", line) for line in lines] for lines in (pieces, at_once))
    assert pieces == at_once


@given(DOCUMENT, st.integers(8, 60))
def test_no_text_is_lost(text, width):
    shown = "".join(SGR.sub("", "".join(whole(text, width))).split())
    position = 0
    for character in re.sub(r"&[#\w]+;|[^\w]|[\d_]", "", text):  # list items are renumbered
        position = shown.find(character, position) + 1
        assert position, f"{character!r} of {text!r} is missing in {shown!r}"


@given(DOCUMENT, st.integers(20, 60))
@example("| a | b |\n|---|--:|\nmore cells | than | the header, and wider than the window\n", 20)
def test_prose_fits_the_width(text, width):
    stream = MarkdownStream()
    stream.feed(text)
    rows = list(stream.finished(width, last=True))
    # Code is never wrapped, and a table whose rows have more cells than its header is shown as code.
    in_code = any(mark in text for mark in ("```", "~~~", "    ")) or any("```" in row.shown for row in rows)
    for row in rows:
        assert row.num_cells == cell_len(SGR.sub("", row.shown))
        assert in_code or row.num_cells <= width


# Sequences that could move the cursor, set titles, query the terminal or reorder text, plain or hidden in Markdown.
SEQUENCES = ["\x1b[31m", "\x1b]0;title\x07", "\x1bP1$r\x1b\\", "\x9b2J", "\x9d0;t\x9c", "\x7f", "\x08", "\x00", "\r"]
TURNS = ["\u202e", "\u2066", "\u2028", "\ud800", "&#x202e;", "&#155;", "&#x1b;"]
DISGUISES = ["<http://x.y/%1b[31m>", "[a](<x\x1b[1m>)", "![\x9b](y)", "```\x1b[1m\n", "`\x1b[2m`", "| \x1bc |\n|---|\n"]
NASTY = st.lists(st.sampled_from([*SEQUENCES, *TURNS, *DISGUISES, "> ", "- ", "text ", "\n", "**"]), max_size=12).map(
    "".join
)


@given(NASTY, st.lists(st.integers(0, 80), max_size=6), st.booleans())
def test_control_sequences_are_neutralized(text, cuts, markdown):
    stream = MarkdownStream() if markdown else PlainStream("dim")
    live, begin = [], 0
    for end in [*sorted(min(cut, len(text)) for cut in cuts), len(text)]:
        stream.feed(text[begin:end])
        live += [*stream.finished(30), *stream.unfinished(30)]
        begin = end
    for row in [*live, *stream.finished(30, last=True)]:
        left = SGR.sub("", row.shown)
        assert not re.search(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\u2028\u2029\ud800-\udfff]", left)


def test_layout_of_each_block_type():
    text = """# Title

Words with **bold**, *slanted*, `code` and a [link](http://x.y).

1. one
2. two
   - nested

> quoted

```python
def f(x):

\treturn x
```

| a | b |
|---|--:|
| 1 | 22 |

<b>html</b>"""
    stream = MarkdownStream()
    stream.feed(text)
    assert plain(stream.finished(60, last=True)) == [
        "Title",
        "",
        "Words with bold, slanted, code and a link (http://x.y).",
        "",
        "1. one",
        "2. two",
        "   • nested",
        "",
        "│ quoted",
        "",
        "```python",
        "def f(x):",
        "",
        "    return x",
        "```",
        "",
        "a    b",
        "──────",
        "1   22",
        "",
        "<b>html</b>",
    ]


def test_code_is_highlighted_and_not_wrapped():
    line = f"x = '{'y' * 60}'  # comment"
    rows = whole(f"```python\n{line}\n```\n", width=20)
    assert len(rows) == 3
    assert SGR.sub("", rows[1]) == line
    assert len(SGR.findall(rows[1])) > 4
    assert SGR.sub("", "\n".join(whole("```nolanguage\n<a>\n```"))) == "```nolanguage\n<a>\n```"


@pytest.mark.parametrize(
    ("text", "num_rows"),
    [
        ("A paragraph that\nmay go on\n", 0),
        ("It has ended.\n\nNext", 1),
        ("# At once\n", 1),
        ("- one\n- two\n- thr", 1),
        ("```py\none = 1\ntwo = 2\nthr", 3),
        ("| a |\n|---|\n| 1 |\n", 0),
        ("| a |\n|---|\n| 1 |\n\n", 3),
    ],
)
def test_complete_blocks_are_final(text, num_rows):
    stream = MarkdownStream()
    stream.feed(text)
    assert len(stream.finished(40)) == num_rows


def test_plain_text_is_split_into_lines():
    stream = PlainStream()
    assert streamed(stream, "a **b**\n" + "x" * 90 + "\n\nend", [3, 20, 50]) == ["a **b**", "x" * 90, "", "end"]
    stream.feed("y" * 25)
    assert [row.num_cells for row in stream.unfinished(10)] == [10, 10, 5]
