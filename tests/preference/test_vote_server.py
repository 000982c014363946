"""The page's server: what it tells, whom it refuses, and that a vote is stored before it is acknowledged."""

import dataclasses
import hashlib
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from comparisons import WORDS, made

from loratune.errors import LoratuneError
from loratune.preference.analysis import Vote
from loratune.preference.comparison import Comparison, PreferenceRecord, read_comparison, read_preferences, settle
from loratune.preference.votes import NAME, Votes, read_votes

pytest.importorskip("fastapi", reason="FastAPI is not installed (the extra `compare`)")
from starlette.testclient import TestClient

from loratune.preference.guard import LARGEST
from loratune.preference.server import create_app, left_side, listen, order_of

SECRETS = ("trial", "tuned", "default", "secret-model", "nowhere", "first", "second")


@pytest.fixture
def record(tmp_path: Path) -> PreferenceRecord:
    return read_preferences(made(tmp_path / "c"))


@pytest.fixture
def votes(record: PreferenceRecord) -> Iterator[Votes]:
    with Votes(record.folder / NAME) as votes:
        yield votes


@pytest.fixture
def page(record: PreferenceRecord, votes: Votes) -> TestClient:
    return TestClient(create_app(record.pairs, votes, seed=3), base_url="http://localhost:1", client=("127.0.0.1", 1))


def say(page: TestClient, what: str, **body: str) -> dict:
    reply = page.post(f"/api/{what}", json={"rater": "Ann", **body})
    assert reply.status_code == 200, reply.text
    return reply.json()


def test_nothing_sent_tells_the_contestants_apart(page: TestClient) -> None:
    sent = [page.get(path) for path in ("/", "/page.js", "/page.css")]
    assert [reply.status_code for reply in sent] == [200] * 3
    state = say(page, "state")
    texts = [reply.text for reply in sent] + [json.dumps(state)]
    while state["question"] is not None:
        state = say(page, "vote", question=state["question"]["id"], choice="left")
        texts.append(json.dumps(state))
    for secret in SECRETS:
        assert not any(secret in text for text in texts[3:]), secret
    assert not any(secret in text for text in texts for secret in ("tuned", "default (", "secret-model"))
    assert all("://" not in text.replace("http://www.w3.org", "") for text in texts)  # everything is served from here


def test_headers_forbid_everything_from_elsewhere(page: TestClient) -> None:
    reply = page.get("/")
    assert reply.headers["content-security-policy"].startswith("default-src 'none'")
    assert "server" not in reply.headers
    assert page.get("/docs").status_code == page.get("/openapi.json").status_code == page.get("/../votes.db").status_code == 404


def test_a_session_with_undo(page: TestClient, record: PreferenceRecord) -> None:
    state = say(page, "state")
    assert (state["done"], state["total"]) == (0, 6)
    asked = []
    for choice in ("left", "right", "tie"):
        asked.append(state["question"]["id"])
        state = say(page, "vote", question=asked[-1], choice=choice)
    assert state["done"] == 3
    assert asked == [pair.question.id for pair in order_of(record.pairs, 3, "Ann")][:3]
    assert [(v.question, v.left, v.choice) for v in read_votes(record.folder)] == [
        (q, left_side(3, "Ann", q), c) for q, c in zip(asked, ("left", "right", "tie"), strict=True)
    ]
    state = say(page, "undo")
    assert (state["done"], state["question"]["id"]) == (2, asked[2])
    for _ in range(4):
        state = say(page, "vote", question=state["question"]["id"], choice="neither")
    assert (state["done"], state["question"]) == (6, None)
    assert "left" not in state


def test_what_stands_left_is_what_the_vote_says(page: TestClient, record: PreferenceRecord) -> None:
    """Whoever always prefers "amber", wherever it stands, votes for the first contestant every time."""
    state = say(page, "state")
    places = set()
    while (question := state["question"]) is not None:
        choice = "left" if state["left"]["text"].startswith(WORDS["first"]) else "right"
        places.add(choice)
        state = say(page, "vote", question=question["id"], choice=choice)
    assert places == {"left", "right"}
    people = read_preferences(record.folder).people
    assert people is not None
    assert people.votes.first == 6 == people.votes.total


def test_sides_are_fair_and_differ_between_raters() -> None:
    sides = [left_side(0, "Ann", str(n)) for n in range(2000)]
    assert 900 < sides.count("first") < 1100  # six standard deviations
    assert sides != [left_side(0, "Bob", str(n)) for n in range(2000)]
    assert sides != [left_side(1, "Ann", str(n)) for n in range(2000)]
    assert sides == [left_side(0, " ann ", str(n)) for n in range(2000)]


