"""Other divergences than KL(q || p), against scipy and against enumeration."""

import itertools
from typing import Any, Literal

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from small import run, small_config

from constrained_ft import equations, metrics
from constrained_ft.compose import compose
from constrained_ft.divergences import divergence_loss
from constrained_ft.errors import ConfigError
from constrained_ft.fused import Head, Tilt

V, T = 3, 3
KINDS: list[Literal["reverse_kl", "jsd", "tv"]] = ["reverse_kl", "jsd", "tv"]


def drawn(*shape: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def test_each_divergence_is_that_of_scipy() -> None:
    logq, logits = drawn(50, 7, seed=0).log_softmax(-1), drawn(50, 7, seed=1)
    q, p = logq.exp().numpy(), logits.softmax(-1).numpy()
    found = {kind: equations.divergence_to_target(kind, logq, logits).numpy() for kind in KINDS}
    np.testing.assert_allclose(found["reverse_kl"], (p * np.log(p / q)).sum(-1), atol=1e-12)
    np.testing.assert_allclose(found["jsd"], jensenshannon(p, q, axis=-1) ** 2, atol=1e-12)
    np.testing.assert_allclose(found["tv"], np.abs(p - q).sum(-1) / 2, atol=1e-12)


def test_the_bounded_ones_take_a_target_with_zeros() -> None:
    logq = torch.tensor([[0.0, -torch.inf]], dtype=torch.float64)
    logits = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    jsd = equations.divergence_to_target("jsd", logq, logits)
    np.testing.assert_allclose(jsd.detach(), jensenshannon([1, 0], [0.5, 0.5]) ** 2, atol=1e-12)
    (gradient,) = torch.autograd.grad(jsd.sum(), logits)
    assert bool(gradient.isfinite().all())
    assert equations.divergence_to_target("tv", logq, logits).item() == 0.5


class Table:
    """All completions of a table, one row a prefix; R is a table too."""

    def __init__(self) -> None:
        self.prefixes = [p for t in range(T) for p in itertools.product(range(V), repeat=t)]
        place = {prefix: i for i, prefix in enumerate(self.prefixes)}
        self.completions = list(itertools.product(range(V), repeat=T))
        self.at = torch.tensor([[place[y[:t]] for t in range(T)] for y in self.completions])
        self.said = torch.tensor(self.completions)
        count = len(self.prefixes)
        self.reference = drawn(count, V, seed=2)
        self.evidence = drawn(count, V, seed=3)
        self.logits = (self.reference + drawn(count, V, seed=4)).requires_grad_()

    def log_of(self, logits: torch.Tensor) -> torch.Tensor:
        """log of every completion's probability."""
        logprobs = logits.log_softmax(-1)[self.at]
        return logprobs.gather(-1, self.said[..., None])[..., 0].sum(-1)

    def target(self) -> torch.Tensor:
        return equations.target_logprobs(self.reference, self.evidence, 0.0)

    def loss(self, kind: Any, shares: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Of all completions, each counting as its share says."""
        count = len(self.completions)
        at_M, said_M = self.at.reshape(-1), self.said.reshape(-1)
        rows_M = torch.arange(count).repeat_interleave(T)
        steps_M = torch.arange(T).repeat(count)
        one_hot = torch.eye(len(self.prefixes))
        share_M = shares[rows_M].float()
        tilt = Tilt(
            hidden_MD=one_hot[at_M],
            head=Head(weight_VD=self.reference.T.float(), bias_V=None, bf16_valued=False),
            factors_MJR=one_hot[at_M][:, None],
            offset_MJ=torch.zeros(len(at_M), 1),
            tokens_JVR=self.evidence.T.float()[None],
            prior_JV=torch.zeros(1, V),
            limit=15.0,
            floor_M=None,
            weights_M=weights.float() * share_M,
        )
        head = Head(weight_VD=self.logits.T.float(), bias_V=None, bf16_valued=False)
        return divergence_loss(
            kind,
            one_hot[at_M],
            head,
            tilt,
            share_M=share_M,
            said_M=said_M,
            rows_M=rows_M,
            steps_M=steps_M,
        )


def test_the_gradient_of_the_reverse_kl_is_that_of_whole_completions() -> None:
    table = Table()
    log_p, log_q = table.log_of(table.logits), table.log_of(table.target())
    exact = (log_p.exp() * (log_p - log_q)).sum()
    (wanted,) = torch.autograd.grad(exact, table.logits)
    shares = table.log_of(table.logits).exp().detach()
    found = table.loss("reverse_kl", shares, torch.ones(1, dtype=torch.float64))
    (gradient,) = torch.autograd.grad(found, table.logits)
    np.testing.assert_allclose(found.detach(), exact.detach(), rtol=1e-5)
    np.testing.assert_allclose(gradient, wanted, atol=1e-5)


@pytest.mark.parametrize("kind", ["jsd", "tv"])
def test_the_others_read_the_mixture_of_prefixes(kind: Any) -> None:
    table = Table()
    shares = table.log_of(table.logits).exp().detach()
    weight = torch.tensor([3.0], dtype=torch.float64)
    local = equations.divergence_to_target(kind, table.target(), table.logits)[table.at]
    wanted = (2.0 * shares[:, None] * local).sum()  # (3 + 1) / 2
    assert float(table.loss(kind, shares, weight).detach()) == pytest.approx(
        float(wanted.detach()), rel=1e-5
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_with_another_divergence_ends(kind: str, tmp_path: Any) -> None:
    config = small_config(f"trainer.divergence={kind}", "constraint.labels=tilt")
    folder = run(config, tmp_path / "run")
    rows = metrics.read(folder.metrics_file)
    assert len(rows) == 3
    assert all(row["update/kl"] >= 0 for row in rows)


def test_the_reverse_kl_of_a_target_with_zeros_is_refused() -> None:
    with pytest.raises(ConfigError, match="costs without bound"):
        compose(["experiment=smoke", "trainer.divergence=reverse_kl"])
