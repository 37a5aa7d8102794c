"""Means with their 95 % bootstrap intervals."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_RESAMPLES = 1000


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean and its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float

    def complement(self) -> "Interval":
        """Of 1 - what this is of."""
        return Interval(mean=1 - self.mean, low=1 - self.high, high=1 - self.low)

    @classmethod
    def of(cls, mean: float, resampled_K: NDArray[np.float64]) -> "Interval":
        """A number, and the percentiles of what it is in resamples; NaN there is left out."""
        low, high = np.nanquantile(resampled_K, [0.025, 0.975])
        return cls(mean=mean, low=float(low), high=float(high))

    def percent(self) -> str:
        """For a table: `8.3 % (6.1-10.9)`."""
        return f"{100 * self.mean:.1f} % ({100 * self.low:.1f}–{100 * self.high:.1f})"

    def plain(self, digits: int = 2) -> str:
        """For a table: `44.10 (41.72-46.80)`."""
        return f"{self.mean:.{digits}f} ({self.low:.{digits}f}–{self.high:.{digits}f})"


def bootstrap(values: Sequence[float] | NDArray[np.generic], seed: int = 0) -> Interval:
    """Mean of independent values and the percentile interval of its bootstrap distribution."""
    array = np.asarray(values, dtype=np.float64)
    draws = np.random.default_rng(seed).integers(len(array), size=(_RESAMPLES, len(array)))
    low, high = np.quantile(array[draws].mean(axis=1), [0.025, 0.975])
    return Interval(mean=float(array.mean()), low=float(low), high=float(high))


def bootstrap_of_groups(groups: Sequence[NDArray[np.float64]], seed: int = 0) -> Interval:
    """Mean of the means of several groups of independent values, each resampled by itself."""
    rng = np.random.default_rng(seed)
    draws = [rng.integers(len(group), size=(_RESAMPLES, len(group))) for group in groups]
    resampled = [group[draw].mean(axis=1) for group, draw in zip(groups, draws, strict=True)]
    low, high = np.quantile(np.mean(resampled, axis=0), [0.025, 0.975])
    mean = float(np.mean([group.mean() for group in groups]))
    return Interval(mean=mean, low=float(low), high=float(high))


def resampled_counts(number: int, seed: int = 0) -> NDArray[np.float64]:
    """How often each of so many observations comes up in each resample, [resamples, number]."""
    draws = np.random.default_rng(seed).integers(number, size=(_RESAMPLES, number))
    counts = np.zeros((_RESAMPLES, number))
    np.add.at(counts, (np.arange(_RESAMPLES)[:, None], draws), 1.0)
    return counts


def ratio_perplexity(losses: np.ndarray, counts: np.ndarray) -> Interval:
    """exp(sum of losses / sum of tokens) and its bootstrap over rows."""
    draws = np.random.default_rng(0).integers(len(losses), size=(_RESAMPLES, len(losses)))
    resampled = np.exp(losses[draws].sum(axis=1) / counts[draws].sum(axis=1))
    low, high = np.quantile(resampled, [0.025, 0.975])
    mean = float(np.exp(losses.sum() / counts.sum()))
    return Interval(mean=mean, low=float(low), high=float(high))
