"""The claims of the method, each a check of an implementation against the oracle.

A claim takes the functions it checks from its argument, the module `equations` or something with
the same names, and raises AssertionError where they are wrong: the tests hold the package against
the claims, and planted mistakes against the same claims.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import oracle
import torch
from oracle import Array, Tables
from torch import Tensor

Maths = Any  # what has the functions of `equations`


@dataclass(frozen=True)
class World:
    """A reference, a constraint, and what the oracle says of them."""

    vocabulary: int
    length: int
    logits: Tables
    labels: Array  # C of every completion
    probs: Array  # p of every completion
    satisfaction: list[Array]  # R of every prefix of 0..T tokens

    @property
    def rate(self) -> float:
        """R(x)."""
        return float(self.satisfaction[0][0])

    @property
    def target(self) -> Array:
        """q* of every completion."""
        weighted: Array = self.probs * self.labels / self.rate
        return weighted

    @property
    def auxiliary_logits(self) -> Tables:
        """The exact logits of R, laid out like the reference's."""
        return [
            oracle.logit(values).reshape(-1, self.vocabulary) for values in self.satisfaction[1:]
        ]

    def token_logprobs(self) -> Tensor:
        """log R(y_<=j) along every completion, [completions, T]; about -60 for R = 0."""
        columns = [
            self.satisfaction[t + 1][oracle.rows(self.vocabulary, self.length, t + 1)]
            for t in range(self.length)
        ]
        return torch.from_numpy(np.log(np.maximum(np.stack(columns, axis=1), np.exp(-60))))


def world(logits: Tables, labels: Array) -> World:
    length, vocabulary = len(logits), logits[0].shape[1]
    probs = oracle.completion_probs(oracle.softmax(logits))
    satisfaction = oracle.conditional_means(labels, probs, vocabulary, length)
    return World(vocabulary, length, logits, labels, probs, satisfaction)


def worlds() -> dict[str, World]:
    """Constraints of many kinds: arbitrary, absorbing, reached late, rare, with a stop token."""
    rng = np.random.default_rng(7)

    def build(vocabulary: int, length: int, kind: str) -> World:
        logits = oracle.random_logits(rng, vocabulary, length)
        tokens = oracle.completions(vocabulary, length)
        match kind:
            case "arbitrary":
                labels = rng.random(len(tokens)) < 0.4
            case "absorbing":
                labels = ~(tokens == 1).any(axis=1)
            case "contains":
                labels = (tokens == 1).any(axis=1)
            case "parity":
                labels = tokens.sum(axis=1) % 2 == 0
            case "rare":
                labels = (tokens == 1).all(axis=1)
            case _:
                logits = oracle.stopping(logits, stop=0)
                labels = (tokens == 1).sum(axis=1) == 1
        return world(logits, labels.astype(np.float64))

    shapes = {
        "arbitrary": (4, 4),
        "absorbing": (5, 3),
        "contains": (3, 6),
        "parity": (3, 4),
        "rare": (3, 3),
        "stopping": (3, 4),
    }
    return {kind: build(*shape, kind) for kind, shape in shapes.items()}


WORLDS = worlds()


def tensors(tables: Tables) -> list[Tensor]:
    return [torch.from_numpy(table.copy()) for table in tables]


def target_tables(maths: Maths, world: World, floor: float | Tensor = 0.0) -> Tables:
    """The next-token probabilities of q that the implementation makes from p and the exact R."""
    tables = zip(tensors(world.logits), tensors(world.auxiliary_logits), strict=True)
    return [maths.target_logprobs(p, u, floor).exp().numpy() for p, u in tables]


def weighted_kl(
    maths: Maths, world: World, llm_logits: list[Tensor], targets: list[Tensor]
) -> Tensor:
    """K = E_p sum_j w[j] KL_j: the regulariser of one prompt, with all rollouts at their weight."""
    prompt_logprob = torch.full((len(world.probs),), world.rate, dtype=torch.float64).log()
    logweights = maths.prefix_logweights(world.token_logprobs(), prompt_logprob)
    total = torch.zeros((), dtype=torch.float64)
    for t, (logits, target) in enumerate(zip(llm_logits, targets, strict=True)):
        kl_by_row = maths.kl_to_target(target, logits)
        kl = kl_by_row[torch.from_numpy(oracle.rows(world.vocabulary, world.length, t))]
        total = total + (torch.from_numpy(world.probs) * logweights[:, t].exp() * kl).sum()
    return total


def close(actual: object, expected: object, atol: float, rtol: float = 0.0) -> None:
    np.testing.assert_allclose(
        np.asarray(actual), np.asarray(expected), rtol=rtol, atol=atol, strict=False
    )


# The claims


def target_is_the_conditional(maths: Maths) -> None:
    """The product of the token-level target is p(y) C(y) / R(x), and every factor is normalised."""
    for world in WORLDS.values():
        tables = target_tables(maths, world)
        for table in tables:
            close(table.sum(axis=1), 1.0, atol=1e-12)
        close(oracle.completion_probs(tables), world.target, atol=1e-10)


def kl_is_minus_log_satisfaction(maths: Maths) -> None:
    """The weighted sum of token-level KLs is KL(q* || p) over completions, which is -log R(x)."""
    for world in WORLDS.values():
        references = tensors(world.logits)
        auxiliaries = tensors(world.auxiliary_logits)
        targets = [
            maths.target_logprobs(p, u) for p, u in zip(references, auxiliaries, strict=True)
        ]
        total = weighted_kl(maths, world, references, targets)
        close(total, oracle.kl(world.target, world.probs), atol=1e-10)
        close(total, -np.log(world.rate), atol=1e-10)


