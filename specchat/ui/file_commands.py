"""The slash commands about files, saved chats and the clipboard."""

import re

from specchat.chat import transcript as transcripts
from specchat.chat.copies import read_copy
from specchat.chat.files import read_text
from specchat.chat.saved_chats import find_chats
from specchat.chat.session import ChatSession
from specchat.errors import PromptTooLongError, UsageError
from specchat.paths import user_path
from specchat.ui import clipboard
from specchat.ui.desk import Attachment, Desk

_MOST_SESSIONS = 10
_CODE = re.compile(r"^(?P<fence>```+|~~~+)[^\n]*\n(?P<code>.*?)^(?P=fence)[ \t]*$", re.DOTALL | re.MULTILINE)


def read(desk: Desk, file: str) -> None:
    """Attach a file's text to the next message, list the attached files, or remove them."""
    if not file:
        _tell_attached(desk)
    elif file == "none":
        desk.attached.clear()
        desk.talk.tell("nothing is attached to the next message")
    else:
        attach(desk, desk.session(), file)


def attach(desk: Desk, session: ChatSession, file: str) -> None:
    """Attach a file's text to the next message.

    Raises:
        UsageError: the file cannot be read, or is not text.
        PromptTooLongError: the text does not fit into the context beside the chat so far.
    """
    path = user_path(file)
    text = read_text(path)
    num_tokens = session.count_tokens(text)
    used = session.context_used + sum(_count(session, each) for each in desk.attached)
    if used + num_tokens >= session.ctx:
        raise PromptTooLongError(
            f"{path.name} has {num_tokens:,} tokens, but {max(session.ctx - used, 0):,} of {session.ctx:,} are free",
            hint="free space with /clear or /drop N, or restart with a larger --ctx",
        )
    desk.attached.append(Attachment(path.name, text, num_tokens))
    desk.talk.tell(f"attached {path.name} ({num_tokens:,} tokens) to the next message; /read none removes it")


def _tell_attached(desk: Desk) -> None:
    if not desk.attached:
        raise UsageError("nothing is attached", hint="/read FILE attaches a text file to the next message")
    session = desk.session()
    for each in desk.attached:
        desk.talk.tell(f"{each.name} ({_count(session, each):,} tokens)")


def _count(session: ChatSession, attachment: Attachment) -> int:
    return session.count_tokens(attachment.text) if attachment.num_tokens is None else attachment.num_tokens


def attach_unread(desk: Desk) -> list[str]:
    """Attach the files of the command line and return their names; the model need not be loaded."""
    desk.attached += [Attachment(name, text, None) for name, text in desk.chat.files]
    return [name for name, _ in desk.chat.files]


def save(desk: Desk, file: str) -> None:
    """Write a copy of the chat, or show where the chat is saved."""
    transcript = desk.chat.transcript
    if file:
        desk.session()
        path = user_path(file)
        transcripts.export(transcript.records, path)
        desk.talk.tell(f"saved to {path}")
    elif transcript.path is None:
        raise UsageError("this chat is not saved (--no-save)", hint="write a copy with /save FILE")
    else:
        resume = f"resume it with: specchat run --session {transcript.session_id}"
        desk.talk.tell(f"chat saved in {transcript.path}; {resume}")


def load(desk: Desk, name: str) -> None:
    """Replace the chat with the one in a file or a saved session."""
    session, copy = desk.session(), read_copy(name)
    session.load(copy.records, copy.source)
    if copy.repair:
        desk.talk.warn(copy.repair)
    turns = len(session.state.exchanges)
    desk.talk.tell(f"loaded {turns} turn{'' if turns == 1 else 's'} from {copy.source}")


def sessions(desk: Desk, text: str) -> None:
    """List the saved chats, or those that contain a text."""
    found = find_chats(text)
    if not found:
        raise UsageError("no saved chat contains that text" if text else "no saved chats")
    for chat in found[:_MOST_SESSIONS]:
        turns = f"{chat.turns} turn{'' if chat.turns == 1 else 's'}"
        desk.talk.tell(f"{chat.session_id} · {chat.changed:%Y-%m-%d %H:%M} · {turns} · {chat.title}")
    more = f"{len(found) - _MOST_SESSIONS} more: specchat sessions; " if len(found) > _MOST_SESSIONS else ""
    desk.talk.say(f"{more}/load ID continues one here", "dim")


def copy(desk: Desk, what: str) -> None:
    """Copy the last answer, or the last code block in it, to the clipboard."""
    exchanges = desk.session().state.exchanges
    if not exchanges:
        raise UsageError("no answer to copy")
    text = exchanges[-1].answer.content
    if what == "code":
        blocks = [match["code"] for match in _CODE.finditer(text)]
        if not blocks:
            raise UsageError("the last answer has no code block", hint="/copy copies the whole answer")
        text = blocks[-1].rstrip("\n")
    elif what:
        raise UsageError(f"/copy takes code or nothing, not '{what}'")
    how = clipboard.copy(text, desk.view.out.stream)
    desk.talk.tell(f"copied {len(text):,} characters {how}")
