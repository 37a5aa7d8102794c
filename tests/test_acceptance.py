"""The acceptance tests of the mathematics, against the enumeration of small language models.

Numbered as in the method's list; 11 and 12 concern the schedules and stand with their tests.
"""

import math

import claims
import numpy as np
import oracle
import pytest
import torch
from claims import WORLDS, World, close, tensors
from oracle import Array
from torch import Tensor

from constrained_ft import equations

LIMIT = 60.0  # the logit that stands for certainty


# 1. Decomposition


def test_the_recursion_over_next_tokens_is_the_enumerated_satisfaction() -> None:
    claims.recursion_is_enumeration(equations)


def test_the_token_level_target_is_the_conditional_of_the_reference() -> None:
    claims.target_is_the_conditional(equations)


def test_the_kl_to_the_target_is_minus_log_satisfaction() -> None:
    claims.kl_is_minus_log_satisfaction(equations)


def test_soft_labels_are_acceptance_probabilities() -> None:
    base = WORLDS["parity"]
    labels = np.random.default_rng(3).uniform(0.05, 1.0, len(base.labels))
    soft = claims.world(base.logits, labels)
    tables = claims.target_tables(equations, soft)
    close(oracle.completion_probs(tables), soft.target, atol=1e-10)
    kl = oracle.kl(soft.target, soft.probs)
    close(kl, -math.log(soft.rate) + soft.target @ np.log(labels), atol=1e-10)


def test_the_satisfaction_of_any_llm_is_at_least_exp_of_minus_the_kl() -> None:
    rng = np.random.default_rng(5)
    for world in (WORLDS["arbitrary"], WORLDS["rare"], WORLDS["contains"]):
        own = equations.satisfaction_lower_bound(oracle.kl(world.target, world.probs))
        close(own, world.rate, atol=1e-12)
        for _ in range(5):
            other = oracle.random_logits(rng, world.vocabulary, world.length)
            probs = oracle.completion_probs(oracle.softmax(other))
            bound = equations.satisfaction_lower_bound(oracle.kl(world.target, probs))
            assert float(probs @ world.labels) >= bound - 1e-12


# 2. Gradient


def test_the_weighted_gradient_is_that_of_minus_log_satisfaction() -> None:
    claims.gradient_is_that_of_minus_log_satisfaction(equations)


def test_the_weighted_gradient_is_that_of_the_kl_to_a_frozen_target() -> None:
    claims.gradient_is_that_of_the_kl_to_a_frozen_target(equations)


def test_prefix_weights_are_unbiased() -> None:
    claims.prefix_weights_are_unbiased(equations)


def test_exact_prefix_weights_are_unbiased_for_the_target_of_a_wrong_auxiliary() -> None:
    rng = np.random.default_rng(11)
    world = WORLDS["stopping"]
    auxiliaries = [u + rng.normal(size=u.shape) for u in world.auxiliary_logits]
    targets, sampled, expected = [], [], []
    tokens = oracle.completions(world.vocabulary, world.length)
    for t, (p, u) in enumerate(zip(tensors(world.logits), tensors(auxiliaries), strict=True)):
        rows = oracle.rows(world.vocabulary, world.length, t)
        targets.append(equations.target_logprobs(p, u).exp().numpy())
        sampled.append(torch.nn.functional.logsigmoid(u)[rows, tokens[:, t]])
        expected.append(equations.expected_satisfaction_logprobs(p, u)[0][rows])
    target = oracle.completion_probs(targets)
    weights = equations.exact_prefix_logweights(torch.stack(sampled, 1), torch.stack(expected, 1))
    for t, weight in enumerate(weights.exp().numpy().T):
        reweighted = oracle.prefix_sums(world.probs * weight, world.vocabulary, t)
        close(reweighted, oracle.prefix_sums(target, world.vocabulary, t), atol=1e-12)
        alive = ~(tokens[:, :t] == 0).any(axis=1)
        close((world.probs * weight)[alive].sum(), target[alive].sum(), atol=1e-12)


