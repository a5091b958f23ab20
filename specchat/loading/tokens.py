"""Addresses of workers, and the token that they and the machine with the terminal know."""

import os

from specchat.errors import UsageError, WrongTokenError
from specchat.files import read_given
from specchat.loading.request import WorkersChoice
from specchat.paths import user_path

TOKEN_VARIABLE = "SPECCHAT_TOKEN"


def parse_workers(name: str, text: str) -> tuple[tuple[str, int], ...]:
    """Parse a list of addresses such as `10.0.0.2:7000,10.0.0.3:7000`.

    Raises:
        UsageError: the list is empty, or names something else or an address twice.
    """
    from specchat.engine.workers.wire import parse_address, shown

    found = [parse_address(name, each) for each in text.split(",")]
    if twice := next((each for each in found if found.count(each) > 1), None):
        raise UsageError(f"{name} names {shown(*twice)} twice", hint="name each worker once")
    return tuple(found)


def find_token(file: str | None) -> bytes:
    """Return the token of the environment, or of a file.

    Args:
        file: path of a file with the token; None for the variable SPECCHAT_TOKEN.

    Raises:
        UsageError: the file cannot be read.
        WrongTokenError: a token that is missing or too short.
    """
    from specchat.engine.workers.wire import check_token

    if file is None:
        return check_token(os.environ.get(TOKEN_VARIABLE, "").strip())
    try:
        text = read_given(user_path(file)).decode().strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UsageError(f"--token-file cannot read {file}: {reason}") from error
    if not text:
        raise WrongTokenError(f"the token file {file} is empty")
    return check_token(text)


def workers_choice(addresses: tuple[tuple[str, int], ...], file: str | None) -> WorkersChoice | None:
    """Return the workers of a request; None without addresses.

    Args:
        addresses: host and port of each worker.
        file: path of a file with the token; None for the variable SPECCHAT_TOKEN.
    """
    return WorkersChoice(addresses, find_token(file)) if addresses else None
