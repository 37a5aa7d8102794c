"""What the runs of a sweep came to: control against the language, and which runs no other beats.

Only JSON is read here, so that a sweep of runs that are done is summed up in no time.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from constrained_ft.run_folder import RunFolder, write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LABELLED = 10  # of more points, only those on the front get their names


@dataclass(frozen=True, kw_only=True)
class Point:
    """One finished run, or several that differ in their seed alone."""

    job: str
    """Its number, or all of theirs."""
    overrides: str
    satisfaction: float
    """Of the fine-tuned model's completions of held-out prompts, all groups together."""
    low: float
    high: float
    """Its 95 % interval: the groups' own, weighted by their completions, which is a little wide. Of
    several seeds: one standard deviation to either side."""
    perplexity: dict[str, float]
    """Of held-out text, by group of the corpus."""
    on_front: bool = False
    """Whether no other run has both more satisfaction and a lower perplexity of the first group."""


def read_points(jobs: Mapping[str, tuple[str, Path]]) -> list[Point]:
    """The runs that are finished, the front marked.

    Args:
        jobs: overrides and folder of each, by number.
    """
    points = [
        point
        for job, (overrides, folder) in jobs.items()
        if (point := _point(job, overrides, RunFolder(folder))) is not None
    ]
    return [_placed(point, points) for point in points]


def over_seeds(points: Sequence[Point]) -> list[Point]:
    """The means of runs that differ in their seed alone; the front marked among these."""
    groups: dict[str, list[Point]] = {}
    for point in points:
        words = [word for word in point.overrides.split() if not word.startswith("seed=")]
        groups.setdefault(" ".join(words), []).append(point)
    means = [runs[0] if len(runs) == 1 else _mean(words, runs) for words, runs in groups.items()]
    return [_placed(point, means) for point in means]


def best(points: Sequence[Point], satisfaction: float) -> Point | None:
    """Of the runs with at least this satisfaction the one with the lowest perplexity."""
    good = [point for point in points if point.satisfaction >= satisfaction]
    return min(good, key=_cost, default=None)


def table(points: Sequence[Point]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows for people, the most satisfied first; of overrides those that differ."""
    groups = list(points[0].perplexity)
    ordered = sorted(points, key=lambda point: -point.satisfaction)
    columns = ["job", "overrides", "satisfied", *(f"perplexity, {g}" for g in groups), "front"]
    return columns, [
        [
            point.job,
            words,
            f"{100 * point.satisfaction:.1f} % ({100 * point.low:.1f}–{100 * point.high:.1f})",
            *(f"{point.perplexity[group]:.2f}" for group in groups),
            "yes" if point.on_front else "",
        ]
        for point, words in zip(
            ordered, differing([point.overrides for point in ordered]), strict=True
        )
    ]


def differing(overrides: Sequence[str]) -> list[str]:
    """Of the overrides of each of several jobs those that are not everybody's."""
    shared = set.intersection(*(set(text.split()) for text in overrides))
    if len(overrides) == 1:
        return list(overrides)
    return [" ".join(word for word in text.split() if word not in shared) for text in overrides]


def save(folder: Path, points: Sequence[Point], exits: Mapping[str, int | None]) -> None:
    """Write `sweep.json`: every job with its exit code, and what the finished ones came to."""
    tree = {"exit_codes": dict(exits), "runs": [asdict(point) for point in points]}
    write_atomically(folder / "sweep.json", json.dumps(tree, indent=2, ensure_ascii=False) + "\n")


def plot(file: Path, points: Sequence[Point]) -> bool:
    """Satisfaction against perplexity, the front joined by a line; false without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(6.5, 4.5), layout="constrained")
    draw(figure.subplots(), points)
    figure.savefig(file, dpi=150)
    return True


def draw(axes: "Axes", points: Sequence[Point], *, on: str = "tab:blue", off: str = "0.6") -> None:
    """Put the points and the front on axes, in one colour for those on it and one for the rest."""
    group = next(iter(points[0].perplexity))
    labels = differing([point.overrides for point in points])
    middle = (min(map(_cost, points)) + max(map(_cost, points))) / 2
    for point, label in zip(points, labels, strict=True):
        x, y = _cost(point), 100 * point.satisfaction
        errors = [[max(y - 100 * point.low, 0)], [max(100 * point.high - y, 0)]]
        to_the_left = x > middle  # a label stays inside the frame
        colour = on if point.on_front else off
        axes.errorbar([x], [y], yerr=errors, marker="o", capsize=3, color=colour)
        if point.on_front or len(points) <= _LABELLED:
            axes.annotate(
                f"{point.job}: {_short(label)}" if label else point.job,
                (x, y),
                xytext=(-6 if to_the_left else 6, -10),
                ha="right" if to_the_left else "left",
                textcoords="offset points",
                fontsize="small",
            )
    line = sorted((p for p in points if p.on_front), key=_cost)
    axes.plot(
        [_cost(p) for p in line],
        [100 * p.satisfaction for p in line],
        color=on,
        label="front: no other run is better at both",
    )
    axes.set(xlabel=f"perplexity of held-out {group} (lower is better)", ylabel="satisfied, %")
    axes.legend(loc="lower right", frameon=False)


def _point(job: str, overrides: str, folder: RunFolder) -> Point | None:
    try:
        models = json.loads(folder.evaluation_file.read_text(encoding="utf-8"))["models"]
    except (OSError, ValueError, KeyError):
        return None
    if len(models) < 2:  # the base alone: not finished
        return None
    tuned: dict[str, Any] = models[-1]
    groups = list(tuned["groups"].values())
    total = sum(group["samples"] for group in groups)

    def mean(name: str) -> float:
        return float(sum(g["samples"] * g["satisfaction"][name] for g in groups) / total)

    return Point(
        job=job,
        overrides=overrides,
        satisfaction=mean("mean"),
        low=mean("low"),
        high=mean("high"),
        perplexity={name: one["mean"] for name, one in tuned["perplexity"].items()},
    )


def _mean(overrides: str, runs: Sequence[Point]) -> Point:
    shares = [run.satisfaction for run in runs]
    mean, spread = fmean(shares), stdev(shares)
    return Point(
        job=", ".join(run.job for run in runs),
        overrides=f"{overrides} ({len(runs)} seeds)".strip(),
        satisfaction=mean,
        low=max(mean - spread, 0.0),
        high=min(mean + spread, 1.0),
        perplexity={
            name: fmean(run.perplexity[name] for run in runs) for name in runs[0].perplexity
        },
    )


def _short(overrides: str) -> str:
    """Overrides by the last names of their keys, a line each."""
    pairs = [word.partition("=") for word in overrides.split()]
    return "\n".join("".join((key.rpartition(".")[2], *rest)) for key, *rest in pairs)


def _placed(point: Point, points: Sequence[Point]) -> Point:
    beaten = any(
        other.satisfaction >= point.satisfaction
        and _cost(other) <= _cost(point)
        and (other.satisfaction, _cost(other)) != (point.satisfaction, _cost(point))
        for other in points
    )
    return Point(**(asdict(point) | {"on_front": not beaten}))


def _cost(point: Point) -> float:
    """Perplexity of the corpus's first group."""
    return next(iter(point.perplexity.values()))
