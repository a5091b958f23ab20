"""Errors that a client gets: an HTTP status and OpenAI's error object."""

from __future__ import annotations

from typing import Any

from specchat.errors import ModelError, PromptTooLongError, SpecchatError, UsageError

_KINDS = {403: "permission_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An error that a client gets.

    Args:
        status: HTTP status.
        message: text for people, about what happened and what to do.
        code: short name of the reason, for programs.
        param: name of the field at fault, or None.
    """

    def __init__(self, status: int, message: str, code: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param

    def as_object(self) -> dict[str, Any]:
        """Return OpenAI's error object."""
        kind = _KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def wrong_type(param: str, wanted: str) -> ApiError:
    """Return the error of a field of another type."""
    return ApiError(400, f"{param} must be {wanted}", "invalid_type", param)


def wrong_value(param: str, message: str) -> ApiError:
    """Return the error of a field whose value is not allowed."""
    return ApiError(400, message, "invalid_value", param)


def missing(param: str) -> ApiError:
    """Return the error of a required field that is missing."""
    return ApiError(400, f"{param} is missing", "missing_required_parameter", param)


def unsupported(param: str, message: str) -> ApiError:
    """Return the error of a field that asks for something this server does not do."""
    return ApiError(400, message, "unsupported_parameter", param)


def stopping() -> ApiError:
    """Return the error of an answer that ends with the server."""
    return ApiError(503, "the server is shutting down", "shutting_down")


def internal() -> ApiError:
    """Return the error of a request on which the server itself failed; a client gets no details."""
    return ApiError(500, "the server failed on this request", "internal_error")


def of_specchat(error: SpecchatError, param: str | None = None) -> ApiError:
    """Return the error for a client of an error of ours.

    Args:
        error: error to report.
        param: field of the prompt, which most such errors are about.
    """
    if isinstance(error, PromptTooLongError):
        return ApiError(400, _worded(error), "context_length_exceeded", param)
    if isinstance(error, UsageError | ModelError):
        return ApiError(400, _worded(error), "invalid_value", param)
    return ApiError(500, _worded(error), "generation_failed")


def _worded(error: SpecchatError) -> str:
    return f"{error.message} ({error.hint})" if error.hint else error.message
