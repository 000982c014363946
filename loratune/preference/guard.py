"""Who may talk to the page: checked before any of our code sees a request.

Without a token only this machine may: the peer's address must be a loopback one and the Host header must
name this machine, so that a web site cannot reach the page under a name of its own that it resolves to
127.0.0.1 (DNS rebinding). With a token anyone who has it may, from anywhere: it comes once in the link
(`/?token=...`) and then stays in a cookie of the browser.

A request that changes something must say that it carries JSON, which no foreign page's form can, and when
the browser says where it comes from (Origin, Sec-Fetch-Site), that must be this page.
"""

import hashlib
import hmac
import ipaddress
import re
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qsl, urlencode

from starlette.datastructures import Headers
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LARGEST = 4096  # bytes of a request's body; a vote has about 100
_HERE = r"(localhost|127\.0\.0\.1|\[::1\])(:\d+)?"  # whatever the port: an SSH tunnel changes it
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",  # the token may stand in the address for a moment
    "Cache-Control": "no-store",
}


class Guard:
    """ASGI middleware: refuses with 4xx and a reason, else hands on the request with its body read."""

    def __init__(self, app: ASGIApp, token: str | None = None) -> None:
        self.app, self.token = app, token
        # Cookies do not know ports: two comparisons on one machine each keep their own.
        self.cookie = "loratune_" + hashlib.sha256((token or "").encode()).hexdigest()[:12]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":  # there are no web sockets here
            return None
        send = _with_headers(send)
        headers = Headers(scope=scope)
        refusal = self._stranger(scope, headers) or (_foreign(headers) if scope["method"] not in ("GET", "HEAD") else None)
        if refusal is not None:
            return await refusal(scope, receive, send)
        body = await _body(headers, receive)
        if body is None:
            return await _refuse(413, f"The request is too large: at most {LARGEST} bytes.")(scope, receive, send)
        return await self.app(scope, _once(body, receive), send)

    def _stranger(self, scope: Scope, headers: Headers) -> Response | None:
        """None for those who may come in."""
        if self.token is None:
            if not _is_loopback((scope.get("client") or ("", 0))[0]):
                return _refuse(403, "Only this machine may open the page. Start it with --host and --token to let others in.")
            if not re.fullmatch(_HERE, headers.get("host", ""), re.IGNORECASE):
                return _refuse(403, "The Host header does not name this machine: open the page as http://localhost or http://127.0.0.1.")
            return None
        query = dict(parse_qsl(scope["query_string"].decode("latin-1")))
        if scope["method"] == "GET" and scope["path"] == "/" and _same(query.pop("token", ""), self.token):
            reply = RedirectResponse("/" + (f"?{urlencode(query)}" if query else ""), 303)
            reply.set_cookie(self.cookie, self.token, httponly=True, samesite="lax", max_age=30 * 86400)
            return reply
        bearer = headers.get("authorization", "").removeprefix("Bearer ")
        if _same(bearer, self.token) or _same(cookie(headers, self.cookie), self.token):
            return None
        return _refuse(401, "A token is needed: open the page through the link that `loratune compare` printed.")


def _foreign(headers: Headers) -> Response | None:
    """None for a request that only our own page, or a program of the user, can have sent."""
    if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        return _refuse(415, "Send JSON: the Content-Type must be application/json.")
    origin, site = headers.get("origin"), headers.get("sec-fetch-site")
    if (origin is not None and origin.partition("://")[2] != headers.get("host")) or site not in (None, "same-origin"):
        return _refuse(403, "The request comes from another page.")
    return None


async def _body(headers: Headers, receive: Receive) -> bytes | None:
    """The request's body; None when it is too large. What is announced too large is not read at all."""
    announced = headers.get("content-length", "0")
    if not announced.isdigit() or int(announced) > LARGEST:
        return None
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if len(body) > LARGEST:
            return None
        if not message.get("more_body"):
            return body


def _once(body: bytes, receive: Receive) -> Receive:
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def _with_headers(send: Send) -> Send:
    async def more(message: Message) -> None:
        if message["type"] == "http.response.start":
            own = [(name.lower().encode(), value.encode()) for name, value in _HEADERS.items()]
            message = {**message, "headers": [*message.get("headers", []), *own]}
        await send(message)

    return more


def _refuse(status: int, reason: str) -> Response:
    return JSONResponse({"detail": reason}, status)


def _same(given: str, token: str) -> bool:
    return hmac.compare_digest(given.encode(), token.encode())  # in constant time


def cookie(headers: Headers, name: str) -> str:
    """The value of the request's cookie `name`; empty when there is none."""
    try:
        found = SimpleCookie(headers.get("cookie", "")).get(name)
    except CookieError:
        return ""
    return found.value if found is not None else ""


def _is_loopback(address: str) -> bool:
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return False
    return found.is_loopback or bool(getattr(found, "ipv4_mapped", None) and found.ipv4_mapped.is_loopback)  # type: ignore[union-attr]
