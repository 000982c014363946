"""A figure as files for a paper, and as SVG inside the page, in the page's own font and colours."""

import io
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from markupsafe import Markup, escape

from loratune.report import live
from loratune.report.drawing import FAINT, INK, PAPER, SHADES, SOFT, STYLE, Plot
from loratune.system.files import write_atomically

THEMED = {INK: "ink", SOFT: "soft", FAINT: "faint", PAPER: "paper"} | {shade: f"s{k}" for k, shade in enumerate(SHADES)}
"""Colours that the page exchanges for its own -> the name of the style sheet's variable."""


@dataclass(frozen=True, kw_only=True)
class Inline:
    """A figure for the page."""

    title: str
    html: Markup


def save_figure(plot: Plot, stem: Path) -> str:
    """Write <stem>.svg and <stem>.pdf in the light colours; returns the SVG. The same record gives the same bytes."""
    svg, pdf = io.StringIO(), io.BytesIO()
    live.name_groups(plot.figure)
    undated = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with warnings.catch_warnings(), matplotlib.rc_context({**STYLE, "svg.hashsalt": plot.name}):
        warnings.filterwarnings("ignore", message="Glyph")  # a name in letters that matplotlib's font lacks; the page's font has them
        plot.figure.savefig(svg, format="svg", metadata=undated)
        plot.figure.set_layout_engine("none")  # keep the layout, it takes a second to find
        plot.figure.savefig(pdf, format="pdf", metadata={"CreationDate": None, "Creator": "loratune", "Title": plot.title})
    write_atomically(stem.with_name(stem.name + ".svg"), svg.getvalue())
    write_atomically(stem.with_name(stem.name + ".pdf"), pdf.getvalue())
    return svg.getvalue()


def inline(plot: Plot, svg: str, key: str, studies: Sequence[str]) -> Inline:
    """The figure as an HTML <figure> whose ids all begin with `key`, and the ids of each study's rows with those of `studies`."""
    svg = live.annotate(plot.figure, svg, studies)
    head, _, body = svg[svg.index("<svg") :].partition(">")
    box = head.partition('viewBox="')[2].partition('"')[0]
    for before, after in ((r'\bid="', f'id="{key}-'), (r'href="#', f'href="#{key}-'), (r"url\(#", f"url(#{key}-")):
        body = re.sub(before, after, body)
    body = re.sub(r"#[0-9a-f]{6}\b", lambda found: f"var(--{THEMED[found[0]]})" if found[0] in THEMED else found[0], body)
    body = re.sub(r" ?font-family: [^;\"]*;", "", body)
    title, alt = f'<title id="{key}-title">{escape(plot.title)}</title>', f'<desc id="{key}-alt">{escape(plot.alt)}</desc>'
    opening = f'<svg viewBox="{box}" role="img" aria-labelledby="{key}-title {key}-alt">'
    drawing = f'<div class="drawing">{opening}{title}{alt}{body}</div>'
    return Inline(title=plot.title, html=Markup(f'<figure id="{key}">{drawing}<figcaption>{escape(plot.caption)}</figcaption></figure>'))
