"""What the figures share: size, colours, the scale of losses, and small marks.

Colours are few and exact, because html.py exchanges them for the page's own (light or dark): `INK`,
`SOFT`, `FAINT`, `PAPER` and the `SHADES` of a loss, dark = low, from viridis, which keeps its order for
the colour-blind and in grey print.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.path import Path as Curve

WIDTH = 5.2  # inches: a column of a paper, and a phone's screen without tiny print
INK, SOFT, FAINT, PAPER = "#1b1f24", "#5e6670", "#dfe3e8", "#fefefe"
BEST = "#d1460b"  # also the curve "best so far"
LEVELS = 24
SHADES = tuple(to_hex(matplotlib.colormaps["viridis"](0.97 * k / (LEVELS - 1))) for k in range(LEVELS))  # lowest loss first
DARK = tuple(to_hex(matplotlib.colormaps["viridis"](1 - 0.9 * k / (LEVELS - 1))) for k in range(LEVELS))  # on a dark page: bright = low
STUDIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9")  # Okabe and Ito, yellow darkened

STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "text.color": INK,
    "axes.labelcolor": SOFT,
    "axes.edgecolor": SOFT,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "lines.linewidth": 1.4,
    "savefig.facecolor": "none",
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "svg.fonttype": "none",
    "pdf.fonttype": 42,
}

_FEW = 8  # losses


@dataclass(frozen=True, kw_only=True)
class Plot:
    """A drawing, its title, what it looks like in words (for those who do not see it), and its caption with the numbers."""

    name: str  # file name without ending
    title: str
    figure: Figure
    alt: str
    caption: str


@dataclass(frozen=True)
class Scale:
    """Losses from the best to the worst that is still told apart; a few very bad ones must not flatten the rest."""

    low: float
    high: float

    @classmethod
    def of(cls, losses: Sequence[float]) -> "Scale":
        """High is Tukey's upper fence, the third quartile and 1.5 times the distance between the quartiles; of fewer than 8 the highest."""
        ordered = sorted(losses)
        if len(ordered) < _FEW:  # whose quartiles say little, and the default is among them
            return cls(ordered[0], ordered[-1])
        quartiles = [ordered[round(q * (len(ordered) - 1))] for q in (0.25, 0.75)]
        high = min(ordered[-1], quartiles[1] + 1.5 * (quartiles[1] - quartiles[0]))
        return cls(ordered[0], high if high > ordered[0] else ordered[-1])

    def place(self, loss: float) -> float:
        """0 for the best, 1 for the worst told apart and all beyond it."""
        return 0.0 if self.high <= self.low else min(1.0, max(0.0, (loss - self.low) / (self.high - self.low)))

    def shade(self, loss: float) -> str:
        return SHADES[round(self.place(loss) * (LEVELS - 1))]

    @property
    def room(self) -> float:
        """A margin around it, in loss."""
        return 0.05 * (self.high - self.low or abs(self.low) * 0.01 or 0.01)

    def text(self, loss: float) -> str:
        """A loss with as many decimals as the scale can tell apart."""
        return f"{loss:.{3 if self.high - self.low > 0.02 else 4}f}"

    def beyond(self, losses: Sequence[float]) -> int:
        return sum(v > self.high * (1 + 1e-12) for v in losses)


def blank(height: float) -> tuple[Figure, Any]:
    """A figure of `height` inches with one pair of axes."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots()


def literal(name: str) -> str:
    """A name that matplotlib neither reads as mathematics nor leaves out of a legend."""
    return name.lstrip("_").replace("$", r"\$") or "study"


def smooth(heights: Sequence[float]) -> Curve:
    """A curve through (0, h0), (1, h1), ... that leaves and reaches each axis level, so that lines can be followed."""
    points, codes = [(0.0, heights[0])], [Curve.MOVETO]
    for x, (here, there) in enumerate(itertools.pairwise(heights)):
        points += [(x + 0.4, here), (x + 0.6, there), (x + 1.0, there)]
        codes += [Curve.CURVE4] * 3
    return Curve(points, codes)


def smooth_points(heights: Sequence[float]) -> tuple[list[float], list[float]]:
    """The points of `smooth`, close together: the cubic Bezier curve 0, .4, .6, 1."""
    xs, ys = [0.0], [heights[0]]
    for x, (here, there) in enumerate(itertools.pairwise(heights)):
        for u in (k / 16 for k in range(1, 17)):
            xs.append(x + 1.2 * u * (1 - u) ** 2 + 1.8 * u**2 * (1 - u) + u**3)
            ys.append(here + (there - here) * (3 * u**2 - 2 * u**3))
    return xs, ys


def tag(axes: Any, x: float, y: float, text: str, side: str) -> None:
    """A tick's text on a pale ground, readable where lines cross it."""
    ground = {"facecolor": PAPER, "alpha": 0.8, "edgecolor": "none", "pad": 0.6}
    axes.text(x, y, text, ha=side, va="center", fontsize=7.5, color=INK, bbox=ground, zorder=6)


def colour_key(axes: Any, scale: Scale) -> None:
    """A strip of the shades above the drawing, with the losses at its ends."""
    strip = axes.inset_axes((0.64, 1.1, 0.36, 0.035))
    strip.bar(range(LEVELS), [1] * LEVELS, width=1.3, color=SHADES, linewidth=0)
    strip.set(xlim=(-0.5, LEVELS - 0.5), ylim=(0, 1), yticks=[])
    strip.set_xticks([0, LEVELS - 1], [scale.text(scale.low), scale.text(scale.high)])
    strip.tick_params(length=0, pad=2)
    strip.grid(False)
    for spine in strip.spines.values():
        spine.set_visible(False)
    strip.set_title("final loss", fontsize=8, color=SOFT, pad=3)
