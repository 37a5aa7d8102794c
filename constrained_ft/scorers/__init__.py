"""The constraint C(x, y) in [0, 1]: one protocol, one small file a kind.

`score_all` is the only way to numbers. A score that is missing, of another type, not finite or
outside [0, 1] is an error that names the scorer and the sample; it never becomes a number.
"""

import math
from collections.abc import Sequence

from constrained_ft.config import (
    FunctionScorerConfig,
    LettersScorerConfig,
    LinearScorerConfig,
    ScorerConfig,
    WordsScorerConfig,
)
from constrained_ft.errors import ScorerError
from constrained_ft.scorers.function import FunctionScorer
from constrained_ft.scorers.ledger import Ledger, RememberingScorer
from constrained_ft.scorers.letters import LettersScorer
from constrained_ft.scorers.linear import LinearScorer
from constrained_ft.scorers.protocol import Score, ScoreFailure, Scorer, wrong_count
from constrained_ft.scorers.words import WordsScorer, read_words, without

__all__ = [
    "Ledger",
    "RememberingScorer",
    "Score",
    "ScoreFailure",
    "Scorer",
    "build_scorer",
    "probe",
    "score_all",
]

_PROBES = ("The weather was", "This is")
_PROBE_COMPLETIONS = (" fine all day.", " a test.")


def build_scorer(config: ScorerConfig) -> Scorer:
    """The scorer that a section asks for.

    Raises:
        ScorerError: if it cannot be loaded.
        DataError: if a word list is not there.
    """
    match config:
        case LinearScorerConfig():
            return LinearScorer()
        case WordsScorerConfig():
            listed = [] if config.path is None else read_words(config.path, config.min_severity)
            return WordsScorer([*config.words, *without(listed, config.ignore)])
        case LettersScorerConfig():
            return LettersScorer(config.letter, config.at_most)
        case FunctionScorerConfig():
            return FunctionScorer(config.path, config.in_flight)


def score_all(scorer: Scorer, prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """One score in [0, 1] for each completion.

    Raises:
        ScorerError: naming the scorer and the first sample without a valid score.
    """
    assert len(prompts) == len(completions)
    if not completions:
        return []
    try:
        results = scorer.score(prompts, completions)
    except ScorerError:
        raise
    except Exception as error:
        raise ScorerError(
            f"the scorer {scorer.name} failed: {type(error).__name__}: {error}"
        ) from error
    if len(results) != len(completions):
        raise ScorerError(wrong_count(scorer.name, len(results), len(completions)))
    return [
        _value(scorer, index, completion, result)
        for index, (completion, result) in enumerate(zip(completions, results, strict=True))
    ]


def probe(scorer: Scorer) -> None:
    """Run the scorer once, before anything is loaded that takes time.

    Raises:
        ScorerError: if it fails.
    """
    score_all(scorer, _PROBES, _PROBE_COMPLETIONS)


def _value(scorer: Scorer, index: int, completion: str, result: Score | ScoreFailure) -> float:
    excerpt = repr(completion if len(completion) <= 60 else completion[:57] + "...")
    sample = f"sample {index} ({excerpt})"
    if isinstance(result, ScoreFailure):
        raise ScorerError(f"the scorer {scorer.name} gave no score for {sample}: {result.error}")
    if not (math.isfinite(result.value) and 0 <= result.value <= 1):
        raise ScorerError(
            f"the scorer {scorer.name} gave {result.value} for {sample}; a score must lie in [0, 1]"
        )
    return result.value
