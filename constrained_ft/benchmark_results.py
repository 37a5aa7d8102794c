"""What a benchmark came to."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from constrained_ft.intervals import Interval, bootstrap_of_groups


@dataclass(frozen=True, kw_only=True)
class BenchmarkResult:
    """One model on the items of one benchmark."""

    items: int
    metrics: dict[str, Interval]
    """Accuracy under lm-eval's names: `acc` takes the likeliest choice, `acc_norm`, where the task
    has it, the likeliest a character. The last one is the benchmark's score."""
    chance: float | None
    """Accuracy of a guess among the choices; None where there are no choices."""
    by_item: dict[str, float]
    """The score of each item, by the task and the item's number."""

    @property
    def score(self) -> Interval:
        """The metric that goes into the mean over benchmarks."""
        return [*self.metrics.values()][-1]


def mean_score(results: Mapping[str, BenchmarkResult]) -> Interval:
    """Mean score, each benchmark with the same weight; the interval resamples the items of each."""
    return bootstrap_of_groups([np.array([*one.by_item.values()]) for one in results.values()])


def mean_chance(results: Mapping[str, BenchmarkResult]) -> float | None:
    """Of a guess; None where any benchmark has no choices."""
    chances = [one.chance for one in results.values()]
    known = [chance for chance in chances if chance is not None]
    return sum(known) / len(known) if len(known) == len(chances) else None


def item_differences(
    mine: Mapping[str, BenchmarkResult], theirs: Mapping[str, BenchmarkResult]
) -> list[NDArray[np.float64]]:
    """Of each benchmark that both have, the score of one minus that of the other, item by item."""
    pairs = [(mine[name].by_item, theirs[name].by_item) for name in mine if name in theirs]
    return [np.array([one[item] - two[item] for item in one]) for one, two in pairs]


def benchmark_rows(results: Sequence[Mapping[str, BenchmarkResult]]) -> list[list[str]]:
    """Rows of a table with a column for each model; a model that was not asked has none."""
    first = next((one for one in results if one), {})
    rows: list[list[str]] = []
    for name, result in first.items():
        rows.append([f"{name}: items", *(str(one[name].items) if one else "–" for one in results)])
        for metric in result.metrics:
            cells = [one[name].metrics[metric].percent() if one else "–" for one in results]
            rows.append([f"  {metric}{_beside(result.chance)}", *cells])
    if len(first) > 1:
        cells = [mean_score(one).percent() if one else "–" for one in results]
        rows.append([f"mean of {len(first)} benchmarks{_beside(mean_chance(first))}", *cells])
    return rows


def _beside(chance: float | None) -> str:
    return "" if chance is None else f" (chance {chance:.1%})"
