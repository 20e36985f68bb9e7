"""The page's door: what each request must pass, and what each answer carries.

    on loopback     reading is free: who uses this machine can read the run's files anyway
    elsewhere       reading needs the key
    everywhere      the owner's functions need it; beyond loopback also TLS

The key is in the address that the server prints. The first visit turns it into a cookie that no
script can read and no other site's request carries.
"""

import hmac
import secrets
from collections.abc import Iterable
from urllib.parse import parse_qsl, urlencode

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import cookie_parser
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from plumbing.addresses import join_address

OWNER = "/api/owner"
CHANGING = ("POST", "PUT", "PATCH", "DELETE")

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Frame-Options": "DENY",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Door:
    """ASGI middleware around the whole page.

    Args:
        names: what this server may be called in the Host header, without the port.
        port: where it listens.
        reading_needs_key: whether reading does, not only the owner's functions.
        tls: whether the connection is encrypted.
        loopback: whether it listens at this machine's own address alone.
        entrance: a path that is open without the key, and where browsers without it are sent;
            what answers there decides whom to `let_in`.
    """

    def __init__(
        self,
        app: ASGIApp,
        names: Iterable[str],
        port: int,
        loopback: bool,
        tls: bool,
        entrance: str = "",
    ) -> None:
        self.app = app
        self.hosts = {join_address(name, port).lower() for name in names}
        self.origin = "https://" if tls else "http://"
        self.cookie = f"page_{port}"  # cookies are shared by all ports of a host
        self.key = secrets.token_urlsafe(24)
        self.tls = tls
        self.loopback = loopback
        self.entrance = entrance

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return  # no WebSockets here, and nothing to start or stop
        answer = self._objection(scope) or self.app

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        await answer(scope, receive, send_with_headers)

    def _objection(self, scope: Scope) -> Response | None:
        """Return the answer to a request that gets no further, or None."""
        headers = Headers(scope=scope)
        host = headers.get("host", "").lower()
        if host not in self.hosts:
            return PlainTextResponse(
                "this name is not one of this server's; open the address that it prints\n", 421
            )
        query = dict(parse_qsl(scope["query_string"].decode("latin-1")))
        if "key" in query:
            return self._welcome(scope["path"], query)
        has_key = self._is_key(cookie_parser(headers.get("cookie", "")).get(self.cookie, ""))
        owner = scope["path"].startswith(OWNER)
        if owner and not (self.loopback or self.tls):
            return PlainTextResponse("the owner's functions need TLS: server.py --secure\n", 403)
        is_open = scope["path"] == self.entrance or (self.loopback and not owner)
        if not has_key and not is_open:
            if self.entrance and scope["path"] == "/":
                return RedirectResponse(self.entrance, 303)
            return PlainTextResponse("open the address with the key that the server prints\n", 401)
        if scope["method"] in CHANGING and headers.get("origin") != self.origin + host:
            return PlainTextResponse("this request comes from another site\n", 403)
        return None

    def _welcome(self, path: str, query: dict[str, str]) -> Response:
        """Turn the key in an address into a cookie, and take it out of the address bar."""
        key = query.pop("key")
        answer = RedirectResponse(path + ("?" + urlencode(query) if query else ""), 303)
        if not self._is_key(key):
            return PlainTextResponse(
                "this key is of another run of the server; open the address that it prints\n", 401
            )
        return self.let_in(answer)

    def let_in(self, answer: Response) -> Response:
        """Return the answer with the cookie that opens the page."""
        answer.set_cookie(
            self.cookie, self.key, httponly=True, samesite="strict", secure=self.tls, path="/"
        )
        return answer

    def _is_key(self, key: str) -> bool:
        return hmac.compare_digest(key.encode(), self.key.encode())