def test_the_rest_waits_for_a_restart(page: TestClient, record: PreferenceRecord, votes: Votes) -> None:
    state = say(page, "state")
    then = say(page, "vote", question=state["question"]["id"], choice="left")
    votes.close()
    with Votes(record.folder / NAME) as again:
        returned = browser(record, again)
        returned.cookies.update(page.cookies)
        assert say(returned, "state", rater="ann") == then


# --- whose name it is -------------------------------------------------------------------------------------------------


def browser(record: PreferenceRecord, votes: Votes, seed: int = 3) -> TestClient:
    """A browser of its own: no cookies."""
    return TestClient(create_app(record.pairs, votes, seed=seed), base_url="http://localhost:1", client=("127.0.0.1", 1))


def refused(page: TestClient, what: str, **body: str) -> str:
    reply = page.post(f"/api/{what}", json={"rater": "Ann", **body})
    assert reply.status_code == 403, reply.text
    return reply.json()["detail"]


@pytest.mark.parametrize("name", ["Ann", " ann ", "ANN", "\uff21nn"])
def test_nobody_acts_under_another_s_name(page: TestClient, record: PreferenceRecord, votes: Votes, name: str) -> None:
    state = say(page, "state")
    state = say(page, "vote", question=state["question"]["id"], choice="left")
    stored = read_votes(record.folder)
    eve, forger = browser(record, votes), browser(record, votes)
    say(eve, "state", rater="Eve")
    (mine,) = eve.cookies.jar
    (hers,) = page.cookies.jar
    forger.cookies.set(hers.name, mine.value)  # Eve's own secret under Ann's cookie
    for other in (eve, forger, browser(record, votes)):
        assert "Ann votes from another browser" in refused(other, "state", rater=name)
        assert "lost its cookie" in refused(other, "vote", rater=name, question=state["question"]["id"], choice="right")
        assert "--readmit" in refused(other, "undo", rater=name)
    assert read_votes(record.folder) == stored
    assert say(page, "state") == state  # Ann goes on


def test_the_secret_is_the_browser_s_alone(page: TestClient, record: PreferenceRecord) -> None:
    reply = page.post("/api/state", json={"rater": "Ann"})
    sent = reply.headers["set-cookie"].lower()
    assert "httponly" in sent
    assert "samesite=strict" in sent
    (kept,) = page.cookies.jar
    assert len(kept.value or "") == 43  # 32 bytes
    assert (kept.value or "").encode() not in (record.folder / NAME).read_bytes() + (record.folder / f"{NAME}-wal").read_bytes()
    assert kept.value not in reply.text


def test_without_entering_nobody_votes(page: TestClient, record: PreferenceRecord) -> None:
    refused(page, "vote", question="1", choice="left")
    page.cookies.set("loratune_rater_" + hashlib.sha256(b"ann").hexdigest()[:12], "guessed")  # no secret of ours
    refused(page, "vote", question="1", choice="left")
    assert read_votes(record.folder) == []


def test_a_name_is_the_browser_s_that_entered_first(record: PreferenceRecord, votes: Votes) -> None:
    """Before any vote."""
    first, second = browser(record, votes), browser(record, votes)
    state = say(first, "state")
    refused(second, "state")
    refused(second, "vote", question=state["question"]["id"], choice="right")
    say(first, "vote", question=state["question"]["id"], choice="left")


def test_two_raters_share_a_browser(page: TestClient) -> None:
    for rater in ("Ann", "Bob", "Ann"):
        state = say(page, "state", rater=rater)
        say(page, "vote", rater=rater, question=state["question"]["id"], choice="tie")
    assert (say(page, "state")["done"], say(page, "state", rater="Bob")["done"]) == (2, 1)


def test_a_lost_cookie_is_told_and_mended(page: TestClient, record: PreferenceRecord, votes: Votes) -> None:
    state = say(page, "state")
    then = say(page, "vote", question=state["question"]["id"], choice="left")
    fresh = browser(record, votes)
    refused(fresh, "state")
    assert votes.readmit(" ANN ")
    assert not votes.readmit("Nobody")
    assert say(fresh, "state") == then  # the votes stay
    say(fresh, "undo")
    refused(page, "vote", question=then["question"]["id"], choice="left")  # the name is the new browser's


def test_votes_of_before_names_had_browsers(record: PreferenceRecord, votes: Votes) -> None:
    """The first browser that goes on takes the name over."""
    votes.cast(Vote(rater="Ann", question="1", left="first", choice="left"))
    page = browser(record, votes)
    assert say(page, "state")["done"] == 1
    say(page, "vote", question="2", choice="tie")
    refused(browser(record, votes), "state")


# --- the secret seed --------------------------------------------------------------------------------------------------


def test_every_comparison_draws_its_own_seed(tmp_path: Path) -> None:
    seeds = {fresh(tmp_path / str(n)).seed for n in range(4)}
    assert len(seeds) == 4
    assert min(seeds) > 2**64


