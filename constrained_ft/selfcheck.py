"""The claims of the method, verified on this machine by enumerating a small language model.

Shape suffixes: H prefixes of one length, V vocabulary, Y completions.

The model is tabular: `tables[t]` has a row for each prefix of t tokens, the row number being the
prefix read in base V. One side of each check is the package's equation, the other a sum over all
completions; everything is in float64.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from constrained_ft import equations
from constrained_ft.distributed import generator_for

_VOCABULARY, _LENGTH = 5, 5
_EXACT = 1e-8
_CERTAIN = 60.0  # the logit that stands for a probability of 0 or 1

Tables = list[Tensor]


@dataclass(frozen=True, kw_only=True)
class Check:
    """One claim, how far off it may be, and how far off it was."""

    claim: str
    tolerance: float
    error: float

    @property
    def passed(self) -> bool:
        """Whether the error is a number within the tolerance."""
        return self.error <= self.tolerance


def equation_checks(seed: int = 0) -> list[Check]:
    """Check the equations on a random tabular model and a random constraint; about a second."""
    generator = generator_for(seed, "selfcheck")
    tables = [
        torch.randn(_VOCABULARY**t, _VOCABULARY, generator=generator, dtype=torch.float64)
        for t in range(_LENGTH)
    ]
    scores_Y = torch.rand(_VOCABULARY**_LENGTH, generator=generator, dtype=torch.float64)
    labels_Y = (scores_Y < 0.3).double()
    return [
        *_decomposition(tables, labels_Y),
        *_gradient(tables, labels_Y),
        *_thresholds(tables, labels_Y),
        *_tilt(scores_Y),
        *_equilibrium(tables, labels_Y),
        *_live_target(),
        *_extremes(),
    ]


def _decomposition(tables: Tables, labels_Y: Tensor) -> list[Check]:
    probs_Y, satisfaction = _enumerate(tables, labels_Y)
    recursion_error = 0.0
    logits_Y = _logit(labels_Y)
    for t in reversed(range(_LENGTH)):
        satisfied_H, violated_H = equations.expected_satisfaction_logprobs(
            tables[t], logits_Y.reshape(-1, _VOCABULARY)
        )
        logits_Y = equations.log_odds(satisfied_H, violated_H).clamp(-_CERTAIN, _CERTAIN)
        recursion_error = max(recursion_error, _gap(satisfied_H.exp(), satisfaction[t]))
    targets = _targets(tables, satisfaction)
    target_Y = probs_Y * labels_Y / satisfaction[0]
    weights = _prefix_weights(satisfaction)
    weight_error = max(
        _gap(_prefix_sums(probs_Y * weights[t], t), _prefix_sums(target_Y, t))
        for t in range(_LENGTH)
    )
    kl = _weighted_kl(tables, targets, probs_Y, weights)
    return [
        _exact("R from one-step expectations is R by enumeration", recursion_error),
        _exact(
            "the token-level target is p(y) C(y) / R(x) over completions",
            _gap(_completion_logprobs(targets).exp(), target_Y),
        ),
        _exact("prefix weights turn the reference's prefixes into the target's", weight_error),
        _exact(
            "the weighted token-level KLs add up to -log R(x)", _gap(kl, -satisfaction[0].log())
        ),
    ]


def _gradient(tables: Tables, labels_Y: Tensor) -> list[Check]:
    probs_Y, satisfaction = _enumerate(tables, labels_Y)
    llm = [table.clone().requires_grad_() for table in tables]
    targets = _targets(llm, satisfaction)
    kl = _weighted_kl(llm, targets, probs_Y, _prefix_weights(satisfaction))
    ours = torch.autograd.grad(kl, llm)
    minus_log_rate = -(_completion_logprobs(llm).exp() @ labels_Y).log()
    theirs = torch.autograd.grad(minus_log_rate, llm)
    error = max(_gap(a, b) for a, b in zip(ours, theirs, strict=True))
    return [_exact("the gradient of the update is that of -log P(C = 1 | x)", error)]


def _thresholds(tables: Tables, labels_Y: Tensor) -> list[Check]:
    probs_Y, satisfaction = _enumerate(tables, labels_Y)
    rate = satisfaction[0]
    rate_error, kl_error = 0.0, 0.0
    for threshold in (0.5, 0.9, 0.99):
        floor = equations.floor_for_threshold(rate, threshold)
        target_Y = _completion_logprobs(_targets(tables, satisfaction, floor)).exp()
        rate_error = max(rate_error, abs(float(target_Y @ labels_Y) - threshold))
        kl = (target_Y * (target_Y / probs_Y).log()).sum()
        expected = equations.target_kl(rate.log(), (1 - rate).log(), floor)
        kl_error = max(kl_error, _gap(kl, expected))
    return [
        _exact("the target meets a threshold below one exactly", rate_error),
        _exact("its KL from the reference is that of the two rates", kl_error),
    ]


def _tilt(scores_Y: Tensor) -> list[Check]:
    wanted = 0.8
    beta = equations.solve_tilt(scores_Y, wanted)
    uniform = [torch.zeros(_VOCABULARY**t, _VOCABULARY).double() for t in range(_LENGTH)]
    probs_Y, satisfaction = _enumerate(uniform, equations.tilt_labels(scores_Y, beta))
    target_Y = _completion_logprobs(_targets(uniform, satisfaction)).exp()
    kl = (target_Y * (target_Y / probs_Y).log()).sum()
    dual = beta * wanted - torch.exp(beta * scores_Y).mean().log()
    return [
        _exact(
            "the tilted target has the mean score asked for",
            abs(float(target_Y @ scores_Y) - wanted),
        ),
        _exact("the tilt leaves no duality gap", _gap(kl, dual)),
    ]


def _equilibrium(tables: Tables, labels_Y: Tensor) -> list[Check]:
    """The LLM (corpus + lambda q*) / (1 + lambda), solved by hand, must be where training rests."""
    corpus_Y = _completion_logprobs([-table for table in tables]).exp()
    corpus_rate = float(corpus_Y @ labels_Y)
    rate_error, slope = 0.0, 0.0
    for kl_weight in (1.0, 9.0):
        rate = equations.rate_at_equilibrium(corpus_rate, kl_weight)
        settled_Y = corpus_Y / (1 + kl_weight - kl_weight / rate * labels_Y)
        llm = [
            (_prefix_sums(settled_Y, t + 1).reshape(-1, _VOCABULARY)).log().requires_grad_()
            for t in range(_LENGTH)
        ]
        probs_Y, satisfaction = _enumerate([table.detach() for table in llm], labels_Y)
        targets = _targets(llm, satisfaction)
        kl = _weighted_kl(llm, targets, probs_Y, _prefix_weights(satisfaction))
        loss = -(corpus_Y * _completion_logprobs(llm)).sum() + kl_weight * kl
        gradients = torch.autograd.grad(loss, llm)
        slope = max(slope, *(float(gradient.abs().max()) for gradient in gradients))
        rate_error = max(rate_error, abs(float(satisfaction[0]) - rate))
    return [
        _exact("at rest the satisfaction is (corpus + lambda) / (1 + lambda)", rate_error),
        _exact("training rests there: corpus term and lambda KL cancel", slope),
    ]


def _live_target() -> list[Check]:
    auxiliary_logits = _logit(torch.tensor([1.0, 0.1], dtype=torch.float64))
    logits = torch.tensor([0.02, 0.98], dtype=torch.float64).log().requires_grad_()
    for _ in range(1000):
        target = equations.target_logprobs(logits, auxiliary_logits)
        (gradient,) = torch.autograd.grad(equations.kl_to_target(target, logits), logits)
        logits = (logits - gradient).detach().requires_grad_()
    violating = float(torch.softmax(logits.detach(), dim=-1)[1])
    claim = "a target from the LLM itself takes no gradient: the good choice wins"
    return [Check(claim=claim, tolerance=1e-3, error=violating)]


def _extremes() -> list[Check]:
    bad = 0
    for dtype in (torch.float32, torch.float64):
        extremes = torch.tensor([-1e4, -_CERTAIN, 0.0, _CERTAIN, 1e4], dtype=dtype)
        auxiliary = torch.cartesian_prod(extremes, extremes, extremes)
        reference = auxiliary.flip(0).clone()
        reference[::2, 1] = -math.inf
        llm = reference.clone().requires_grad_()
        kl = equations.kl_to_target(equations.target_logprobs(reference, auxiliary), llm)
        expected = equations.expected_satisfaction_logprobs(reference, auxiliary)
        (gradient,) = torch.autograd.grad(kl.sum(), llm)
        bad += sum(int((~value.isfinite()).sum()) for value in (kl, gradient, *expected))
    return [
        Check(
            claim="extreme logits give finite losses and gradients", tolerance=0.0, error=float(bad)
        )
    ]


def _completion_logprobs(tables: Tables) -> Float[Tensor, " Y"]:
    """log p(y) of every completion, from logits or log-probabilities of next tokens."""
    logprobs = torch.zeros(1, dtype=torch.float64)
    for table in tables:
        logprobs = (logprobs[:, None] + torch.log_softmax(table, dim=-1)).flatten()
    return logprobs


def _prefix_sums(values_Y: Tensor, t: int) -> Float[Tensor, " H"]:
    return values_Y.reshape(_VOCABULARY**t, -1).sum(dim=-1)


def _enumerate(tables: Tables, labels_Y: Tensor) -> tuple[Tensor, list[Tensor]]:
    """(p of every completion, R of every prefix of 0..T tokens)."""
    probs_Y = _completion_logprobs(tables).exp()
    satisfaction = [
        _prefix_sums(probs_Y * labels_Y, t) / _prefix_sums(probs_Y, t) for t in range(_LENGTH + 1)
    ]
    return probs_Y, satisfaction


def _targets(
    tables: Tables, satisfaction: list[Tensor], floor: float | Tensor = 0.0
) -> list[Float[Tensor, "_ V"]]:
    return [
        equations.target_logprobs(table, _logit(rate).reshape(table.shape), floor)
        for table, rate in zip(tables, satisfaction[1:], strict=True)
    ]


def _prefix_weights(satisfaction: list[Tensor]) -> list[Float[Tensor, " Y"]]:
    """The weight of each prefix of 0..T-1 tokens, for every completion that runs through it."""
    num = len(satisfaction[-1])
    along = [rate.repeat_interleave(num // len(rate)) for rate in satisfaction]
    token_logprobs = torch.stack(along[1:], dim=1).clamp_min(math.exp(-_CERTAIN)).log()
    return list(equations.prefix_logweights(token_logprobs, along[0].log()).exp().unbind(1))


def _weighted_kl(
    llm: Tables, targets: list[Tensor], probs_Y: Tensor, weights: list[Tensor]
) -> Float[Tensor, ""]:
    """E_p sum_t w KL: what one prompt contributes to the loss, were all rollouts drawn."""
    total = torch.zeros((), dtype=torch.float64)
    for t, (target, table, weight_Y) in enumerate(zip(targets, llm, weights, strict=True)):
        mass_H = _prefix_sums(probs_Y * weight_Y, t)
        total = total + (mass_H * equations.kl_to_target(target, table)).sum()
    return total


def _logit(probs: Tensor) -> Tensor:
    return torch.logit(probs).clamp(-_CERTAIN, _CERTAIN)


def _gap(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max())


def _exact(claim: str, error: float) -> Check:
    return Check(claim=claim, tolerance=_EXACT, error=error)
