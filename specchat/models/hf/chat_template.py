"""A model's chat template: a program from a model's folder, which runs within limits of time and size.

transformers' environment keeps a template from reaching anything outside it. This module adds limits: a template is
ended after some seconds, its text has a greatest length, and no operation makes a value so large that computing it
holds the interpreter or fills the memory; see template_limits.py.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from specchat.errors import AllocationError, UsageError, is_lack_of_memory
from specchat.models.hf.template_limits import LONGEST_TEXT, limit_texts, with_limits
from specchat.threads import run_within

WITHOUT_TEMPLATE = "pass --base to continue the prompt as it stands, without the template"

# Real templates take milliseconds; one that was written to loop takes forever.
_RENDER_S = 10.0
# Real templates repeat a message twice at most.
_REPEATS = 4


class ChatTemplate:
    """A chat template of a model.

    Args:
        text: the template's source.
    """

    def __init__(self, text: str) -> None:
        self._text = text

    def render(self, turns: Sequence[Mapping[str, Any]], *, is_prompt: bool, names: Mapping[str, Any]) -> str:
        """Render a chat, with the names that transformers gives to templates.

        Args:
            turns: messages of the chat.
            is_prompt: whether to add the start of the next answer.
            names: special tokens, and switches of the template.

        Raises:
            UsageError: the template refuses the chat, fails, takes too long, or renders too much.
            AllocationError: there is no memory for a thread.
        """
        import jinja2

        def run() -> str:
            limit_texts(LONGEST_TEXT + _REPEATS * sum(map(_num_characters, turns)))
            values = {"messages": turns, "tools": None, "documents": None, "add_generation_prompt": is_prompt, **names}
            return str(self._compiled.render(**values))

        try:
            text = run_within(_RENDER_S, run)
        except jinja2.TemplateError as error:
            reason = " ".join(str(error).split())
            raise UsageError(f"the model's chat template rejects this chat: {reason}") from error
        except Exception as error:  # templates are programs, which fail in any way
            if isinstance(error, AllocationError) or (is_lack_of_memory(error) and not isinstance(error, MemoryError)):
                raise  # the machine's fault, not the template's
            raise UsageError(
                f"the model's chat template fails on this chat: {_reason(error)}", hint=WITHOUT_TEMPLATE
            ) from error
        if not _is_utf8(text):
            raise UsageError("the model's chat template renders text that is not UTF-8", hint=WITHOUT_TEMPLATE)
        return text

    @cached_property
    def _compiled(self) -> Any:
        """The compiled template, in an environment of transformers that checks operations before they compute."""
        from transformers.utils.chat_template_utils import _compile_jinja_template

        # Compiling also computes constants, so the operators are replaced first. transformers caches its own templates
        # by their text; a text of a single blank is no model's, and its environment is copied.
        environment = with_limits(_compile_jinja_template(" ").environment.overlay())
        return environment.from_string(self._text)


def _num_characters(turn: Mapping[str, Any]) -> int:
    """Return the characters of a message, whose text may be a list of parts."""
    content = turn["content"]
    parts = content if isinstance(content, list) else [{"text": content}]
    reasoning = turn.get("reasoning") or ""
    return len(reasoning) + sum(len(part["text"]) for part in parts)


def _is_utf8(text: str) -> bool:
    """Return whether a text can be encoded: JSON files may hold halves of surrogate pairs."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _reason(error: Exception) -> str:
    """Return why a template failed, in words."""
    if isinstance(error, TimeoutError):
        return f"it takes more than {_RENDER_S:.0f} s"
    if isinstance(error, RecursionError):
        return "it calls itself without end"
    if isinstance(error, MemoryError):
        return "it needs too much memory"
    return " ".join(str(error).split()) or "it gives no reason"
