"""The claims of the method, verified on this machine by enumerating a small language model.

Shape suffixes: H prefixes of one length, V vocabulary, Y completions, T completion positions.

First the equations, one side of each check being the package's, the other a sum over all
completions, in float64. The model is tabular: `tables[t]` has a row for each prefix of t tokens,
the row number being the prefix read in base V.

Then the training: the sampler, the auxiliary and the update of every run, on a model of which all
completions are known (`tabular`).
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from constrained_ft import equations
from constrained_ft.compose import compose
from constrained_ft.finetune import update_llm
from constrained_ft.llm import LLM
from constrained_ft.parts import Parts
from constrained_ft.progress import Display
from constrained_ft.randomness import generator_for
from constrained_ft.rollouts import Rollouts, label
from constrained_ft.tabular import every_completion, table_parts
from constrained_ft.target import Target, learn_target, states_of

_VOCABULARY, _LENGTH = 5, 5
_EXACT = 1e-8
_CERTAIN = 60.0  # the logit that stands for a probability of 0 or 1

# The trained model: completions of up to three letters, with at most one c; the dot ends them.
_LETTERS = ".abc"
_ITERATIONS = 3
_TRAINING = (
    "llm=tiny",
    "constraint=letters",
    "constraint.scorer.letter=c",
    "constraint.scorer.at_most=1",
    "constraint.labels=hard",
    "data=file",
    "data.path=none",
    "prompts=file",
    "prompts.path=none",
    "prompts.prompts_per_iteration=64",
    "prompts.samples_per_prompt=768",
    "prompts.max_new_tokens=3",
    "sampler.batch_size=4096",
    "evaluation.judge=null",
    # A prefix's mark in the hidden state lets a plain head hold any R; earlier models' rollouts
    # would bias it.
    "auxiliary=head",
    "auxiliary.rank=4",
    "auxiliary.weight_decay=0",
    "auxiliary.consistency_weight=0.3",
    "auxiliary.learning_rate=0.01",
    "auxiliary.batch_size=4096",
    "auxiliary.max_epochs=30",
    "auxiliary.patience=5",
    "auxiliary.replay_iterations=0",
)
_WITHOUT_CORPUS = (
    "trainer.corpus=false",
    "trainer.kl_weight=1",
    f"trainer.iterations={_ITERATIONS}",
    "trainer.steps_per_iteration=256",
    "trainer.rollouts_per_step=192",
    "trainer.learning_rate=0.2",
    "trainer.lr_scheduler=cosine",
    "trainer.max_grad_norm=100",
    # A whole iteration gets all the way to its target. A stale R, applied to the LLM that is
    # already there, would ask for the constraint twice.
    "trainer.reference=matched",
)

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


def selfcheck(display: Display) -> bool:
    """Check everything, show the table, and say whether all of it holds; half a minute."""
    checks = equation_checks()
    display.phase("training a small model with both schedules", 2 * _ITERATIONS)
    for schedule in ("alternating", "overlapped"):
        checks += training_checks(schedule, display)
    rows = [
        [
            check.claim,
            f"{check.tolerance:.0e}",
            f"{check.error:.1e}",
            "yes" if check.passed else "NO",
        ]
        for check in checks
    ]
    display.table("Claims", ["claim", "tolerance", "error", "holds"], rows)
    return all(check.passed for check in checks)


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


def training_checks(schedule: str, display: Display, seed: int = 0) -> list[Check]:
    """Train a table on nothing but the constraint, and compare with what it should become.

    Args:
        schedule: `alternating` or `overlapped`.
        display: advanced by iterations.
        seed: of the run.
    """
    config = compose([*_TRAINING, f"trainer={schedule}", *_WITHOUT_CORPUS, f"seed={seed}"])
    length = config.prompts.max_new_tokens
    parts = table_parts(_LETTERS, length, config)
    every = every_completion(parts.llm, length)
    labels_Y = label(every, parts.scorers, config.constraint).labels_N.double()
    probs_Y = _probs(parts.llm, every)
    target_Y = probs_Y * labels_Y / (probs_Y @ labels_Y)
    target: Target | None = None
    auxiliary_error = 0.0
    for iteration in range(1, _ITERATIONS + 1):
        # The schedule of `train`, which saves and reports besides.
        newest = target
        if schedule == "alternating" or newest is None or iteration < _ITERATIONS:
            newest = learn_target(parts, config, parts.llm.frozen(), iteration)
            auxiliary_error = max(auxiliary_error, error_of_auxiliary(parts, every, labels_Y))
        if schedule == "alternating" or target is None:
            target = newest
        update_llm(parts, target, config, iteration)
        target = newest
        display.advance()
    trained_Y = _probs(parts.llm, every)
    kl = (torch.xlogy(target_Y, target_Y) - torch.xlogy(target_Y, trained_Y)).sum()
    return [
        Check(
            claim=f"{schedule}: R fitted to rollouts is R by enumeration, mean over prefixes",
            tolerance=0.02,
            error=auxiliary_error,
        ),
        Check(
            claim=f"{schedule}: without a corpus the LLM becomes its first target, KL in nats",
            tolerance=1e-3,
            error=float(kl),
        ),
    ]


@torch.no_grad()
def error_of_auxiliary(parts: Parts, every: Rollouts, labels_Y: Tensor) -> float:
    """Mean over prefixes, as the LLM writes them, of |R learned - R by enumeration|."""
    probs_Y = _probs(parts.llm, every)
    same_YYT = (every.ids_NT[:, None] == every.ids_NT) & (every.mask_NT[:, None] == every.mask_NT)
    shared_YYT = same_YYT.double().cumprod(-1)
    mass_YT = torch.einsum("yzt,z->yt", shared_YYT, probs_Y)
    exact_YT = torch.einsum("yzt,z->yt", shared_YYT, probs_Y * labels_Y) / mass_YT
    auxiliary = parts.auxiliary.frozen()
    hidden_YTD = states_of(parts.llm.frozen(), every)
    evidence = auxiliary.read_examples(hidden_YTD, every.ids_NT, every.mask_NT)
    logits_YT = auxiliary.table.logits_of(evidence.factors_NTJR, evidence.offset_NTJ, every.ids_NT)
    weights_YT = probs_Y[:, None] * every.mask_NT
    errors_YT = (logits_YT.sigmoid() - exact_YT).abs()
    return float((errors_YT * weights_YT).sum() / weights_YT.sum())


@torch.no_grad()
def _probs(llm: LLM, every: Rollouts) -> Float[Tensor, " Y"]:
    """p(y) of every completion."""
    llm_logits = llm.head(states_of(llm.frozen(), every)).double()
    logprobs_YT = torch.log_softmax(llm_logits, dim=-1).gather(-1, every.ids_NT[..., None])[..., 0]
    return (logprobs_YT * every.mask_NT).sum(-1).exp()


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
