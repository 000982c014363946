"""What the page's script (`templates/figures.js`) is told of a figure: which mark is which trial, and what its axes measure.

The drawing itself carries it, as attributes of the inline SVG, so that there is one picture for the page, for paper and for a reader
without scripts:

    data-trial   on a mark or a line: the number of its trial, whose row in the table of trials says the rest
    data-study   on the group around them: what that row's id begins with
    data-panel   on a pair of axes that can be zoomed: its box in the SVG, and what its edges mean, as JSON
"""

import itertools
import json
import re
from collections.abc import Sequence
from typing import Any

from markupsafe import escape
from matplotlib.artist import Artist
from matplotlib.figure import Figure

from loratune.record import Trial

_SHAPE = re.compile(r"<defs>.*?</defs>|<(?:use|path)\b", re.DOTALL)


def tell_trials(artist: Any, trials: Sequence[Trial | int], study: int = 0) -> None:
    """The artist draws one mark or line for each of `trials`, in this order; `study` counts the page's studies."""
    artist.trials = (study, [t if isinstance(t, int) else t.number for t in trials])


def tell_axis(axes: Any, which: str, **told: Any) -> None:
    """What axis `which` ("x" or "y") measures where matplotlib's own limits do not say it.

    low, high: the values at the ends of the limits `of`; log: they grow by factors; whole: they are whole numbers;
    large: written as 1.2 M; named: (position, text) of ticks that stand for no number. Without low and high the named alone.
    """
    axes.told = {**getattr(axes, "told", {}), which: told}


def name_groups(figure: Figure) -> None:
    """Give what the script is told of a name in the SVG. To be called before the figure is saved."""
    for number, artist in enumerate(_marked(figure)):
        artist.set_gid(f"trials-{number}")
    for number, axes in enumerate(_zoomed(figure)):
        axes.set_gid(f"panel-{number}")


def annotate(figure: Figure, svg: str, studies: Sequence[str]) -> str:
    """The saved figure's SVG with the attributes; `studies`: what the ids of each study's rows begin with."""
    for artist in _marked(figure):
        study, numbers = artist.trials
        opening = f'<g id="{artist.get_gid()}">'
        before, _, rest = svg.partition(opening)
        end = match.start() if (match := re.search(r'<g id="', rest)) else len(rest)
        shapes = [found.end() for found in _SHAPE.finditer(rest, 0, end) if not found[0].startswith("<defs")]
        ends = [0, *shapes, len(rest)]
        named = [f' data-trial="{number}"' for number in numbers]
        pieces = [rest[a:b] + name for (a, b), name in zip(itertools.pairwise(ends), [*named, ""], strict=True)]
        svg = f'{before}{opening[:-1]} data-study="{escape(studies[study])}">{"".join(pieces)}'
    width, height = (float(v) for v in re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)[0])
    for axes in _zoomed(figure):
        opening = f'<g id="{axes.get_gid()}"'
        (left_edge, bottom), (right, top) = axes.get_position().get_points()
        box = [left_edge * width, (1 - top) * height, right * width, (1 - bottom) * height]
        panel = {"box": [round(v, 3) for v in box], "x": _axis(axes, "x"), "y": _axis(axes, "y")}
        svg = svg.replace(opening, f'{opening} data-panel="{escape(json.dumps(panel, separators=(",", ":")))}"')
    return svg


def _marked(figure: Figure) -> list[Any]:
    return [a for a in figure.findobj(lambda artist: hasattr(artist, "trials"), include_self=False) if isinstance(a, Artist)]


def _zoomed(figure: Figure) -> list[Any]:
    """Axes with trials in them that show their scales."""
    return [axes for axes in figure.axes if axes.axison and any(hasattr(child, "trials") for child in axes.get_children())]


def _axis(axes: Any, which: str) -> dict[str, Any]:
    """What the two ends of the box mean. A tick's place is its share of the way between them."""
    start, end = axes.get_xlim() if which == "x" else axes.get_ylim()
    log = (axes.get_xscale() if which == "x" else axes.get_yscale()) == "log"
    told = dict(getattr(axes, "told", {}).get(which, {}))
    found: dict[str, Any] = {"low": start, "high": end, "log": log}
    if "named" in told:
        found = {"named": [[round((place - start) / (end - start), 5), text] for place, text in told.pop("named")]}
    if "low" in told:  # at 0 and 1 of the limits, which go a little beyond
        low, high = told.pop("low"), told.pop("high")
        found |= {
            "low": low * (high / low) ** start if told.get("log") else low + (high - low) * start,
            "high": low * (high / low) ** end if told.get("log") else low + (high - low) * end,
        }
    return {**found, **told}