def gradient_is_that_of_minus_log_satisfaction(maths: Maths) -> None:
    """With the LLM itself as reference, the update descends -log P_theta(C = 1 | x)."""
    for world in (WORLDS["parity"], WORLDS["rare"], WORLDS["stopping"]):

        def minus_log_satisfaction(logits: Tables, labels: Array = world.labels) -> float:
            probs = oracle.completion_probs(oracle.softmax(logits))
            return -float(np.log(probs @ labels))

        llm = [logits.requires_grad_() for logits in tensors(world.logits)]
        auxiliaries = tensors(world.auxiliary_logits)
        targets = [maths.target_logprobs(p, u) for p, u in zip(llm, auxiliaries, strict=True)]
        gradients = torch.autograd.grad(weighted_kl(maths, world, llm, targets), llm)
        expected = oracle.slope(minus_log_satisfaction, world.logits)
        for gradient, table in zip(gradients, expected, strict=True):
            close(gradient, table, atol=1e-8)


def gradient_is_that_of_the_kl_to_a_frozen_target(maths: Maths) -> None:
    """With a frozen reference, the update descends KL(q* || p_theta) over completions."""
    world = WORLDS["parity"]
    elsewhere = oracle.random_logits(np.random.default_rng(1), world.vocabulary, world.length)
    llm = [logits.requires_grad_() for logits in tensors(elsewhere)]
    tables = zip(tensors(world.logits), tensors(world.auxiliary_logits), strict=True)
    targets = [maths.target_logprobs(p, u) for p, u in tables]
    total = weighted_kl(maths, world, llm, targets)

    def sequence_kl(logits: Tables) -> float:
        return oracle.kl(world.target, oracle.completion_probs(oracle.softmax(logits)))

    close(total.detach(), sequence_kl(elsewhere), atol=1e-10)
    gradients = torch.autograd.grad(total, llm)
    for gradient, table in zip(gradients, oracle.slope(sequence_kl, elsewhere), strict=True):
        close(gradient, table, atol=1e-8)


def share_of_good_arm(maths: Maths) -> float:
    """Two arms, R = (1, 0.1) and p(good) = 0.02, after 2,000 steps with the LLM as reference."""
    auxiliary_logits = torch.from_numpy(oracle.logit(np.array([1.0, 0.1])))
    logits = torch.tensor([0.02, 0.98], dtype=torch.float64).log().requires_grad_()
    for _ in range(2000):
        target = maths.target_logprobs(logits, auxiliary_logits)
        (gradient,) = torch.autograd.grad(maths.kl_to_target(target, logits), logits)
        with torch.no_grad():
            logits -= gradient
    return float(torch.softmax(logits.detach(), dim=-1)[0])


def live_target_teaches_the_satisfying_arm(maths: Maths) -> None:
    """A target made from the LLM itself at every step leads to the arm that satisfies."""
    close(share_of_good_arm(maths), 0.9997, atol=1e-4)


def labels_teach_the_satisfaction(maths: Maths) -> None:
    """The cross-entropy to the labels is 0 where R is right and sure, and its slope is R - C."""
    sure = torch.tensor([40.0, -40.0], dtype=torch.float64)
    labels = torch.tensor([1.0, 0.0], dtype=torch.float64)
    close(maths.bernoulli_cross_entropy(labels, sure), 0.0, atol=1e-12)
    logits = torch.linspace(-4, 4, 9, dtype=torch.float64).requires_grad_()
    for label in (0.0, 0.3, 1.0):
        loss = maths.bernoulli_cross_entropy(torch.full_like(logits, label), logits)
        (gradient,) = torch.autograd.grad(loss.sum(), logits)
        close(gradient, 1 / (1 + np.exp(-logits.detach().numpy())) - label, atol=1e-12)


def recursion_is_enumeration(maths: Maths) -> None:
    """From the labels backwards, one-step expectations give R and 1 - R of every prefix."""
    for world in WORLDS.values():
        auxiliary = torch.from_numpy(oracle.logit(world.labels))
        for t in reversed(range(world.length)):
            satisfied, violated = maths.expected_satisfaction_logprobs(
                torch.from_numpy(world.logits[t]), auxiliary.reshape(-1, world.vocabulary)
            )
            possible = oracle.prefix_sums(world.probs, world.vocabulary, t) > 0
            close(satisfied.exp()[possible], world.satisfaction[t][possible], atol=1e-10)
            close(violated.exp()[possible], 1 - world.satisfaction[t][possible], atol=1e-10)
            auxiliary = maths.log_odds(satisfied, violated).clamp(-60, 60)


def prefix_weights_are_unbiased(maths: Maths) -> None:
    """E_p[w[j] f(y_<j)] = E_q*[f(y_<j)] for every f, that the completion goes on for one."""
    for world in WORLDS.values():
        prompt_logprob = torch.full((len(world.probs),), world.rate, dtype=torch.float64).log()
        weights = maths.prefix_logweights(world.token_logprobs(), prompt_logprob).exp().numpy()
        for t in range(world.length):
            reweighted = oracle.prefix_sums(world.probs * weights[:, t], world.vocabulary, t)
            close(reweighted, oracle.prefix_sums(world.target, world.vocabulary, t), atol=1e-10)
