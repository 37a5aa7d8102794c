"""Two models on the same prompts, with the same random numbers: how far apart, and is that chance?

The difference of each prompt, or of each item of a benchmark, is one observation. Its mean has a
bootstrap interval over them; the p-value is that of the sign-flip permutation test: were both
models alike, every difference would be as likely with the other sign.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter

from constrained_ft.benchmark_results import item_differences
from constrained_ft.intervals import Interval, bootstrap, bootstrap_of_groups
from constrained_ft.results import Evaluation

_FLIPS = 9999
_CHUNK = 500
_ALL_PAIRS = 4  # models; of more each is compared with the first only


@dataclass(frozen=True, kw_only=True)
class Difference:
    """What was measured of one model minus what was measured of another."""

    group: str
    """Of prompts, or the number of benchmarks."""
    model: str
    other: str
    prompts: int
    """Prompts, or items of all benchmarks."""
    difference: Interval
    p_value: float
    measure: Literal["violations", "benchmarks"] = "violations"
    """The share of violations over the prompts of a group, or the mean score of benchmarks."""


def differences(evaluations: Sequence[Evaluation]) -> list[Difference]:
    """Every pair of up to four models; of more, each and the first. What both were asked."""
    pairs = list(combinations(evaluations, 2))
    if len(evaluations) > _ALL_PAIRS:
        pairs = [(evaluations[0], one) for one in evaluations[1:]]
    found = []
    for other, one in pairs:
        for name, group in one.groups.items():
            mine = group.violation_by_prompt
            theirs = other.groups[name].violation_by_prompt if name in other.groups else {}
            shared = [prompt for prompt in mine if prompt in theirs]
            if not shared:
                continue
            values = np.array([mine[prompt] - theirs[prompt] for prompt in shared])
            found.append(
                Difference(
                    group=name,
                    model=one.model,
                    other=other.model,
                    prompts=len(shared),
                    difference=bootstrap(values),
                    p_value=sign_flip(values),
                )
            )
        found += _of_benchmarks(one, other)
    return found


def _of_benchmarks(one: Evaluation, other: Evaluation) -> list[Difference]:
    """Each benchmark has the same weight, however many items it has."""
    parts = item_differences(one.benchmarks, other.benchmarks)
    if not parts:
        return []
    weighted = [values / (len(values) * len(parts)) for values in parts]
    return [
        Difference(
            measure="benchmarks",
            group=str(len(parts)),
            model=one.model,
            other=other.model,
            prompts=sum(map(len, parts)),
            difference=bootstrap_of_groups(parts),
            p_value=sign_flip(np.concatenate(weighted)),
        )
    ]


def sign_flip(values: NDArray[np.float64], seed: int = 0) -> float:
    """Two-sided p-value of a mean of zero, by 9,999 random flips of signs and the one observed."""
    rng = np.random.default_rng(seed)
    observed = abs(values.sum())
    extreme = 1
    for start in range(0, _FLIPS, _CHUNK):
        count = min(_CHUNK, _FLIPS - start)
        signs = rng.choice([-1.0, 1.0], size=(count, len(values)))
        # Sums that are the same but for the order of additions count as the same.
        extreme += int((np.abs(signs @ values) >= observed - 1e-9).sum())
    return extreme / (_FLIPS + 1)


def plain(found: Sequence[Difference]) -> list[dict[str, Any]]:
    """For JSON."""
    return [asdict(one) for one in found]


def load(path: Path) -> list[Difference]:
    """Those of a file of results."""
    return TypeAdapter(list[Difference]).validate_python(
        json.loads(path.read_text(encoding="utf-8")).get("differences", [])
    )


def table(found: Sequence[Difference]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows for people."""
    columns = ["difference", "prompts", "points", "p"]
    titles = {"violations": "violations, {}", "benchmarks": "mean of {} benchmarks"}
    return columns, [
        [
            f"{titles[one.measure].format(one.group)}: {one.model} - {one.other}",
            str(one.prompts),
            f"{100 * one.difference.mean:+.1f} "
            f"({100 * one.difference.low:+.1f} to {100 * one.difference.high:+.1f})",
            "< 0.001" if one.p_value < 0.001 else f"{one.p_value:.3f}",
        ]
        for one in found
    ]
