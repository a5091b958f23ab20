"""Docstrings, comments and messages are in plain English: entries are noun phrases, and house words stay out.

A stranger reads an entry of `Args:` away from its signature. So the entry must not continue the parameter's name.
"""

import ast
import io
import re
import textwrap
import tokenize
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "specchat"
FILES = sorted(PACKAGE.rglob("*.py"))

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
Function = ast.FunctionDef | ast.AsyncFunctionDef


def name_of(path):
    return str(path.relative_to(PACKAGE))


# --- entries -----------------------------------------------------------------------------------------------------

NAMED_SECTIONS = {"Args", "Attributes", "Raises"}
PLAIN_SECTIONS = {"Returns", "Yields"}
SECTIONS = NAMED_SECTIONS | PLAIN_SECTIONS
# Words that continue the name before the colon ("seconds: that it took.") instead of naming a thing.
CONTINUING = {
    *("that", "which", "who", "whom", "whose", "what", "how", "where", "when", "why", "if", "because", "as", "than"),
    *("is", "are", "was", "were", "be", "has", "have", "had", "does", "do", "did", "may", "can", "must", "never"),
    *("it", "they", "them", "he", "its", "their", "those", "these", "ours", "theirs", "likewise", "so", "also", "else"),
    *("and", "or", "but", "nor", "otherwise", "not", "of", "to", "by", "in", "on", "at", "with", "without", "from"),
    *("up", "behind", "beside", "beyond", "before", "after", "above", "below", "inside", "outside", "past", "over"),
    *("under", "through", "between", "among", "into", "for", "told"),
}
# A pronoun or a participle on its own: "one per layer.", "all of them.", "the same of the draft.", "asked once."
_DANGLING = re.compile(
    r"(one (per|for|of)\b"
    r"|(all|none|any|some|each|both) of (them|it|those|these)\b"
    r"|the (same|one|ones) (of|as|that|for|before)\b"
    r"|((?!(seed|speed|need)\b)\w+ed|done|taken|given|kept|written|set|read)"
    r"(\.$|,| (in|by|at|on|with|when|before|after|once|anew|if|as|between|from)\b))"
)


def sections(docstring):
    """Map the title of each google-style section to its entries, `(name, text)`; plain text has the name ''."""
    found, title, entries = {}, None, []
    for line in docstring.splitlines():
        if (header := re.fullmatch(r"(\w+):", line)) and header[1] in SECTIONS:
            title, entries = header[1], []
            found[title] = entries
        elif title is None or not line.strip():
            continue
        elif not line.startswith(" "):
            title = None
        elif title in NAMED_SECTIONS and (entry := re.fullmatch(r" {4}(\S[^:]*): (.*)", line)):
            entries.append((entry[1], entry[2]))
        elif entries:
            name, text = entries.pop()
            entries.append((name, f"{text} {line.strip()}"))
        else:
            entries.append(("", line.strip()))
    return found


def first_word(text):
    return re.split(r"[\s,;:.]", text.lower(), maxsplit=1)[0]


def entry_fault(text):
    """Say why an entry cannot stand alone; None for a good entry."""
    if not text.endswith((".", ".)", '."')):
        return "does not end with a full stop"
    if first_word(text) in CONTINUING or _DANGLING.match(text.lower()):
        return "continues its name instead of naming a thing"
    return None


