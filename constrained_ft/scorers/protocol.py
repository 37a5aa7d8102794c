"""What a scorer is: text in, a score or a failure out, one for each completion."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable


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
    """The constraint C(x, y)."""

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


def wrong_count(name: str, got: int, asked: int) -> str:
    """What is wrong with so many results."""
    return (
        f"the scorer {name} gave {got} results for {asked} completions; it must give one for each, "
        "in order"
    )