def test_both_prefix_weights_agree_when_the_auxiliary_is_exact() -> None:
    world = WORLDS["parity"]
    along = world.token_logprobs()
    prompt = torch.full((len(world.probs),), math.log(world.rate), dtype=torch.float64)
    expected = torch.cat([prompt[:, None], along[:, :-1]], dim=1)
    exact = equations.exact_prefix_logweights(along, expected)
    torch.testing.assert_close(exact, equations.prefix_logweights(along, prompt))


@pytest.mark.parametrize("floor", [0.0, 0.2])
def test_weighted_samples_of_the_reference_are_samples_of_the_target(floor: float) -> None:
    world = WORLDS["contains"]
    labels = torch.from_numpy(world.labels)
    weights = equations.accepted_weights(labels, torch.full_like(labels, world.rate), floor)
    tables = claims.target_tables(equations, world, floor)
    close(world.probs * weights.numpy(), oracle.completion_probs(tables), atol=1e-10)


# 3. The target takes no gradient


def test_a_detached_live_target_teaches_the_satisfying_arm() -> None:
    claims.live_target_teaches_the_satisfying_arm(equations)


# 4. What lambda does


def equilibrium(corpus: Array, labels: Array, kl_weight: float, threshold: float) -> float:
    """E[C] of a softmax over arms after descending CE + lambda KL, the target made afresh."""
    corpus_probs, satisfied = torch.from_numpy(corpus), torch.from_numpy(labels)
    auxiliary_logits = torch.from_numpy(oracle.logit(labels))
    logits = torch.zeros(len(corpus), dtype=torch.float64, requires_grad=True)
    for _ in range(800):
        rate = (torch.softmax(logits.detach(), -1) * satisfied).sum()
        floor = equations.floor_for_threshold(rate, threshold)
        target = equations.target_logprobs(logits, auxiliary_logits, floor)
        cross_entropy = -(corpus_probs * torch.log_softmax(logits, -1)).sum()
        loss = cross_entropy + kl_weight * equations.kl_to_target(target, logits)
        (gradient,) = torch.autograd.grad(loss, logits)
        with torch.no_grad():
            logits -= 2 / (1 + kl_weight) * gradient
    return float(torch.softmax(logits.detach(), -1) @ satisfied)


@pytest.mark.parametrize(
    ("kl_weight", "threshold"), [(0.0, 1.0), (1.0, 1.0), (4.0, 1.0), (1.0, 0.9), (3.0, 0.8)]
)
def test_a_bandit_settles_where_the_lambda_law_says(kl_weight: float, threshold: float) -> None:
    corpus = np.array([0.3, 0.25, 0.25, 0.05, 0.15])
    labels = np.array([1.0, 0.0, 1.0, 0.0, 1.0])
    expected = equations.rate_at_equilibrium(0.7, kl_weight, threshold)
    close(equilibrium(corpus, labels, kl_weight, threshold), expected, atol=1e-6)


def test_soft_labels_settle_at_the_mean_label_of_the_target() -> None:
    corpus = np.array([0.5, 0.3, 0.2])
    labels = np.array([0.2, 1.0, 0.6])
    kl_weight = 2.0
    rate = equilibrium(corpus, labels, kl_weight, threshold=1.0)
    # p = (corpus + lambda p C / rate) / (1 + lambda), solved for p
    probs = corpus / (1 + kl_weight - kl_weight * labels / rate)
    close(probs.sum(), 1.0, atol=1e-5)
    target_mean = float(probs @ labels**2) / rate
    close(rate, (float(corpus @ labels) + kl_weight * target_mean) / (1 + kl_weight), atol=1e-6)


def test_a_corpus_above_the_threshold_is_left_as_it_is() -> None:
    corpus = np.array([0.5, 0.3, 0.2])
    labels = np.array([1.0, 1.0, 0.0])
    close(equilibrium(corpus, labels, kl_weight=3.0, threshold=0.75), 0.8, atol=1e-6)
    close(equations.rate_at_equilibrium(0.8, 3.0, threshold=0.75), 0.8, atol=1e-15)


def lengths(world: World) -> Array:
    """The number of tokens of every completion, its stop token included."""
    stops = oracle.completions(world.vocabulary, world.length) == 0
    first = np.where(stops.any(axis=1), stops.argmax(axis=1), world.length - 1)
    return (first + 1).astype(np.float64)


