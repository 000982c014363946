"""A judge behind a real local HTTP server that speaks OpenAI's chat completions."""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from comparisons import WORDS, made, ready

from loratune.cli import main
from loratune.preference.comparison import read_preferences
from loratune.preference.judge import Judge, JudgeError, ask_judge, verdict
from loratune.preference.summary_lines import summary_text
from loratune.preference.votes import read_votes
from loratune.system.jsonl import read_lines


class Endpoint:
    """Answers with what `reply` makes of (request, its number): a text, or (status, headers, body)."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.headers: list[Any] = []
        self.paths: list[str] = []
        self.reply: Callable[[dict[str, Any], int], Any] = lambda request, number: "VERDICT: TIE"
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                endpoint.requests.append(request)
                endpoint.headers.append(self.headers)
                endpoint.paths.append(self.path)
                given = endpoint.reply(request, len(endpoint.requests))
                if isinstance(given, str) or given is None:
                    content = {
                        "id": "x",
                        "object": "chat.completion",
                        "choices": [{"index": 0, "message": {"role": "assistant", "content": given}}],
                    }
                    given = (200, {}, json.dumps(content))
                status, headers, body = given
                self.send_response(status)
                for name, value in {"Content-Type": "application/json", "Content-Length": str(len(body.encode())), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body.encode())

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    endpoint = Endpoint()
    thread = threading.Thread(target=endpoint.server.serve_forever, args=(0.01,))
    thread.start()
    yield endpoint
    endpoint.server.shutdown()
    endpoint.server.server_close()
    thread.join()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return made(tmp_path / "c")


def judge(endpoint: Endpoint, **options: Any) -> Judge:
    return Judge(url=endpoint.url, model="judge-1", **({"first_wait": 0.001, "retries": 2} | options))


def run(endpoint: Endpoint, folder: Path, **options: Any) -> None:
    ask_judge(judge(endpoint, **options), read_preferences(folder).pairs, folder, tell=lambda _: None)


def shown(request: dict[str, Any]) -> tuple[str, str, str]:
    """(question's number, what answer A begins with, what answer B begins with) of a request."""
    text = request["messages"][1]["content"]
    return text.split("number ")[1][0], text.split("[Answer A]\n")[1][:5], text.split("[Answer B]\n")[1][:5]


def test_both_orders_make_one_verdict(endpoint: Endpoint, folder: Path) -> None:
    def reply(request: dict[str, Any], _: int) -> str:
        number, a, _b = shown(request)
        if number in "123":  # sees what is better, wherever it stands
            return "Reasons.\n\nVERDICT: " + ("A" if a == WORDS["first"] else "B")
        return "VERDICT: A" if number == "4" else "VERDICT: TIE" if number == "5" else "I prefer A."

    endpoint.reply = reply
    run(endpoint, folder, key="k-123")
    assert len(endpoint.requests) == 12
    assert {shown(r)[1:] for r in endpoint.requests} == {("amber", "basil"), ("basil", "amber")}
    assert set(endpoint.paths) == {"/v1/chat/completions"}
    assert endpoint.headers[0]["Authorization"] == "Bearer k-123"
    found = read_preferences(folder).judges["judge-1"]
    assert (found.questions.first, found.questions.second, found.questions.ties) == (3, 0, 2)
    assert (found.inconsistent, found.unreadable) == (1, 1)
    assert (found.position.left, found.position.right) == (5, 3)  # questions 1-3 once each side, 4 twice A
    assert not any(secret in json.dumps(endpoint.requests) for secret in ("tuned", "default", "trial"))
    assert "k-123" not in "".join(path.read_text() for path in folder.iterdir())


def test_kept_apart_from_people(endpoint: Endpoint, folder: Path) -> None:
    run(endpoint, folder)
    record = read_preferences(folder)
    assert read_votes(folder) == []
    assert record.people is None
    assert "No person has voted yet." in summary_text(record)
    assert "Judge judge-1, each question in both orders: not one of 6 questions is decided." in summary_text(record)


def test_resumed_where_it_stopped(endpoint: Endpoint, folder: Path) -> None:
    endpoint.reply = lambda request, number: "VERDICT: A" if number <= 5 else (503, {}, "down")
    with pytest.raises(JudgeError, match=r"did not answer after 3 attempts. Last: HTTP 503: down"):
        run(endpoint, folder)
    assert len(read_lines(folder / "judge.jsonl")) == 5
    before = len(endpoint.requests)
    endpoint.reply = lambda request, number: "VERDICT: A"
    run(endpoint, folder)
    assert len(endpoint.requests) == before + 7
    run(endpoint, folder)
    assert len(endpoint.requests) == before + 7
    assert read_preferences(folder).judges["judge-1"].inconsistent == 6


def test_a_torn_last_line_is_asked_again(endpoint: Endpoint, folder: Path) -> None:
    run(endpoint, folder)
    file = folder / "judge.jsonl"
    file.write_bytes(file.read_bytes()[:-20])
    run(endpoint, folder)
    assert len(endpoint.requests) == 13
    assert len(read_lines(file)) == 12


def test_retries_what_passes(endpoint: Endpoint, folder: Path) -> None:
    troubles: dict[int, Any] = {1: (429, {"Retry-After": "0"}, "slow down"), 2: (500, {}, "oops")}
    endpoint.reply = lambda request, number: troubles.get(number, "VERDICT: TIE")
    run(endpoint, folder)
    assert len(endpoint.requests) == 14


def test_a_model_that_takes_no_temperature(endpoint: Endpoint, folder: Path) -> None:
    def reply(request: dict[str, Any], _: int) -> Any:
        return (400, {}, '{"error": {"message": "Unsupported value: temperature"}}') if "temperature" in request else "VERDICT: B"

    endpoint.reply = reply
    run(endpoint, folder)
    assert len(read_lines(folder / "judge.jsonl")) == 12


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((401, {}, '{"error": "no key"}'), 'refuses. HTTP 401: {"error": "no key"}'),
        ((302, {"Location": "http://127.0.0.1:1/"}, ""), "refuses. HTTP 302"),  # a key is not carried elsewhere
        ((200, {}, "<html>"), "does not speak OpenAI's chat completions"),
        ((200, {}, '{"choices": []}'), "does not speak OpenAI's chat completions"),
    ],
)
def test_an_endpoint_that_will_not_do(endpoint: Endpoint, folder: Path, answer: Any, said: str) -> None:
    endpoint.reply = lambda request, number: answer
    with pytest.raises(JudgeError) as error:
        run(endpoint, folder)
    assert said in str(error.value)
    assert len(endpoint.requests) == 1


