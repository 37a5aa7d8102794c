"""Scorers made of scorers: all of them, any of them, the opposite, a weighted mean."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from constrained_ft.scorers.protocol import Score, ScoreFailure, Scorer, valid

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


def cancel(scorer: Scorer) -> None:
    """Let a scorer that waits for something return soon; others are quick anyway."""
    stop = getattr(scorer, "cancel", None)
    if stop is not None:
        stop()


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
