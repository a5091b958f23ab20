"""What the commands of an interactive chat share: the chat, its screen, and the wait for the model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Event

from specchat.chat.answer import Turn
from specchat.chat.session import ChatSession
from specchat.chat.transcript import Transcript
from specchat.errors import UsageError
from specchat.records.chat import Setting
from specchat.ui.chat_view import ChatView
from specchat.ui.interrupts import Interrupts
from specchat.ui.loading import BackgroundLoad


@dataclass(frozen=True)
class Attachment:
    """A file that goes with the next message.

    Attributes:
        name: name of the file.
        text: text of the file, without line breaks at the end.
        num_tokens: tokens of the text; None if it was attached before the model was loaded.
    """

    name: str
    text: str
    num_tokens: int | None


@dataclass(frozen=True)
class Chat:
    """The parts of an interactive chat, except the screen.

    Attributes:
        load: background load of the session.
        transcript: writer of the saved session.
        settings: function that returns all settings and their sources.
        notes: warnings to show at the start.
        check_model: refuses a name that cannot be a model, before the chat leaves the one it has.
        files: names and texts of the files that go with the first message.
        rings: whether the terminal's bell rings after a slow answer.
    """

    load: BackgroundLoad[ChatSession]
    transcript: Transcript
    settings: Callable[[ChatSession], Sequence[Setting]]
    check_model: Callable[[str], None] = lambda _name: None
    notes: Sequence[str] = ()
    files: Sequence[tuple[str, str]] = ()
    rings: bool = False


class Desk:
    """The chat and the screen, as the commands use them.

    Args:
        chat: session and transcript.
        view: view of the answers.

    Attributes:
        chat: session and transcript.
        view: view of the answers.
        talk: stderr.
        interrupts: handler of Ctrl-C.
        attached: files that go with the next message.
        turns: answers of this run.
    """

    def __init__(self, chat: Chat, view: ChatView) -> None:
        self.chat = chat
        self.view = view
        self.talk = view.talk
        self.interrupts = Interrupts()
        self.attached: list[Attachment] = []
        self.turns: list[Turn] = []

    def loaded(self, cancel: Event) -> ChatSession | None:
        """Wait for the session and return it, or None if the user cancelled the wait."""
        self.view.wait_for(self.chat.load, cancel)
        self.show_load_warnings()
        return self.chat.load.result() if self.chat.load.is_done else None

    def session(self) -> ChatSession:
        """Wait for the session and return it.

        Raises:
            UsageError: the user cancelled the wait.
        """
        cancel = Event()
        with self.interrupts.setting(cancel):
            session = self.loaded(cancel)
        if session is None:
            raise UsageError("the model is not loaded yet")
        return session

    def show_load_warnings(self) -> None:
        """Show the warnings of loading that were not shown yet."""
        for warning in self.chat.load.reporter.take_warnings():
            self.talk.warn(warning)
