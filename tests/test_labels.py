"""From the scores of a constraint's terms to the label that the auxiliary learns."""

from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from constrained_ft import equations
from constrained_ft.compose import compose
from constrained_ft.config import ConstraintConfig, TermConfig
from constrained_ft.errors import ConfigError
from constrained_ft.labels import LEAST_EFFECTIVE, solve_tilts, verdict
from constrained_ft.scorer_config import LettersScorerConfig


def term(**keys: Any) -> TermConfig:
    return TermConfig(scorer=LettersScorerConfig(kind="letters", letter="a", at_most=0), **keys)


def several(**terms: TermConfig) -> ConstraintConfig:
    return ConstraintConfig(terms=terms)


def single(**keys: Any) -> ConstraintConfig:
    return ConstraintConfig(
        scorer=LettersScorerConfig(kind="letters", letter="a", at_most=0), **keys
    )


def drawn(count: int, terms: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, terms, generator=torch.Generator().manual_seed(seed))


def test_each_kind_of_label() -> None:
    scores_NJ = torch.tensor([[0.2], [0.5], [0.9]])
    assert verdict(scores_NJ, single()).labels_N.tolist() == [0, 1, 1]
    assert torch.equal(verdict(scores_NJ, single(labels="soft")).labels_N, scores_NJ[:, 0])
    tilted = verdict(scores_NJ, single(labels="tilt", beta=2.0)).labels_N
    assert torch.allclose(tilted, torch.exp(-2 * (1 - scores_NJ[:, 0])))


def test_several_labels_are_multiplied_each_to_its_power() -> None:
    constraint = several(
        hard=term(satisfied_at=0.3),
        soft=term(labels="soft", weight=2.0),
        tilt=term(labels="tilt", beta=3.0, weight=0.5),
    )
    scores_NJ = drawn(50, 3)
    said = verdict(scores_NJ, constraint)
    a, b, c = scores_NJ.unbind(-1)
    wanted = (a >= 0.3).float() * b**2 * torch.exp(-1.5 * (1 - c))
    assert torch.allclose(said.labels_N, wanted)
    bounds = torch.tensor([0.3, 0.5, 0.5])
    assert torch.equal(said.satisfied_NJ, scores_NJ >= bounds)
    assert said.settled.betas == (None, None, None)


def test_one_mean_is_met_as_by_the_equation() -> None:
    scores_NJ = drawn(4000, 1)
    said = verdict(scores_NJ, single(labels="tilt", target_mean=0.8))
    (beta,) = said.settled.betas
    assert beta == pytest.approx(equations.solve_tilt(scores_NJ[:, 0], 0.8), abs=1e-4)
    weights = said.labels_N / said.labels_N.sum()
    assert float(weights @ scores_NJ[:, 0]) == pytest.approx(0.8, abs=1e-4)
    # A mean that holds already asks for nothing.
    assert verdict(scores_NJ, single(labels="tilt", target_mean=0.2)).settled.betas == (0.0,)


def test_several_means_are_those_of_the_dual_s_maximum() -> None:
    scores = drawn(3000, 2).double()
    scores[:, 1] = 0.5 * scores[:, 0] + 0.5 * scores[:, 1]  # they hang together
    means = [0.6, 0.7]
    betas = solve_tilts(scores, torch.ones(3000, dtype=torch.float64), means)

    def dual(beta: np.ndarray) -> float:
        return float(np.log(np.exp((scores.numpy() - means) @ beta).mean()))

    found = minimize(dual, np.zeros(2), bounds=[(0, 50)] * 2, tol=1e-12)
    assert betas == pytest.approx(found.x, abs=0.02)


def test_terms_that_ask_for_a_share_meet_it_among_what_the_others_accept() -> None:
    constraint = several(all=term(), most=term(threshold=0.9))
    scores_NJ = drawn(5000, 2)
    said = verdict(scores_NJ, constraint)
    satisfied_NJ = scores_NJ >= 0.5
    assert float(said.labels_N[~satisfied_NJ[:, 0]].sum()) == 0
    share = float(said.labels_N[satisfied_NJ[:, 1]].sum() / said.labels_N.sum())
    assert share == pytest.approx(0.9, abs=1e-4)
    assert not constraint.has_hard_labels