def test_an_unreachable_endpoint(folder: Path) -> None:
    gone = Judge(url="http://127.0.0.1:9/v1", model="m", retries=1, first_wait=0.001)
    with pytest.raises(JudgeError, match="did not answer after 2 attempts"):
        ask_judge(gone, read_preferences(folder).pairs, folder)
    with pytest.raises(JudgeError, match="needed: an http or https address"):
        ask_judge(Judge(url="localhost:8000", model="m"), read_preferences(folder).pairs, folder)


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("Good.\nVERDICT: A", "left"),
        ("VERDICT: B\n\n", "right"),
        ("VERDICT: TIE", "tie"),
        ("VERDICT: A\nVERDICT: B", "right"),
        ("VERDICT: C", None),
        ("verdict: a", None),
        ("The VERDICT: A", None),
        ("VERDICT: A.", None),
        ("VERDICT: A\nOn second thoughts, no.", None),
        ("", None),
    ],
)
def test_only_an_exact_last_line_is_a_verdict(reply: str, expected: str | None) -> None:
    assert verdict(reply) == expected


def test_a_judge_that_says_nothing(endpoint: Endpoint, folder: Path) -> None:
    endpoint.reply = lambda request, number: None
    run(endpoint, folder)
    assert read_preferences(folder).judges["judge-1"].unreadable == 6


def test_the_command(endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    folder, arguments = ready(tmp_path)
    monkeypatch.setenv("MY_KEY", "k-9")
    endpoint.reply = lambda request, number: "VERDICT: " + ("A" if "[Answer A]\namber" in request["messages"][1]["content"] else "B")
    code = main(["compare", *arguments, "--no-page", "--judge", endpoint.url, "--judge-model", "judge-1", "--judge-key", "MY_KEY"])
    said = capsys.readouterr().out
    assert code == 0
    assert endpoint.headers[0]["Authorization"] == "Bearer k-9"
    assert "judge-1: 12 of 12 replies" in said
    assert "each question in both orders: 6 for" in said
    assert "sign test p = 0.031: " in said  # 2 / 2^6
    assert read_preferences(folder).judges["judge-1"].position.left == 6
