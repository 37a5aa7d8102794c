"""The auxiliary R: what it may look at, what it learns, and how its quality is measured."""

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.calibration import calibration_curve
from sklearn.metrics import roc_auc_score
from torch import Tensor

from constrained_ft import equations
from constrained_ft.auxiliary import LOGIT_LIMIT, Auxiliary, FrozenAuxiliary, vocabulary_prior
from constrained_ft.compose import compose
from constrained_ft.config import AuxiliaryConfig
from constrained_ft.distributed import StopRequest
from constrained_ft.errors import CheckpointError
from constrained_ft.fit import (
    Examples,
    _epoch_order,
    _with_td_targets,
    area_under_curve,
    bins,
    calibration_error,
    fit_auxiliary,
    measure,
)
from constrained_ft.fused import Head
from constrained_ft.labels import Settled
from constrained_ft.progress import Silent
from constrained_ft.prompts import Prompt
from constrained_ft.rollouts import LabeledRollouts, Rollouts

KINDS = ["additive", "transformer", "head"]
VOCABULARY, WIDTH, STEPS = 24, 16, 8
BAD = 3  # the token that breaks the constraint
CPU = torch.device("cpu")


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def config_of(kind: str, *overrides: str) -> AuxiliaryConfig:
    fast = (
        "learning_rate=0.01",
        "rank=8",
        "width=32",
        "layers=1",
        "max_epochs=15",
        "batch_size=64",
    )
    given = [f"auxiliary.{override}" for override in (*fast, *overrides)]
    return compose(["constraint=letters", f"auxiliary={kind}", *given]).auxiliary


def auxiliary_of(
    kind: str, *overrides: str, noise: float = 0.0, prior_V: Tensor | None = None
) -> Auxiliary:
    prior_V = torch.zeros(VOCABULARY) if prior_V is None else prior_V
    embeddings_VD = numbers(VOCABULARY, WIDTH, seed=1)
    auxiliary = Auxiliary(config_of(kind, *overrides), embeddings_VD, prior_V, seed=0)
    with torch.no_grad():
        for number, parameter in enumerate(auxiliary.parameters()):
            parameter.add_(noise * numbers(*parameter.shape, seed=number))
    return auxiliary.eval()


def rollouts_of(prompts: int, samples: int, seed: int = 0, iteration: int = 1) -> LabeledRollouts:
    """Random tokens; states that know the token before; satisfied without the token `BAD`.

    Of R(x, y_<=t): 0 once `BAD` was said, else (1 - 1/24) ** (tokens to come).
    """
    count = prompts * samples
    generator = torch.Generator().manual_seed(seed)
    ids_NT = torch.randint(VOCABULARY, (count, STEPS), generator=generator)
    mask_NT = torch.ones_like(ids_NT, dtype=torch.bool)
    labels_N = (ids_NT != BAD).all(-1).float()
    before_NT = torch.nn.functional.pad(ids_NT[:, :-1], (1, 0))
    hidden_NTD = numbers(VOCABULARY, WIDTH, seed=2)[before_NT]
    hidden_NTD = hidden_NTD + 0.1 * torch.randn(count, STEPS, WIDTH, generator=generator)
    rollouts = Rollouts(
        prompts=tuple(
            Prompt(id=str(i), text="", group="prompts", token_ids=(0,)) for i in range(prompts)
        ),
        prompt_N=torch.arange(prompts).repeat_interleave(samples),
        ids_NT=ids_NT,
        mask_NT=mask_NT,
        hidden_NTD=hidden_NTD,
        texts=("",) * count,
        guided_N=torch.zeros(count, dtype=torch.long),
        iteration=iteration,
        sampled_by="cft",
    )
    return LabeledRollouts(
        rollouts=rollouts,
        scores_NJ=labels_N[:, None],
        satisfied_N=labels_N > 0,
        labels_N=labels_N,
        missing=0,
        settled=Settled(betas=(None,), bars=(0.5,)),
        effective=float(labels_N.sum()),
    )


UNIFORM = Head(weight_VD=torch.zeros(VOCABULARY, WIDTH), bias_V=None, bf16_valued=False)


def fit(auxiliary: Auxiliary, *labeled: LabeledRollouts) -> dict[str, float]:
    auxiliary.start_at(float(labeled[0].labels_N.mean()))
    return fit_auxiliary(
        auxiliary,
        UNIFORM,
        labeled,
        auxiliary.config,
        seed=0,
        display=Silent(),
        stop=StopRequest(),
    )


