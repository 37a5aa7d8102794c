"""R as the product of one for each term: exact or within bounds, learned, continued, handed on."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from small import LENGTH, LETTERS, TABLE, go_on, run, small_config, small_parts, stopped
from torch import Tensor

from constrained_ft import equations, memory, metrics, results
from constrained_ft.auxiliary import FrozenAuxiliary, ProductAuxiliary
from constrained_ft.compose import compose
from constrained_ft.errors import ConfigError
from constrained_ft.explain import explain_tokens
from constrained_ft.finetune import update_llm
from constrained_ft.mining import prompt_satisfaction
from constrained_ft.rollouts import by_term, label
from constrained_ft.run_folder import RunFolder
from constrained_ft.selfcheck import _probs, error_of_auxiliary
from constrained_ft.tabular import every_completion, table_parts
from constrained_ft.target import learn_target

TERMS = (
    "constraint=several",
    "constraint.terms.nontoxic.scorer={kind: letters, letter: e, at_most: 0}",
    "constraint.terms.brief.scorer={kind: letters, letter: a, at_most: 0}",
    "~constraint.terms.brief.scorer.unit",
    "auxiliary.terms=product",
)
LONGER = (
    "trainer=overlapped",
    "trainer.steps_per_iteration=8",
    "prompts.prompts_per_iteration=16",
    "prompts.samples_per_prompt=6",
    "prompts.guided_roll_ins=0.25",
    "auxiliary.max_epochs=6",
    "evaluation.samples_per_prompt=12",
)
SIZE, TOKENS = 4, 4


# The equations ------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_logit_of_a_product_is_that_of_the_probabilities(count: int) -> None:
    u = 8 * torch.randn(count, 500, generator=torch.Generator().manual_seed(0))
    u = torch.cat([u, torch.full((count, 1), 15.0), torch.full((count, 1), -15.0)], 1).clamp(
        -15, 15
    )
    exact = u.double().sigmoid().prod(0)
    exact = exact.log() - (1 - exact).log()
    found = equations.product_logits(u.unbind())
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=3e-6)
    if count == 1:
        assert torch.equal(found, u[0])


def levels(labels_YJ: np.ndarray, *, apart: bool) -> list[tuple[Tensor, Tensor]]:
    """(R of each label, R of all) of every prefix; where `apart`, tokens know nothing of others."""
    tables = oracle.random_logits(np.random.default_rng(0), SIZE, TOKENS)
    if apart:
        tables = [np.broadcast_to(table[:1], table.shape) for table in tables]
    probs_Y = oracle.completion_probs(oracle.softmax(tables))
    columns = [*labels_YJ.T, labels_YJ.prod(-1)]
    found = [oracle.conditional_means(column, probs_Y, SIZE, TOKENS) for column in columns]
    return [
        (torch.tensor(np.stack(each, -1)), torch.tensor(all_H))
        for *each, all_H in zip(*found, strict=True)
    ]


def test_terms_that_are_independent_given_the_text_so_far_have_the_product() -> None:
    ids_YT = oracle.completions(SIZE, TOKENS)
    # One is about the first and the third token, the other about the rest.
    labels_YJ = np.stack([(ids_YT[:, 0::2] != 3).all(1), (ids_YT[:, 1::2] < 2).all(1)], -1) * 1.0
    for each_HJ, all_H in levels(labels_YJ, apart=True):
        torch.testing.assert_close(each_HJ.prod(-1), all_H, rtol=0, atol=1e-12)
        u = torch.logit(each_HJ.clamp(1e-6, 1 - 1e-6))
        found = equations.product_logits(u.unbind(-1)).sigmoid()
        torch.testing.assert_close(found, all_H, rtol=0, atol=5e-6)


def test_of_terms_that_hang_together_the_bounds_hold_and_the_product_does_not() -> None:
    ids_YT = oracle.completions(SIZE, TOKENS)
    hard_YJ = np.stack([(ids_YT != 3).all(1), (ids_YT < 2).all(1), (ids_YT[:, 1:] != 0).all(1)], -1)
    soft_YJ = np.random.default_rng(1).random((len(ids_YT), 3)) * hard_YJ
    for labels_YJ in (hard_YJ * 1.0, soft_YJ):
        gap = 0.0
        for each_HJ, all_H in levels(labels_YJ, apart=False):
            low_H, high_H = equations.frechet_bounds(each_HJ)
            assert bool((low_H <= all_H + 1e-12).all())
            assert bool((all_H <= high_H + 1e-12).all())
            gap = max(gap, float((each_HJ.prod(-1) - all_H).abs().max()))
        assert gap > 0.01


# Learning -----------------------------------------------------------------------------------------


def test_each_r_learns_its_own_term_and_both_rates_rise_by_enumeration() -> None:
    config = compose(
        [
            *(line for line in TABLE if not line.startswith("constraint")),
            "constraint=several",
            "constraint.terms.nontoxic.labels=hard",
            "constraint.terms.nontoxic.scorer={kind: letters, letter: c, at_most: 0}",
            "constraint.terms.brief={labels: tilt, beta: 3, weight: 2}",
            "constraint.terms.brief.scorer={kind: letters, letter: b, at_most: 0}",
            "~constraint.terms.brief.scorer.unit",
            "auxiliary.terms=product",
            "auxiliary.learning_rate=0.05",
            "auxiliary.max_epochs=60",
            "auxiliary.patience=5",
            "trainer.corpus=false",
            "trainer.kl_weight=1",
            "trainer.iterations=1",
            "trainer.steps_per_iteration=40",
            "trainer.learning_rate=0.2",
        ]
    )
    parts = table_parts(LETTERS, LENGTH, config)
    every = every_completion(parts.llm, config.prompts.max_new_tokens)
    said = label(every, parts.scorers, config.constraint)
    own = by_term(said, config.constraint)
    assert torch.equal(own[0].labels_N * own[1].labels_N, said.labels_N)
    held_YJ = said.scores_NJ.double() >= 0.5
    before_J = _probs(parts.llm, every) @ held_YJ.double()
    target = learn_target(parts, config, parts.llm.frozen(), 1)
    for one, its in zip(parts.auxiliary.each, own, strict=True):
        error = error_of_auxiliary(replace(parts, auxiliary=one), every, its.labels_N.double())
        assert error < 0.02
    update_llm(parts, target, config, 1)
    after_J = _probs(parts.llm, every) @ held_YJ.double()
    assert bool((before_J < 0.8).all())
    assert bool((after_J > 0.9).all())
    assert abs(target.metrics["terms/product_bias"]) < 0.1


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return run(small_config(*TERMS, *LONGER), tmp_path_factory.mktemp("product") / "straight")


def test_both_rates_rise_and_everything_is_watched(straight: RunFolder) -> None:
    base, tuned = results.load(straight.evaluation_file)
    (before,), (after,) = base.groups.values(), tuned.groups.values()
    # The last iteration learns nothing: no update would read it.
    rows = metrics.read(straight.metrics_file)[:-1]
    for name in ("nontoxic", "brief"):
        assert before.terms[name].mean + 0.03 < after.terms[name].mean
        assert all(row[f"term/{name}/log_loss"] > 0 for row in rows)
        assert all(row[f"term/{name}/calibration_error"] >= 0 for row in rows)
    for row in rows:
        assert 0 <= row["terms/outside_bounds"] <= 1
        assert 0 <= row["terms/product_gap"] <= 1
        assert -1 <= row["terms/product_bias"] <= 1
        assert row["auxiliary/log_loss"] > 0


def test_a_stopped_run_is_continued_to_the_same_bits(straight: RunFolder, tmp_path: Path) -> None:
    config = small_config(*TERMS, *LONGER)
    stopped(config, tmp_path / "run", after=1)
    folder = go_on(config, tmp_path / "run")
    for name in ("final/llm/model.safetensors", "final/auxiliary/auxiliary.safetensors"):
        assert (straight.path / name).read_bytes() == (folder.path / name).read_bytes()


def test_what_is_read_back_guides_by_the_sum_of_the_log_r(straight: RunFolder) -> None:
    config = small_config(*TERMS)
    parts = small_parts(config)
    assert isinstance(parts.auxiliary, ProductAuxiliary)
    first, second = parts.auxiliary.each
    assert first.embeddings_VD is second.embeddings_VD
    assert not torch.equal(first.prior_V, second.prior_V)
    llm = parts.llm.frozen()
    frozen = FrozenAuxiliary.load(straight.final_auxiliary, torch.device("cpu"))
    each = [
        FrozenAuxiliary([one], table)
        for one, table in zip(frozen._each, frozen.table.each(), strict=True)
    ]
    hidden_BTD, past_BT = torch.randn(3, 5, frozen.hidden_size), torch.randint(200, (3, 4))
    log_r = frozen.guide()(hidden_BTD, past_BT)
    summed = sum(one.guide()(hidden_BTD, past_BT) for one in each)
    torch.testing.assert_close(log_r, summed, rtol=1e-5, atol=1e-5)
    # R of a prompt, and of a text token by token, is of the product too.
    prompts = parts.prompts.training[:5]
    found = torch.stack([prompt_satisfaction(llm, one, prompts) for one in (frozen, *each)])
    assert bool((found[0] < found[1:].amin(0)).all())
    start, tokens = explain_tokens(llm, frozen, (5, 6), (7, 8, 9), 2)
    ends = [np.log(r / (1 - r)) for r in (start, tokens[-1].satisfaction)]
    assert sum(one.evidence for one in tokens) == pytest.approx(ends[1] - ends[0], abs=1e-4)
    joint = memory._update_bytes(parts.llm, parts.prompts, small_config(*TERMS[:-1]))
    assert memory._update_bytes(parts.llm, parts.prompts, config) > joint


def test_a_product_of_a_single_constraint_is_refused() -> None:
    what = r"^auxiliary\.terms=product is .* constraint\.terms names none"
    with pytest.raises(ConfigError, match=what) as caught:
        small_config("auxiliary.terms=product")
    assert caught.value.exit_code == 2
