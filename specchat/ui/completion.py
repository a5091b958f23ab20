"""Tab completion of slash commands and their arguments."""

from collections.abc import Callable, Iterable, Mapping

from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document

# Function that returns the completions of an argument; None completes file names.
Words = Callable[[], Iterable[str]] | None


class CommandCompleter(Completer):
    """A completer of slash commands; ordinary messages have no completions.

    Args:
        arguments: completions of the argument by command name, without the slash; None completes file names. Commands
            without an argument have no completions.
    """

    def __init__(self, arguments: Mapping[str, Words]) -> None:
        self._arguments = arguments
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        """Yield the completions at the cursor."""
        text = document.text_before_cursor
        if not text.startswith("/") or text.startswith("//") or "\n" in text:
            return
        name, space, argument = text[1:].partition(" ")
        if not space:
            yield from _words(self._arguments, name)
        elif name in self._arguments:
            words = self._arguments[name]
            if words is None:
                yield from self._paths.get_completions(Document(argument), complete_event)
            else:
                yield from _words(words(), argument)


def _words(words: Iterable[str], begun: str) -> Iterable[Completion]:
    return (Completion(word, start_position=-len(begun)) for word in sorted(words) if word.startswith(begun))
