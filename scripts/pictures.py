"""The pictures of docs/how-it-works.md.

    python scripts/pictures.py

They are computed: the second by the package's own equations, the third by solving for the rest of
the two pulls on a distribution of two outcomes.
"""

from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from constrained_ft import equations

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "images"
INK, ACCENT, SOFT, PALE = "#24292f", "#2f6f9f", "#b4552d", "#eef2f5"


def main() -> None:
    """Draw all three."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, draw, size in (
        ("loop", draw_loop, (8.2, 3.3)),
        ("target", draw_target, (8.2, 3.4)),
        ("rest", draw_rest, (5.6, 3.6)),
    ):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        figure.savefig(FOLDER / f"{name}.svg", facecolor="white", metadata={"Date": None})


def draw_loop(figure: Figure) -> None:
    """What happens in an iteration."""
    axes = figure.subplots()
    axes.set(xlim=(0, 10), ylim=(0, 4))
    axes.axis("off")
    boxes = {
        "sample": (0.2, 2.4, "sample\n$y \\sim p(\\cdot|x)$"),
        "score": (2.65, 2.4, "score\n$C(x, y)$"),
        "fit": (5.1, 2.4, "fit R\ntoken by token"),
        "target": (7.55, 2.4, "target\n$q^* \\propto p \\cdot R$"),
        "corpus": (7.55, 0.4, "your corpus"),
        "update": (5.1, 0.4, "update the LLM\n$CE + \\lambda\\,KL(q^*\\|LLM)$"),
    }
    width, height = 2.1, 1.1
    for name, (x, y, text) in boxes.items():
        colour = ACCENT if name == "update" else INK
        box = FancyBboxPatch((x, y), width, height, "round,pad=0.05", fc=PALE, ec=colour, lw=1.4)
        axes.add_patch(box)
        axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", color=INK)
    right, middle = width + 0.05, 2.4 + height / 2
    for start in (0.2, 2.65, 5.1):
        _arrow(axes, (start + right, middle), (start + 2.4, middle))
    _arrow(axes, (7.5, 0.95), (7.27, 0.95))
    _arrow(axes, (8.1, 2.35), (6.9, 1.55), "arc3,rad=-0.15")
    _arrow(axes, (5.03, 0.95), (1.25, 2.35), "arc3,rad=-0.35")
    axes.text(1.6, 0.35, "the next iteration samples the new LLM", color=ACCENT, fontsize=9)


def _arrow(
    axes: Axes, start: tuple[float, float], end: tuple[float, float], bend: str = "arc3"
) -> None:
    axes.add_patch(
        FancyArrowPatch(
            start, end, arrowstyle="-|>", mutation_scale=12, color=ACCENT, connectionstyle=bend
        )
    )


def draw_target(figure: Figure) -> None:
    """p, R and q* of the next token after a prefix."""
    tokens = ["a", "my", "such", "the", "an", "our", "idiot", "moron"]
    p = torch.tensor([0.24, 0.14, 0.12, 0.12, 0.10, 0.08, 0.12, 0.08])
    satisfied = torch.tensor([0.93, 0.95, 0.55, 0.96, 0.35, 0.97, 0.02, 0.01])
    q = equations.target_logprobs(p.log(), torch.logit(satisfied)).exp()
    left, middle, right = figure.subplots(1, 3, sharey=True)
    places = np.arange(len(tokens))
    shown = (
        (left, p, INK, "p: what the model would say"),
        (middle, satisfied, SOFT, "R: how likely it ends well"),
        (right, q, ACCENT, "q*: p times R, normalised"),
    )
    for axes, values, colour, title in shown:
        axes.barh(places, values.numpy(), color=colour, height=0.7)
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_yticks(places, tokens)
        axes.spines[["top", "right"]].set_visible(False)
    right.barh(places, p.numpy(), fill=False, edgecolor=INK, height=0.7, lw=0.8)
    left.invert_yaxis()
    left.set_ylabel("after “You are”")


def draw_rest(figure: Figure) -> None:
    """Where the corpus and the constraint leave a model that is free to be anything."""
    axes = figure.subplots()
    weights = np.logspace(-1, 3, 200)
    grid = np.linspace(1e-5, 1 - 1e-6, 200_001)
    for corpus, colour in ((0.9, INK), (0.75, ACCENT), (0.5, SOFT)):
        law = (corpus + weights) / (1 + weights)
        axes.plot(weights, 100 * law, color=colour, label=f"corpus satisfies {corpus:.0%}")
        for weight in (0.5, 3.0, 30.0):
            entropy = corpus * np.log(grid) + (1 - corpus) * np.log(1 - grid)
            least = grid[np.argmin(-entropy - weight * np.log(grid))]
            axes.plot([weight], [100 * least], "o", color=colour, ms=4)
    axes.set(xscale="log", xlabel="λ", ylabel="satisfied, %", ylim=(45, 101))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9, loc="lower right")


if __name__ == "__main__":
    main()
