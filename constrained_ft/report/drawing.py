"""One figure of a report, as SVG in the page's own colours.

Drawn by matplotlib: its SVG needs no script, prints, and its text stays text. Every figure is
small, so that on a phone, where it fills the width, its labels can still be read.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from io import StringIO
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from constrained_ft.report.reading import Run
from constrained_ft.report.text import visible

# Colours as matplotlib draws them; on the page they are variables, which follow its theme.
INK, MUTED, GRID, ACCENT, PAPER = "#22262b", "#737a82", "#dfe1e3", "#0f6b5c", "#fffffe"
_VARIABLES = {INK: "ink", MUTED: "muted", GRID: "grid", ACCENT: "accent", PAPER: "paper"}
_WIDTH, _HEIGHT = 4.6, 2.9  # inches
FEW = 12  # points of a line that get a mark each
LINES = ("-", "--", ":", "-.", (0, (6, 1, 1, 1, 1, 1)))
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "axes.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "text.color": INK,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "legend.fontsize": 8.5,
}


@dataclass(frozen=True, kw_only=True)
class Chart:
    """One figure."""

    key: str
    """Its file's name, and its anchor on the page."""
    title: str
    caption: str
    described: str
    """What it shows, for those who do not see it."""
    svg: str
    """For the page: its colours are variables."""
    file: str
    """A file of its own."""


Draw = Callable[[Axes], None]


def chart(
    key: str,
    title: str,
    caption: str,
    draw: Draw,
    *,
    described: str = "",
    height: float = _HEIGHT,
) -> Chart:
    """Draw one figure.

    Args:
        key: names it.
        title: what it shows.
        caption: how to read it.
        draw: puts marks on the axes.
        described: the numbers that matter, in words.
        height: inches.
    """
    with rc_context({**_STYLE, "svg.hashsalt": key}):
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        draw(figure.subplots())
        stream = StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(stream, format="svg", metadata=nothing)
    file = stream.getvalue()
    words = f"{title}. {described}".strip()
    return Chart(
        key=key, title=title, caption=caption, described=words, svg=_inline(file), file=file
    )


def _inline(svg: str) -> str:
    """For a page: without a prolog, names that may occur twice, a size and colours of its own."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.S)
    svg = re.sub(r'<g id="[a-z0-9]+_\d+">', "<g>", svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg).replace("xlink:href", "href")
    for colour, name in _VARIABLES.items():
        svg = svg.replace(colour, f"var(--{name})")
    return svg


def series(run: Run, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Iterations and values, where there are any."""
    some = [
        (row.get("iteration", i + 1.0), row[name]) for i, row in enumerate(run.rows) if name in row
    ]
    pairs = np.array(some, dtype=np.float64).reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1]


def smooth(values: np.ndarray) -> np.ndarray:
    """A centred moving mean over an eighth of the values; of few, the values."""
    half = len(values) // 16 if len(values) > FEW else 0
    return np.array([values[max(i - half, 0) : i + half + 1].mean() for i in range(len(values))])


def legend(axes: Axes) -> None:
    """Above the axes, where it covers nothing."""
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=3,
        borderaxespad=0.2,
        handlelength=1.8,
        columnspacing=1.2,
    )


def short(text: str, length: int) -> str:
    """A label that fits."""
    text = visible(text)
    return text if len(text) <= length else f"{text[: length - 1]}…"