def settled(corpus: Array, world: World, kl_weight: float) -> World:
    """The LLM with p = (corpus + lambda q*(p)) / (1 + lambda), solved by hand."""
    rate = equations.rate_at_equilibrium(float(corpus @ world.labels), kl_weight)
    share = np.where(world.labels > 0, 1 + kl_weight - kl_weight / rate, 1 + kl_weight)
    factors = oracle.next_probs(corpus / share, world.vocabulary, world.length)
    stop_row = np.eye(world.vocabulary)[0]
    with np.errstate(divide="ignore"):
        logits = [np.log(np.where(np.isnan(table), stop_row, table)) for table in factors]
    return claims.world(logits, world.labels)


def slope_at(
    llm: World, corpus: Array, ce_factor: float, kl_factor: float
) -> tuple[float, list[Tensor]]:
    """E[C] of the LLM, and the gradient of ce_factor · CE + kl_factor · K over all its rollouts."""
    logits = [table.requires_grad_() for table in tensors(llm.logits)]
    tables = zip(logits, tensors(llm.auxiliary_logits), strict=True)
    targets = [equations.target_logprobs(p, u) for p, u in tables]
    loss = kl_factor * claims.weighted_kl(equations, llm, logits, targets)
    for t, tokens in enumerate(oracle.completions(llm.vocabulary, llm.length).T):
        rows = oracle.rows(llm.vocabulary, llm.length, t)
        gold = torch.log_softmax(logits[t], -1)[rows, tokens]
        loss = loss - ce_factor * (torch.from_numpy(corpus) * gold)[corpus > 0].sum()
    return llm.rate, list(torch.autograd.grad(loss, logits))


@pytest.fixture
def corpus() -> Array:
    """A corpus whose texts are longer than the rollouts: it seldom stops early."""
    world = WORLDS["stopping"]
    logits = oracle.random_logits(np.random.default_rng(2), world.vocabulary, world.length)
    for table in logits:
        table[:, 0] -= 2.0
    return oracle.completion_probs(oracle.softmax(oracle.stopping(logits, stop=0)))


@pytest.mark.parametrize("kl_weight", [0.5, 2.0, 9.0])
def test_terms_divided_by_sequence_counts_settle_at_lambda(corpus: Array, kl_weight: float) -> None:
    llm = settled(corpus, WORLDS["stopping"], kl_weight)
    rate, gradients = slope_at(llm, corpus, ce_factor=1.0, kl_factor=kl_weight)
    expected = equations.rate_at_equilibrium(float(corpus @ llm.labels), kl_weight)
    close(rate, expected, atol=1e-12)
    for gradient in gradients:
        close(gradient, 0.0, atol=1e-12)


def test_one_common_token_count_has_the_same_minimiser(corpus: Array) -> None:
    llm = settled(corpus, WORLDS["stopping"], 2.0)
    sequences, prompts = 12, 7
    tokens = sequences * float(corpus @ lengths(llm))
    _, gradients = slope_at(
        llm,
        corpus,
        ce_factor=sequences / tokens,
        kl_factor=2.0 * (sequences / prompts) * prompts / tokens,
    )
    for gradient in gradients:
        close(gradient, 0.0, atol=1e-12)


def test_terms_divided_by_their_own_token_counts_settle_elsewhere(corpus: Array) -> None:
    effective = 2.0
    llm = settled(corpus, WORLDS["stopping"], effective)
    corpus_length = float(corpus @ lengths(llm))
    rollout_length = float(llm.probs @ lengths(llm))
    kl_weight = effective * rollout_length / corpus_length
    rate, gradients = slope_at(llm, corpus, 1 / corpus_length, kl_weight / rollout_length)
    for gradient in gradients:
        close(gradient, 0.0, atol=1e-12)
    corpus_rate = float(corpus @ llm.labels)
    close(rate, equations.rate_at_equilibrium(corpus_rate, effective), atol=1e-12)
    assert abs(rate - equations.rate_at_equilibrium(corpus_rate, kl_weight)) > 1e-3


# 5. A threshold below one


