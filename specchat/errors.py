"""Named errors, with hints, for user mistakes and for machines that refuse.

Only `specchat.cli.exit_status` turns these errors into exit codes. A broken internal invariant is an `assert` instead.
"""

import errno

from specchat.masking import masked


class SpecchatError(Exception):
    """Base of every error shown to a user. Secrets in its texts are masked, because others may read them in a log.

    Args:
        message: one line without a final full stop: what happened and why.
        hint: one line of advice, or None.
    """

    def __init__(self, message: str, hint: str | None = None) -> None:
        self.message = masked(message)
        self.hint = None if hint is None else masked(hint)
        super().__init__(self.message)


class UsageError(SpecchatError):
    """An invalid request: a wrong flag or size, an empty prompt, or options that cannot be combined."""


class InvalidSizeError(UsageError):
    """A SIZE that is not written like 900MiB, 8GiB or 8GB."""


class EmptyPromptError(UsageError):
    """A prompt that is empty or blank."""


class UnsupportedModelError(UsageError):
    """A model architecture on which the engine cannot verify draft trees."""


class VocabularyMismatchError(UsageError):
    """A draft whose token ids stand for other tokens than the target's ids."""


class NotAvailableError(UsageError):
    """A capability that this version does not have."""


class AddressUnusableError(UsageError):
    """An address on which a server cannot listen, for example because another program uses the port."""


class WrongTokenError(UsageError):
    """A token that is missing, too short, or another one than at the other end."""


class VersionMismatchError(UsageError):
    """A worker with other versions of specchat or of the libraries that compute."""


class ModelError(SpecchatError):
    """A model that cannot be found, downloaded or read."""


class ModelNotFoundError(ModelError):
    """A folder, repository or revision that does not exist."""


class ModelGatedError(ModelError):
    """A model for which the hub requires a login or an accepted licence."""


class ModelNotCachedError(ModelError):
    """A model that is not in the local cache while offline."""


class HubUnreachableError(ModelError):
    """A hub that does not answer, or that something else answers for."""


class CorruptCheckpointError(ModelError):
    """A checkpoint whose header, index or shard is damaged or truncated."""


class DifferentWeightsError(ModelError):
    """A worker whose files of the model hold other weights."""


class UnknownTokenError(ModelError):
    """A token of the tokenizer for which the model has no embedding."""


class PickledCheckpointError(ModelError):
    """A checkpoint that only has pickled weights. Pickles may run code when opened, so they are never read."""


class DoesNotFitError(SpecchatError):
    """A request that exceeds the memory, the disk or the context."""


class BudgetError(DoesNotFitError):
    """A budget below what the smallest plan needs.

    Args:
        message: message as in `SpecchatError`.
        hint: hint as in `SpecchatError`.
        needed_bytes: memory of the smallest plan.
    """

    def __init__(self, message: str, hint: str | None, needed_bytes: int) -> None:
        self.needed_bytes = needed_bytes
        super().__init__(message, hint)


class AllocationError(DoesNotFitError):
    """Memory that a plan counted on but that could not be allocated."""


class PromptTooLongError(DoesNotFitError):
    """A prompt that leaves no room for an answer in the context."""


class BrokenScoresError(SpecchatError):
    """A target whose scores are NaN or infinite, so that no token can be drawn."""


class SessionError(SpecchatError):
    """A saved chat that cannot be read or written."""


class DeviceUnusableError(SpecchatError):
    """A device that was requested by name but cannot be used."""


class WorkerUnreachableError(DeviceUnusableError):
    """A worker that does not answer at its address."""


class LostWorkerError(SpecchatError):
    """A worker that failed, ended, or stopped answering, so that no further pass can be computed."""


def is_lack_of_memory(error: BaseException) -> bool:
    """Return whether a foreign error means that memory, or a thread, could not be allocated.

    A new thread needs memory for its stack. torch has a dedicated error only for GPU memory, and Python has none for
    threads, so other errors are recognised by their text.
    """
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return any(words in str(error) for words in ("allocate memory", "start new thread"))
