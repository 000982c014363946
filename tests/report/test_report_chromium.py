"""The report in a real browser: nothing asked of the network, no error, readable at two widths, in the dark and on paper.

Chromium is driven through Playwright, whose own browser download is not needed.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chromium import CHROMIUM, FLAGS, SHOTS

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")

# Texts that stand out too little from their ground (WCAG AA: 4.5), and how many were looked at.
CONTRAST = """() => {
  const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = (c) => { const [r, g, b] = c.slice(0, 3).map((v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
                         return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const ground = (e) => { for (; e; e = e.parentElement) { const c = rgb(getComputedStyle(e).backgroundColor);
                          if (c.length < 4 || c[3] > 0) return c; } return [255, 255, 255]; };
  const colour = (e) => rgb(getComputedStyle(e)[e.closest("svg") ? "fill" : "color"]);
  const all = [...document.querySelectorAll("body *")].filter((e) => e.getClientRects().length
    && !["title", "desc"].includes(e.tagName) && [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim()));
  const found = all.map((e) => { const [a, b] = [light(colour(e)), light(ground(e))].sort((x, y) => y - x);
                                 return [e.textContent.trim().slice(0, 40), (a + 0.05) / (b + 0.05)]; });
  return [found.length, found.filter(([, ratio]) => ratio < 4.5)];
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (375, "dark")])
def test_it_is_quiet_and_fits(story: Path, browser: Any, width: int, scheme: str) -> None:
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page = context.new_page()
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(story.as_uri())
    page.wait_for_load_state("networkidle")
    page.evaluate("window.scrollTo(0, document.body.scrollHeight)")
    assert said == []
    assert asked == [story.as_uri()]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    boxes = page.eval_on_selector_all(
        "figure svg", "all => all.map((e) => [e.getBoundingClientRect().left, e.getBoundingClientRect().right])"
    )
    assert len(boxes) == 9
    assert all(0 <= left < right <= width for left, right in boxes)
    looked_at, faint = page.evaluate(CONTRAST)
    assert looked_at > 300
    assert faint == []
    if SHOTS:
        page.screenshot(path=Path(SHOTS) / f"report-{width}-{scheme}.png", full_page=True)
    context.close()


def test_the_committed_example_is_quiet_and_fits(browser: Any) -> None:
    """docs/example-report.html, which `docs/tutorial.md` says how to make: complete, small, of no machine in particular."""
    example = Path(__file__).resolve().parents[2] / "docs" / "example-report.html"
    text = example.read_text()
    assert len(text) < 5e6
    assert not re.search(r"(?<![\w.:/])/(?:home|root|tmp|work|Users)/", text)
    for title in ("Chosen against default", "Learning curves", "Downstream scores", "Finalists and noise", "To reproduce it"):
        assert title in text
    page = browser.new_page(viewport={"width": 390, "height": 800})
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(example.as_uri())
    page.wait_for_load_state("networkidle")
    assert (said, asked) == ([], [example.as_uri()])
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.close()


def test_it_is_named_for_screen_readers(story: Path, browser: Any) -> None:
    page = browser.new_page()
    page.goto(story.as_uri())
    tree = page.locator("body").aria_snapshot()
    for wanted in ("- main:", 'navigation "Contents"', 'heading "whole" [level=1]', 'heading "Blind preference" [level=2]'):
        assert wanted in tree
    images = re.findall(r"""- '?img "(.*)""", tree)
    assert len(images) == 9
    assert sum("Parallel coordinates of 12 configurations" in image for image in images) == 1
    page.close()


def test_on_paper_nothing_is_cut_off(story: Path, browser: Any, tmp_path: Path) -> None:
    page = browser.new_page(viewport={"width": 688, "height": 1000})  # A4 less its margins, 96 px per inch
    page.goto(story.as_uri())
    page.emulate_media(media="print")
    wide = page.eval_on_selector_all(
        "table, svg, pre", "all => all.filter((e) => e.getBoundingClientRect().right > 688.5).map((e) => e.outerHTML.slice(0, 80))"
    )
    assert wide == []
    assert page.is_hidden("nav")
    page.pdf(path=(pdf := Path(SHOTS or tmp_path) / "report.pdf"), format="A4", prefer_css_page_size=True)
    assert pdf.read_bytes().startswith(b"%PDF")
    page.close()
