"""What each equation promises beyond the acceptance tests: bounds, shapes, edges, refusals."""

import math

import numpy as np
import pytest
import torch
from claims import close
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from constrained_ft import equations

quick = settings(max_examples=60, deadline=None, derandomize=True, database=None)
dtypes = st.sampled_from([torch.float32, torch.float64])
probabilities = st.floats(0.0, 1.0)


@st.composite
def rows_of_logits(draw: st.DrawFn, limit: float, num: int, dtype: torch.dtype) -> Tensor:
    """`num` rows of the same 2 to 6 logits' length."""
    vocabulary = draw(st.integers(2, 6))
    logit = st.floats(-limit, limit)
    row = st.lists(logit, min_size=vocabulary, max_size=vocabulary)
    return torch.tensor([draw(row) for _ in range(num)], dtype=dtype)


# The target and its divergence


@quick
@given(data=st.data(), dtype=dtypes, floor=probabilities)
def test_the_target_is_normalised_and_the_kl_never_negative(
    data: st.DataObject, dtype: torch.dtype, floor: float
) -> None:
    reference, auxiliary, llm = data.draw(rows_of_logits(1e4, 3, dtype))
    target = equations.target_logprobs(reference, auxiliary, floor)
    assert target.dtype == dtype
    close(target.exp().sum(), 1.0, atol=1e-5)
    assert float(equations.kl_to_target(target, llm)) >= 0.0
    close(equations.kl_to_target(target, target), 0.0, atol=1e-6)


@quick
@given(data=st.data(), floor=probabilities)
def test_the_gradient_of_the_kl_is_p_minus_q_by_finite_differences(
    data: st.DataObject, floor: float
) -> None:
    reference, auxiliary, llm = data.draw(rows_of_logits(6.0, 3, torch.float64))
    target = equations.target_logprobs(reference, auxiliary, floor)
    llm.requires_grad_()
    (gradient,) = torch.autograd.grad(equations.kl_to_target(target, llm), llm)
    close(gradient, torch.softmax(llm.detach(), -1) - target.exp(), atol=1e-12)
    step = 1e-5 * torch.eye(len(llm), dtype=torch.float64)
    ends = [equations.kl_to_target(target.expand_as(step), llm.detach() + s) for s in (step, -step)]
    close(gradient, (ends[0] - ends[1]) / 2e-5, atol=1e-8)


def test_a_kl_mended_to_zero_keeps_its_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1000, 50, generator=generator)
    target = torch.log_softmax(logits, -1)
    llm = (logits + 3.0).requires_grad_()
    kl = equations.kl_to_target(target, llm)
    (gradient,) = torch.autograd.grad(kl.sum(), llm)
    assert (kl >= 0).all()
    assert (kl == 0).any()
    close(gradient, torch.softmax(llm.detach(), -1) - target.exp(), atol=1e-7)


def test_no_gradient_reaches_the_target() -> None:
    reference, auxiliary, llm = torch.randn(
        3, 4, 5, generator=torch.Generator().manual_seed(0), requires_grad=True
    )
    target = equations.target_logprobs(reference, auxiliary)
    (gradient,) = torch.autograd.grad(equations.kl_to_target(target, llm).sum(), llm)
    assert gradient.isfinite().all()
    with pytest.raises(RuntimeError, match="not have been used"):
        torch.autograd.grad(equations.kl_to_target(target, llm).sum(), auxiliary)


def test_an_excluded_token_stays_excluded_and_counts_nothing() -> None:
    reference = torch.tensor([1.0, -math.inf, 0.5])
    auxiliary = torch.tensor([-2.0, 30.0, 2.0])
    target = equations.target_logprobs(reference, auxiliary)
    assert target[1] == -math.inf
    kept = torch.tensor([0, 2])
    torch.testing.assert_close(
        target[kept], equations.target_logprobs(reference[kept], auxiliary[kept])
    )
    llm = torch.tensor([0.3, -math.inf, 0.1], requires_grad=True)
    kl = equations.kl_to_target(target, llm)
    (gradient,) = torch.autograd.grad(kl, llm)
    torch.testing.assert_close(kl, equations.kl_to_target(target[kept], llm[kept]))
    assert gradient[1] == 0
    assert gradient.isfinite().all()