@pytest.mark.parametrize("threshold", [0.6, 0.9, 0.99, 1.0])
def test_the_target_meets_a_threshold_exactly(threshold: float) -> None:
    for world in WORLDS.values():
        floor = equations.floor_for_threshold(world.rate, threshold)
        target = oracle.completion_probs(claims.target_tables(equations, world, floor))
        if world.rate >= threshold:
            close(target, world.probs, atol=1e-12)
            continue
        close(target @ world.labels, threshold, atol=1e-10)
        kl = oracle.kl(target, world.probs)
        rate = torch.tensor(world.rate, dtype=torch.float64)
        close(equations.target_kl(rate.log(), torch.log1p(-rate), floor), kl, atol=1e-10)
        wanted = np.array([threshold, 1 - threshold])
        close(oracle.kl(wanted, np.array([world.rate, 1 - world.rate])), kl, atol=1e-10)


def test_no_other_distribution_that_meets_the_threshold_is_closer() -> None:
    world, threshold = WORLDS["parity"], 0.9
    floor = equations.floor_for_threshold(world.rate, threshold)
    target = oracle.completion_probs(claims.target_tables(equations, world, floor))
    rng = np.random.default_rng(0)
    satisfied = world.labels > 0
    for scale in (0.01, 0.1, 1.0):
        rival = target * np.exp(scale * rng.normal(size=len(target)))
        rival[satisfied] *= threshold / rival[satisfied].sum()
        rival[~satisfied] *= (1 - threshold) / rival[~satisfied].sum()
        assert oracle.kl(rival, world.probs) > oracle.kl(target, world.probs)


def test_floored_prefix_weights_give_the_kl_of_the_floored_target() -> None:
    world, threshold = WORLDS["rare"], 0.8
    floor = equations.floor_for_threshold(world.rate, threshold)
    tables = zip(tensors(world.logits), tensors(world.auxiliary_logits), strict=True)
    targets = [equations.target_logprobs(p, u, floor) for p, u in tables]
    along = equations.floored_logprob(world.token_logprobs(), floor)
    prompt = torch.full((len(world.probs),), math.log(world.rate), dtype=torch.float64)
    weights = equations.prefix_logweights(along, equations.floored_logprob(prompt, floor)).exp()
    total = 0.0
    for t, (p, target) in enumerate(zip(tensors(world.logits), targets, strict=True)):
        kl = equations.kl_to_target(target, p)[oracle.rows(world.vocabulary, world.length, t)]
        total += float((torch.from_numpy(world.probs) * weights[:, t] * kl).sum())
    wanted = np.array([threshold, 1 - threshold])
    close(total, oracle.kl(wanted, np.array([world.rate, 1 - world.rate])), atol=1e-10)


# 6. The tilt for soft scores


@pytest.mark.parametrize("target_mean", [0.6, 0.85, 0.95])
def test_the_tilt_meets_its_mean_without_a_duality_gap(target_mean: float) -> None:
    vocabulary, length = 3, 4
    uniform = [np.zeros((vocabulary**t, vocabulary)) for t in range(length)]
    scores = np.random.default_rng(4).random(vocabulary**length)
    beta = equations.solve_tilt(torch.from_numpy(scores), target_mean)
    labels = equations.tilt_labels(torch.from_numpy(scores), beta).numpy()
    world = claims.world(uniform, labels)
    target = oracle.completion_probs(claims.target_tables(equations, world))
    close(target @ scores, target_mean, atol=1e-10)

    def dual(beta: float) -> float:
        return beta * target_mean - math.log(np.exp(beta * scores).mean())

    close(oracle.kl(target, world.probs), dual(beta), atol=1e-10)
    assert dual(beta) >= max(dual(beta * 0.99), dual(beta * 1.01))
    minus_log_rate = -math.log(world.rate)
    close(dual(beta), minus_log_rate - beta * (1 - target_mean), atol=1e-10)


# 7. Learning R


