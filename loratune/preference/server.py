"""The voting page's server: one page and four requests. It knows the votes, and never tells who wrote what.

What a rater sees is a function of (seed, rater, question): the order of the questions and which answer
stands on the left. So nothing is kept but votes, and a rater goes on at any time, after any restart. The seed
is the comparison's secret; nothing that is sent tells it.

A name belongs to the browser that first entered under it: a cookie there holds a secret, and votes.db keeps its
hash. Without it nobody votes or takes back a vote under that name, nor sees what it has voted on.
"""

import hashlib
import re
import secrets
import socket
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from loratune.errors import LoratuneError, StorageError
from loratune.preference.analysis import FIRST, SECOND, Vote, other
from loratune.preference.comparison import Pair
from loratune.preference.connections import Patient
from loratune.preference.guard import Guard, cookie
from loratune.preference.votes import Votes, key

_PAGE = Path(__file__).parent / "page"
_FILES = {"/": "page.html", "/page.js": "page.js", "/page.css": "page.css"}
PORT = 8652
_COOKIE_DAYS = 180


def _name(text: str) -> str:
    text = " ".join(unicodedata.normalize("NFC", text).split())
    if not text or not text.isprintable():
        raise ValueError("a name has 1 to 60 printable characters")
    return text


Name = Annotated[str, Field(max_length=60), AfterValidator(_name)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    rater: Name


class _Ballot(_Body):
    question: str = Field(max_length=200)
    choice: Literal["left", "right", "tie", "neither"]


def left_side(seed: int, rater: str, question: str) -> str:
    """first | second: whose answer the rater sees as A."""
    return (FIRST, SECOND)[_hash("side", seed, rater, question) % 2]


def order_of(pairs: Sequence[Pair], seed: int, rater: str) -> list[Pair]:
    """The pairs in the rater's own order, so that no question always comes when everyone is tired."""
    return sorted(pairs, key=lambda pair: _hash("order", seed, rater, pair.question.id))


def _hash(what: str, seed: int, rater: str, question: str) -> int:
    return int.from_bytes(hashlib.sha256(repr((what, seed, key(rater), question)).encode()).digest()[:8], "big")


def create_app(pairs: Sequence[Pair], votes: Votes, *, seed: int, raters: Sequence[str] = (), token: str | None = None) -> Guard:
    """The application. raters: the only names that may vote; anyone when empty. token: see guard.py."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    known = {pair.question.id for pair in pairs}
    allowed = {key(name): name for name in raters}

    def spelt(name: str) -> str:
        if allowed and key(name) not in allowed:
            raise HTTPException(403, f"{name} is not among the raters of this comparison.")
        return votes.spelt(allowed.get(key(name), name))

    def mine(rater: str, request: Request) -> None:
        """See that the name is, or now becomes, the asking browser's."""
        secret = _secret(request, rater)
        if not secret or not votes.claim(rater, secret):
            raise HTTPException(403, _not_yours(rater))

    def state(rater: str) -> dict[str, Any]:
        """What the rater sees now. Only texts: nothing in it tells the contestants apart."""
        given = votes.of(rater)
        done = sum(question in known for question in given)
        pair = next((pair for pair in order_of(pairs, seed, rater) if pair.question.id not in given), None)
        found: dict[str, Any] = {"rater": rater, "done": done, "total": len(pairs), "question": None}
        if pair is not None:
            q, side = pair.question, left_side(seed, rater, pair.question.id)
            found["question"] = {"id": q.id, "category": q.category, "instruction": q.instruction, "input": q.input}
            for place, whose in (("left", side), ("right", other(side))):
                found[place] = {"text": pair.answer(whose).text, "cut": not pair.answer(whose).ended}
        return found

    def file(name: str) -> Any:
        async def send() -> FileResponse:
            return FileResponse(_PAGE / name)

        return send

    for path, name in _FILES.items():
        app.get(path)(file(name))

    # Coroutines that never wait: the event loop runs them one after the other, each vote whole.
    @app.post("/api/state")
    async def _state(body: _Body, request: Request, response: Response) -> dict[str, Any]:
        rater = spelt(body.rater)
        secret = _secret(request, rater) or secrets.token_urlsafe(32)
        if not votes.claim(rater, secret):
            raise HTTPException(403, _not_yours(rater))
        response.set_cookie(_cookie_of(rater), secret, httponly=True, samesite="strict", max_age=_COOKIE_DAYS * 86400)
        return state(rater)

    @app.post("/api/vote")
    async def _vote(ballot: _Ballot, request: Request) -> dict[str, Any]:
        rater = spelt(ballot.rater)
        if ballot.question not in known:
            raise HTTPException(422, f"there is no question {ballot.question!r} to vote on.")
        mine(rater, request)
        side = left_side(seed, rater, ballot.question)
        votes.cast(Vote(rater=rater, question=ballot.question, left=side, choice=ballot.choice))
        return state(rater)

    @app.post("/api/undo")
    async def _undo(body: _Body, request: Request) -> dict[str, Any]:
        rater = spelt(body.rater)
        if not votes.of(rater):
            raise HTTPException(409, "there is no vote to take back.")
        mine(rater, request)
        votes.undo(rater)
        return state(rater)

    @app.exception_handler(RequestValidationError)
    async def _malformed(_: Request, error: RequestValidationError) -> JSONResponse:
        # The input is not repeated: it may be nothing that JSON can hold.
        said = [f"{'.'.join(map(str, e['loc'][1:])) or 'body'}: {e['msg']}" for e in error.errors()]
        return JSONResponse({"detail": "; ".join(said)}, 422)

    @app.exception_handler(StorageError)
    async def _not_stored(_: Request, error: StorageError) -> JSONResponse:
        return JSONResponse({"detail": f"The vote was not stored: {error}"}, 503)

    return Guard(app, token)


def _cookie_of(rater: str) -> str:
    """One per name, for several people may share a browser. Cookies do not know ports: a name's secret may serve two comparisons."""
    return "loratune_rater_" + hashlib.sha256(key(rater).encode()).hexdigest()[:12]


def _secret(request: Request, rater: str) -> str:
    """The secret that the browser keeps for this rater; empty when it has none, or none of ours."""
    found = cookie(request.headers, _cookie_of(rater))
    return found if re.fullmatch(r"[\w-]{43}", found, re.ASCII) else ""


def _not_yours(rater: str) -> str:
    return (
        f"{rater} votes from another browser, or this browser has lost its cookie or keeps none. Go on in the browser where {rater} began. "
        "If that is not possible, ask whoever runs the comparison to let the name in again (loratune compare ... --readmit NAME): "
        "its votes stay."
    )


def listen(host: str, port: int | None, token: str | None) -> socket.socket:
    """A listening socket; without a `port` the usual one, or any free one. Raises LoratuneError.

    Without a token nobody but this machine is served, so another `host` is refused.
    """
    if token is None and host not in ("127.0.0.1", "localhost", "::1"):
        raise LoratuneError(f"--host {host} opens the page to other machines. Add --token, which makes up a token, or --token YOURS.")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    problem: OSError | None = None
    for wanted in (PORT, 0) if port is None else (port,):
        try:
            return socket.create_server((host, wanted), family=family, backlog=64)
        except (OSError, OverflowError) as error:
            problem = error if isinstance(error, OSError) else OSError(0, str(error))
    raise LoratuneError(f"cannot listen on {host}, port {port}: {problem.strerror if problem else ''}. Choose another --port.")


def serve_page(app: Guard, listening: socket.socket) -> None:
    """Answer until SIGINT or SIGTERM; a vote that is being stored is finished first."""
    server(app).run(sockets=[listening])


def server(app: Guard) -> uvicorn.Server:
    """uvicorn, as it should serve the page: without a word, and without waiting for ever (see connections.py)."""
    config = uvicorn.Config(
        app,
        http=Patient,
        ws="none",
        log_level="error",
        lifespan="off",
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=2,
    )
    return uvicorn.Server(config)