def logits_of(frozen: FrozenAuxiliary, labeled: LabeledRollouts) -> Tensor:
    evidence = frozen.read(labeled.rollouts)
    ids_NT = labeled.rollouts.ids_NT
    return frozen.table.logits_of(evidence.factors_NTJR, evidence.offset_NTJ, ids_NT)


def log_loss(frozen: FrozenAuxiliary, labeled: LabeledRollouts) -> float:
    u_NT = logits_of(frozen, labeled)
    labels_NT = labeled.labels_N[:, None].expand_as(u_NT)
    return float(equations.bernoulli_cross_entropy(labels_NT, u_NT).mean())


@pytest.fixture
def several_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


# What it may look at ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_evidence_is_causal(kind: str) -> None:
    frozen = auxiliary_of(kind, noise=0.3).frozen()
    rollouts = rollouts_of(4, 2).rollouts
    before = frozen.read(rollouts)
    for place in (2, 5):
        ids_NT, hidden_NTD = rollouts.ids_NT.clone(), rollouts.hidden_NTD.clone()
        ids_NT[:, place] = (ids_NT[:, place] + 1) % VOCABULARY
        hidden_NTD[:, place + 1 :] = hidden_NTD[:, place + 1 :].flip(-1)
        after = frozen.read_examples(hidden_NTD, ids_NT, rollouts.mask_NT)
        for name in ("factors_NTJR", "offset_NTJ"):
            old, new = getattr(before, name), getattr(after, name)
            # R of the token at `place` itself has not read it yet: it is what will be multiplied.
            assert torch.equal(old[:, : place + 1], new[:, : place + 1])
            assert not torch.allclose(old[:, place + 1 :], new[:, place + 1 :])


@pytest.mark.parametrize("kind", KINDS)
def test_the_guide_reads_what_the_target_reads(kind: str) -> None:
    frozen = auxiliary_of(kind, noise=0.3, prior_V=-numbers(VOCABULARY).abs()).frozen()
    rollouts = rollouts_of(4, 2).rollouts
    evidence, guide = frozen.read(rollouts), frozen.guide()
    for t in range(STEPS):
        log_r = guide(rollouts.hidden_NTD[:, : t + 1], rollouts.ids_NT[:, :t])
        u_NV = frozen.table.logits(evidence.factors_NTJR[:, t], evidence.offset_NTJ[:, t])
        expected = torch.nn.functional.logsigmoid(u_NV)
        torch.testing.assert_close(log_r, expected, atol=1e-4, rtol=1e-4)
        chosen = u_NV.gather(1, rollouts.ids_NT[:, t : t + 1])[:, 0]
        here = frozen.table.logits_of(evidence.factors_NTJR, evidence.offset_NTJ, rollouts.ids_NT)
        torch.testing.assert_close(chosen, here[:, t])


@pytest.mark.parametrize("kind", KINDS)
def test_padding_does_not_matter(kind: str) -> None:
    frozen = auxiliary_of(kind, noise=0.3).frozen()
    rollouts = rollouts_of(4, 2).rollouts
    short = frozen.read_examples(
        rollouts.hidden_NTD[:, :5], rollouts.ids_NT[:, :5], rollouts.mask_NT[:, :5]
    )
    mask_NT = rollouts.mask_NT.clone()
    mask_NT[:, 5:] = False
    padded = frozen.read_examples(rollouts.hidden_NTD, rollouts.ids_NT, mask_NT)
    for name in ("factors_NTJR", "offset_NTJ"):
        torch.testing.assert_close(getattr(padded, name)[:, :5], getattr(short, name))


def test_the_part_of_the_table_that_is_needed_is_the_table() -> None:
    auxiliary = auxiliary_of("additive", noise=0.3, prior_V=-numbers(VOCABULARY).abs())
    ids_NT = rollouts_of(1, 2).rollouts.ids_NT
    part, place_NT = auxiliary.table_of(ids_NT)
    whole = auxiliary.table()
    torch.testing.assert_close(part.tokens_JVR[:, place_NT], whole.tokens_JVR[:, ids_NT])
    torch.testing.assert_close(part.prior_JV[:, place_NT], whole.prior_JV[:, ids_NT])


@pytest.mark.parametrize("kind", KINDS)
def test_it_starts_at_the_base_rate(kind: str) -> None:
    auxiliary = auxiliary_of(kind)
    auxiliary.start_at(0.8)
    r_NT = logits_of(auxiliary.frozen(), rollouts_of(4, 2)).sigmoid()
    torch.testing.assert_close(r_NT, torch.full_like(r_NT, 0.8))