def fit_error(world: World, num_rollouts: int, rng: np.random.Generator) -> float:
    """RMS error of R at all prefixes of one and two tokens, fitted to labels by Newton's method."""
    counts = torch.from_numpy(rng.multinomial(num_rollouts, world.probs, size=100)).double()
    labels = torch.from_numpy(world.labels).expand_as(counts)
    errors = []
    for t in (1, 2):
        rows = torch.from_numpy(oracle.rows(world.vocabulary, world.length, t))
        visits = torch.zeros(100, world.vocabulary**t, dtype=torch.float64)
        visits.index_add_(1, rows, counts)
        logits = torch.zeros_like(visits, requires_grad=True)
        for _ in range(12):
            loss = (counts * equations.bernoulli_cross_entropy(labels, logits[:, rows])).sum()
            (gradient,) = torch.autograd.grad(loss, logits)
            with torch.no_grad():
                rate = torch.sigmoid(logits)
                logits -= gradient / (visits * rate * (1 - rate))
        errors.append(torch.sigmoid(logits.detach()) - torch.from_numpy(world.satisfaction[t]))
    return float(torch.cat(errors, dim=1).square().mean().sqrt())


def test_labels_teach_the_satisfaction_at_the_rate_of_monte_carlo() -> None:
    rng = np.random.default_rng(8)
    few, many = (fit_error(WORLDS["parity"], n, rng) for n in (1_000, 16_000))
    assert many < 0.02
    assert 3.5 < few / many < 4.5


def test_the_cross_entropy_of_labels_has_its_minimum_at_the_satisfaction() -> None:
    claims.labels_teach_the_satisfaction(equations)


def test_the_exact_satisfaction_is_consistent() -> None:
    for world in WORLDS.values():
        for t in range(1, world.length):
            satisfied, violated = equations.expected_satisfaction_logprobs(
                torch.from_numpy(world.logits[t]), torch.from_numpy(world.auxiliary_logits[t])
            )
            logits = torch.from_numpy(world.auxiliary_logits[t - 1].reshape(-1)).requires_grad_()
            residual = equations.consistency_divergence(satisfied, violated, logits)
            (gradient,) = torch.autograd.grad(residual.sum(), logits)
            possible = oracle.prefix_sums(world.probs, world.vocabulary, t) > 0
            close(residual.detach()[possible], 0.0, atol=1e-12)
            close(gradient[possible], 0.0, atol=1e-12)


@pytest.mark.parametrize("td_lambda", [0.0, 0.7, 1.0])
def test_td_targets_from_the_exact_satisfaction_are_unbiased(td_lambda: float) -> None:
    world = WORLDS["arbitrary"]
    along = world.token_logprobs().exp()
    everywhere = torch.ones(along.shape, dtype=torch.bool)
    targets = equations.td_lambda_targets(
        torch.from_numpy(world.labels), along, everywhere, td_lambda
    )
    for t in range(world.length):
        means = oracle.conditional_means(
            targets[:, t].numpy(), world.probs, world.vocabulary, world.length
        )
        close(means[t + 1], world.satisfaction[t + 1], atol=1e-12)


# 8. Balanced batches and rollouts of another LLM


def test_balanced_batches_shift_the_logit_of_every_prefix_alike() -> None:
    world = WORLDS["parity"]
    keep_satisfied, keep_violating = 0.2, 0.9
    kept = world.probs * np.where(world.labels > 0, keep_satisfied, keep_violating)
    shift = equations.balanced_shift(keep_satisfied, keep_violating)
    fitted = oracle.conditional_means(world.labels, kept, world.vocabulary, world.length)
    for t in range(world.length):
        logit = oracle.logit(world.satisfaction[t])
        close(oracle.logit(fitted[t]) - logit, shift, atol=1e-10)
        calibrated = torch.from_numpy(logit).requires_grad_()
        rows = torch.from_numpy(oracle.rows(world.vocabulary, world.length, t))
        loss = equations.bernoulli_cross_entropy(
            torch.from_numpy(world.labels), (calibrated + shift)[rows]
        )
        (gradient,) = torch.autograd.grad((torch.from_numpy(kept) * loss).sum(), calibrated)
        close(gradient, 0.0, atol=1e-12)


