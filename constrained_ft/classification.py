"""How well scores tell two classes apart: F1, AUROC, accuracy, each with its interval.

A score says which text is the more likely positive one, not how many are. Where one class is rare,
a model that has learned little answers no always, and F1 would be 0 whatever it knows. So as large
a share of the texts is called positive as is positive among other texts that are known, those with
the highest scores: every model makes as many positive calls as every other.

Shape suffixes:  N texts, K samples, U different scores.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from constrained_ft.intervals import Interval, resampled_counts

MEASURES: tuple[Literal["F1", "AUROC", "accuracy"], ...] = ("F1", "AUROC", "accuracy")


@dataclass(frozen=True, kw_only=True)
class Classification:
    """How well one detector does."""

    texts: int
    positive: float
    """Share of the texts that are positive."""
    measures: dict[str, Interval]
    """By the names of `MEASURES`; the intervals resample texts."""
    scores: dict[str, float]
    """By the text's id; the higher, the more likely positive."""
    threshold: float
    """Texts with at least this score are called positive."""
    positives: tuple[str, ...]
    """Ids of the texts that are positive."""


def classification(
    scores: Mapping[str, float], positives: frozenset[str], share: float
) -> Classification:
    """Measure scores.

    Args:
        scores: by the text's id.
        positives: ids of the texts that are positive.
        share: of the texts that is called positive.
    """
    called = min(max(round(share * len(scores)), 1), len(scores))
    scores_N = np.array(list(scores.values()))
    labels_N = np.array([text in positives for text in scores])
    threshold = float(np.sort(scores_N)[-called])
    whole = measured(labels_N, scores_N, threshold, np.ones((1, len(scores))))
    drawn = measured(labels_N, scores_N, threshold, resampled_counts(len(scores)))
    return Classification(
        texts=len(scores),
        positive=float(labels_N.mean()),
        measures={name: Interval.of(float(whole[name][0]), drawn[name]) for name in MEASURES},
        scores=dict(scores),
        threshold=threshold,
        positives=tuple(text for text in scores if text in positives),
    )


def measured(
    labels_N: NDArray[np.bool_],
    scores_N: NDArray[np.float64],
    threshold: float,
    counts_KN: NDArray[np.float64],
) -> dict[str, NDArray[np.float64]]:
    """F1, AUROC and accuracy of each of K samples, which hold each text so many times.

    NaN where a sample has one class only.
    """
    called_N = scores_N >= threshold
    positive_K, negative_K = counts_KN[:, labels_N].sum(1), counts_KN[:, ~labels_N].sum(1)
    hits_K = counts_KN[:, labels_N & called_N].sum(1)
    false_K = counts_KN[:, ~labels_N & called_N].sum(1)
    # Mann and Whitney: pairs of a positive and a negative text in the right order, ties by half.
    order_N = np.argsort(scores_N, kind="stable")
    starts_U = np.unique(scores_N[order_N], return_index=True)[1]
    positive_KU, negative_KU = (
        np.add.reduceat((counts_KN * side_N)[:, order_N], starts_U, axis=1)
        for side_N in (labels_N, ~labels_N)
    )
    below_KU = negative_KU.cumsum(1) - negative_KU / 2
    with np.errstate(invalid="ignore"):
        found = {
            "F1": 2 * hits_K / (hits_K + false_K + positive_K),
            "AUROC": (positive_KU * below_KU).sum(1) / (positive_K * negative_K),
            "accuracy": (hits_K + negative_K - false_K) / (positive_K + negative_K),
        }
    both_K = (positive_K > 0) & (negative_K > 0)
    return {name: np.where(both_K, values_K, np.nan) for name, values_K in found.items()}
