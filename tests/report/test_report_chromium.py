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
    for title in ("Chosen against first full run", "Learning curves", "Downstream scores", "Finalists and noise", "To reproduce it"):
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


def test_hover_and_zoom(story: Path, browser: Any) -> None:
    """By mouse and by keys; a reset gives the same picture back."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(story.as_uri())
    figure, tip = page.locator("#figure-slices"), page.locator(".tip")
    rate = figure.locator("[data-panel]").nth(3)  # the learning rate's
    marks, ticks = rate.locator("use[data-trial]"), rate.locator(".finer text")

    def centre(place: int) -> tuple[float, float]:
        box = marks.nth(place).bounding_box()
        return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2

    def words(number: int) -> list[str]:
        cells = [cell.split("\n")[0].strip() for cell in page.locator(f"#trial-{number} > *").all_inner_texts()]
        heads = page.locator("table.trials thead th").all_inner_texts()
        return [f"trial {number}, {cells[1]}", *(f"{head} {cell}" for head, cell in zip(heads[2:], cells[2:], strict=True))]

    marks.nth(0).scroll_into_view_if_needed()
    assert tip.is_hidden()
    page.mouse.move(*centre(4))
    assert tip.inner_text().split("\n") == words(4)
    assert figure.locator("use.on").count() == 4  # in each panel
    page.mouse.move(5, 5)
    assert tip.is_hidden()

    before = [centre(k) for k in range(3)]
    shown = rate.locator('g[id*="xtick_"]:visible').count()
    box = rate.locator("path").first.bounding_box()  # the panel's ground
    page.mouse.move(box["x"] + 0.25 * box["width"], box["y"] + 0.3 * box["height"])
    page.mouse.down()
    page.mouse.move(box["x"] + 0.75 * box["width"], box["y"] + 0.9 * box["height"], steps=2)
    page.mouse.up()
    assert ticks.count() >= 3
    assert rate.locator('g[id*="xtick_"]:visible').count() == 0
    assert figure.locator("[data-panel]").nth(0).locator('g[id*="ytick_"]:visible').count() == 0  # the loss is one axis of all
    after = [centre(k) for k in range(3)]
    for side, factor in ((0, 1 / 0.5), (1, 1 / 0.6)):
        for k in (1, 2):
            assert after[k][side] - after[0][side] == pytest.approx(factor * (before[k][side] - before[0][side]), rel=0.02, abs=0.5)
    page.mouse.dblclick(box["x"] + 0.5 * box["width"], box["y"] + 0.5 * box["height"])
    assert ticks.count() == 0
    assert rate.locator('g[id*="xtick_"]:visible').count() == shown
    assert [centre(k) for k in range(3)] == before

    curves = page.locator("#figure-learning-curves .drawing")
    line = curves.locator("path[data-trial]").first
    straight = line.get_attribute("d")
    curves.focus()
    page.keyboard.press("ArrowRight")
    assert tip.inner_text().split("\n") == words(0)
    page.keyboard.press("+")
    assert line.get_attribute("d") != straight
    assert any(text.endswith(" k") for text in curves.locator(".finer text").all_text_contents())
    page.keyboard.press("0")
    assert line.get_attribute("d") == straight
    page.keyboard.press("Escape")
    assert tip.is_hidden()
    assert said == []
    page.close()
