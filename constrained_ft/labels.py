"""What the auxiliary learns: from the scores of a constraint's terms to one label C(x, y).

Shape suffixes:  N completions, J terms.

    hard              1 where the score reaches `satisfied_at`, else 0
    soft              the score, as the probability that a completion is accepted
    tilt              exp(-beta (1 - score))
    hard, annealed    1 where the score is among the best of the iteration, until enough reach it
    several terms     the product of their labels, each to the power of its weight: the label of the
                      conjunction, so one R fitted to it is exact; with `auxiliary.terms=product`
                      each term's R is fitted to its own factor

A term that asks for a mean, the share `threshold` of completions or the score `target_mean`, is the
tilt of the closest distribution with that mean (an exponential family). Its beta is solved in every
iteration, on the sampled scores: sum_i w_i e^(beta s_i) s_i / sum_i w_i e^(beta s_i) = mean. It is
held where fewer samples than `LEAST_EFFECTIVE` would carry the result. All prompts share it.

A term with a `target_rate` asks it of the LLM and not of q*, and the corpus pulls the LLM away from
q*. So its beta, solved in the first iteration, goes on by dual ascent on the rate of the LLM's own
samples: the multiplier of the constrained problem.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from constrained_ft import equations
from constrained_ft.config import ConstraintConfig, TermConfig

LEAST_EFFECTIVE = 8.0
_MOST_BETA = 50.0
_ROUNDS, _HALVINGS = 12, 40


@dataclass(frozen=True, kw_only=True)
class Settled:
    """What of the labels depends on the completions of an iteration."""

    betas: tuple[float | None, ...]
    """The tilt of each term that asks for a mean or a rate; None for the others."""
    bars: tuple[float, ...]
    """The score from which each term's hard label is 1."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a constraint says of some completions."""

    satisfied_NJ: Bool[Tensor, "N J"]
    labels_NJ: Float[Tensor, "N J"]
    """Of each term, to the power of its weight."""
    labels_N: Float[Tensor, " N"]
    """Their product."""
    settled: Settled
    effective: float
    """Completions that carry the labels: (sum of labels)^2 / sum of squares."""


def verdict(
    scores_NJ: Float[Tensor, "N J"],
    constraint: ConstraintConfig,
    settled: Settled | None = None,
    *,
    before: Settled | None = None,
) -> Verdict:
    """Labels from scores.

    Args:
        scores_NJ: in [0, 1], in the order of the constraint's terms.
        constraint: the `constraint` section.
        settled: tilts and bars of other completions; None finds those of these.
        before: those of the iteration before, from which a `target_rate` goes on.
    """
    terms = list(constraint.all_terms().values())
    satisfied_NJ = scores_NJ >= scores_NJ.new_tensor([term.satisfied_at for term in terms])
    bars = (
        tuple(_bar(scores_NJ[:, j], term) for j, term in enumerate(terms))
        if settled is None
        else settled.bars
    )
    means = [_mean_asked(term, constraint) for term in terms]
    labels_NJ, fixed_N = torch.ones_like(scores_NJ), torch.ones_like(scores_NJ[:, 0])
    statistics_NJ = scores_NJ.clone()
    for j, (term, mean) in enumerate(zip(terms, means, strict=True)):
        if term.labels == "hard":
            statistics_NJ[:, j] = (scores_NJ[:, j] >= bars[j]).float()
        if mean is None:
            labels_NJ[:, j] = _fixed_label(statistics_NJ[:, j], term).pow(term.weight)
            fixed_N = fixed_N * labels_NJ[:, j]
    if settled is None:
        betas = solve_tilts(statistics_NJ, fixed_N, means)
        if before is not None:
            betas = _ascended(betas, before.betas, satisfied_NJ, terms)
    else:
        betas = settled.betas
    labels_N = fixed_N
    for j, beta in enumerate(betas):
        if beta is not None:
            labels_NJ[:, j] = equations.tilt_labels(statistics_NJ[:, j], beta)
            labels_N = labels_N * labels_NJ[:, j]
    return Verdict(
        satisfied_NJ=satisfied_NJ,
        labels_NJ=labels_NJ,
        labels_N=labels_N,
        settled=Settled(betas=betas, bars=bars),
        effective=_effective(labels_N),
    )


