"""The packages that the server needs."""

from importlib.util import find_spec

from specchat.errors import NotAvailableError

_PACKAGES = ("starlette", "uvicorn")


def check_installed() -> None:
    """Refuse to serve without the packages of the extra `serve`.

    Raises:
        NotAvailableError: a package is not installed.
    """
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if missing:
        raise NotAvailableError(
            f"specchat serve needs {' and '.join(missing)}, not installed here", "run pip install 'specchat[serve]'"
        )
