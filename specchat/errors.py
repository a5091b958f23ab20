"""Everything a user can get wrong, or a machine can refuse, as named errors with a hint.

Only `specchat.cli.exit_status` turns these into exit codes. A broken invariant of our own is an `assert` instead.
"""

import errno


class SpecchatError(Exception):
    """Base of every error shown to a user.

    Args:
        message: What happened and why, one line, no full stop.
        hint: What to do about it, one line, or None.
    """

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(SpecchatError):
    """Asked wrongly: a flag, a size, an empty prompt, something that cannot be combined."""


class InvalidSizeError(UsageError):
    """A SIZE that is not of the form 900MiB, 8GiB, 8GB."""


class EmptyPromptError(UsageError):
    """There is nothing to answer."""


class UnsupportedModelError(UsageError):
    """An architecture that the engine cannot verify trees on."""


class VocabularyMismatchError(UsageError):
    """A draft whose token ids do not mean what the target's mean."""


class NotAvailableError(UsageError):
    """A capability that this version does not have."""


class ModelError(SpecchatError):
    """The model cannot be had or cannot be read."""


class ModelNotFoundError(ModelError):
    """No such folder, repository or revision."""


class ModelGatedError(ModelError):
    """The hub wants a login or an accepted licence first."""


class ModelNotCachedError(ModelError):
    """Offline, and the files are not in the local cache."""


class CorruptCheckpointError(ModelError):
    """A header, index or shard that cannot be what was saved."""


class PickledCheckpointError(ModelError):
    """Weights only as pickles, which may run code when opened: never read."""


class DoesNotFitError(SpecchatError):
    """Memory, disk or context is too small for what was asked."""


class AllocationError(DoesNotFitError):
    """Memory that a plan counted on could not be had when it was taken."""


class PromptTooLongError(DoesNotFitError):
    """The prompt leaves no room for an answer in the context."""


class SessionError(SpecchatError):
    """A saved chat that cannot be read or written."""


class DeviceUnusableError(SpecchatError):
    """A device that was asked for by name cannot be used."""


def is_lack_of_memory(error: BaseException) -> bool:
    """Whether an error that is not ours says that memory could not be had, or a thread, which takes some, too.

    torch has an error of its own for a GPU's memory only, and Python none for threads.
    """
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return any(words in str(error) for words in ("allocate memory", "start new thread"))