def entry_faults(source):
    """List the faults of all entries in the docstrings of a module's functions and classes."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, Definition):
            for title, entries in sections(ast.get_docstring(node) or "").items():
                for name, text in entries:
                    if fault := entry_fault(text):
                        yield f"line {node.lineno}, {node.name}, {title}: {name}: {text!r} {fault}"


@pytest.mark.parametrize(
    "text",
    [
        "token rows, int64 [S].",
        "expected number of tokens that a step emits.",
        "receives one-line warnings.",
        "no plan stays within the budget.",
        "whether the bytes came past the page cache.",
        "one-line warnings.",
        "seed as in `ShapeLayers`.",
        '"cpu" or "cuda:0".',
    ],
)
def test_a_noun_phrase_is_a_good_entry(text):
    assert entry_fault(text) is None


@pytest.mark.parametrize(
    "text",
    [
        "token rows",
        "that it emits.",
        "of this machine.",
        "what it is about, a word or two.",
        "how its matrices are stored.",
        "likewise of a pass over the draft.",
        "one per layer.",
        "all of them.",
        "the same for the draft.",
        "checked before every layer.",
        "loaded.",
        "Is given the steps.",
        "they differ.",
    ],
)
def test_an_entry_that_continues_its_name_is_found(text):
    assert entry_fault(text)


def test_entries_of_all_sections_are_checked():
    source = '''
    def walk(rows):
        """Walk down the tree.

        Args:
            rows: that it needs,
                each once.
            *names: node names.

        Returns:
            What was found
            on the way.

        Raises:
            ValueError: they differ.
        """

    class Rate:
        """A rate.

        Attributes:
            a, b: by hand.
        """
    '''
    found = list(entry_faults(textwrap.dedent(source)))
    assert {fault.split(": ")[1] for fault in found} == {"a, b", "rows", "", "ValueError"}
    assert "'that it needs, each once.'" in " ".join(found)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_entries_are_noun_phrases(path):
    assert not list(entry_faults(path.read_text()))


# --- length ------------------------------------------------------------------------------------------------------

# A function of one or two lines may still need a sentence on units, ownership or errors: three lines hold that.
FREE_LINES = 3
_REASON = re.compile(r"Source:|\d[\d.,]*(%|x| ?(GB|MB|GiB|MiB|KiB|ms|us|s|times|tokens|bytes)\b)")


def prose_lines(docstring):
    """Return the non-blank lines of a docstring in front of its first section."""
    lines = []
    for line in docstring.splitlines():
        if re.fullmatch(r"(\w+):", line) and line[:-1] in SECTIONS:
            break
        if line.strip():
            lines.append(line)
    return lines


def is_contract(body):
    """Return whether a body is left to subclasses: nothing, `...` or NotImplementedError."""
    return all(
        isinstance(node, ast.Pass)
        or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
        or (isinstance(node, ast.Raise) and "NotImplementedError" in ast.dump(node))
        for node in body
    )


def length_fault(node):
    """Say why a function's docstring is too long; None where it is not.

    A docstring that gives a source or a measurement may be longer, and so may the contract of an abstract method.
    """
    docstring = ast.get_docstring(node)
    body = node.body[1:]
    if docstring is None or is_contract(body) or _REASON.search(docstring):
        return None
    num_statements = sum(isinstance(inner, ast.stmt) for outer in body for inner in ast.walk(outer))
    if node.name.startswith("_") and num_statements <= 3 and len(docstring.splitlines()) > FREE_LINES:
        return f"a private function of {num_statements} statements has {len(docstring.splitlines())} lines of docstring"
    num_prose, num_code = len(prose_lines(docstring)), body[-1].end_lineno - body[0].lineno + 1
    if num_prose > max(FREE_LINES, num_code):
        return f"{num_prose} lines of prose on {num_code} lines of code"
    return None


def length_faults(source):
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, Function) and (fault := length_fault(node)):
            yield f"line {node.lineno}, {node.name}: {fault}"


def function(name, docstring, body):
    return f"def {name}(rows):\n" + textwrap.indent(f'"""{docstring}\n"""\n{body}\n', "    ")


LONG = "Return the rows.\n\nOne.\nTwo.\nThree."


def test_a_long_docstring_on_a_short_function_is_found():
    assert list(length_faults(function("rows", LONG, "return rows")))
    assert list(length_faults(function("_rows", "Return the rows.\n\nArgs:\n    rows: token rows.", "return rows")))


@pytest.mark.parametrize(
    ("docstring", "body"),
    [
        ("Return the rows.\n\nOne.\nTwo.", "return rows"),
        ("Return the rows.\n\nOne.\n\nArgs:\n    rows: token rows.\n\nReturns:\n    Rows.", "return rows"),
        (LONG, "a = rows\nb = a\nc = b\nreturn c"),
        (LONG, "..."),
        (LONG, "raise NotImplementedError"),
        (f"{LONG}\n\nSource: Leviathan et al. 2023", "return rows"),
        (f"{LONG} Copies reach 2.4 GB/s here.", "return rows"),
    ],
)
def test_a_docstring_may_be_as_long_as_its_function_needs(docstring, body):
    assert not list(length_faults(function("rows", docstring, body)))


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_docstrings_are_no_longer_than_their_functions_need(path):
    assert not list(length_faults(path.read_text()))


# --- house words -------------------------------------------------------------------------------------------------

# Patterns of whole words; what to write instead stands behind.
BANNED = (
    "likewise",  # name the thing
    "so many",
    "so much",
    "whoever",  # the caller, the user
    "whatever is",
    "be had",  # is available
    "of those that",
    "that of those",
    "told in one line",
    "told in a line",
    "at hand",  # available
    "turned round",  # transposed
    "comes quantized",  # is pre-quantized
    "come quantized",
    "came quantized",
    "it goes like this",  # usage:
    "as it is there",
    "number formats?",  # quantization format
    "matrix products?",  # matmul
    "rehears\\w*",  # profile
    "in torch's eyes",
    "is none of",
    "by and by",
)
_BANNED = re.compile(rf"\b({'|'.join(BANNED)})\b", re.IGNORECASE)
_TEXT_TOKENS = {tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}


def texts(source):
    """Yield (line, text) of every string and of every block of comments; line breaks become blanks."""
    comment, first, last = [], 0, -1
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            line = token.start[0]
            if line != last + 1:
                yield first, " ".join(comment)
                comment, first = [], line
            comment.append(token.string.lstrip("# "))
            last = line
        elif token.type in _TEXT_TOKENS:
            yield token.start[0], " ".join(token.string.split())
    yield first, " ".join(comment)


def banned_phrases(source):
    return [f"line {line}: {match[1]!r}" for line, text in texts(source) for match in _BANNED.finditer(text)]


@pytest.mark.parametrize(
    ("source", "num_found"),
    [
        ('x = "Likewise of a draft"\n', 1),
        ('x = f"{1} comes quantized"\n', 1),
        ('"""Memory that can be\n    had."""\n', 1),
        ("x = 1  # of those\n# that stay\n", 1),
        ("# a rehearsal\nx = 1\n\n# as it is there\n", 2),
        ("likewise = 1\n", 0),
        ('x = "otherwise"  # so manual\n', 0),
        ('x = "beforehand"\n', 0),
    ],
)
def test_house_words_are_found_in_strings_and_comments(source, num_found):
    assert len(banned_phrases(source)) == num_found


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_house_words_stay_out(path):
    assert not banned_phrases(path.read_text())