def test_logits_stay_within_their_limit() -> None:
    frozen = auxiliary_of("additive", noise=30.0).frozen()
    evidence = frozen.read(rollouts_of(4, 2).rollouts)
    u_NTV = frozen.table.logits(evidence.factors_NTJR, evidence.offset_NTJ)
    assert float(u_NTV.abs().max()) == LOGIT_LIMIT


def test_the_scale_of_the_embeddings_does_not_matter() -> None:
    embeddings_VD = numbers(VOCABULARY, WIDTH)
    tables = [
        Auxiliary(config_of("additive"), scale * embeddings_VD, torch.zeros(VOCABULARY), seed=0)
        .table()
        .tokens_JVR
        for scale in (1.0, 0.02)
    ]
    torch.testing.assert_close(tables[0], tables[1])


# The prior ----------------------------------------------------------------------------------------


def test_the_prior_is_the_log_odds_against_the_empty_text_within_bounds() -> None:
    scores_V = torch.tensor([0.5, 0.8, 0.9, 0.0, 1.0])
    prior_V = vocabulary_prior(scores_V, 0.8)
    expected = [np.log(1) - np.log(4), 0.0, np.log(9) - np.log(4), -8.0, 8.0]
    torch.testing.assert_close(prior_V, torch.tensor(expected, dtype=torch.float32))


@pytest.mark.parametrize("kind", ["additive", "transformer"])
def test_the_prior_knows_a_token_that_was_never_sampled(kind: str) -> None:
    prior_V = torch.zeros(VOCABULARY)
    prior_V[BAD] = prior_V[BAD + 1] = -6.0
    auxiliary = auxiliary_of(kind, prior_V=prior_V)
    labeled = rollouts_of(32, 4)
    assert (labeled.rollouts.ids_NT == BAD + 1).any()
    labeled.rollouts.ids_NT[labeled.rollouts.ids_NT == BAD + 1] = 0
    fit(auxiliary, labeled)
    frozen = auxiliary.frozen()
    ids_NT = torch.tensor([[0, 1, BAD + 1, 5, 6, 7, 8, 9], [0, 1, 2, 5, 6, 7, 8, 9]])
    hidden_NTD = labeled.rollouts.hidden_NTD[:1].expand(2, -1, -1)
    evidence = frozen.read_examples(hidden_NTD, ids_NT, torch.ones_like(ids_NT, dtype=torch.bool))
    r_NT = frozen.table.logits_of(evidence.factors_NTJR, evidence.offset_NTJ, ids_NT).sigmoid()
    assert (r_NT[0, 2:] < 0.1).all()  # from the unseen token on, and not before
    assert (r_NT[1, 2:] > 0.5).all()
    torch.testing.assert_close(r_NT[0, :2], r_NT[1, :2])


# Fitting ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_fitting_lowers_the_loss_on_what_it_has_not_seen(kind: str) -> None:
    auxiliary, unseen = auxiliary_of(kind, "learning_rate=0.03"), rollouts_of(100, 4, seed=9)
    labeled = rollouts_of(200, 4)
    auxiliary.start_at(float(labeled.labels_N.mean()))
    before = log_loss(auxiliary.frozen(), unseen)
    numbers_of_fit = fit(auxiliary, labeled)
    after = log_loss(auxiliary.frozen(), unseen)
    # R exactly: 0 after `BAD`, else the chance that no `BAD` follows.
    bad_NT = (unseen.rollouts.ids_NT == BAD).long().cumsum(-1) > 0
    exact_NT = (1 - 1 / VOCABULARY) ** torch.arange(STEPS - 1, -1, -1).expand_as(bad_NT)
    exact_NT = torch.where(bad_NT, 1e-6, exact_NT.clamp(max=1 - 1e-6))
    labels_NT = unseen.labels_N[:, None].expand_as(exact_NT)
    best = float(torch.nn.functional.binary_cross_entropy(exact_NT, labels_NT))
    # The head sees one token and cannot remember; a rank of 8 cannot single out one of 24 tokens.
    share = {"head": 0.05, "additive": 0.5, "transformer": 0.8}[kind]
    assert before - after > share * (before - best)
    assert after > best - 0.02
    assert numbers_of_fit["auxiliary/epochs"] >= 1
    assert numbers_of_fit["auxiliary/examples"] == pytest.approx(640, abs=200)


