"""The figures of several runs: the front, and each curve of all runs in the same axes."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from constrained_ft import front
from constrained_ft.front import Point
from constrained_ft.report.drawing import (
    ACCENT,
    FEW,
    LINES,
    MUTED,
    Chart,
    chart,
    legend,
    series,
    short,
    smooth,
)
from constrained_ft.report.reading import Run


def of_runs(runs: Sequence[Run], best: str | None) -> list[Chart]:
    """Each curve of all runs in one figure; lambda only where it moves."""
    found = []
    for key, title, metric, ylabel, scale in (
        ("satisfaction", "Satisfaction", "rollouts/satisfaction", "satisfied, %", 100.0),
        ("cross-entropy", "Cross-entropy of the corpus", "update/ce", "nats per token", 1.0),
        ("kl", "KL to the target", "update/kl", "nats per token", 1.0),
        ("lambda", "λ", "update/kl_weight", "trainer.kl_weight", 1.0),
    ):
        some = [run for run in runs if any(metric in row for row in run.rows)]
        moves = any(np.ptp(series(run, metric)[1]) > 0 for run in some)
        if some and (moves or key != "lambda"):
            found.append(_together(some, key, title, metric, ylabel, scale, best))
    return found


def of_front(points: Sequence[Point]) -> Chart:
    """Satisfaction against perplexity of every measured run."""

    def draw(axes: Axes) -> None:
        front.draw(axes, points, on=ACCENT, off=MUTED)

    on_front = [point.job for point in points if point.on_front]
    return chart(
        "front",
        "Control against the language",
        "Each run's fine-tuned model on held-out prompts and text, with 95 % intervals; the "
        "numbers are those of the table. Up and to the left is better. The line joins the runs "
        "that no other beats in both.",
        draw,
        described=f"On the front: {', '.join(on_front)}.",
        height=3.4,
    )


def _together(  # noqa: PLR0913
    runs: Sequence[Run],
    key: str,
    title: str,
    metric: str,
    ylabel: str,
    scale: float,
    best: str | None,
) -> Chart:
    few = len(runs) <= len(LINES)
    ends = []

    def draw(axes: Axes) -> None:
        for number, run in enumerate(runs):
            chosen = run.name == best
            xs, ys = series(run, metric)
            ys = smooth(ys) * scale
            ends.append(f"{run.name}: {ys[-1]:.3g}.")
            axes.plot(
                xs,
                ys,
                color=ACCENT if chosen else MUTED,
                linestyle=LINES[number] if few else "-",
                linewidth=1.8 if chosen else 1.1 if few else 0.7,
                marker="o" if len(xs) == 1 else None,
                markersize=4,
                zorder=3 if chosen else 2,
                label=short(run.name, 16) if few else None,
            )
        axes.set(xlabel="iteration", ylabel=ylabel)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if few:
            legend(axes)

    caption = "Smoothed. " if any(len(run.rows) > FEW for run in runs) else ""
    caption += "" if best is None else f"In colour: {best}, the best run."
    drawn = chart(key, title, caption.strip(), draw)
    words = f"{title}. At the end: {' '.join(ends)}"
    return Chart(**(vars(drawn) | {"described": words}))
