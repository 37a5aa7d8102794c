"""1 where a completion matches a regular expression, or does not."""

import hashlib
import re
from collections.abc import Sequence

from constrained_ft.scorer_config import RegexScorerConfig
from constrained_ft.scorers.protocol import Score, ScoreFailure


class RegexScorer:
    """Searches the completion with Python's `re`."""

    def __init__(self, config: RegexScorerConfig) -> None:
        self._pattern = re.compile(config.pattern, re.IGNORECASE if config.ignore_case else 0)
        self._must = config.must
        words = {"not_contain": "no", "contain": "some", "match_whole": "all of"}
        self.name = f"regex ({words[config.must]} {config.pattern!r})"
        told = repr((config.pattern, config.must, config.ignore_case))
        self.version = hashlib.sha256(told.encode()).hexdigest()[:16]

    def score(
        self, prompts: Sequence[str], completions: Sequence[str]
    ) -> list[Score | ScoreFailure]:
        """1 where the completion is as asked for, else 0."""
        return [Score(float(self._holds(completion))) for completion in completions]

    def why(self, completion: str) -> str:
        """What was found."""
        found = self._pattern.search(completion)
        return "no match" if found is None else f"matches {found[0]!r} at {found.start()}"

    def _holds(self, completion: str) -> bool:
        if self._must == "match_whole":
            return self._pattern.fullmatch(completion.strip()) is not None
        found = self._pattern.search(completion) is not None
        return found == (self._must == "contain")
