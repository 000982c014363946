"""The whole command in a real browser: two raters, a kill in the middle, keyboard only, two widths.

Chromium is driven through Playwright, whose own browser download is not needed.
"""

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chromium import CHROMIUM, FLAGS, SHOTS
from comparisons import ANN, BOB, WORDS, ready

from loratune.preference.comparison import read_preferences
from loratune.preference.votes import read_votes

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytest.importorskip("fastapi", reason="FastAPI is not installed (the extra `compare`)")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")

KEYS = {"left": ("a", "1", "ArrowLeft"), "right": ("b", "2", "ArrowRight"), "tie": ("t", "3"), "neither": ("n", "4")}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


class Command:
    """`loratune compare` in a process of its own, always on the same port."""

    def __init__(self, home: Path) -> None:
        self.folder, self.arguments = ready(home)
        self.port = 0

    def start(self) -> str:
        """Returns the page's address."""
        command = [sys.executable, "-m", "loratune", "compare", *self.arguments, "--no-browser", "--port", str(self.port)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert self.process.stdout is not None
        said = self.process.stdout.readline()
        address = re.search(r"http://127\.0\.0\.1:(\d+)/", said)
        assert address, said + self.process.stdout.read()
        self.port = int(address[1])
        return address[0]

    def stop(self, number: int) -> str:
        """Returns what it printed."""
        self.process.send_signal(number)
        return self.process.communicate(timeout=20)[0]


@pytest.fixture
def command(tmp_path: Path) -> Iterator[Command]:
    command = Command(tmp_path)
    yield command
    if command.process.poll() is None:
        command.process.kill()
        command.process.wait()


HOSTILE = "<img src=x onerror=alert(1)><script>alert(2)</script>"


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A page for the tests that do not vote, with answers that try to be markup."""
    command = Command(tmp_path_factory.mktemp("page"))
    answers = command.folder / "answers.jsonl"
    answers.write_text(answers.read_text().replace("says: ", json.dumps(f"says: {HOSTILE}")[1:-1]))
    yield command.start()
    command.stop(signal.SIGTERM)


class Rater:
    """A person at a browser of their own, who wants `verdicts` (question -> first, second, tie, neither)."""

    def __init__(self, browser: Any, address: str, name: str, verdicts: dict[str, str], **options: Any) -> None:
        self.context = browser.new_context(**options)
        self.page = self.context.new_page()
        self.problems: list[str] = []
        self.elsewhere: list[str] = []
        self.page.on("console", lambda message: self.problems.append(message.text) if message.type == "error" else None)
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("request", lambda request: None if request.url.startswith((address, "data:")) else self.elsewhere.append(request.url))
        self.name, self.verdicts = name, verdicts
        self.choices: list[str] = []
        self.page.goto(address)

    def begin(self) -> None:
        assert self.page.evaluate("document.activeElement.id") == "name"
        self.page.keyboard.type(self.name)
        self.page.keyboard.press("Enter")
        self.page.wait_for_selector("#vote:not([hidden])")

    @property
    def question(self) -> str:
        return re.findall(r"\d+", self.page.inner_text("#instruction"))[0]

    @property
    def count(self) -> int:
        return int(self.page.inner_text("#count").split()[0])

    def choice(self) -> str:
        """What to press for what this person wants, as the answers stand now."""
        verdict = self.verdicts[self.question]
        if verdict in ("tie", "neither"):
            return verdict
        return "left" if self.page.inner_text("#left").startswith(WORDS[verdict]) else "right"

    def vote(self, key: str | None = None) -> None:
        choice, before = self.choice(), self.count
        self.choices.append(choice)
        self.page.keyboard.press(key or KEYS[choice][before % len(KEYS[choice])])
        self.wait_for_count(before + 1)

    def wait_for_count(self, votes: int) -> None:
        self.page.wait_for_function("n => document.getElementById('count').textContent.startsWith(n + ' ')", arg=votes)

    def tab_to(self, name: str) -> None:
        """Walk with Tab to the button called `name`."""
        for _ in range(30):
            self.page.keyboard.press("Tab")
            if name in self.page.evaluate("document.activeElement.textContent"):
                return
        raise AssertionError(f"no Tab reaches {name!r}")

    def shoot(self, name: str) -> None:
        wide = self.page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
        assert wide[0] <= wide[1], f"{name}: scrolls sideways, {wide}"
        if SHOTS:
            self.page.screenshot(path=Path(SHOTS) / f"pref-{name}.png")


def test_two_raters_a_kill_and_the_example_worked_by_hand(command: Command, browser: Any) -> None:
    address = command.start()
    ann = Rater(browser, address, "Ann", ANN, viewport={"width": 1280, "height": 800})
    bob = Rater(browser, address, "Bob", BOB, viewport={"width": 375, "height": 667}, color_scheme="dark", has_touch=True, is_mobile=True)
    for rater in (ann, bob):
        rater.shoot(f"begin-{rater.name}")
        rater.begin()
        rater.shoot(f"vote-{rater.name}")
    for _ in range(3):
        ann.vote()
    bob.vote()
    stored = read_votes(command.folder)
    assert len(stored) == 4

    command.stop(signal.SIGKILL)
    before = ann.question
    ann.page.keyboard.press("a")
    ann.page.wait_for_selector("#alert:not([hidden])")
    assert "does not answer" in ann.page.inner_text("#alert")
    assert (ann.question, ann.count) == (before, 3)
    ann.shoot("gone-Ann")
    ann.problems.clear()  # the browser notes the refused connection
    assert read_votes(command.folder) == stored  # no vote lost, none invented
    assert command.start() == address

    ann.vote()  # the open page goes on
    assert ann.page.is_hidden("#alert")
    bob.page.reload()
    bob.page.wait_for_selector("#vote:not([hidden])")
    assert bob.count == 1
    for rater in (ann, bob):
        while rater.page.is_visible("#vote"):
            rater.vote()
        assert "all 6 questions" in rater.page.inner_text("#done")
        rater.shoot(f"done-{rater.name}")
        assert rater.problems == []
        assert rater.elsewhere == []

    said = command.stop(signal.SIGINT)
    assert command.process.returncode == 0, said
    people = read_preferences(command.folder).people
    assert people is not None
    # As worked by hand in test_preference_analysis.py.
    assert (people.votes.first, people.votes.second, people.votes.ties, people.votes.neither) == (7, 3, 1, 1)
    assert people.votes.win_rate == pytest.approx(8 / 12)
    assert (people.questions.first, people.questions.second, people.questions.ties) == (3, 1, 2)
    assert people.questions.sign_test() == pytest.approx(10 / 16)
    assert people.alpha == pytest.approx(10 / 21)
    assert (people.position.left, people.position.right) == tuple((ann.choices + bob.choices).count(side) for side in ("left", "right"))
    assert "66.7% (39.1% to 86.2%)" in said  # Wilson with 8 of 12
    assert "alpha 0.48" in said
    assert "sign test p = 0.62" in said
    for rater in (ann, bob):
        rater.context.close()


def test_a_whole_session_by_keyboard_alone(command: Command, browser: Any) -> None:
    address = command.start()
    ann = Rater(browser, address, "Änn O'Neil", ANN, viewport={"width": 1280, "height": 800})
    page = ann.page
    ann.begin()
    assert page.evaluate("document.activeElement.id") == "heading"  # reading goes on at the new question
    ann.tab_to("Tie")
    page.keyboard.press("Enter")
    ann.wait_for_count(1)
    assert page.inner_text("#status").startswith("Stored: tie. 1 of 6")  # what a screen reader says
    ann.tab_to("Take back")
    page.keyboard.press("Space")
    ann.wait_for_count(0)
    ann.vote()
    page.keyboard.press("u")
    ann.wait_for_count(0)

    for ignored in ("Control+a", "Alt+t", "x", "ArrowDown", "Shift+Tab"):
        page.keyboard.press(ignored)
    page.keyboard.down("Shift")
    page.keyboard.up("Shift")
    ann.tab_to("Keyboard")
    page.keyboard.press("Enter")
    ann.shoot("keys-Ann")
    page.keyboard.press("Tab")
    page.keyboard.press("Space")  # single keys off, as WCAG 2.1.4 asks for
    page.keyboard.press("t")
    page.reload()
    page.wait_for_selector("#vote:not([hidden])")
    page.keyboard.press("t")
    assert ann.count == 0
    ann.tab_to("Keyboard")
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    page.keyboard.press("Space")
    page.keyboard.press("Tab")

    while page.is_visible("#vote"):
        ann.vote()
    assert page.evaluate("document.activeElement.id") == "thanks"
    assert {v.question: v.verdict for v in read_votes(command.folder)} == ANN
    assert {v.rater for v in read_votes(command.folder)} == {"Änn O'Neil"}
    assert ann.problems == []
    ann.context.close()
    command.stop(signal.SIGTERM)


def test_a_name_stays_with_its_browser(command: Command, browser: Any) -> None:
    """Another browser is told what to do; after --readmit it goes on where the first one stopped."""
    address = command.start()
    ann = Rater(browser, address, "Ann", ANN)
    ann.begin()
    ann.vote()
    other = Rater(browser, address, "ann", ANN)
    other.page.keyboard.type("ann")
    other.page.keyboard.press("Enter")
    other.page.wait_for_selector("#alert:not([hidden])")
    assert "ann votes from another browser" in other.page.inner_text("#alert").lower()
    assert other.page.is_hidden("#vote")
    other.shoot("taken")
    other.page.fill("#name", "Bob")  # anybody else may vote here
    other.page.keyboard.press("Enter")
    other.page.wait_for_selector("#vote:not([hidden])")
    ann.page.reload()
    ann.page.wait_for_selector("#vote:not([hidden])")
    assert ann.count == 1

    ann.context.clear_cookies()
    ann.page.keyboard.press("a")
    ann.page.wait_for_selector("#alert:not([hidden])")
    assert "--readmit" in ann.page.inner_text("#alert")
    assert len(read_votes(command.folder)) == 1
    command.stop(signal.SIGTERM)
    command.arguments += ["--readmit", "Ann"]
    command.start()
    ann.page.reload()
    ann.page.wait_for_selector("#vote:not([hidden])")
    assert ann.count == 1
    ann.vote()
    for rater in (ann, other):
        rater.context.close()
    command.stop(signal.SIGTERM)


def test_named_and_structured_for_screen_readers(address: str, browser: Any) -> None:
    ann = Rater(browser, address, "Ann of the screen reader", ANN, viewport={"width": 375, "height": 667})
    ann.begin()
    tree = ann.page.locator("body").aria_snapshot()
    for wanted in (
        "- banner:",
        "- main:",
        "- contentinfo:",
        'heading "Which answer is better?" [level=1]',
        'article "Answer A"',
        'article "Answer B"',
        'region "Your vote"',
        'progressbar "0 of 6 voted"',
        "- status",
        'button "A is better"',
        'button "B is better"',
        'button "Tie"',
        'button "Both bad"',
    ):
        assert wanted in tree, tree
    assert tree.index("Answer A") < tree.index("Answer B") < tree.index("A is better") < tree.index("Take back")
    small = ann.page.evaluate(
        "[...document.querySelectorAll('button, input, summary')].filter(e => e.offsetParent && e.getBoundingClientRect().height < 24)"
        ".map(e => e.outerHTML)"
    )
    assert [element for element in small if "checkbox" not in element] == []  # the checkbox stands in a label of 32 px
    ann.context.close()


def test_contrast(address: str, browser: Any) -> None:
    """WCAG AA: 4.5 between every text and what it stands on."""
    for scheme in ("light", "dark"):
        ann = Rater(browser, address, f"Ann in the {scheme}", ANN, color_scheme=scheme)  # a name is one browser's
        ann.begin()
        found = ann.page.evaluate(
            """() => {
              const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
              const light = (c) => { const [r, g, b] = c.slice(0, 3).map((v) => (v /= 255) <= 0.04045
                                   ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
                                     return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
              const ground = (e) => { for (; e; e = e.parentElement) { const c = rgb(getComputedStyle(e).backgroundColor);
                                      if (c.length < 4 || c[3] > 0) return c; } return [255, 255, 255]; };
              const all = [...document.querySelectorAll("body *")].filter((e) => e.offsetParent &&
                [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim()));
              return all.map((e) => { const [a, b] = [light(rgb(getComputedStyle(e).color)), light(ground(e))].sort((x, y) => y - x);
                                      return [e.tagName + "#" + e.id, (a + 0.05) / (b + 0.05)]; });
            }"""
        )
        assert len(found) > 10
        assert [pair for pair in found if pair[1] < 4.5] == []
        ann.context.close()


def test_answers_are_text_never_markup(address: str, browser: Any) -> None:
    ann = Rater(browser, address, "Ann of the markup", ANN)
    ann.page.on("dialog", lambda dialog: ann.problems.append(dialog.message))
    ann.begin()
    assert HOSTILE in ann.page.inner_text("#left") + ann.page.inner_text("#right")
    assert ann.page.query_selector("main img, main script") is None
    assert ann.problems == []
    ann.context.close()
