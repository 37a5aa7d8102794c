"""1 where a letter occurs at most so many times: quick, exact, and easy to check by hand."""

from collections.abc import Sequence

from constrained_ft.scorers.protocol import Score, ScoreFailure


class LettersScorer:
    """Counts one letter in the completion, whatever its case."""

    def __init__(self, letter: str, at_most: int) -> None:
        self._letter = letter.casefold()
        self._at_most = at_most
        self.name = f"letters (at most {at_most} {letter!r})"
        self.version = "1"

    def score(
        self, prompts: Sequence[str], completions: Sequence[str]
    ) -> list[Score | ScoreFailure]:
        """1 where the completion has few enough, else 0."""
        return [
            Score(float(completion.casefold().count(self._letter) <= self._at_most))
            for completion in completions
        ]
