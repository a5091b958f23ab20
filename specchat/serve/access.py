"""Who may use the server: a key, and the pages that browsers may ask from.

Every page that a browser shows can send requests to the own machine. Browsers name the page's origin, other programs
send none. So requests with an origin that was not allowed are refused.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass

from starlette.requests import Request

from specchat.serve.errors import ApiError

ANY_ORIGIN = "*"


@dataclass(frozen=True)
class Access:
    """The rules of access.

    Attributes:
        api_key: key that requests must have, or None.
        origins: origins of pages that may ask; "*" allows all.
    """

    api_key: str | None = None
    origins: tuple[str, ...] = ()

    def check_origin(self, request: Request) -> None:
        """Refuse pages that were not allowed.

        Raises:
            ApiError: the request comes from such a page.
        """
        origin = request.headers.get("origin")
        if origin is None or origin in self.origins or ANY_ORIGIN in self.origins:
            return
        why = f"pages of {origin} may not use this server: start it with --allow-origin {origin}"
        raise ApiError(403, why, "origin_not_allowed")

    def check_key(self, request: Request) -> None:
        """Refuse requests without the key.

        Raises:
            ApiError: the key is missing or wrong.
        """
        if self.api_key is None:
            return
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not secrets.compare_digest(key.strip().encode(), self.api_key.encode()):
            raise ApiError(401, "the API key is missing or wrong: send Authorization: Bearer KEY", "invalid_api_key")