def test_the_kl_is_infinite_where_the_llm_excludes_what_the_target_wants() -> None:
    target = torch.tensor([0.5, 0.5]).log()
    assert equations.kl_to_target(target, torch.tensor([0.0, -math.inf])) == math.inf


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_the_target_takes_any_leading_shape_and_a_floor_for_each_prefix(
    shape: tuple[int, ...],
) -> None:
    generator = torch.Generator().manual_seed(1)
    reference, auxiliary = torch.randn(2, *shape, 5, generator=generator, dtype=torch.float64)
    for floor in (torch.rand(shape, generator=generator), torch.tensor(0.3), 0, 1, 0.25):
        target = equations.target_logprobs(reference, auxiliary, floor)
        alpha = torch.as_tensor(floor, dtype=torch.float64).expand(shape).unsqueeze(-1)
        wanted = torch.softmax(reference, -1) * (alpha + (1 - alpha) * torch.sigmoid(auxiliary))
        torch.testing.assert_close(target.exp(), wanted / wanted.sum(-1, keepdim=True))
        assert equations.kl_to_target(target, reference).shape == shape


def test_a_floor_of_one_gives_back_the_reference() -> None:
    reference, auxiliary = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(2))
    target = equations.target_logprobs(reference, auxiliary, 1.0)
    torch.testing.assert_close(target, torch.log_softmax(reference, -1))


@pytest.mark.parametrize("floor", [-0.1, 1.1, math.nan])
def test_a_floor_outside_the_unit_interval_is_refused(floor: float) -> None:
    with pytest.raises(ValueError, match="floor must lie in"):
        equations.target_logprobs(torch.zeros(3), torch.zeros(3), floor)


@quick
@given(data=st.data())
def test_both_expectations_are_exact_however_sure_the_auxiliary(data: st.DataObject) -> None:
    reference, auxiliary = data.draw(rows_of_logits(30.0, 2, torch.float64))
    satisfied, violated = equations.expected_satisfaction_logprobs(reference, auxiliary)
    probs = np.exp(reference.numpy() - reference.numpy().max())
    probs /= probs.sum()
    close(satisfied.exp(), (probs / (1 + np.exp(-auxiliary.numpy()))).sum(), atol=0, rtol=1e-9)
    close(violated.exp(), (probs / (1 + np.exp(auxiliary.numpy()))).sum(), atol=0, rtol=1e-9)


# Thresholds


@quick
@given(rate=probabilities, threshold=probabilities)
def test_the_floor_lifts_a_bernoulli_to_its_threshold(rate: float, threshold: float) -> None:
    floor = equations.floor_for_threshold(rate, threshold)
    assert 0.0 <= floor <= 1.0
    if rate >= threshold:
        assert floor == 1.0
    elif rate > 1e-300:
        close(rate / (rate + floor * (1 - rate)), threshold, atol=1e-12)
    else:
        close(floor, 0.0, atol=1e-12 / max(threshold, 1e-300))


def test_the_floor_is_one_wherever_the_threshold_is_met() -> None:
    rates = torch.tensor([0.0, 0.5, 0.8, 0.9, 1.0])
    assert equations.floor_for_threshold(rates, 0.8)[2:].tolist() == [1.0, 1.0, 1.0]
    assert equations.floor_for_threshold(rates, 1.0).tolist() == [0.0, 0.0, 0.0, 0.0, 1.0]
    assert equations.floor_for_threshold(rates, 0.0).tolist() == [1.0] * 5
    assert equations.floor_for_threshold(1.0, 1.0) == 1.0
    assert equations.floor_for_threshold(0, 1) == 0.0
    assert equations.floor_for_threshold(rates.double(), 0.8).dtype == torch.float64


