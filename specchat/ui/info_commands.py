"""The slash commands that show or change settings, and those that show what happened."""

from collections.abc import Sequence

from specchat.chat.assignments import parse_assignment
from specchat.chat.session import ChatSession
from specchat.errors import UsageError
from specchat.records.chat import Setting
from specchat.ui.chat_view import info_lines, plan_lines, totals_lines
from specchat.ui.commands import help_lines
from specchat.ui.desk import Desk
from specchat.ui.prompt import unquoted


def system(desk: Desk, text: str) -> None:
    """Show or change the system prompt."""
    session = desk.session()
    if text:
        session.set_system(None if text == "none" else unquoted(text) or text)
    desk.talk.tell(f"system prompt: {session.system or 'none'}")


def set_value(desk: Desk, assignment: str) -> None:
    """Show the settings of answers, or change one."""
    session = desk.session()
    if not assignment:
        _tell_settings(desk, session.settings())
        return
    changed = session.set_value(*parse_assignment(assignment))
    desk.talk.tell(f"{changed.name} = {changed.value}")


def think(desk: Desk, word: str) -> None:
    """Switch thinking on or off, or show or fold the thinking."""
    session = desk.session()
    match word:
        case "on" | "off":
            session.set_thinking(word == "on")
            desk.talk.tell(f"thinking is {word}, starting with the next answer")
        case "show":
            desk.view.shows_thinking = True
            _show_last_thinking(desk, session)
        case "hide":
            desk.view.shows_thinking = False
            desk.talk.tell("finished thinking will be hidden")
        case "":
            switch = {True: "on", False: "off", None: "model default"}[session.thinking]
            desk.talk.tell(f"thinking: {switch}, {'shown' if desk.view.shows_thinking else 'hidden'}")
        case _:
            raise UsageError(f"/think takes on, off, show or hide, not '{word}'")


def _show_last_thinking(desk: Desk, session: ChatSession) -> None:
    reasoning = session.state.exchanges[-1].answer.reasoning if session.state.exchanges else None
    desk.talk.say(reasoning.strip() if reasoning else "thinking will be shown", "dim")


def help_(desk: Desk) -> None:
    """List commands and keys."""
    for line in help_lines(desk.talk.console.width):
        desk.talk.tell(line)


def stats(desk: Desk) -> None:
    """Show the statistics of this chat's answers."""
    if not desk.turns:
        raise UsageError("no answers yet")
    for line in totals_lines(desk.turns, desk.session().engine.plan):
        desk.talk.tell(line)


def history(desk: Desk) -> None:
    """Show all messages of this chat."""
    session = desk.session()
    if session.system:
        desk.talk.say(f"system prompt: {session.system}", "dim")
    for number, exchange in enumerate(session.state.exchanges):
        if number or session.system:
            desk.talk.tell("")
        desk.talk.tell("> " + exchange.question.replace("\n", "\n  "))
        desk.talk.tell("")
        desk.talk.tell(exchange.answer.content)
    if not session.state.exchanges:
        raise UsageError("no messages yet")


def info(desk: Desk) -> None:
    """Show the plan, the context in use, and the settings with their sources."""
    session = desk.session()
    for line in plan_lines(session.engine.plan, desk.talk.console.width):
        desk.talk.tell(line)
    desk.talk.tell(f"context: {session.context_used:,} of {session.ctx:,} tokens in use")
    _tell_settings(desk, desk.chat.settings(session))


def verbose(desk: Desk) -> None:
    """Toggle the display of each pass."""
    desk.view.verbose = not desk.view.verbose
    desk.talk.tell("verbose on: each pass is shown" if desk.view.verbose else "verbose off")


def _tell_settings(desk: Desk, settings: Sequence[Setting]) -> None:
    for line in info_lines(settings, desk.talk.console.width):
        desk.talk.tell(line)
