"""The constraint C(x, y) in [0, 1]: one protocol, one small file a kind.

A score that is missing, of another type, not finite or outside [0, 1] is a failure that says why;
it never becomes a number. `scores_of` gives what there is and None for the rest, `score_all`
insists on every score.
"""

from collections.abc import Sequence
from pathlib import Path

from constrained_ft.errors import ScorerError
from constrained_ft.scorer_config import (
    ClassifierScorerConfig,
    EmbeddingScorerConfig,
    FunctionScorerConfig,
    HttpScorerConfig,
    LengthScorerConfig,
    LettersScorerConfig,
    LinearScorerConfig,
    RegexScorerConfig,
    ScorerConfig,
    SelfJudgeScorerConfig,
    WeightedScorerConfig,
    WordsScorerConfig,
)
from constrained_ft.scorers.cache import (
    RememberingScorer,
    ScoreCache,
    remembering,
    user_cache,
)
from constrained_ft.scorers.classifier import ClassifierScorer
from constrained_ft.scorers.combined import (
    Columns,
    CombinedScorer,
    cancel,
    give_columns,
    needs_columns,
)
from constrained_ft.scorers.embedding import Embedder, EmbeddingScorer, Probe
from constrained_ft.scorers.function import FunctionScorer
from constrained_ft.scorers.http import HttpScorer
from constrained_ft.scorers.length import LengthScorer
from constrained_ft.scorers.letters import LettersScorer
from constrained_ft.scorers.linear import LinearScorer
from constrained_ft.scorers.llm_self import SelfJudgeScorer
from constrained_ft.scorers.protocol import Score, ScoreFailure, Scorer, valid
from constrained_ft.scorers.regex import RegexScorer
from constrained_ft.scorers.words import WordsScorer, read_words, without

__all__ = [
    "CombinedScorer",
    "Embedder",
    "Probe",
    "RememberingScorer",
    "Score",
    "ScoreCache",
    "ScoreFailure",
    "Scorer",
    "build_scorer",
    "cancel",
    "given_columns",
    "least_scores",
    "probe",
    "probed",
    "score_all",
    "user_cache",
    "valid",
]

_PROBES = ("The weather was", "This is")
_PROBE_COMPLETIONS = (" fine all day.", " a test.")


def build_scorer(config: ScorerConfig) -> Scorer:
    """The scorer that a section asks for.

    Raises:
        ScorerError: if it cannot be loaded.
        ModelError: if a model that it needs is missing.
        DataError: if a word list is not there.
    """
    match config:
        case LinearScorerConfig():
            return LinearScorer()
        case WordsScorerConfig():
            listed = [] if config.path is None else read_words(config.path, config.min_severity)
            return WordsScorer([*config.words, *without(listed, config.ignore)], config)
        case LettersScorerConfig():
            return LettersScorer(config.letter, config.at_most)
        case RegexScorerConfig():
            return RegexScorer(config)
        case LengthScorerConfig():
            return LengthScorer(config)
        case FunctionScorerConfig():
            return FunctionScorer(config)
        case HttpScorerConfig():
            return HttpScorer(config)
        case ClassifierScorerConfig() | EmbeddingScorerConfig() | SelfJudgeScorerConfig():
            return _with_a_model(config)
        case _:
            parts = {name: build_scorer(part) for name, part in config.of.items()}
            weights = config.weights if isinstance(config, WeightedScorerConfig) else None
            return CombinedScorer(config.kind, parts, weights)


def _with_a_model(
    config: ClassifierScorerConfig | EmbeddingScorerConfig | SelfJudgeScorerConfig,
) -> Scorer:
    match config:
        case ClassifierScorerConfig():
            return ClassifierScorer(config)
        case EmbeddingScorerConfig():
            return EmbeddingScorer(config)
        case SelfJudgeScorerConfig():
            return SelfJudgeScorer(config)


def score_all(scorer: Scorer, prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """One score in [0, 1] for each completion.

    Raises:
        ScorerError: naming the scorer and the first sample without a valid score.
    """
    scores = []
    for index, result in enumerate(valid(scorer, prompts, completions)):
        if isinstance(result, ScoreFailure):
            text = completions[index]
            excerpt = repr(text if len(text) <= 60 else text[:57] + "...")
            raise ScorerError(
                f"the scorer {scorer.name} gave no score for sample {index} ({excerpt}): "
                f"{result.error}"
            )
        scores.append(result.value)
    return scores


def least_scores(
    scorers: Sequence[Scorer], prompts: Sequence[str], completions: Sequence[str]
) -> list[float | None]:
    """The score of the scorer that is satisfied least; None where one gives none."""
    said = [valid(scorer, prompts, completions) for scorer in scorers]
    found: list[float | None] = []
    for row in zip(*said, strict=True):
        values = [one.value for one in row if isinstance(one, Score)]
        found.append(min(values) if len(values) == len(row) else None)
    return found


def probed(config: ScorerConfig, scores: Path | None = None, rank: int = 0) -> Scorer:
    """A scorer that has given two fixed strings a score, with a memory where that pays.

    One that needs columns of prompts is not asked yet: `given_columns` does that.

    Args:
        config: the scorer's section.
        scores: the run's folder for scores; None where there is no run.
        rank: whose file there is written to.

    Raises:
        ScorerError: when it cannot be loaded or gives no score.
        ModelError: when a model that it needs is missing.
    """
    scorer = remembering(build_scorer(config), config, scores, rank)
    if not needs_columns(scorer):
        probe(scorer)
    return scorer


def given_columns(scorers: Sequence[Scorer], columns: Columns) -> None:
    """Give scorers what the rows of prompts say, and ask those that waited for it.

    Raises:
        ScorerError: when one of them gives no score.
    """
    for scorer in scorers:
        give_columns(scorer, columns)
        if needs_columns(scorer):
            some = list(columns)[: len(_PROBES)] or list(_PROBES[:1])
            score_all(scorer, some, _PROBE_COMPLETIONS[: len(some)])


def probe(scorer: Scorer) -> None:
    """Run the scorer once, before anything is loaded that takes time.

    Raises:
        ScorerError: if it fails.
    """
    score_all(scorer, _PROBES, _PROBE_COMPLETIONS)