def fresh(folder: Path) -> Comparison:
    """The comparison as the command settles it, which says no seed."""
    like = read_preferences(made(folder / "like")).comparison
    given = {f.name: getattr(like, f.name) for f in dataclasses.fields(like)}
    given.pop("seed")
    settle(Comparison(**given), folder / "c")
    return read_comparison(folder / "c") or pytest.fail("no comparison")


def test_the_same_command_keeps_the_seed(tmp_path: Path) -> None:
    """Also one of before, whose seed was 0: who voted goes on with the same sides."""
    folder = made(tmp_path / "c")
    text = json.loads((folder / "comparison.json").read_text())
    (folder / "comparison.json").write_text(json.dumps({**text, "seed": 0}))
    again = read_preferences(folder).comparison
    settle(dataclasses.replace(again, seed=99), folder)
    assert read_preferences(folder).comparison.seed == 0


def test_no_reply_tells_the_seed(record: PreferenceRecord, votes: Votes) -> None:
    seed = 0x1234567890ABCDEF1234567890ABCDEF
    page = browser(record, votes, seed)
    replies = [page.get(path) for path in ("/", "/page.js", "/page.css")]
    replies.append(page.post("/api/state", json={"rater": "Ann"}))
    while (question := replies[-1].json()["question"]) is not None:
        replies.append(page.post("/api/vote", json={"rater": "Ann", "question": question["id"], "choice": "left"}))
    replies.append(page.post("/api/undo", json={"rater": "Ann"}))
    replies.append(page.post("/api/vote", json={"rater": "Ann", "question": "99", "choice": "left"}))
    for reply in replies:
        text = reply.text + str(dict(reply.headers))
        assert str(seed) not in text
        assert f"{seed:x}" not in text.lower()


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (b"", 422, "body"),
        (b"{", 422, "JSON"),
        (b"\xff\xfe", 422, "JSON"),
        (b"[" * 4000, 400, "parsing"),
        (b"[]", 422, "dictionary"),
        (b'{"rater": "Ann"}', 422, "question"),
        (b'{"rater": "Ann", "question": 1, "choice": "left"}', 422, "question"),
        (b'{"rater": "Ann", "question": "1", "choice": "best"}', 422, "choice"),
        (b'{"rater": "Ann", "question": "1", "choice": "left", "left": "first"}', 422, "left"),
        (b'{"rater": "Ann", "question": "99", "choice": "left"}', 422, "no question '99'"),
        (b'{"rater": "", "question": "1", "choice": "left"}', 422, "rater"),
        (b'{"rater": "a\\u0000b", "question": "1", "choice": "left"}', 422, "rater"),
        (b'{"rater": "\\ud800", "question": "1", "choice": "left"}', 422, "rater"),
        (b'{"rater": "Ann", "question": "\\ud800", "choice": "left"}', 422, "question"),
        (b'{"rater": "' + b"n" * 61 + b'", "question": "1", "choice": "left"}', 422, "rater"),
        (b'{"rater": "' + b"n" * LARGEST + b'"}', 413, "too large"),
    ],
)
def test_malformed_and_oversized_posts(page: TestClient, record: PreferenceRecord, body: bytes, status: int, said: str) -> None:
    reply = page.post("/api/vote", content=body, headers={"Content-Type": "application/json"})
    assert reply.status_code == status, reply.text
    assert said in reply.json()["detail"]
    assert read_votes(record.folder) == []


def test_an_oversized_body_without_a_length_is_cut_off(page: TestClient) -> None:
    pieces = (b" " * 1000 for _ in range(100))
    assert page.post("/api/vote", content=pieces, headers={"Content-Type": "application/json"}).status_code == 413
    reply = page.post("/api/vote", content=b"{}", headers={"Content-Type": "application/json", "Content-Length": "nonsense"})
    assert reply.status_code == 413


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
def test_what_a_foreign_form_can_send_is_refused(page: TestClient, record: PreferenceRecord, kind: str | None) -> None:
    body = b'{"rater": "Ann", "question": "1", "choice": "left"}'
    reply = page.post("/api/vote", content=body, headers={"Content-Type": kind} if kind else {})
    assert reply.status_code == 415
    assert read_votes(record.folder) == []


