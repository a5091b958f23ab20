"""Limits of the operations of chat templates: each is checked before it makes a text or a number too large.

Templates come from a model's folder. Without limits, a template of one line would fill the memory, for example by
doubling a text forty times. Every way to make a text longer is checked: operators, `~`, filters and methods.
"""

import re
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any

# Real templates add some thousand characters to the text of a chat.
LONGEST_TEXT = 4 << 20
_MOST_PARTS = 4 * LONGEST_TEXT
_LARGEST_BITS = 4096
_LONGEST_FIELD = 10_000

_RENDERING = threading.local()  # the limit of the rendering in this thread, in characters


class TooLargeError(Exception):
    """A value that a template may not compute."""


def limit_texts(num_characters: int) -> None:
    """Set the greatest length of texts that templates join in this thread."""
    _RENDERING.limit = num_characters


def with_limits(environment: Any) -> Any:
    """Return a sandboxed environment of Jinja, which is modified, that checks operations before they compute."""
    from jinja2.compiler import CodeGenerator

    class Limited(CodeGenerator):
        """The compiler of Jinja, with a `~` that checks the length of its text."""

        def visit_Concat(self, node: Any, frame: Any) -> None:  # noqa: N802  Jinja's name
            """Write the call that joins the values of one `~`."""
            self.write("environment.concat(map(str, (")
            for part in node.nodes:
                self.visit(part, frame)
                self.write(", ")
            self.write(")))")

    environment.code_generator_class = Limited
    environment.concat = _joined
    environment.binop_table = {**environment.binop_table, **_OPERATORS}
    environment.intercepted_binops = frozenset(_OPERATORS)
    environment.filters = {**environment.filters, **_filters(environment.filters)}
    call = environment.call

    def checked_call(context: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
        method = getattr(function, "__wrapped__", function)  # the sandbox wraps `format`
        owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        if isinstance(owner, str) and name in _METHODS:
            own = {key: value for key, value in kwargs.items() if key not in ("_loop_vars", "_block_vars")}  # Jinja's
            _METHODS[name](owner, *args, **own)
        return call(context, function, *args, **kwargs)

    environment.call = checked_call
    return environment


def _check(size: int, limit: int) -> None:
    if size > limit:
        raise TooLargeError(f"it computes a value of more than {limit:,} parts")


def _joined(pieces: Iterable[str]) -> str:
    """Join the pieces of a text, unless they are longer than this rendering may become."""
    kept, length, limit = [], 0, getattr(_RENDERING, "limit", LONGEST_TEXT)
    for piece in pieces:
        length += len(piece)
        if length > limit:
            raise TooLargeError(f"it renders more than {limit:,} characters")
        kept.append(piece)
    return "".join(kept)


# --- operators -----------------------------------------------------------------------------------------------------


def _times(left: Any, right: Any) -> Any:
    for text, number in ((left, right), (right, left)):
        if isinstance(text, str | list | tuple) and isinstance(number, int):
            _check(len(text) * number, LONGEST_TEXT)
    if isinstance(left, int) and isinstance(right, int):
        _check(left.bit_length() + right.bit_length(), _LARGEST_BITS)
    return left * right


def _power(left: Any, right: Any) -> Any:
    if isinstance(left, int) and isinstance(right, int):
        _check(left.bit_length() * abs(right), _LARGEST_BITS)
    return left**right


def _modulo(left: Any, right: Any) -> Any:
    if isinstance(left, str):
        _check_fields(left, right)
    return left % right


def _plus(left: Any, right: Any) -> Any:
    if isinstance(left, str | list | tuple) and isinstance(right, str | list | tuple):
        _check(len(left) + len(right), _MOST_PARTS)
    return left + right


_OPERATORS: dict[str, Callable[[Any, Any], Any]] = {"*": _times, "**": _power, "%": _modulo, "+": _plus}


# --- methods of strings, and filters that do the same ---------------------------------------------------------------


def _check_fields(text: str, values: Any) -> None:
    """Check `text % values`: the widths of fields, and the values, each of which may be written many times."""
    fields = re.findall(r"%[^%a-zA-Z]*?(\d+|\*)", text)
    for width in fields:
        _check(_LONGEST_FIELD + 1 if width == "*" else int(width[:9]), _LONGEST_FIELD)
    _check(len(text) + text.count("%") * (_LONGEST_FIELD * bool(fields) + _longest(values)), _MOST_PARTS)


def _check_format(text: str, *args: Any, **kwargs: Any) -> None:
    """Check `text.format(...)`, whose fields may have a width of any value."""
    if re.search(r"\{[^{}]*:[^{}]*(\{|\d{5})", text):
        _check(_LONGEST_FIELD + 1, _LONGEST_FIELD)
    _check(len(text) + text.count("{") * (_LONGEST_FIELD + _longest((args, kwargs))), _MOST_PARTS)


def _check_join(text: str, values: Iterable[Any] = ()) -> None:
    if isinstance(values, str | list | tuple | dict):
        _check(sum(len(text) + len(str(each)) for each in values), _MOST_PARTS)


def _check_replace(text: str, old: str = "", new: str = "", *_: Any, **__: Any) -> None:
    _check(len(text) + (text.count(old) if old else len(text) + 1) * len(new), _MOST_PARTS)


def _check_width(text: str, width: int = 0, *_: Any) -> None:
    _check(len(text) + width, LONGEST_TEXT)


def _check_tabs(text: str, tabsize: int = 8) -> None:
    _check(len(text) + text.count("\t") * tabsize, _MOST_PARTS)


def _check_indent(text: str, width: Any = 4, *_: Any, **__: Any) -> None:
    size = len(width) if isinstance(width, str) else width
    _check(len(text) + (len(text.splitlines()) + 1) * size, _MOST_PARTS)


def _longest(value: Any) -> int:
    """Return the length of the longest text within a value."""
    match value:
        case str():
            return len(value)
        case Mapping():
            return max((_longest(each) for each in (*value, *value.values())), default=0)
        case list() | tuple():
            return max(map(_longest, value), default=0) * (1 if isinstance(value, tuple) else len(value))
    return len(str(value))


_METHODS: dict[str, Callable[..., None]] = {
    "join": _check_join,
    "replace": _check_replace,
    "format": _check_format,
    "format_map": _check_format,
    "expandtabs": _check_tabs,
    **dict.fromkeys(("center", "ljust", "rjust", "zfill"), _check_width),
}


def _filters(filters: Mapping[str, Any]) -> dict[str, Any]:
    """Return Jinja's filters that may make a text much longer, with a check before each."""
    from jinja2 import pass_eval_context
    from jinja2.filters import make_attrgetter

    @pass_eval_context
    def join(context: Any, value: Any, d: str = "", attribute: Any = None) -> Any:
        if attribute is not None:
            value = map(make_attrgetter(context.environment, attribute), value)
        items = list(value)
        _check_join(str(d), items)
        return filters["join"](context, items, d)

    @pass_eval_context
    def replace(context: Any, s: Any, old: Any, new: Any, count: int | None = None) -> Any:
        _check_replace(str(s), str(old), str(new))
        return filters["replace"](context, s, old, new, count)

    def checked(name: str, check: Callable[..., None]) -> Any:
        def run(value: Any, *args: Any, **kwargs: Any) -> Any:
            check(str(value), *args, **kwargs)
            return filters[name](value, *args, **kwargs)

        return run

    return {
        "join": join,
        "replace": replace,
        "center": checked("center", _check_width),
        "indent": checked("indent", _check_indent),
        "format": checked("format", lambda text, *args, **kwargs: _check_fields(text, kwargs or args)),
    }