@pytest.mark.parametrize("balanced", [False, True])
def test_balancing_leaves_r_calibrated(*, balanced: bool) -> None:
    auxiliary = auxiliary_of("additive", f"balanced={balanced}".lower())
    fit(auxiliary, rollouts_of(200, 4))
    unseen = rollouts_of(200, 4, seed=9)
    r_NT = logits_of(auxiliary.frozen(), unseen).sigmoid()
    assert float(r_NT.mean()) == pytest.approx(float(unseen.labels_N.mean()), abs=0.05)


@pytest.mark.parametrize("rare", [True, False])
def test_balancing_repeats_the_rarer_kind(*, rare: bool) -> None:
    labeled = rollouts_of(5, 4)
    labels_N = torch.full((20,), float(not rare))
    labels_N[[3, 7]] = float(rare)
    labeled = replace(labeled, labels_N=labels_N)
    order, shift = _epoch_order(Examples.of(labeled, torch.arange(20), STEPS, 1.0), balanced=True)
    assert torch.bincount(order)[[2, 3, 7]].tolist() == [1, 9, 9]
    assert shift == pytest.approx(math.log(9) if rare else -math.log(9))


def test_fitting_leaves_a_frozen_copy_alone() -> None:
    auxiliary = auxiliary_of("transformer")
    frozen, labeled = auxiliary.frozen(), rollouts_of(32, 4)
    before = logits_of(frozen, labeled)
    fit(auxiliary, labeled)
    assert torch.equal(logits_of(frozen, labeled), before)
    assert not torch.equal(logits_of(auxiliary.frozen(), labeled), before)


@pytest.mark.parametrize("kind", KINDS)
def test_fitting_is_a_function_of_the_seed_on_several_threads_too(
    kind: str, several_threads: None
) -> None:
    states = []
    for _ in range(2):
        # Enough numbers in a batch for operations to be split among threads.
        auxiliary = auxiliary_of(kind, "max_epochs=2", "rank=64", "batch_size=256")
        fit(auxiliary, rollouts_of(100, 4))
        states.append(auxiliary.state_dict())
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name


def test_replayed_rollouts_are_fitted_beside_the_newest() -> None:
    newest, old = rollouts_of(32, 4, iteration=2), rollouts_of(32, 4, seed=1)
    alone = fit(auxiliary_of("additive"), newest)
    both = fit(auxiliary_of("additive"), newest, old)
    # A fifth of the prompts is held out, in every iteration the same.
    assert both["auxiliary/examples"] == 2 * alone["auxiliary/examples"] == 2 * 26 * 4


# Quality ------------------------------------------------------------------------------------------


def test_the_roc_area_is_that_of_scikit_learn() -> None:
    scores_N = (numbers(300) * 4).round() / 4  # with ties
    labels_N = (numbers(300, seed=1) + scores_N > 0).float()
    expected = roc_auc_score(labels_N.numpy(), scores_N.numpy())
    assert area_under_curve(scores_N, labels_N) == pytest.approx(expected, abs=1e-9)
    assert area_under_curve(scores_N, torch.ones(300)) is None


def test_the_calibration_error_is_that_of_scikit_learns_curve() -> None:
    probs_N = numbers(500).sigmoid()
    labels_N = (torch.rand(500, generator=torch.Generator().manual_seed(3)) < probs_N**2).float()
    observed, predicted = calibration_curve(labels_N.numpy(), probs_N.numpy(), n_bins=10)
    counts = np.histogram(probs_N.numpy(), bins=10, range=(0, 1))[0]
    expected = np.sum(np.abs(observed - predicted) * counts[counts > 0]) / 500
    assert calibration_error(probs_N, labels_N) == pytest.approx(expected, abs=1e-6)
    found = bins(probs_N, labels_N)
    assert [one.observed for one in found] == pytest.approx(observed, abs=1e-6)
    assert [one.predicted for one in found] == pytest.approx(predicted, abs=1e-6)
    assert [one.share for one in found] == pytest.approx(counts[counts > 0] / 500)