def test_only_the_suffix_of_another_llms_rollout_needs_a_weight() -> None:
    world = WORLDS["parity"]
    sampler = oracle.random_logits(np.random.default_rng(9), world.vocabulary, world.length)
    sampling_probs = oracle.completion_probs(oracle.softmax(sampler))
    tokens = oracle.completions(world.vocabulary, world.length)

    def along(tables: oracle.Tables) -> Tensor:
        probs = oracle.softmax(tables)
        columns = [
            probs[t][oracle.rows(world.vocabulary, world.length, t), tokens[:, t]]
            for t in range(world.length)
        ]
        return torch.from_numpy(np.log(np.stack(columns, axis=1)))

    everywhere = torch.ones(tokens.shape, dtype=torch.bool)
    weights = equations.suffix_logweights(along(world.logits), along(sampler), everywhere).exp()
    for t in range(world.length):
        means = oracle.conditional_means(
            weights[:, t].numpy() * world.labels, sampling_probs, world.vocabulary, world.length
        )
        close(means[t + 1], world.satisfaction[t + 1], atol=1e-12)


# 9. Two constraints


def test_a_conjunction_is_one_constraint_after_the_other() -> None:
    rng = np.random.default_rng(10)
    logits = oracle.random_logits(rng, 3, 4)
    first, second = (rng.random((2, 81)) < 0.5).astype(np.float64)
    one = claims.world(logits, first)
    tables = claims.target_tables(equations, one)
    two_given_one = claims.world([np.log(table) for table in tables], second)
    both = claims.world(logits, first * second)
    for t in range(5):
        product = one.satisfaction[t] * two_given_one.satisfaction[t]
        close(product, both.satisfaction[t], atol=1e-12)
    in_turn = oracle.completion_probs(claims.target_tables(equations, two_given_one))
    close(in_turn, both.target, atol=1e-10)


