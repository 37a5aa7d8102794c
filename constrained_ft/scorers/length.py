"""1 where a completion is as long as asked for."""

import re
from collections.abc import Callable, Sequence

from constrained_ft.loading import load_tokenizer, plain_config
from constrained_ft.scorer_config import LengthScorerConfig
from constrained_ft.scorers.protocol import Score, ScoreFailure

# An end sign, with quotes and brackets behind it, before a blank or the end of the text.
_SENTENCE_END = re.compile(r"[.!?…][\"'”’)\]]*(?=\s|$)")


class LengthScorer:
    """Counts tokens, words, characters or sentences of the completion."""

    def __init__(self, config: LengthScorerConfig) -> None:
        """Load the tokenizer, where one is needed.

        Raises:
            ModelError: if it is missing.
        """
        self._config = config
        self._count = _counter(config)
        most = "" if config.at_most is None else f" at most {config.at_most}"
        least = f" at least {config.at_least}" if config.at_least else ""
        self.name = f"length ({config.unit}{least}{most})"
        whose = "" if config.unit != "tokens" else f" of {config.tokenizer}"
        self.version = f"1{' graded' if config.graded else ''}{whose}"

    def score(
        self, prompts: Sequence[str], completions: Sequence[str]
    ) -> list[Score | ScoreFailure]:
        """1 where the count lies between the bounds."""
        return [Score(self._value(self._count(text.strip()))) for text in completions]

    def why(self, completion: str) -> str:
        """What was counted."""
        return f"{self._count(completion.strip())} {self._config.unit}"

    def _value(self, count: int) -> float:
        least, most = self._config.at_least, self._config.at_most
        if count >= least and (most is None or count <= most):
            return 1.0
        if not self._config.graded:
            return 0.0
        return count / least if count < least else (most or 0) / count


def _counter(config: LengthScorerConfig) -> Callable[[str], int]:
    match config.unit:
        case "characters":
            return len
        case "words":
            return lambda text: len(text.split())
        case "sentences":
            return _sentences
        case "tokens":
            assert config.tokenizer is not None
            tokenizer = load_tokenizer(plain_config(config.tokenizer))
            return lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"])


def _sentences(text: str) -> int:
    """Sentences begun: a rest without an end sign is one too."""
    ends = [found.end() for found in _SENTENCE_END.finditer(text)]
    rest = text[ends[-1] if ends else 0 :].strip()
    return len(ends) + bool(rest)