def test_a_tilt_stops_where_too_few_samples_would_carry_it() -> None:
    scores_NJ = torch.zeros(1000, 1)
    scores_NJ[:3] = 1.0
    said = verdict(scores_NJ, single(labels="tilt", target_mean=0.9))
    assert said.effective == pytest.approx(LEAST_EFFECTIVE, rel=1e-3)
    assert float(said.labels_N @ scores_NJ[:, 0] / said.labels_N.sum()) < 0.9


def test_annealing_lowers_the_bar_until_enough_reach_it() -> None:
    constraint = single(satisfied_at=0.9, anneal=0.25)
    low = drawn(400, 1) * 0.5
    said = verdict(low, constraint)
    assert float(said.labels_N.mean()) == pytest.approx(0.25, abs=0.01)
    assert not said.satisfied_NJ.any()
    high = 0.5 + drawn(400, 1) * 0.5
    assert verdict(high, single(satisfied_at=0.6, anneal=0.25)).settled.bars == (0.6,)
    # Other completions are judged by the bar of these.
    again = verdict(high, constraint, said.settled)
    assert bool((again.labels_N == 1).all())


def test_annealing_never_takes_the_worst_for_good() -> None:
    mostly_nothing = torch.zeros(100, 1)
    mostly_nothing[:5] = 0.4  # fewer than the share that annealing asks for
    said = verdict(mostly_nothing, single(satisfied_at=0.9, anneal=0.25))
    assert said.settled.bars == pytest.approx((0.4,))
    assert said.labels_N.sum() == 5
    equal = verdict(torch.full((10, 1), 0.3), single(satisfied_at=0.9, anneal=0.25))
    assert equal.labels_N.sum() == 0


def test_a_rate_asked_of_a_term_is_met_by_the_llm_and_not_only_by_its_target() -> None:
    """The corpus holds the LLM at (corpus + lambda q*) / (1 + lambda), the law of its rest."""
    corpus, kl_weight, wanted = 0.5, 4.0, 0.85

    def rest(**asked: float) -> float:
        constraint = several(one=term(**asked), other=term(satisfied_at=0.0))
        before, rate = None, corpus
        for _ in range(60):
            held_N = torch.arange(2000) < round(rate * 2000)
            scores_NJ = torch.stack([held_N.float(), torch.ones(2000)], -1)
            said = verdict(scores_NJ, constraint, before=before)
            before = said.settled
            target = float(said.labels_N @ scores_NJ[:, 0] / said.labels_N.sum())
            rate = (corpus + kl_weight * target) / (1 + kl_weight)
        return rate

    assert rest(threshold=wanted) == pytest.approx(0.78, abs=0.005)
    assert rest(target_rate=wanted) == pytest.approx(wanted, abs=0.005)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["constraint=several", "constraint.labels=soft"], "give `labels` and `target_mean` to"),
        (["constraint=several", "constraint.threshold=0.9"], "needs hard labels"),
        (
            ["constraint=several", "constraint.terms.nontoxic.target_rate=0.9"],
            "it needs labels=hard and threshold=1",
        ),
        (["constraint=letters", "constraint.target_mean=0.9"], "needs labels=tilt"),
        (["constraint=toxicity", "constraint.anneal=0.1"], "needs labels=hard"),
        (["constraint=letters", "+constraint.terms.a.scorer.kind=linear"], "either `scorer` or"),
        (["constraint=several", "auxiliary.balanced=true"], "of each term too"),
        (
            ["experiment=smoke", "constraint=several", "evaluation.judge={kind: linear}"],
            "it would judge itself",
        ),
    ],
)
def test_terms_that_contradict_each_other_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose(overrides)
    assert message in str(caught.value)
