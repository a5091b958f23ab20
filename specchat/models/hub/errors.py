"""Conversion of huggingface_hub's errors to specchat's."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from specchat.errors import (
    DoesNotFitError,
    HubUnreachableError,
    ModelError,
    ModelGatedError,
    ModelNotFoundError,
    SpecchatError,
)
from specchat.models.catalog.ref import ModelRef

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError


@contextmanager
def hub_errors(ref: ModelRef) -> Iterator[None]:
    """Convert huggingface_hub's errors to specchat's, and ask the hub for nothing else than what the context asks for.

    Otherwise huggingface_hub would also fetch a list of programs, in order to tell the hub which one runs here. It
    keeps whatever answer it gets for a day, and one that is no list ends every later request.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import DryRunError, HfHubHTTPError, LocalEntryNotFoundError

    constants.HF_HUB_DISABLE_TELEMETRY = True
    # hf_xet raises RuntimeError.
    failures: tuple[type[Exception], ...] = (*_transport_errors(), OSError, ValueError, RuntimeError)
    try:
        yield
    except failures as exc:
        # These two only report an earlier network error, which is their cause.
        wrapped = isinstance(exc, DryRunError | LocalEntryNotFoundError) and isinstance(exc.__cause__, Exception)
        cause = exc.__cause__ if wrapped else exc
        if isinstance(cause, HfHubHTTPError):
            raise _translate_answer(ref, cause) from exc
        raise _translate_failure(ref, cause) from exc
    except (AttributeError, LookupError, TypeError) as exc:  # huggingface_hub takes the form of answers for granted
        raise not_a_hub(exc) from exc


def _transport_errors() -> tuple[type[Exception], ...]:
    """Return the base classes of the HTTP library, which differs among the allowed versions of huggingface_hub."""
    from huggingface_hub.errors import HfHubHTTPError

    return tuple(base for base in HfHubHTTPError.__bases__ if issubclass(base, Exception))


def _translate_answer(ref: ModelRef, exc: "HfHubHTTPError") -> ModelError:
    """Convert an error response of the hub."""
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    if isinstance(exc, GatedRepoError):  # before RepositoryNotFoundError, of which it is a subclass
        return ModelGatedError(
            f"{ref.text} is gated: a logged-in user must accept its licence",
            hint=f"accept it at {constants.ENDPOINT}/{ref.repo_id}, then run: hf auth login",
        )
    if isinstance(exc, RevisionNotFoundError):
        return ModelNotFoundError(
            f"{ref.repo_id} has no revision '{ref.revision}'",
            hint=f"remove @{ref.revision}, or choose a revision from {constants.ENDPOINT}/{ref.repo_id}/tree/main",
        )
    if isinstance(exc, RepositoryNotFoundError):
        return ModelNotFoundError(f"{ref.repo_id} is not on the hub, or is private", hint=_not_found_hint(ref))
    status = exc.response.status_code
    if status in (401, 403):
        return ModelGatedError(f"the hub refused access to {ref.text} (HTTP {status})", hint="run: hf auth login")
    if status == 429:
        return ModelError("the hub limits requests (HTTP 429)", hint="wait some minutes, or run: hf auth login")
    return ModelError(f"the hub failed on {ref.text} (HTTP {status})", hint="try again later")


def _translate_failure(ref: ModelRef, exc: BaseException | None) -> SpecchatError:
    """Convert an error that is no response of the hub."""
    from huggingface_hub import constants
    from huggingface_hub.errors import FileMetadataError, HFValidationError

    if isinstance(exc, HFValidationError):
        return ModelNotFoundError(f"'{ref.text}' is not a hub id", hint="a hub id has the form org/name")
    if isinstance(exc, FileMetadataError | ValueError):
        return not_a_hub(exc)
    if isinstance(exc, OSError) and exc.errno in (errno.ENOSPC, errno.EDQUOT):
        return DoesNotFitError(f"the disk of {constants.HF_HUB_CACHE} is full", hint="free some space and run again")
    if isinstance(exc, OSError) and exc.filename is not None:
        return ModelError(
            f"cannot use {exc.filename}: {exc.strerror}", hint="check its permissions, or set HF_HOME to another folder"
        )
    return HubUnreachableError(
        f"cannot reach {constants.ENDPOINT}: {_first_line(exc)}",
        hint="check the connection and run again; cached models run with --offline",
    )


def not_a_hub(exc: BaseException | None) -> ModelError:
    """Return the error for an endpoint that does not respond like a hub."""
    from huggingface_hub import constants

    why = f": {_first_line(exc)}" if exc is not None else ""
    return HubUnreachableError(
        f"{constants.ENDPOINT} does not respond like a hub{why}", hint="check HF_ENDPOINT, and any proxy or login page"
    )


def _not_found_hint(ref: ModelRef) -> str:
    assert ref.repo_id is not None
    if Path(ref.repo_id).is_dir():
        return f"did you mean ./{ref.repo_id}?"
    return "check the spelling; for a private model run: hf auth login"


def _first_line(exc: BaseException | None) -> str:
    lines = (line.strip() for line in str(exc).splitlines())
    return next((line for line in lines if line), type(exc).__name__)
