"""Loading a model while one live line shows the progress."""

from collections.abc import Callable
from threading import Event
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from specchat.loading.request import Reporter
    from specchat.ui.chat_view import ChatView

T = TypeVar("T")


def load_watched(load: "Callable[[Reporter], T]", view: "ChatView") -> T:
    """Load the models; on a terminal, one live line on stderr shows the progress.

    Raises:
        KeyboardInterrupt: Ctrl-C was pressed.
    """
    from specchat.ui.interrupts import Interrupts
    from specchat.ui.live import can_redraw
    from specchat.ui.loading import BackgroundLoad
    from specchat.ui.progress import TalkReporter

    if view.talk.quiet or not can_redraw(view.talk.stream):
        return load(TalkReporter(view.talk))
    background, cancel = BackgroundLoad(load), Event()
    with Interrupts().setting(cancel):
        view.wait_for(background, cancel)
    if not background.is_done:
        raise KeyboardInterrupt
    for warning in background.reporter.take_warnings():
        view.talk.warn(warning)
    return background.result()
