"""Two models on the same prompts, with the same random numbers: how far apart, and is that chance?

The difference of each prompt, or of each item of a benchmark, is one observation. Its mean has a
bootstrap interval over them; the p-value is that of the sign-flip permutation test: were both
models alike, every difference would be as likely with the other sign. How well labelled texts are
told apart is compared by the bootstrap over texts alone.
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
from constrained_ft.classification import MEASURES, measured
from constrained_ft.intervals import Interval, bootstrap, bootstrap_of_groups, resampled_counts
from constrained_ft.results import Evaluation

_FLIPS = 9999
_CHUNK = 500
_ALL_PAIRS = 4  # models; of more each is compared with the first only


@dataclass(frozen=True, kw_only=True)
class Difference:
    """What was measured of one model minus what was measured of another."""

    group: str
    """Of prompts; the number of benchmarks; or the detector: `answers`, `head`, `probe`."""
    model: str
    other: str
    prompts: int
    """Prompts, items of all benchmarks, or labelled texts."""
    difference: Interval
    p_value: float | None
    """None for what tells labelled texts apart: no test was made."""
    measure: Literal["violations", "benchmarks", "F1", "AUROC", "accuracy"] = "violations"
    """The share of violations over the prompts of a group, the mean score of benchmarks, or how
    well labelled texts are told apart."""


def differences(evaluations: Sequence[Evaluation]) -> list[Difference]:
    """Every pair of up to four models; of more, each and the first. What both were asked."""
    pairs = list(combinations(evaluations, 2))
    if len(evaluations) > _ALL_PAIRS:
        pairs = [(evaluations[0], one) for one in evaluations[1:]]
    found: list[Difference] = []
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
                    measure="violations",
                    group=name,
                    model=one.model,
                    other=other.model,
                    prompts=len(shared),
                    difference=bootstrap(values),
                    p_value=sign_flip(values),
                )
            )
        found += _of_benchmarks(one, other)
        for detector in one.detection:
            if detector in other.detection:
                found += _detection_differences(detector, one, other)
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


def _detection_differences(detector: str, one: Evaluation, other: Evaluation) -> list[Difference]:
    """Of F1, AUROC and accuracy: both models are measured on the same resamples."""
    mine, theirs = one.detection[detector], other.detection[detector]
    shared = [text for text in mine.scores if text in theirs.scores]
    if not shared:
        return []
    positives = set(mine.positives)
    labels_N = np.array([text in positives for text in shared])
    found_K = []
    for result in (mine, theirs):
        scores_N = np.array([result.scores[text] for text in shared])
        counts_KN = np.vstack([np.ones((1, len(shared))), resampled_counts(len(shared))])
        found_K.append(measured(labels_N, scores_N, result.threshold, counts_KN))
    apart_K = {name: found_K[0][name] - found_K[1][name] for name in MEASURES}
    return [
        Difference(
            measure=name,
            group=detector,
            model=one.model,
            other=other.model,
            prompts=len(shared),
            difference=Interval.of(float(apart_K[name][0]), apart_K[name][1:]),
            p_value=None,
        )
        for name in MEASURES
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
    columns = ["difference", "number", "points", "p"]
    titles = {"violations": "violations, {}", "benchmarks": "mean of {} benchmarks"}
    titles |= {measure: f"{measure} of {{}}" for measure in MEASURES}
    return columns, [
        [
            f"{titles[one.measure].format(one.group)}: {one.model} - {one.other}",
            str(one.prompts),
            f"{100 * one.difference.mean:+.1f} "
            f"({100 * one.difference.low:+.1f} to {100 * one.difference.high:+.1f})",
            _p_value(one.p_value),
        ]
        for one in found
    ]


def _p_value(value: float | None) -> str:
    if value is None:
        return "–"
    return "< 0.001" if value < 0.001 else f"{value:.3f}"
