"""Access control: by API key; on loopback without keys, by the Host header."""

import ipaddress
import re
import secrets
from collections.abc import Collection, Sequence

from pydantic import SecretStr
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from server.config import Settings
from server.errors import AuthenticationError, PermissionDeniedError
from server.middleware import error_response

OPEN_PATHS = ("/health",)


class ApiKeyMiddleware:
    """Requires one of the keys for all paths but OPEN_PATHS, if there are keys."""

    def __init__(self, app: ASGIApp, keys: Sequence[SecretStr]) -> None:
        self._app = app
        self._keys = [key.get_secret_value().encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_guarded = scope["type"] == "http" and scope["path"] not in OPEN_PATHS
        if self._keys and is_guarded and not self._has_key(dict(scope["headers"])):
            error = AuthenticationError(
                "Missing or wrong API key; send it as 'Authorization: Bearer <key>'.",
                code="invalid_api_key",
            )
            await error_response(error)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _has_key(self, headers: dict[bytes, bytes]) -> bool:
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        # All keys are compared, each in constant time, so that timing reveals nothing.
        matches = [secrets.compare_digest(given.strip(), key) for key in self._keys]
        return scheme.lower() == b"bearer" and any(matches)


def is_loopback(host: str) -> bool:
    """Whether the host is a loopback address, or localhost."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def exposure(settings: Settings) -> str | None:
    """The warning if other machines can reach the server without a key; None: they cannot."""
    if settings.keys or is_loopback(settings.host):
        return None
    return f"anyone who reaches {settings.host} may use this server: no --api-key is set"


class HostMiddleware:
    """Refuses requests whose Host header names another host, against DNS rebinding.

    There, a web page's own host name resolves to this server, so both have the same origin to the
    browser.
    """

    def __init__(self, app: ASGIApp, names: Collection[str]) -> None:
        """names: hosts that are accepted in addition to loopback addresses."""
        self._app, self._names = app, {name.lower() for name in names}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self._app
        for host in Headers(scope=scope).getlist("host") if scope["type"] == "http" else ():
            # Without the port, and without the brackets of an IPv6 address.
            name = re.sub(r":\d*$", "", host.strip().lower()).strip("[]")
            if not (is_loopback(name) or name in self._names):
                app = error_response(
                    PermissionDeniedError(
                        f"The header 'Host: {host[:100]}' names another server than this one, "
                        "which has no API key and answers its own machine only; start it with "
                        f"--allowed-host {name[:100]}, or with an --api-key.",
                        code="host_not_allowed",
                    )
                )
        await app(scope, receive, send)