@pytest.mark.parametrize(("satisfaction", "threshold"), [(0.5, 1.1), (0.5, -0.1), (1.5, 0.5)])
def test_a_floor_for_what_is_no_probability_is_refused(
    satisfaction: float, threshold: float
) -> None:
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
        equations.floor_for_threshold(satisfaction, threshold)


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.98, 1.0])
def test_the_log_floor_is_the_log_of_the_floor(threshold: float) -> None:
    rates = torch.tensor([0.0, 1e-12, 0.01, 0.29, 0.31, 0.97, 0.99, 1.0], dtype=torch.float64)
    log_floor = equations.log_floor_for_threshold(rates.log(), torch.log1p(-rates), threshold)
    torch.testing.assert_close(log_floor.exp(), equations.floor_for_threshold(rates, threshold))


def test_the_log_floor_keeps_digits_that_a_probability_loses() -> None:
    tiny = torch.tensor([-80.0])
    log_floor = equations.log_floor_for_threshold(tiny, torch.zeros(1), 0.5)
    close(log_floor, -80.0, atol=1e-5)
    almost = equations.log_floor_for_threshold(torch.zeros(1), torch.tensor([-60.0]), 1.0)
    assert almost == -math.inf


def test_a_floored_logprob_is_the_log_of_the_floored_probability() -> None:
    logprobs = torch.tensor([[-1e4, -2.0, 0.0], [-math.inf, -0.1, -60.0]], dtype=torch.float64)
    for floor in (0.0, 0.4, 1, torch.tensor([[0.0], [0.5]]), torch.tensor(0.0)):
        alpha = torch.as_tensor(floor, dtype=torch.float64)
        floored = equations.floored_logprob(logprobs, floor)
        torch.testing.assert_close(floored.exp(), alpha + (1 - alpha) * logprobs.exp())
        assert not floored.isnan().any()


def test_the_kl_of_the_target_is_zero_where_nothing_is_asked() -> None:
    rates = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    close(equations.target_kl(rates.log(), torch.log1p(-rates), 1.0), 0.0, atol=1e-15)
    close(equations.target_kl(rates.log(), torch.log1p(-rates))[1:], -rates[1:].log(), atol=1e-15)


# Weights


def test_clipping_reports_the_share_of_the_mass_that_it_cuts() -> None:
    weights = torch.tensor([[1.0, 8.0, 100.0], [3.0, 0.0, 7.0]])
    mask = torch.tensor([[True, True, False], [True, True, False]])
    clipped, share = equations.clip_weights(weights, 5, mask)
    assert clipped.tolist() == [[1.0, 5.0, 0.0], [3.0, 0.0, 0.0]]
    close(share, 3 / 12, atol=1e-7)
    nothing, none = equations.clip_weights(weights, 5, torch.zeros_like(mask))
    assert nothing.sum() == 0
    assert none == 0


def test_accepted_weights_have_mean_one_under_the_reference() -> None:
    labels = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.5], dtype=torch.float64)
    rate = torch.full_like(labels, 0.5)
    for floor in (0.0, 0.3, 1.0, torch.tensor(0.3)):
        close(equations.accepted_weights(labels, rate, floor).mean(), 1.0, atol=1e-7)


def test_suffix_weights_do_not_see_what_is_masked() -> None:
    current = torch.tensor([[-1.0, -2.0, -3.0, -math.inf]])
    sampling = torch.tensor([[-1.5, -2.5, -1.0, -math.inf]])
    mask = torch.tensor([[True, True, True, False]])
    weights = equations.suffix_logweights(current, sampling, mask)
    assert weights.tolist() == [[0.5 - 2.0, -2.0, 0.0, 0.0]]