# 10. Extremes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [60.0, 1e4])
@pytest.mark.parametrize("floor", [0.0, 1e-6, 1.0])
def test_extreme_logits_leave_values_and_gradients_finite(
    dtype: torch.dtype, scale: float, floor: float
) -> None:
    signs = torch.tensor([[1, -1, 0, 1], [-1, -1, -1, -1], [1, 1, 1, 1], [0, 1, -1, 0]])
    auxiliary = (scale * signs).to(dtype)
    for reference in (
        auxiliary,
        -auxiliary,
        auxiliary.roll(1, dims=1),
        torch.zeros(4, 4).to(dtype),
    ):
        reference = reference.clone()
        reference[:, 3] = -math.inf
        logits = reference.clone().requires_grad_()
        target = equations.target_logprobs(reference, auxiliary, floor)
        assert target.dtype == dtype
        assert not target.isnan().any()
        assert (target[:, 3] == -math.inf).all()
        close(target.exp().sum(-1), 1.0, atol=1e-5)
        kl = equations.kl_to_target(target, logits)
        (gradient,) = torch.autograd.grad(kl.sum(), logits)
        assert kl.dtype == dtype
        assert kl.isfinite().all()
        assert (kl >= 0).all()
        assert gradient.isfinite().all()
        for logprob in equations.expected_satisfaction_logprobs(reference, auxiliary):
            assert logprob.isfinite().all()
            assert (logprob <= 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_certain_expectations_leave_the_consistency_finite(dtype: torch.dtype) -> None:
    logits = torch.tensor([-1e4, -60.0, 0.0, 60.0, 1e4], dtype=dtype).requires_grad_()
    for satisfied, violated in ((0.0, -math.inf), (-math.inf, 0.0), (-1e-30, -69.0), (-1e4, 0.0)):
        divergence = equations.consistency_divergence(
            torch.full_like(logits, satisfied), torch.full_like(logits, violated), logits
        )
        (gradient,) = torch.autograd.grad(divergence.sum(), logits)
        assert divergence.isfinite().all()
        assert (divergence >= -1e-6).all()
        assert gradient.isfinite().all()
        close(gradient, torch.sigmoid(logits.detach()) - math.exp(satisfied), atol=1e-6)


def test_a_prompt_that_never_satisfies_leaves_everything_finite() -> None:
    auxiliary = torch.full((1, 3, 5), -LIMIT)
    reference = torch.randn(1, 3, 5, generator=torch.Generator().manual_seed(0))
    satisfied, violated = equations.expected_satisfaction_logprobs(reference, auxiliary)
    close(satisfied, -LIMIT, atol=1e-5)
    target = equations.target_logprobs(reference, auxiliary)
    close(target, torch.log_softmax(reference, -1), atol=1e-5)
    weights = equations.prefix_logweights(auxiliary[:, :, 0], satisfied[:, 0])
    assert weights.isfinite().all()
    log_floor = equations.log_floor_for_threshold(satisfied[:, 0], violated[:, 0], 0.9)
    close(log_floor, -LIMIT - math.log(9), atol=1e-4)
    zero = torch.zeros(3)
    assert (equations.accepted_weights(zero, zero) == 0).all()


@pytest.mark.parametrize("label", [0.0, 1.0])
def test_labels_that_are_all_alike_leave_the_fit_finite(label: float) -> None:
    logits = torch.tensor([-1e4, -LIMIT, 0.0, LIMIT, 1e4]).requires_grad_()
    loss = equations.bernoulli_cross_entropy(torch.full((5,), label), logits)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert loss.isfinite().all()
    close(gradient, torch.sigmoid(logits.detach()) - label, atol=1e-6)


# 13. What is masked


def test_masked_positions_get_no_gradient_and_count_for_nothing() -> None:
    generator = torch.Generator().manual_seed(1)
    reference, auxiliary = torch.randn(2, 2, 6, 5, generator=generator, dtype=torch.float64)
    llm = torch.randn(2, 6, 5, generator=generator, dtype=torch.float64).requires_grad_()
    mask = torch.tensor([[False, True, True, True, True, False], [True] * 3 + [False] * 3])
    raw = torch.rand(2, 6, generator=generator, dtype=torch.float64) + 0.5

    def loss(mask: torch.Tensor, keep: slice) -> Tensor:
        weights, _ = equations.clip_weights(raw[:, keep], 1.2, mask[:, keep])
        target = equations.target_logprobs(reference[:, keep], auxiliary[:, keep])
        return (weights * equations.kl_to_target(target, llm[:, keep])).sum()

    (gradient,) = torch.autograd.grad(loss(mask, slice(0, 6)), llm)
    assert (gradient[~mask] == 0).all()
    assert (gradient[mask].abs().sum(-1) > 0).all()
    torch.testing.assert_close(loss(mask, slice(0, 6)), loss(mask, slice(0, 5)))


def test_masked_tokens_add_no_evidence_and_get_no_gradient() -> None:
    mask = torch.tensor([[False, False, True, True, True], [False, True, True, False, False]])
    evidence = torch.randn(2, 5, generator=torch.Generator().manual_seed(2)).requires_grad_()
    bias = torch.tensor([0.5, -1.0], requires_grad=True)
    offsets = equations.additive_offsets(evidence, mask, bias)
    assert (offsets[0, :3] == 0.5).all()
    close(offsets[1, 3:].detach(), -1.0 + evidence[1, 1:3].sum().item(), atol=1e-6)
    gradient, bias_gradient = torch.autograd.grad(offsets.sum(), (evidence, bias))
    assert gradient.tolist() == [[0, 0, 2, 1, 0], [0, 3, 2, 0, 0]]
    assert bias_gradient.tolist() == [5, 5]


# 14. Chunks


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_a_loss_in_chunks_of_positions_is_the_dense_loss(chunk: int) -> None:
    generator = torch.Generator().manual_seed(3)
    reference, auxiliary, start = torch.randn(3, 50, 11, generator=generator, dtype=torch.float64)
    floors = torch.rand(50, generator=generator, dtype=torch.float64)
    llm = start.requires_grad_()

    def kl(keep: slice) -> Tensor:
        target = equations.target_logprobs(reference[keep], auxiliary[keep], floors[keep])
        return equations.kl_to_target(target, llm[keep]).sum()

    dense = kl(slice(0, 50))
    (dense_gradient,) = torch.autograd.grad(dense, llm)
    total, gradient = torch.zeros_like(dense), torch.zeros_like(llm)
    for begin in range(0, 50, chunk):
        part = kl(slice(begin, begin + chunk))
        gradient += torch.autograd.grad(part, llm)[0]
        total += part.detach()
    torch.testing.assert_close(total, dense.detach())
    torch.testing.assert_close(gradient, dense_gradient, rtol=0, atol=1e-15)
