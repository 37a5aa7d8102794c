"""Who may ask: by the server's name, the origin and a token; and what browsers are told to refuse.

A page of another site can have a browser send requests here. It cannot read answers, for want of
CORS headers, and it gets none: its origin is another one; and where it gives its own name the
address of this machine (DNS rebinding), the Host header says that name.
"""

import ipaddress
import secrets
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


@dataclass(frozen=True, kw_only=True)
class Rules:
    """Who may ask."""

    names: frozenset[str]
    """Hosts that requests may name, in lower case."""
    any_address: bool = False
    """Whether they may name any IP address as well: a site that rebinds its name has a name."""
    token: str | None = None
    """What requests have to know; None where everybody on this machine may ask."""
    cookie: str = "cft"
    """The cookie that remembers the token. Servers on other ports of a host see it too, so each
    needs a name of its own."""

    def turned_away(self, request: Request) -> Response | None:
        """The answer to a request that is not let in; None lets it in."""
        host = request.headers.get("host", "")
        if not self._is_ours(host):
            return refusal(
                421,
                "this server does not answer to that name; open the address that `cft serve` "
                "printed",
            )
        origin = request.headers.get("origin")
        if origin is not None and origin.lower().partition("://")[2] != host.lower():
            return refusal(403, "requests of other sites are not answered")
        if self.token is None:
            return None
        asked = request.query_params.get("token", "")
        if request.method == "GET" and self._knows(asked):
            # Out of the address bar and the history.
            answer = RedirectResponse("/", 303)
            answer.set_cookie(self.cookie, asked, httponly=True, samesite="lax")
            return answer
        bearer = request.headers.get("authorization", "").removeprefix("Bearer ")
        if self._knows(bearer) or self._knows(request.cookies.get(self.cookie, "")):
            return None
        return refusal(
            401,
            "a token is needed: open the whole address that `cft serve` printed, or send the "
            "header `Authorization: Bearer TOKEN`",
        )

    def _is_ours(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        return name in self.names or (self.any_address and _is_address(name))

    def _knows(self, given: str) -> bool:
        assert self.token is not None
        return secrets.compare_digest(given.encode(), self.token.encode())


@dataclass(frozen=True, kw_only=True)
class Access:
    """An ASGI application that lets in who may ask, and seals whatever is answered."""

    app: ASGIApp
    rules: Rules
    policy: str
    """The Content-Security-Policy."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def sealed(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(_HEADERS | {"Content-Security-Policy": self.policy})
            await send(message)

        answer = self.rules.turned_away(Request(scope)) or self.app
        await answer(scope, receive, sealed)


def refusal(status: int, reason: str) -> Response:
    """Why a request is not answered, and what to do."""
    return JSONResponse({"error": reason}, status)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