def test_the_first_prefix_weighs_one_and_no_weight_sees_its_own_token() -> None:
    along = torch.tensor([[-0.5, -0.2, -9.0]])
    close(equations.prefix_logweights(along, torch.tensor([-1.0])), [[0.0, 0.5, 0.8]], atol=1e-6)
    expected = torch.tensor([[-1.0, -0.5, -0.2]])
    close(equations.exact_prefix_logweights(along, expected), [[0.0, 0.5, 0.8]], atol=1e-6)


# Learning R


@quick
@given(target=probabilities, logit=st.floats(-1e4, 1e4))
def test_the_cross_entropy_is_finite_and_its_gradient_the_difference(
    target: float, logit: float
) -> None:
    logits = torch.tensor(logit, dtype=torch.float64, requires_grad=True)
    loss = equations.bernoulli_cross_entropy(torch.full_like(logits, target), logits)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.isfinite()
    assert float(loss.detach()) >= 0
    close(gradient, torch.sigmoid(logits.detach()) - target, atol=1e-12)


@quick
@given(expected=st.floats(-40, 40), logit=st.floats(-40, 40))
def test_the_consistency_divergence_is_a_kl_with_gradient_to_the_estimate_alone(
    expected: float, logit: float
) -> None:
    source = torch.tensor(expected, dtype=torch.float64, requires_grad=True)
    logits = torch.tensor(logit, dtype=torch.float64, requires_grad=True)
    divergence = equations.consistency_divergence(
        torch.nn.functional.logsigmoid(source), torch.nn.functional.logsigmoid(-source), logits
    )
    assert float(divergence.detach()) >= -1e-12
    (gradient,) = torch.autograd.grad(divergence, logits, retain_graph=True)
    close(gradient, (torch.sigmoid(logits) - torch.sigmoid(source)).detach(), atol=1e-12)
    with pytest.raises(RuntimeError, match="not have been used"):
        torch.autograd.grad(divergence, source)


def test_td_targets_follow_their_recursion_up_to_the_last_token() -> None:
    labels = torch.tensor([1.0, 0.0, 0.3])
    expected = torch.rand(3, 5, generator=torch.Generator().manual_seed(4)).requires_grad_()
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1], [0, 0, 0, 0, 0]], dtype=torch.bool)
    targets = equations.td_lambda_targets(labels, expected, mask, 0.8)
    assert not targets.requires_grad
    for b, (begin, end) in enumerate([(0, 3), (1, 5), (0, 0)]):
        wanted = float(labels[b])
        for j in reversed(range(begin, end)):
            if j < end - 1:
                wanted = 0.2 * float(expected[b, j].detach()) + 0.8 * wanted
            close(targets[b, j], wanted, atol=1e-6)
    assert (targets[~mask] == labels[:, None].expand(3, 5)[~mask]).all()


