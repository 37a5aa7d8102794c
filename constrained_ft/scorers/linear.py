"""A linear toxicity classifier on TF-IDF features, trained on 200,000 human-labelled comments.

It comes with the package alt-profanity-check, as a pickle that was installed with it.
"""

import warnings
from collections.abc import Sequence
from importlib.metadata import version

from constrained_ft.errors import ScorerError
from constrained_ft.scorers.protocol import Score, ScoreFailure


class LinearScorer:
    """1 - P(toxic) of the completion alone."""

    def __init__(self) -> None:
        try:
            # scikit-learn warns that another version of it made the pickle; the package pins that.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                from profanity_check import predict_prob
        except ImportError as error:
            raise ScorerError(
                "constraint.scorer.kind=linear needs the package alt-profanity-check: "
                f"pip install 'constrained-ft[demo]' ({error})"
            ) from error
        self._predict_prob = predict_prob
        self.name = "linear (alt-profanity-check)"
        packages = ("alt-profanity-check", "scikit-learn")
        self.version = " ".join(f"{package}=={version(package)}" for package in packages)

    def score(
        self, prompts: Sequence[str], completions: Sequence[str]
    ) -> list[Score | ScoreFailure]:
        """The probability that the completion is not toxic."""
        if not completions:
            return []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            toxic = self._predict_prob(list(completions))
        return [Score(1.0 - float(probability)) for probability in toxic]
