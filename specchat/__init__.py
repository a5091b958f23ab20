"""Chat with a language model that does not fit in GPU memory, with exactly the text of plain decoding.

    import specchat

    with specchat.load("demo") as model:
        for piece in model.chat([{"role": "user", "content": "Tell me a story."}]):
            print(piece.text, end="", flush=True)

Importing this package imports neither torch nor transformers; `load` does.
"""

from typing import TYPE_CHECKING, Any

from specchat.version import __version__

if TYPE_CHECKING:
    from specchat.api import Model, load
    from specchat.chat.answer import Delta

__all__ = ["Delta", "Model", "__version__", "load"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name == "Delta":
        from specchat.chat.answer import Delta

        return Delta
    if name in ("Model", "load"):
        from specchat.loading.libraries import prepare_threads

        prepare_threads()  # before the import of torch
        from specchat import api

        return getattr(api, name)
    raise AttributeError(f"module 'specchat' has no attribute '{name}'")
