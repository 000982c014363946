"""Real sockets on loopback: whoever dawdles is let go, and never keeps a rater out."""

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from comparisons import made

from loratune.preference.comparison import read_preferences
from loratune.preference.votes import NAME, Votes

pytest.importorskip("fastapi", reason="FastAPI is not installed (the extra `compare`)")
from loratune.preference import connections
from loratune.preference.server import create_app, listen, server

HALF = b"POST /api/vote HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
PATIENCE = 1.0


@pytest.fixture
def port(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    monkeypatch.setattr(connections, "SECONDS", PATIENCE)
    monkeypatch.setattr(connections, "MOST", 32)
    record = read_preferences(made(tmp_path / "c"))
    with Votes(record.folder / NAME) as votes, listen("127.0.0.1", 0, None) as listening:
        running = server(create_app(record.pairs, votes, seed=3))
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]})
        thread.start()
        yield listening.getsockname()[1]
        running.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def ask(port: int) -> dict:
    """A rater's request."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    connection.request("POST", "/api/state", json.dumps({"rater": "Ann"}), {"Content-Type": "application/json", "Host": "localhost"})
    reply = connection.getresponse()
    assert reply.status == 200
    answer = json.loads(reply.read())
    connection.close()
    return answer


def ended(one: socket.socket, seconds: float) -> bool:
    """Whether the server closes the connection within so many seconds; what it still sends is read."""
    end = time.monotonic() + seconds
    try:
        while (left := end - time.monotonic()) > 0:
            one.settimeout(left)
            if not one.recv(1 << 16):
                return True
    except TimeoutError:
        return False
    except ConnectionError:
        return True
    return False


def opened(port: int, sent: bytes) -> socket.socket:
    one = socket.create_connection(("127.0.0.1", port), timeout=5)
    one.sendall(sent)
    return one


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"GET / HT",
        HALF,
        HALF + b"Content-Length: 90\r\n\r\n{",
        HALF + b"Transfer-Encoding: chunked\r\n\r\n5\r\n{",
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",  # a reply, then silence
    ],
    ids=["nothing", "half a line", "half a header", "half a body", "half a chunk", "idle"],
)
def test_a_request_that_does_not_arrive_is_given_up(port: int, sent: bytes) -> None:
    with opened(port, sent) as one:
        assert ended(one, PATIENCE + 10)
    assert ask(port)["total"] == 6


def sending_fails(one: socket.socket, piece: bytes, seconds: float) -> bool:
    """Whether the server ends the connection while a client that reads nothing goes on sending."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            one.sendall(piece)
        except TimeoutError:
            pass  # the server reads no further; it may still have patience
        except ConnectionError:
            return True
        time.sleep(0.1)
    return False


def test_trickling_buys_no_time(port: int) -> None:
    with opened(port, HALF) as one:
        assert sending_fails(one, b"X-A: b\r\n", PATIENCE + 5)


def test_a_reply_that_nobody_reads_is_given_up(port: int) -> None:
    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        one.connect(("127.0.0.1", port))
        one.settimeout(0.2)
        assert sending_fails(one, b"GET /page.js HTTP/1.1\r\nHost: localhost\r\n\r\n" * 50, PATIENCE + 15)


def test_half_open_connections_keep_no_rater_out(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "SECONDS", 60.0)  # the limit alone, not the time
    held = [opened(port, HALF) for _ in range(300)]
    began = time.monotonic()
    assert ask(port)["total"] == 6
    assert time.monotonic() - began < 5
    assert sum(ended(one, 0.05) for one in held) >= 300 - 32  # the oldest made room
    assert not ended(held[-1], 0.2)  # the newest still may go on
    for one in held:
        one.close()


def test_a_rater_s_own_connection_stays_open_between_votes(port: int) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    for _ in range(4):  # longer in all than one request may take
        connection.request("GET", "/", headers={"Host": "localhost"})
        reply = connection.getresponse()
        assert (reply.status, len(reply.read()) > 1000) == (200, True)
        time.sleep(0.4)
    connection.close()
