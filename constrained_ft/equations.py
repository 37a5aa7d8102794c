r"""Every formula of the method, as pure functions of tensors.

    R(x, y_<i)      = P[C(x, y) = 1 | y_<i],  y ~ p            satisfaction of a prefix
    q*(y | x)       = p(y | x) C(x, y) / R(x)                  the target
    q*(y_i | y_<i)  = p(y_i | y_<i) R(y_<=i) / Rbar(y_<i)      the target, token by token
    Rbar(y_<i)      = sum_v p(v | y_<i) R(y_<i v)              R(y_<i), when R is exact
    objective       = corpus cross-entropy + lambda KL(q* || p_theta)

`p` is the reference, a frozen copy of the LLM `p_theta`; `R` is what the auxiliary estimates, as
the logit `u` of a probability. "log R" and "logprob" are natural logarithms of probabilities, and
every divergence is in nats.

Shape suffixes: B sequences, T token positions, V vocabulary, N samples; `dims` is any number of
leading axes. Masks are true at completion tokens, which lie side by side, and false elsewhere.
Results have the dtype of the arguments: compute in float32 or float64.

Sources: [CFT] Meng et al. 2024, arXiv:2410.05559; [NADO] Meng et al. 2022, arXiv:2205.14219;
[PR] posterior regularisation, Ganchev et al. 2010, JMLR 11. What names no source is derived from
these, and every function is tested against the enumeration of small language models.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

# beartype does not take an int for a float
Number = float | int

_SHIFT_LIMIT = 30.0  # logits


# The target and its divergence from the LLM


def target_logprobs(
    reference_logits: Float[Tensor, "*dims V"],
    auxiliary_logits: Float[Tensor, "*dims V"],
    floor: Number | Float[Tensor, "*#dims"] = 0.0,
) -> Float[Tensor, "*dims V"]:
    """Next-token log-probabilities of the target q*, in nats.

    q*(v | y_<i)  ∝  p(v | y_<i) (floor + (1 - floor) R(y_<i v))

    A token that the reference excludes (a logit of -inf) has log-probability -inf; everything else
    is finite for logits within ±1e4.

    Args:
        reference_logits: logits of p(v | y_<i), defined up to a constant.
        auxiliary_logits: logits of R(y_<i v), for every next token v.
        floor: alpha of the threshold, in [0, 1], a number or one value for each prefix; 0 demands
            satisfaction always, 1 gives back the reference.

    Raises:
        ValueError: if a number given as floor is outside [0, 1].

    Source: [NADO], the token-level form of q*; the floor is `floor_for_threshold`.
    """
    floor_V = floor.unsqueeze(-1) if isinstance(floor, Tensor) else floor
    satisfaction_logprobs = floored_logprob(F.logsigmoid(auxiliary_logits), floor_V)
    reference_logprobs = torch.log_softmax(reference_logits, dim=-1)
    return torch.log_softmax(reference_logprobs + satisfaction_logprobs, dim=-1)


def kl_to_target(
    target_logprobs: Float[Tensor, "*dims V"], llm_logits: Float[Tensor, "*dims V"]
) -> Float[Tensor, "*dims"]:
    """KL(q || p_theta) of the next token, in nats, for each prefix; never negative.

    The gradient is p_theta - q to `llm_logits` and none to the target: letting it flow into a q
    that was made from the LLM itself cancels it to first order and rewards any deterministic LLM.
    Tokens with q = 0 count as 0, also where p_theta = 0.

    Args:
        target_logprobs: log q, normalised.
        llm_logits: logits of p_theta, defined up to a constant.

    Source: [CFT], the regulariser in its closed form over the vocabulary.
    """
    kl: Tensor = _KLToTarget.apply(target_logprobs.detach(), llm_logits)  # type: ignore[no-untyped-call]
    return kl


class _KLToTarget(torch.autograd.Function):
    """Keeps p - q alone for the backward pass: half the time and a third of the memory."""

    @staticmethod
    def forward(ctx: Any, target_logprobs: Tensor, llm_logits: Tensor) -> Tensor:
        llm_logprobs = torch.log_softmax(llm_logits, dim=-1)
        target_probs = target_logprobs.exp()
        terms = (target_logprobs - llm_logprobs).mul_(target_probs)
        terms.masked_fill_(target_probs == 0, 0.0)
        if ctx.needs_input_grad[1]:
            ctx.save_for_backward(llm_logprobs.exp_().sub_(target_probs))
        # Rounding can leave a sum of -1e-7.
        return terms.sum(-1).clamp_(min=0.0)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[None, Tensor]:
        (difference,) = ctx.saved_tensors
        return None, difference * grad_outputs[0].unsqueeze(-1)


def divergence_to_target(
    kind: Literal["reverse_kl", "jsd", "tv"],
    target_logprobs: Float[Tensor, "*dims V"],
    llm_logits: Float[Tensor, "*dims V"],
) -> Float[Tensor, "*dims"]:
    """Another divergence between q and p_theta of the next token, for each prefix.

        reverse_kl  KL(p || q) = sum p (log p - log q)
        jsd         (KL(q || m) + KL(p || m)) / 2,  m = (q + p) / 2; at most log 2
        tv          sum |p - q| / 2; at most 1

    No gradient reaches the target. Only KL(q || p), which is `kl_to_target`, and KL(p || q) add up
    to the same divergence of whole completions; the sums of the others are not that.

    Args:
        kind: which one.
        target_logprobs: log q, normalised; finite for `reverse_kl`.
        llm_logits: logits of p_theta, defined up to a constant.
    """
    q, logq = target_logprobs.detach().exp(), target_logprobs.detach()
    logp = torch.log_softmax(llm_logits, dim=-1)
    p = logp.exp()
    match kind:
        case "reverse_kl":
            return (p * (logp - logq)).sum(-1)
        case "jsd":
            logm = torch.logaddexp(logp, logq) - math.log(2)
            forward = torch.where(q > 0, q * (logq - logm), 0.0).sum(-1)
            return 0.5 * (forward + (p * (logp - logm)).sum(-1))
        case "tv":
            return 0.5 * (p - q).abs().sum(-1)


def expected_satisfaction_logprobs(
    reference_logits: Float[Tensor, "*dims V"], auxiliary_logits: Float[Tensor, "*dims V"]
) -> tuple[Float[Tensor, "*dims"], Float[Tensor, "*dims"]]:
    """(log Rbar, log(1 - Rbar)) of a prefix, the expectation of R over the next token.

    Both are sums of positive terms, so that neither loses digits near 0 or 1.

    Args:
        reference_logits: logits of p(v | y_<i), the distribution that the rollouts came from.
        auxiliary_logits: logits of R(y_<i v), for every next token v.

    Source: [NADO], the right-hand side of forward consistency.
    """
    reference_logprobs = torch.log_softmax(reference_logits, dim=-1)
    satisfied = torch.logsumexp(reference_logprobs + F.logsigmoid(auxiliary_logits), dim=-1)
    violated = torch.logsumexp(reference_logprobs + F.logsigmoid(-auxiliary_logits), dim=-1)
    return satisfied.clamp(max=0.0), violated.clamp(max=0.0)


def auxiliary_logits(
    factors: Float[Tensor, "*dims J R"],
    offset: Float[Tensor, "*dims J"],
    tokens_JVR: Float[Tensor, "J V R"],
    prior_JV: Float[Tensor, "J V"],
    limit: Number,
) -> Float[Tensor, "*dims V"]:
    """logit R(y_<i v) of every next token v, where R is a product of J.

    u_j = offset_j + factors_j . tokens_j[v] + prior_j[v],  R = prod_j sigmoid(u_j)

    Args:
        factors: what the prefix makes of each token's evidence, of rank R.
        offset: the logit that the prefix has reached by itself.
        tokens_JVR: the vocabulary's side of the evidence.
        prior_JV: the evidence of each token on its own.
        limit: every u_j is cut at both sides.
    """
    logits = [
        (F.linear(f, tokens_VR, prior_V) + o[..., None]).clamp(-limit, limit)
        for f, o, tokens_VR, prior_V in zip(
            factors.unbind(-2), offset.unbind(-1), tokens_JVR, prior_JV, strict=True
        )
    ]
    return product_logits(logits)


def product_logits(logits: Sequence[Float[Tensor, "*dims"]]) -> Float[Tensor, "*dims"]:
    """The logit of a product of probabilities: L - log(1 - e^L),  L = sum_j log sigmoid(u_j).

    It is P[all hold] for events that are independent given the prefix. Of any others, that
    probability lies between the bounds of `frechet_bounds`.

    Args:
        logits: u_j of each factor; one alone is given back as it is. Beyond about 16, where
            float32 knows 1 from nothing else, the result is infinite.
    """
    if len(logits) == 1:
        return logits[0]
    logprob = F.logsigmoid(logits[0])
    for u in logits[1:]:
        logprob = logprob + F.logsigmoid(u)
    return logprob - torch.log(-torch.expm1(logprob))


def frechet_bounds(
    probs: Float[Tensor, "*dims J"],
) -> tuple[Float[Tensor, "*dims"], Float[Tensor, "*dims"]]:
    """(max(0, sum_j R_j - (J - 1)), min_j R_j), between which P[all hold] lies.

    So does the expectation of a product of labels in [0, 1], R_j being that of each label.

    Args:
        probs: R_j.

    Source: Fréchet 1935.
    """
    count = probs.shape[-1]
    return (probs.sum(-1) - (count - 1)).clamp_min(0), probs.amin(-1)


# A threshold below one


@overload
def floor_for_threshold(satisfaction: Number, threshold: Number) -> float: ...
@overload
def floor_for_threshold(satisfaction: Tensor, threshold: Number) -> Tensor: ...
def floor_for_threshold(
    satisfaction: Number | Float[Tensor, "*dims"], threshold: Number
) -> float | Float[Tensor, "*dims"]:
    """The floor alpha for which the target satisfies the constraint with probability `threshold`.

    alpha = min(1, R(x) / (1 - R(x)) · (1 - delta) / delta), and 1 wherever R(x) >= delta

    With it, q* is the closest distribution to p with E_q[C] >= delta, for a constraint that is 0 or
    1: E_q[C] is delta exactly where p falls short of it, and q is p where p does not.

    Args:
        satisfaction: R(x), the probability that the reference satisfies the constraint.
        threshold: delta, in [0, 1].

    Returns:
        alpha in [0, 1]: a float for a number, a tensor of the same shape for a tensor.

    Raises:
        ValueError: if the threshold, or a number given as satisfaction, is outside [0, 1].

    Source: the I-projection of [PR] on {q : E_q[C] >= delta}, in closed form.
    """
    _require_fraction("threshold", threshold)
    if not isinstance(satisfaction, Tensor):
        _require_fraction("satisfaction", satisfaction)
        return floor_for_threshold(
            torch.tensor(satisfaction, dtype=torch.float64), threshold
        ).item()
    odds = satisfaction * (1 - threshold) / ((1 - satisfaction) * threshold)
    return torch.where(satisfaction >= threshold, 1.0, odds.clamp(max=1.0))


def log_floor_for_threshold(
    satisfaction_logprob: Float[Tensor, "*dims"],
    violation_logprob: Float[Tensor, "*dims"],
    threshold: Number,
) -> Float[Tensor, "*dims"]:
    """log of `floor_for_threshold`, exact near satisfaction 0 and 1: min(0, logit R - logit delta).

    Args:
        satisfaction_logprob: log R(x), as from `expected_satisfaction_logprobs` at the last prompt
            token; the mean of a few labels is too coarse.
        violation_logprob: log(1 - R(x)), from the same call.
        threshold: delta, in [0, 1].

    Raises:
        ValueError: if the threshold is outside [0, 1].
    """
    _require_fraction("threshold", threshold)
    satisfaction_logit = log_odds(satisfaction_logprob, violation_logprob)
    threshold_logit = _logit(threshold)
    shortfall = satisfaction_logit - threshold_logit
    return torch.where(satisfaction_logit >= threshold_logit, 0.0, shortfall)


def shifted_to_mean(logits_S: Float[Tensor, " S"], mean: float) -> Float[Tensor, " S"]:
    """Logits moved by one number so that their probabilities have a mean.

    Args:
        logits_S: any.
        mean: in (0, 1); a mean of 0 or 1, which no finite shift reaches, moves nothing.
    """
    if not 0 < mean < 1:
        return logits_S
    low, high = -_SHIFT_LIMIT, _SHIFT_LIMIT
    for _ in range(60):
        shift = (low + high) / 2
        found = float(torch.sigmoid(logits_S.double() + shift).mean())
        low, high = (shift, high) if found < mean else (low, shift)
    return logits_S + (low + high) / 2


def target_kl(
    satisfaction_logprob: Float[Tensor, "*dims"],
    violation_logprob: Float[Tensor, "*dims"],
    floor: Number | Float[Tensor, "*#dims"] = 0.0,
) -> Float[Tensor, "*dims"]:
    """KL(q* || p) over whole completions, in nats: how far the target is from the reference.

    -log Z + V log alpha,  Z = alpha + (1 - alpha) R(x),  V = alpha (1 - R(x)) / Z = P_q[C = 0]

    Without a floor it is -log R(x). For a constraint that is 0 or 1.

    Args:
        satisfaction_logprob: log R(x).
        violation_logprob: log(1 - R(x)).
        floor: alpha in [0, 1], a number or a tensor that broadcasts.

    Raises:
        ValueError: if a number given as floor is outside [0, 1].
    """
    log_normaliser = floored_logprob(satisfaction_logprob, floor)
    floor = torch.as_tensor(floor, dtype=log_normaliser.dtype, device=log_normaliser.device)
    violation = torch.exp(violation_logprob - log_normaliser)
    return torch.xlogy(floor, floor) * violation - log_normaliser


def log_odds(
    logprob: Float[Tensor, "*dims"], complement_logprob: Float[Tensor, "*dims"]
) -> Float[Tensor, "*dims"]:
    """The logit of a probability from log P and log(1 - P)."""
    return logprob - complement_logprob


def floored_logprob(
    logprob: Float[Tensor, "*dims"], floor: Number | Float[Tensor, "*#dims"]
) -> Float[Tensor, "*dims"]:
    """log(alpha + (1 - alpha) R): log R raised to the floor, wherever a threshold is below one.

    Args:
        logprob: log R.
        floor: alpha in [0, 1], a number or a tensor that broadcasts against `logprob`.

    Raises:
        ValueError: if a number given as floor is outside [0, 1].
    """
    if not isinstance(floor, Tensor):
        _require_fraction("floor", floor)
        if floor == 0:
            return logprob
        floor = torch.tensor(floor, dtype=logprob.dtype, device=logprob.device)
    floor = floor.to(logprob.dtype)
    return torch.logaddexp(floor.log(), torch.log1p(-floor) + logprob)


# Weights of prefixes and samples


def prefix_logweights(
    token_logprobs_BT: Float[Tensor, "B T"], prompt_logprob_B: Float[Tensor, " B"]
) -> Float[Tensor, "B T"]:
    """log w of the prefix before each completion token: how much likelier under q* than under p.

    w[0] = 1,  w[j] = R(x, y_<j) / R(x)

    Position 0 is the first completion token. The low-variance form: it has the right mean when R is
    exact; `exact_prefix_logweights` has it for the q that a learned R defines.

    Args:
        token_logprobs_BT: log R(x, y_<=j) at the sampled token j, floored where a floor is used.
        prompt_logprob_B: log R(x), floored likewise.
    """
    return F.pad(token_logprobs_BT[:, :-1] - prompt_logprob_B[:, None], (1, 0))


def exact_prefix_logweights(
    token_logprobs_BT: Float[Tensor, "B T"], expected_logprobs_BT: Float[Tensor, "B T"]
) -> Float[Tensor, "B T"]:
    """log q(prefix) / p(prefix) before each completion token, for any R.

    log w[j] = sum_{i<j} (log R(x, y_<=i) - log Rbar(x, y_<i))

    Args:
        token_logprobs_BT: log R(x, y_<=j) at the sampled token j, floored where a floor is used.
        expected_logprobs_BT: log Rbar(x, y_<j), of the prefix before token j, floored likewise.
    """
    increments_BT = token_logprobs_BT - expected_logprobs_BT
    return F.pad(increments_BT[:, :-1], (1, 0)).cumsum(dim=1)


def clip_weights(
    weights: Float[Tensor, "*dims"], limit: Number, mask: Bool[Tensor, "*dims"]
) -> tuple[Float[Tensor, "*dims"], Float[Tensor, ""]]:
    """(the weights cut at `limit`, the share of their mass that was cut off).

    Args:
        weights: non-negative weights, not their logarithms.
        limit: the largest weight that is kept, above 0.
        mask: where a weight counts; elsewhere it becomes 0.
    """
    kept = torch.where(mask, weights, 0.0)
    clipped = kept.clamp(max=limit)
    mass = kept.sum()
    return clipped, torch.where(mass > 0, (kept - clipped).sum() / mass, 0.0)


def accepted_weights(
    labels: Float[Tensor, "*dims"],
    satisfaction: Float[Tensor, "*dims"],
    floor: Number | Float[Tensor, "*#dims"] = 0.0,
) -> Float[Tensor, "*dims"]:
    """The weight of a whole sample of p that makes it a sample of q*, by its own label.

    w = (alpha + (1 - alpha) C) / (alpha + (1 - alpha) R(x)), and 0 for C = alpha = 0

    It weighs every prefix of the sample alike. All samples take part: with a floor, those that
    violate the constraint count as well.

    Args:
        labels: C(x, y) in [0, 1].
        satisfaction: R(x) of each sample's prompt.
        floor: alpha in [0, 1], a number or a tensor that broadcasts.
    """
    wanted = floor + (1 - floor) * labels
    return torch.where(wanted > 0, wanted / (floor + (1 - floor) * satisfaction), 0.0)


def inclusion_chances(sizes: Float[Tensor, " N"], expected: int) -> Float[Tensor, " N"]:
    """Chances with which to keep each of some terms of a sum, so that `expected` are kept.

    A kept term counts 1 / chance times, which leaves the sum unbiased whatever the chances; they
    are in proportion to a term's size plus the mean size, so that no kept term counts more than
    about 2 N / expected times. Terms whose chance would exceed 1 are always kept.

    Args:
        sizes: how much each term is expected to matter, at least 0.
        expected: how many to keep; from N on all are kept.

    Source: Horvitz & Thompson 1952, sampling with unequal probabilities.
    """
    sizes = sizes + sizes.mean().clamp_min(torch.finfo(sizes.dtype).tiny)
    if expected >= len(sizes):
        return torch.ones_like(sizes)
    certain = torch.zeros_like(sizes, dtype=torch.bool)
    while True:
        rest = torch.where(certain, 0.0, sizes)
        chances = torch.where(certain, 1.0, rest * (expected - certain.sum()) / rest.sum())
        above = (chances > 1) & ~certain
        if not bool(above.any()):
            return chances
        certain |= above


def suffix_logweights(
    current_logprobs_BT: Float[Tensor, "B T"],
    sampling_logprobs_BT: Float[Tensor, "B T"],
    mask_BT: Bool[Tensor, "B T"],
) -> Float[Tensor, "B T"]:
    """log importance weight of the label at each completion token, for rollouts of another LLM.

    log w[j] = sum_{t>j} (log p(y_t | y_<t) - log pi(y_t | y_<t))

    R(x, y_<=j) is an expectation over what follows token j, so that only what follows is weighed.

    Args:
        current_logprobs_BT: log p of the sampled tokens, for the LLM that R is fitted to.
        sampling_logprobs_BT: log pi of the same tokens, for the LLM that sampled them.
        mask_BT: true at completion tokens.
    """
    ratio_BT = torch.where(mask_BT, current_logprobs_BT - sampling_logprobs_BT, 0.0)
    following_BT = F.pad(ratio_BT[:, 1:], (0, 1))
    return following_BT.flip(1).cumsum(dim=1).flip(1)


# Learning the satisfaction of prefixes


def bernoulli_cross_entropy(
    targets: Float[Tensor, "*dims"], logits: Float[Tensor, "*dims"]
) -> Float[Tensor, "*dims"]:
    """-G log R - (1 - G) log(1 - R), in nats, with R = sigmoid(logits); gradient R - G.

    Args:
        targets: G in [0, 1]: the label of the whole sequence, or a TD(lambda) target.
        logits: of R. Probabilities or log-probabilities here would be squashed twice.

    Source: [NADO], the loss of the sequence-level labels.
    """
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="none")


def consistency_divergence(
    expected_logprob: Float[Tensor, "*dims"],
    expected_complement_logprob: Float[Tensor, "*dims"],
    logits: Float[Tensor, "*dims"],
) -> Float[Tensor, "*dims"]:
    """KL(Bernoulli(Rbar) || Bernoulli(R)) in nats, with R = sigmoid(logits).

    The gradient to `logits` is R - Rbar, and none goes to Rbar. Finite for any logits, also at
    Rbar = 0 and 1.

    Args:
        expected_logprob: log Rbar of a prefix, from `expected_satisfaction_logprobs`.
        expected_complement_logprob: log(1 - Rbar), from the same call.
        logits: of R at the token that ends the prefix.

    Source: [NADO], the forward-consistency regulariser.
    """
    satisfied = _divergence_term(expected_logprob.detach(), F.logsigmoid(logits))
    return satisfied + _divergence_term(expected_complement_logprob.detach(), F.logsigmoid(-logits))


def _divergence_term(logprob: Tensor, estimate_logprob: Tensor) -> Tensor:
    """P (log P - log Q), 0 where P is."""
    prob = logprob.exp()
    return torch.where(prob > 0, prob * (logprob - estimate_logprob), 0.0)


def td_lambda_targets(
    labels_B: Float[Tensor, " B"],
    expected_BT: Float[Tensor, "B T"],
    mask_BT: Bool[Tensor, "B T"],
    td_lambda: Number,
) -> Float[Tensor, "B T"]:
    """Targets G of R at every completion token, without gradient.

    G[j] = C at the last token, else (1 - td_lambda) Rbar(y_<=j) + td_lambda G[j+1]

    Args:
        labels_B: C(x, y) in [0, 1].
        expected_BT: Rbar(y_<=j), the expectation over the token *after* token j; not read at the
            last token.
        mask_BT: true at completion tokens; elsewhere G is the label.
        td_lambda: 1 gives the label everywhere (Monte Carlo), 0 the one-step expectation.

    Raises:
        ValueError: if td_lambda is outside [0, 1].

    Source: TD(lambda), Sutton 1988, without a reward before the end.
    """
    _require_fraction("td_lambda", td_lambda)
    expected_BT = expected_BT.detach()
    has_next_BT = mask_BT & F.pad(mask_BT[:, 1:], (0, 1))
    targets = [labels_B]
    for j in reversed(range(expected_BT.shape[1])):
        mixed_B = (1 - td_lambda) * expected_BT[:, j] + td_lambda * targets[-1]
        targets.append(torch.where(has_next_BT[:, j], mixed_B, labels_B))
    return torch.stack(targets[:0:-1], dim=1)


def balanced_shift(satisfied_rate: Number, violating_rate: Number) -> float:
    """log(a / b): how far balanced batches shift the logit of R, at every prefix alike.

    Keep u calibrated by fitting u + log(a / b) to 0-1 labels; whatever else uses R uses u.

    Args:
        satisfied_rate: a, the rate or relative weight at which satisfied rollouts are kept.
        violating_rate: b, the same for the violating ones.

    Raises:
        ValueError: if either is not above 0.
    """
    if satisfied_rate <= 0 or violating_rate <= 0:
        raise ValueError(f"rates must be above 0, not {satisfied_rate} and {violating_rate}")
    return math.log(satisfied_rate / violating_rate)


def additive_offsets(
    evidence_BT: Float[Tensor, "B T"],
    mask_BT: Bool[Tensor, "B T"],
    prompt_bias_B: Float[Tensor, " B"],
) -> Float[Tensor, "B T"]:
    """The logit of R that the additive auxiliary holds before each token, in float32 or better.

    off[j] = c0(x) + sum of the evidence of the completion tokens before j

    Args:
        evidence_BT: s, the evidence of each token for the constraint, as a change of the logit.
        mask_BT: true at completion tokens; the evidence of the others is not added.
        prompt_bias_B: c0(x), the logit of R(x).

    Source: Bayes' rule; exact when a token's evidence depends on nothing but what s has seen.
    """
    dtype = torch.promote_types(evidence_BT.dtype, torch.float32)
    added_BT = torch.where(mask_BT, evidence_BT.to(dtype), 0.0)
    return prompt_bias_B[:, None].to(dtype) + F.pad(added_BT[:, :-1], (1, 0)).cumsum(dim=1)


# Soft scores


def tilt_labels(scores: Float[Tensor, "*dims"], beta: Number) -> Float[Tensor, "*dims"]:
    """exp(-beta (1 - s)), in (0, 1]: labels whose target is p(y) exp(beta s(y)) / Z.

    Args:
        scores: s in [0, 1].
        beta: 0 or more; the larger, the stricter.

    Source: [PR], the constraint E_q[s] >= b.
    """
    return torch.exp(-beta * (1 - scores))


def solve_tilt(scores: Float[Tensor, " N"], target_mean: Number) -> float:
    """The smallest beta >= 0 for which the tilted mean of the scores reaches `target_mean`.

    It maximises the concave dual beta b - log mean(exp(beta s)), whose slope is b minus the tilted
    mean, by bisection; the maximum is the KL of the tilted from the untilted sample, in nats. Look
    at `effective_sample_size(beta * scores)` before believing a large beta.

    Args:
        scores: s in [0, 1], of samples of p.
        target_mean: b, the mean that is wanted.

    Raises:
        ValueError: if there are no finite scores, or if no finite beta reaches the mean because it
            is not below the best score, or closer to it than any beta up to 1e9 can come.
    """
    scores = scores.detach().to(torch.float64)
    if scores.numel() == 0 or not bool(scores.isfinite().all()):
        raise ValueError("a tilt needs scores, and all of them finite")

    def tilted_mean(beta: float) -> float:
        return float((torch.softmax(beta * scores, dim=0) * scores).sum())

    if float(scores.mean()) >= target_mean:
        return 0.0
    best = float(scores.max())
    if target_mean >= best:
        raise ValueError(f"no tilt lifts the mean score to {target_mean}: the best score is {best}")
    low, high = 0.0, 1.0
    while tilted_mean(high) < target_mean:
        low, high = high, 2 * high
        if high > 1e9:
            raise ValueError(f"no tilt up to 1e9 lifts the mean score to {target_mean}")
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if tilted_mean(middle) < target_mean else (low, middle)
    return high


def effective_sample_size(logweights: Float[Tensor, "*dims N"]) -> Float[Tensor, "*dims"]:
    """(sum w)² / sum w², between 1 and N: how many equal weights carry as much information."""
    return torch.exp(
        2 * torch.logsumexp(logweights, dim=-1) - torch.logsumexp(2 * logweights, dim=-1)
    )


# What lambda does


def rate_at_equilibrium(corpus_rate: Number, kl_weight: Number, threshold: Number = 1.0) -> float:
    """Where corpus and constraint pull alike: the satisfaction (c + lambda delta) / (1 + lambda).

    For an LLM of enough capacity, a constraint that is 0 or 1, and both terms summed over sequences
    on the same prompts. A corpus at or above the threshold is left as it is.

    Args:
        corpus_rate: c, the share of the corpus that satisfies the constraint.
        kl_weight: lambda, 0 or more.
        threshold: delta, in [0, 1].

    Raises:
        ValueError: if a rate is outside [0, 1] or the weight negative.
    """
    _require_fraction("corpus_rate", corpus_rate)
    _require_fraction("threshold", threshold)
    if kl_weight < 0:
        raise ValueError(f"kl_weight must be 0 or more, not {kl_weight}")
    return (corpus_rate + kl_weight * max(corpus_rate, threshold)) / (1 + kl_weight)


def kl_weight_for_rate(rate: Number, corpus_rate: Number, threshold: Number = 1.0) -> float:
    """The lambda whose equilibrium is `rate`: (b - c) / (delta - b), and 0 where c >= b.

    The inverse of `rate_at_equilibrium`.

    Args:
        rate: b, the satisfaction that is wanted, below the threshold.
        corpus_rate: c, the share of the corpus that satisfies the constraint.
        threshold: delta, in [0, 1].

    Raises:
        ValueError: if a rate is outside [0, 1], or if `rate` is not below the threshold: no finite
            lambda reaches it.
    """
    for name, value in (("rate", rate), ("corpus_rate", corpus_rate), ("threshold", threshold)):
        _require_fraction(name, value)
    if rate >= threshold:
        raise ValueError(f"no lambda reaches the rate {rate}: it must be below {threshold}")
    return max(0.0, (rate - corpus_rate) / (threshold - rate))


def dual_step(kl_weight: Number, observed: Number, wanted: Number, gain: Number = 0.25) -> float:
    """One step of dual ascent on lambda, towards the rate that is wanted.

    At equilibrium the violation is v = (1 - c) / (1 + lambda), so lambda would bring it to 1 - b at
    once with 1 + lambda' = (1 + lambda) v / (1 - b). The LLM follows slowly and the observed rate
    is noisy: the step goes a part of that way, `gain`, on the logarithm, and the ratio is kept
    between 1/4 and 4.

    Args:
        kl_weight: lambda as it stands.
        observed: the satisfaction of the LLM's own samples.
        wanted: b, below 1.
        gain: 0 never moves, 1 goes all the way.

    Raises:
        ValueError: if a rate is outside [0, 1], or `wanted` is 1.

    Source: method, the dual of the constrained problem in the coordinates of its equilibrium.
    """
    _require_fraction("observed", observed)
    _require_fraction("wanted", wanted)
    if wanted >= 1:
        raise ValueError("no finite lambda brings every sample to satisfy the constraint")
    ratio = min(max((1 - observed) / (1 - wanted), 0.25), 4.0)
    return max(0.0, (1 + kl_weight) * ratio**gain - 1)


def satisfaction_lower_bound(kl: Number) -> float:
    """exp(-KL): the least satisfaction of an LLM whose KL(q* || p_theta) over sequences is `kl`.

    For a q* that always satisfies the constraint, made from any reference.
    """
    return math.exp(-kl)


def _logit(prob: Number) -> float:
    if prob in (0, 1):
        return math.inf if prob == 1 else -math.inf
    return math.log(prob) - math.log1p(-prob)


def _require_fraction(name: str, value: Number) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must lie in [0, 1], not {value}")