@pytest.mark.parametrize(
    "headers",
    [{"Origin": "http://evil.example"}, {"Origin": "null"}, {"Origin": "http://localhost:2"}, {"Sec-Fetch-Site": "cross-site"}],
)
def test_another_origin_is_refused(page: TestClient, headers: dict[str, str]) -> None:
    reply = page.post("/api/state", json={"rater": "Ann"}, headers=headers)
    assert reply.status_code == 403
    assert "another page" in reply.json()["detail"]
    assert (
        page.post(
            "/api/state", json={"rater": "Ann"}, headers={"Origin": "http://localhost:1", "Sec-Fetch-Site": "same-origin"}
        ).status_code
        == 200
    )


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "localhost:80@evil.example", "", "[::1].evil"]
)
def test_a_foreign_name_for_this_machine_is_refused(page: TestClient, host: str) -> None:
    reply = page.get("/", headers={"Host": host})
    assert reply.status_code == 403
    assert "Host" in reply.json()["detail"]


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8652", "127.0.0.1:1", "[::1]:9"])
def test_this_machine_by_its_own_names(page: TestClient, host: str) -> None:
    assert page.get("/", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("address", ["10.0.0.7", "192.168.1.2", "2001:db8::1", "::ffff:10.0.0.7", "nonsense"])
def test_another_machine_needs_a_token(record: PreferenceRecord, votes: Votes, address: str) -> None:
    outside = TestClient(create_app(record.pairs, votes, seed=3), base_url="http://localhost", client=(address, 1))
    assert outside.get("/").status_code == 403
    assert outside.post("/api/state", json={"rater": "Ann"}).status_code == 403


def test_with_a_token_the_link_opens_the_page_from_anywhere(record: PreferenceRecord, votes: Votes) -> None:
    app = create_app(record.pairs, votes, seed=3, token="tökén")
    outside = TestClient(app, base_url="http://gpu.example", client=("10.0.0.7", 1), follow_redirects=False)
    assert outside.get("/").status_code == outside.get("/?token=wrong").status_code == 401
    assert outside.post("/api/state", json={"rater": "Ann"}, headers={"Authorization": "Bearer wrong"}).status_code == 401
    assert outside.get("/", headers={"Cookie": "a=b; ;;=\x01"}).status_code == 401
    plain = TestClient(
        create_app(record.pairs, votes, seed=3, token="abc"), base_url="http://gpu.example", client=("10.0.0.7", 1), follow_redirects=False
    )
    reply = plain.get("/?token=abc&rater=Ann")
    assert (reply.status_code, reply.headers["location"]) == (303, "/?rater=Ann")
    assert "httponly" in reply.headers["set-cookie"].lower()
    assert plain.get("/").status_code == 200  # by the cookie
    assert plain.post("/api/state", json={"rater": "Ann"}).status_code == 200
    assert plain.post("/api/state", json={"rater": "Ann"}, headers={"Origin": "http://evil.example"}).status_code == 403


def test_only_the_raters_named(record: PreferenceRecord, votes: Votes) -> None:
    app = create_app(record.pairs, votes, seed=3, raters=["Ann", "Bob"])
    page = TestClient(app, base_url="http://localhost", client=("127.0.0.1", 1))
    assert say(page, "state", rater="ANN")["rater"] == "Ann"
    reply = page.post("/api/state", json={"rater": "Eve"})
    assert (reply.status_code, reply.json()["detail"]) == (403, "Eve is not among the raters of this comparison.")


def test_undo_of_nothing(page: TestClient) -> None:
    assert page.post("/api/undo", json={"rater": "Ann"}).status_code == 409


def test_a_vote_that_cannot_be_stored_is_not_acknowledged(page: TestClient, votes: Votes) -> None:
    state = say(page, "state")
    votes._db.execute("PRAGMA query_only = ON")
    reply = page.post("/api/vote", json={"rater": "Ann", "question": state["question"]["id"], "choice": "left"})
    assert reply.status_code == 503
    assert "not stored" in reply.json()["detail"]
    votes._db.execute("PRAGMA query_only = OFF")
    assert say(page, "state") == state


def test_raters_at_the_same_time_lose_nothing(page: TestClient, record: PreferenceRecord) -> None:
    def session(rater: str) -> None:
        state = say(page, "state", rater=rater)
        while state["question"] is not None:
            state = say(page, "vote", rater=rater, question=state["question"]["id"], choice="left")

    threads = [threading.Thread(target=session, args=(f"rater {n}",)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({(v.rater, v.question) for v in read_votes(record.folder)}) == 36


def test_where_it_listens() -> None:
    with pytest.raises(LoratuneError, match="Add --token"):
        listen("0.0.0.0", None, None)
    with listen("127.0.0.1", 0, None) as taken:
        assert taken.getsockname()[0] == "127.0.0.1"
        with pytest.raises(LoratuneError, match="Choose another --port"):
            listen("127.0.0.1", taken.getsockname()[1], None)
    for nonsense in (-1, 70000):
        with pytest.raises(LoratuneError, match="Choose another --port"):
            listen("127.0.0.1", nonsense, None)
    with listen("0.0.0.0", 0, "token") as everywhere:
        assert isinstance(everywhere, socket.socket)
