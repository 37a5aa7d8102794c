"""Scorers made of scorers: all of them, any of them, the opposite, a weighted mean."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from constrained_ft.scorers.protocol import Score, ScoreFailure, Scorer, valid

Columns = Mapping[str, Mapping[str, Any]]
Combine = Callable[[Sequence[float]], float]


class CombinedScorer:
    """Asks each part about every completion and combines what they say.

    A completion that one part gives no score has none at all: a guess for it would be a number.
    """

    def __init__(
        self,
        kind: Literal["all_of", "any_of", "not", "weighted"],
        parts: Mapping[str, Scorer],
        weights: Mapping[str, float] | None = None,
    ) -> None:
        self.parts = dict(parts)
        """The scorers by their names."""
        self._combine = _combination(kind, [weights[n] for n in parts] if weights else [])
        told = ", ".join(f"{name} x {weights[name]:g}" if weights else name for name in self.parts)
        self.name = f"{kind} ({told})"
        whole = repr([kind, sorted((weights or {}).items())])
        inner = [repr((n, part.name, part.version)) for n, part in self.parts.items()]
        self.version = hashlib.sha256("\n".join([whole, *inner]).encode()).hexdigest()[:16]

    def score(
        self, prompts: Sequence[str], completions: Sequence[str]
    ) -> list[Score | ScoreFailure]:
        """The combination, or the first failure."""
        answers = {name: valid(part, prompts, completions) for name, part in self.parts.items()}
        results: list[Score | ScoreFailure] = []
        for row in zip(*answers.values(), strict=True):
            failed = [
                ScoreFailure(f"{name}: {one.error}")
                for name, one in zip(answers, row, strict=True)
                if isinstance(one, ScoreFailure)
            ]
            values = [one.value for one in row if isinstance(one, Score)]
            results.append(failed[0] if failed else Score(self._combine(values)))
        return results

    def cancel(self) -> None:
        """Let every part return soon."""
        for part in self.parts.values():
            cancel(part)

    @property
    def needs_columns(self) -> bool:
        """Whether a part does."""
        return any(needs_columns(part) for part in self.parts.values())

    def take_columns(self, columns: Columns) -> None:
        """Tell every part."""
        for part in self.parts.values():
            give_columns(part, columns)


def cancel(scorer: Scorer) -> None:
    """Let a scorer that waits for something return soon; others are quick anyway."""
    stop = getattr(scorer, "cancel", None)
    if stop is not None:
        stop()


def needs_columns(scorer: Scorer) -> bool:
    """Whether a scorer cannot be asked before it was given columns."""
    return bool(getattr(scorer, "needs_columns", False))


def give_columns(scorer: Scorer, columns: Columns) -> None:
    """Tell a scorer what else the rows of prompts say; few want to know."""
    take = getattr(scorer, "take_columns", None)
    if take is not None:
        take(columns)


def _combination(kind: str, weights: Sequence[float]) -> Combine:
    match kind:
        case "all_of":
            return min
        case "any_of":
            return max
        case "not":
            return lambda values: 1.0 - values[0]
        case _:
            total = sum(weights)
            return lambda values: min(
                1.0, sum(w * v for w, v in zip(weights, values, strict=True)) / total
            )