def test_td_targets_range_from_the_label_to_the_one_step_expectation() -> None:
    labels = torch.tensor([1.0])
    expected = torch.tensor([[0.2, 0.4, 0.6]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    assert equations.td_lambda_targets(labels, expected, mask, 1).tolist() == [[1.0, 1.0, 1.0]]
    close(equations.td_lambda_targets(labels, expected, mask, 0), [[0.2, 0.4, 1.0]], atol=1e-7)
    with pytest.raises(ValueError, match="td_lambda"):
        equations.td_lambda_targets(labels, expected, mask, 1.5)


def test_balanced_shift_is_the_log_of_the_rates_ratio() -> None:
    close(equations.balanced_shift(0.5, 0.25), math.log(2), atol=1e-15)
    with pytest.raises(ValueError, match="above 0"):
        equations.balanced_shift(0.0, 1.0)


def test_offsets_are_the_logit_before_each_token() -> None:
    evidence = torch.tensor([[5.0, 1.0, -2.0, 0.5]], dtype=torch.bfloat16)
    mask = torch.tensor([[False, True, True, True]])
    offsets = equations.additive_offsets(evidence, mask, torch.tensor([0.25]))
    assert offsets.dtype == torch.float32
    assert offsets.tolist() == [[0.25, 0.25, 1.25, -0.75]]


# Soft scores


@quick
@given(
    scores=st.lists(probabilities, min_size=2, max_size=20),
    place=st.floats(0.01, 0.99),
)
def test_the_tilted_mean_is_the_mean_that_was_asked_for(scores: list[float], place: float) -> None:
    samples = torch.tensor(scores, dtype=torch.float64)
    assume(float(samples.max() - samples.mean()) > 1e-6)
    wanted = float(samples.mean() + place * (samples.max() - samples.mean()))
    beta = equations.solve_tilt(samples, wanted)
    weights = equations.tilt_labels(samples, beta)
    close((weights @ samples) / weights.sum(), wanted, atol=1e-9)


def test_a_mean_that_is_already_reached_needs_no_tilt() -> None:
    assert equations.solve_tilt(torch.tensor([0.2, 0.8]), 0.5) == 0.0
    assert equations.solve_tilt(torch.tensor([0.75, 0.75]), 0.75) == 0.0


@pytest.mark.parametrize(
    ("scores", "target_mean", "message"),
    [
        ([0.2, 0.8], 0.8, "best score"),
        ([0.2, 0.8], 0.9, "best score"),
        ([], 0.5, "needs scores"),
        ([0.2, math.nan], 0.5, "finite"),
        ([0.5 - 1e-12, 0.5, 0.5 - 1e-12], 0.5 - 1e-13, "no tilt up to"),
    ],
)
def test_a_mean_out_of_reach_is_refused(
    scores: list[float], target_mean: float, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        equations.solve_tilt(torch.tensor(scores, dtype=torch.float64), target_mean)


def test_the_effective_sample_size_counts_equal_weights() -> None:
    close(equations.effective_sample_size(torch.full((2, 7), -300.0)), 7.0, atol=1e-4)
    close(equations.effective_sample_size(torch.tensor([0.0, -200.0, -300.0])), 1.0, atol=1e-6)
    weights = torch.tensor([1.0, 2.0, 3.0])
    close(equations.effective_sample_size(weights.log()), 36 / 14, atol=1e-6)


# What lambda does


@quick
@given(corpus_rate=st.floats(0.0, 0.9), kl_weight=st.floats(0.01, 100.0))
def test_the_weight_for_a_rate_inverts_the_rate_of_a_weight(
    corpus_rate: float, kl_weight: float
) -> None:
    for threshold in (0.95, 1.0):
        rate = equations.rate_at_equilibrium(corpus_rate, kl_weight, threshold)
        assume(rate < threshold)
        back = equations.kl_weight_for_rate(rate, corpus_rate, threshold)
        close(back, kl_weight, atol=0, rtol=1e-8)


def test_the_lambda_law_has_the_values_one_knows_by_heart() -> None:
    close(equations.kl_weight_for_rate(0.99, 0.9), 9.0, atol=1e-9)
    close(equations.kl_weight_for_rate(0.999, 0.9), 99.0, atol=1e-9)
    close(equations.rate_at_equilibrium(0.9, 1), 0.95, atol=1e-12)
    assert equations.kl_weight_for_rate(0.8, 0.85) == 0.0


@pytest.mark.parametrize(("rate", "threshold"), [(1.0, 1.0), (0.9, 0.9), (0.95, 0.9), (1.2, 1.0)])
def test_a_rate_that_no_lambda_reaches_is_refused(rate: float, threshold: float) -> None:
    with pytest.raises(ValueError, match="rate"):
        equations.kl_weight_for_rate(rate, 0.5, threshold)


@pytest.mark.parametrize(("corpus_rate", "kl_weight"), [(1.5, 1.0), (0.5, -1.0)])
def test_an_equilibrium_of_nonsense_is_refused(corpus_rate: float, kl_weight: float) -> None:
    with pytest.raises(ValueError, match="must"):
        equations.rate_at_equilibrium(corpus_rate, kl_weight)