def solve_tilts(
    statistics_NJ: Float[Tensor, "N J"],
    weights_N: Float[Tensor, " N"],
    means: Sequence[float | None],
) -> tuple[float | None, ...]:
    """The tilts beta >= 0 that bring the weighted means of some statistics up to what is asked.

    The dual is concave and each mean rises with its own beta, so one is solved after the other by
    bisection, until none changes.

    Args:
        statistics_NJ: in [0, 1].
        weights_N: what each completion counts for already.
        means: asked for; None leaves a column alone.
    """
    columns = [j for j, mean in enumerate(means) if mean is not None]
    if not columns:
        return tuple(None for _ in means)
    statistics, weights = statistics_NJ.double(), weights_N.double()
    betas = dict.fromkeys(columns, 0.0)
    for _ in range(_ROUNDS if len(columns) > 1 else 1):
        before = dict(betas)
        for j in columns:
            others = weights * torch.stack(
                [equations.tilt_labels(statistics[:, k], betas[k]) for k in columns if k != j]
                or [torch.ones_like(weights)]
            ).prod(0)
            mean = means[j]
            assert mean is not None
            betas[j] = _solve_one(statistics[:, j], others, mean)
        if max(abs(betas[j] - before[j]) for j in columns) < 1e-6:
            break
    return tuple(betas.get(j) for j in range(len(means)))


def _solve_one(statistic: Tensor, weights: Tensor, mean: float) -> float:
    """As `equations.solve_tilt`, but with weights, and held where few samples are left."""
    least = min(LEAST_EFFECTIVE, float(len(weights)))

    def carries(beta: float) -> bool:
        """Whether beta is not too strong: not past the mean, and enough samples left."""
        tilted = weights * equations.tilt_labels(statistic, beta)
        return _effective(tilted) >= least and float(tilted @ statistic / tilted.sum()) < mean

    if not carries(0.0):
        return 0.0
    low, high = 0.0, _MOST_BETA
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if carries(middle) else (low, middle)
    return low


def _ascended(
    solved: Sequence[float | None],
    before: Sequence[float | None],
    satisfied_NJ: Bool[Tensor, "N J"],
    terms: Sequence[TermConfig],
) -> tuple[float | None, ...]:
    """The tilts with a step of dual ascent in the place of those that a rate asks for.

    A tilt beta lowers the odds of a violation by e^beta: it steps as log(1 + lambda) does in
    `equations.dual_step`.
    """
    betas = list(solved)
    for j, (term, last) in enumerate(zip(terms, before, strict=True)):
        if term.target_rate is not None and last is not None and len(satisfied_NJ) > 0:
            observed = float(satisfied_NJ[:, j].float().mean())
            risen = equations.dual_step(math.expm1(last), observed, term.target_rate)
            betas[j] = min(math.log1p(risen), _MOST_BETA)
    return tuple(betas)


def _effective(weights_N: Float[Tensor, " N"]) -> float:
    """Completions that carry a weighted sum; 0 where no weight is above 0."""
    if not bool((weights_N > 0).any()):
        return 0.0
    return float(equations.effective_sample_size(weights_N.log()))


def _bar(scores_N: Float[Tensor, " N"], term: TermConfig) -> float:
    """`satisfied_at`, or less while too few reach it; the worst score of all is never enough."""
    better_N = scores_N[scores_N > scores_N.min()] if len(scores_N) else scores_N
    if term.anneal is None or len(better_N) == 0:
        return term.satisfied_at
    best = max(scores_N.double().quantile(1 - term.anneal), better_N.min().double())
    return min(term.satisfied_at, float(best))


def _mean_asked(term: TermConfig, constraint: ConstraintConfig) -> float | None:
    """The mean that a term asks for.

    A single constraint's `threshold` is met per prompt by a floor instead (`equations`).
    """
    if term.target_mean is not None:
        return term.target_mean
    if term.target_rate is not None:
        return term.target_rate
    return term.threshold if constraint.terms and term.threshold < 1 else None


def _fixed_label(statistic_N: Float[Tensor, " N"], term: TermConfig) -> Float[Tensor, " N"]:
    if term.labels == "tilt":
        return equations.tilt_labels(statistic_N, term.beta)
    return statistic_N
