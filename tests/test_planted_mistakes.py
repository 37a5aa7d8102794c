"""The claims that the package passes reject the mistakes people make when they write this down."""

from collections.abc import Callable
from types import SimpleNamespace

import claims
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from constrained_ft import equations

Claim = Callable[[claims.Maths], None]


def planted(**mistakes: Callable[..., Tensor]) -> SimpleNamespace:
    """The package's equations with some of them replaced."""
    return SimpleNamespace(**(vars(equations) | mistakes))


def target_towards_violation(p: Tensor, u: Tensor, floor: float = 0.0) -> Tensor:
    return torch.log_softmax(torch.log_softmax(p, -1) + F.logsigmoid(-u), -1)


def target_without_normaliser(p: Tensor, u: Tensor, floor: float = 0.0) -> Tensor:
    return torch.log_softmax(p, -1) + F.logsigmoid(u)


def target_squashed_twice(p: Tensor, u: Tensor, floor: float = 0.0) -> Tensor:
    return torch.log_softmax(torch.log_softmax(p, -1) + F.logsigmoid(torch.sigmoid(u)), -1)


def kl_through_a_live_target(target: Tensor, logits: Tensor) -> Tensor:
    log_ratio = target - torch.log_softmax(logits, -1)
    kl: Tensor = torch.where(target.exp() > 0, target.exp() * log_ratio, 0.0).sum(-1)
    return kl


def reverse_kl(target: Tensor, logits: Tensor) -> Tensor:
    logprobs = torch.log_softmax(logits, -1)
    log_ratio = logprobs - target.detach().clamp(min=-60)
    kl: Tensor = torch.where(logprobs.exp() > 0, logprobs.exp() * log_ratio, 0.0).sum(-1)
    return kl


def cross_entropy_called_kl(target: Tensor, logits: Tensor) -> Tensor:
    probs = target.detach().exp()
    logprobs = torch.log_softmax(logits, -1)
    cross_entropy: Tensor = -torch.where(probs > 0, probs * logprobs, 0.0).sum(-1)
    return cross_entropy


def kl_with_the_wrong_sign(target: Tensor, logits: Tensor) -> Tensor:
    return -equations.kl_to_target(target, logits)


def prefixes_unweighted(tokens: Tensor, prompt: Tensor) -> Tensor:
    return torch.zeros_like(tokens)


def prefix_weights_without_normaliser(tokens: Tensor, prompt: Tensor) -> Tensor:
    return equations.prefix_logweights(tokens, torch.zeros_like(prompt))


def prefix_weights_upside_down(tokens: Tensor, prompt: Tensor) -> Tensor:
    return -equations.prefix_logweights(tokens, prompt)


def cross_entropy_of_squashed_logits(targets: Tensor, logits: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(F.logsigmoid(logits), targets, reduction="none")


def expectation_with_logits_for_logprobs(p: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    return torch.logsumexp(p + F.logsigmoid(u), -1), torch.logsumexp(p + F.logsigmoid(-u), -1)


CAUGHT = [
    (target_towards_violation, "target_logprobs", claims.target_is_the_conditional),
    (target_without_normaliser, "target_logprobs", claims.target_is_the_conditional),
    (target_squashed_twice, "target_logprobs", claims.target_is_the_conditional),
    (target_without_normaliser, "target_logprobs", claims.kl_is_minus_log_satisfaction),
    (cross_entropy_called_kl, "kl_to_target", claims.kl_is_minus_log_satisfaction),
    (kl_with_the_wrong_sign, "kl_to_target", claims.kl_is_minus_log_satisfaction),
    (
        kl_with_the_wrong_sign,
        "kl_to_target",
        claims.gradient_is_that_of_minus_log_satisfaction,
    ),
    (
        kl_through_a_live_target,
        "kl_to_target",
        claims.gradient_is_that_of_minus_log_satisfaction,
    ),
    (kl_through_a_live_target, "kl_to_target", claims.live_target_teaches_the_satisfying_arm),
    (reverse_kl, "kl_to_target", claims.gradient_is_that_of_the_kl_to_a_frozen_target),
    (
        prefixes_unweighted,
        "prefix_logweights",
        claims.gradient_is_that_of_minus_log_satisfaction,
    ),
    (
        prefixes_unweighted,
        "prefix_logweights",
        claims.gradient_is_that_of_the_kl_to_a_frozen_target,
    ),
    (prefixes_unweighted, "prefix_logweights", claims.kl_is_minus_log_satisfaction),
    (prefixes_unweighted, "prefix_logweights", claims.prefix_weights_are_unbiased),
    (prefix_weights_without_normaliser, "prefix_logweights", claims.prefix_weights_are_unbiased),
    (prefix_weights_upside_down, "prefix_logweights", claims.prefix_weights_are_unbiased),
    (
        cross_entropy_of_squashed_logits,
        "bernoulli_cross_entropy",
        claims.labels_teach_the_satisfaction,
    ),
    (
        expectation_with_logits_for_logprobs,
        "expected_satisfaction_logprobs",
        claims.recursion_is_enumeration,
    ),
]


@pytest.mark.parametrize(
    ("mistake", "name", "claim"),
    [pytest.param(*c, id=f"{c[0].__name__}-{c[2].__name__}") for c in CAUGHT],
)
def test_the_claim_rejects_the_mistake(
    mistake: Callable[..., Tensor], name: str, claim: Claim
) -> None:
    with pytest.raises(AssertionError):
        claim(planted(**{name: mistake}))


@pytest.mark.parametrize("claim", dict.fromkeys(c[2] for c in CAUGHT))
def test_the_package_passes_what_rejects_the_mistakes(claim: Claim) -> None:
    claim(planted())


def test_an_undetached_live_target_ends_on_the_violating_arm() -> None:
    assert claims.share_of_good_arm(planted(kl_to_target=kl_through_a_live_target)) < 1e-3