def test_td_targets_mix_the_label_with_what_r_expects() -> None:
    auxiliary, labeled = auxiliary_of("additive"), rollouts_of(16, 4)
    fit(auxiliary, labeled)
    examples = Examples.of(labeled, torch.arange(64), STEPS, 1.0)
    found = _with_td_targets(auxiliary, UNIFORM, examples, 0.9).targets_NT
    # Token by token: the reference is uniform, so the expectation is a plain mean.
    frozen = auxiliary.frozen()
    evidence = frozen.read_examples(examples.hidden_NTD, examples.ids_NT, examples.mask_NT)
    for row in range(64):
        length = int(examples.mask_NT[row].sum())
        wanted = examples.labels_N[row]
        for t in reversed(range(length)):
            if t + 1 < length:
                u_V = frozen.table.logits(
                    evidence.factors_NTJR[row, t + 1], evidence.offset_NTJ[row, t + 1]
                )
                wanted = 0.1 * u_V.sigmoid().mean() + 0.9 * wanted
            assert found[row, t].item() == pytest.approx(float(wanted), abs=1e-5)


def test_quality_is_measured_at_three_places_of_each_completion() -> None:
    auxiliary, labeled = auxiliary_of("additive"), rollouts_of(64, 4)
    fit(auxiliary, labeled)
    rows = torch.arange(256)
    mask_NT = torch.arange(STEPS) < (1 + rows % STEPS)[:, None]
    whole = Examples.of(labeled, rows, STEPS, 1.0)
    examples = Examples(
        hidden_NTD=whole.hidden_NTD,
        ids_NT=whole.ids_NT,
        mask_NT=mask_NT,
        labeled_NT=mask_NT,
        labels_N=whole.labels_N,
        weights_N=whole.weights_N,
        targets_NT=whole.targets_NT,
    )
    frozen = auxiliary.frozen()
    measured = measure(frozen, UNIFORM, examples, seed=0)
    evidence = frozen.read_examples(examples.hidden_NTD, examples.ids_NT, mask_NT)
    u_NT = frozen.table.logits_of(evidence.factors_NTJR, evidence.offset_NTJ, examples.ids_NT)
    r, y = u_NT.sigmoid().numpy(), examples.labels_N.numpy()
    for name, place in [("first", 0 * rows), ("last", rows % STEPS)]:
        at = r[rows.numpy(), place.numpy()]
        assert measured[f"auxiliary/auc_{name}"] == pytest.approx(roc_auc_score(y, at), abs=1e-6)
        brier = float(np.mean((at - y) ** 2))
        assert measured[f"auxiliary/brier_{name}"] == pytest.approx(brier, abs=1e-5)
    every = mask_NT.numpy()
    brier = float(np.mean(((r - y[:, None]) ** 2)[every]))
    assert measured["auxiliary/brier"] == pytest.approx(brier, abs=1e-5)
    likelihood = np.where(y[:, None] > 0, r, 1 - r)[every]
    assert measured["auxiliary/log_loss"] == pytest.approx(-np.log(likelihood).mean(), abs=1e-4)
    # Under a uniform LLM the one-step expectation is a plain mean over the vocabulary.
    u_NTV = frozen.table.logits(evidence.factors_NTJR, evidence.offset_NTJ)
    mean_NT = u_NTV.sigmoid().mean(-1)[:, 1:]
    pairs = mask_NT[:, 1:]
    residual = (mean_NT.log() - u_NT.sigmoid().log()[:, :-1]).abs()[pairs].mean()
    assert measured["auxiliary/tower_residual"] == pytest.approx(float(residual), rel=0.1)


# On disk ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_is_read_back_bit_for_bit(kind: str, tmp_path: Path) -> None:
    prior_V = -numbers(VOCABULARY).abs()
    frozen = auxiliary_of(kind, noise=0.3, prior_V=prior_V).frozen()
    frozen.save(tmp_path)
    again = FrozenAuxiliary.load(tmp_path, CPU)
    labeled = rollouts_of(4, 2)
    assert torch.equal(logits_of(again, labeled), logits_of(frozen, labeled))
    guide = again.guide()(labeled.rollouts.hidden_NTD[:, :3], labeled.rollouts.ids_NT[:, :2])
    same = frozen.guide()(labeled.rollouts.hidden_NTD[:, :3], labeled.rollouts.ids_NT[:, :2])
    assert torch.equal(guide, same)
    assert json.loads((tmp_path / "config.json").read_text())["auxiliary"]["kind"] == kind


def test_a_folder_without_an_auxiliary_says_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no readable auxiliary"):
        FrozenAuxiliary.load(tmp_path, CPU)
    frozen = auxiliary_of("additive").frozen()
    frozen.save(tmp_path)
    (tmp_path / "auxiliary.safetensors").write_bytes(b"not tensors")
    with pytest.raises(CheckpointError, match="holds no readable auxiliary"):
        FrozenAuxiliary.load(tmp_path, CPU)
