"""Two models on the same prompts, with the same random numbers: how far apart, and is that chance?

The difference of each prompt is one observation. Its mean has a bootstrap interval over prompts;
the p-value is that of the sign-flip permutation test: were both models alike, every difference
would be as likely with the other sign.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter

from constrained_ft.intervals import Interval, bootstrap
from constrained_ft.results import Evaluation

_FLIPS = 9999
_CHUNK = 500
_ALL_PAIRS = 4  # models; of more each is compared with the first only


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The share of violations of one model minus that of another, over the prompts of a group."""

    group: str
    model: str
    other: str
    prompts: int
    difference: Interval
    p_value: float


def differences(evaluations: Sequence[Evaluation]) -> list[Difference]:
    """Every pair of up to four models; of more, each and the first. Prompts that both have."""
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
    return found


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
    columns = ["violations, difference", "prompts", "points", "p"]
    return columns, [
        [
            f"{one.group}: {one.model} - {one.other}",
            str(one.prompts),
            f"{100 * one.difference.mean:+.1f} "
            f"({100 * one.difference.low:+.1f} to {100 * one.difference.high:+.1f})",
            "< 0.001" if one.p_value < 0.001 else f"{one.p_value:.3f}",
        ]
        for one in found
    ]
