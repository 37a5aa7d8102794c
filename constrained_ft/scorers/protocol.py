"""What a scorer is: text in, a score or a failure out, one for each completion."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from constrained_ft.errors import ScorerError


@dataclass(frozen=True)
class Score:
    """How well a completion satisfies the constraint: 0 not at all, 1 fully."""

    value: float


@dataclass(frozen=True)
class ScoreFailure:
    """Why a completion has no score."""

    error: str


@runtime_checkable
class Scorer(Protocol):
    """The constraint C(x, y).

    A scorer that may wait for long also has `cancel()`, which lets `score` return soon with
    failures for what is not answered. One that wants more of a prompt's row than its text has
    `take_columns(columns)`, which gives it that by the prompt's text.
    """

    @property
    def name(self) -> str:
        """What messages and reports call it."""

    @property
    def version(self) -> str:
        """Changes whenever the same text could get another score."""

    def score(
        self, prompts: Sequence[str], completions: Sequence[str]
    ) -> list[Score | ScoreFailure]:
        """One result for each pair, in order; `completions[i]` follows `prompts[i]`."""


def valid(
    scorer: Scorer, prompts: Sequence[str], completions: Sequence[str]
) -> list[Score | ScoreFailure]:
    """What a scorer says; whatever is no score in [0, 1] is a failure that says what it was.

    Raises:
        ScorerError: if the scorer cannot go on at all, such as without a place to keep its scores.
    """
    assert len(prompts) == len(completions)
    if not completions:
        return []
    try:
        results = scorer.score(prompts, completions)
    except ScorerError:
        raise
    except Exception as error:
        failure = ScoreFailure(f"it failed with {type(error).__name__}: {error}")
        return [failure for _ in completions]
    if len(results) != len(completions):
        failure = ScoreFailure(
            f"it gave {len(results)} results for {len(completions)} completions; it must give one "
            "for each, in order"
        )
        return [failure for _ in completions]
    return [_checked(result) for result in results]


def _checked(result: Score | ScoreFailure) -> Score | ScoreFailure:
    if isinstance(result, Score) and not (math.isfinite(result.value) and 0 <= result.value <= 1):
        return ScoreFailure(f"it gave {result.value}; a score must lie in [0, 1]")
    return result
