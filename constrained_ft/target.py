"""Stage 1: learn the target q*, the closest distribution to the reference that satisfies C.

Shape suffixes:  S prompts, N rollouts, T completion positions, M rows of (n, t), V vocabulary,
R rank, D hidden width.

    q*(v | h)  ∝  p(v | h) (alpha(x) + (1 - alpha(x)) R(h v))        h = (x, y_<t)

with alpha = 0 for a threshold of 1. A `Target` owns tensors only, frozen: the reference's hidden
states and head, and what R says. Fitting R for the next iteration cannot change it, and no model
runs when the LLM update asks for log q*.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from constrained_ft import equations
from constrained_ft.auxiliary import Evidence, FrozenAuxiliary, TokenTable
from constrained_ft.config import Config, ConstraintConfig, TrainerConfig
from constrained_ft.distributed import StopRequest
from constrained_ft.fit import fit_auxiliary
from constrained_ft.llm import FrozenLLM, Head
from constrained_ft.parts import Parts
from constrained_ft.progress import Display
from constrained_ft.rollouts import LabeledRollouts, label, sample, with_forward_states


@dataclass(frozen=True, kw_only=True)
class Target:
    """q* of one iteration, at every prefix of its rollouts."""

    labeled: LabeledRollouts
    """Their completions are the prefixes; they were sampled at `iteration`."""
    reference_NTD: Float[Tensor, "N T D"]
    """Hidden states of the reference p inside q*."""
    head: Head
    """Output head of the reference."""
    factors_NTR: Float[Tensor, "N T R"]
    offset_NT: Float[Tensor, "N T"]
    table: TokenTable
    """What R says, as in `auxiliary.Evidence`."""
    floor_N: Float[Tensor, " N"]
    """alpha(x): 0 asks for satisfaction always, 1 for nothing."""
    has_floor: bool
    """Whether any alpha is above 0."""
    weights_NT: Float[Tensor, "N T"]
    """How much each prefix counts: an estimate of q*(h) / p(h); 0 past the end."""
    metrics: dict[str, float]

    @property
    def iteration(self) -> int:
        """The iteration at whose start it was learned."""
        return self.labeled.rollouts.iteration

    def logprobs(
        self, rows_M: Int[Tensor, " M"], steps_M: Int[Tensor, " M"]
    ) -> Float[Tensor, "M V"]:
        """log q*(v | prefix) at some positions, in nats."""
        return equations.target_logprobs(
            self.head(self.reference_NTD[rows_M, steps_M]),
            self.table.logits(self.factors_NTR[rows_M, steps_M], self.offset_NT[rows_M, steps_M]),
            # The number 0 spares a pass over the vocabulary.
            self.floor_N[rows_M] if self.has_floor else 0.0,
        )

    def with_reference(self, reference: FrozenLLM) -> "Target":
        """The same guidance applied to another reference: `trainer.reference=fresh`."""
        rollouts = with_forward_states(reference, self.labeled.rollouts)
        return replace(self, reference_NTD=rollouts.hidden_NTD, head=reference.head)


def learn_target(parts: Parts, config: Config, reference: FrozenLLM, iteration: int) -> Target:
    """Learn q* of `reference`: sample, score, fit R.

    Raises:
        ScorerError: when a score is missing or invalid.
        Interrupted: when asked to stop.
    """
    labeled, metrics = learn_auxiliary(parts, config, reference, iteration)
    target = build_target(
        labeled, parts.auxiliary.frozen(), reference.head, config.constraint, config.trainer
    )
    return replace(target, metrics=target.metrics | metrics)


def learn_auxiliary(
    parts: Parts, config: Config, reference: FrozenLLM, iteration: int
) -> tuple[LabeledRollouts, dict[str, float]]:
    """Sample from `reference`, score, and fit R to it; R is changed in place."""
    display: Display = parts.display
    stop: StopRequest = parts.stop
    prompts = parts.prompts.of_iteration(
        iteration, config.prompts.prompts_per_iteration, config.seed
    )
    display.phase("sampling", len(prompts) * config.prompts.samples_per_prompt)
    rollouts = sample(
        reference,
        prompts,
        samples_per_prompt=config.prompts.samples_per_prompt,
        max_new_tokens=config.prompts.max_new_tokens,
        batch_size=config.sampler.batch_size,
        seed=config.seed,
        iteration=iteration,
        display=display,
        stop=stop,
    )
    rollouts = with_forward_states(reference, rollouts)
    display.phase("scoring", len(rollouts.texts))
    labeled = label(rollouts, parts.scorer, config.constraint)
    satisfaction = float(labeled.satisfied_N.float().mean())
    display.advance(len(rollouts.texts), satisfaction=satisfaction)
    if not parts.replay:
        parts.auxiliary.start_at(float(labeled.labels_N.mean()))
    parts.remember(labeled, config.auxiliary.replay_iterations)
    display.phase("fitting the auxiliary", config.auxiliary.max_epochs)
    metrics = fit_auxiliary(
        parts.auxiliary,
        reference.head,
        parts.replay,
        config.auxiliary,
        seed=config.seed,
        display=display,
        stop=stop,
    )
    lengths_N = rollouts.mask_NT.sum(-1).float()
    return labeled, metrics | {
        "rollouts/satisfaction": satisfaction,
        "rollouts/score": float(labeled.scores_N.mean()),
        "rollouts/length": float(lengths_N.mean()),
    }


@torch.no_grad()
def build_target(
    labeled: LabeledRollouts,
    auxiliary: FrozenAuxiliary,
    head: Head,
    constraint: ConstraintConfig,
    trainer: TrainerConfig,
) -> Target:
    """q* from labelled rollouts of the reference and R fitted to them."""
    rollouts = labeled.rollouts
    evidence = auxiliary.read(rollouts)
    log_satisfied_S, log_violated_S = _prompt_satisfaction(labeled, evidence, auxiliary, head)
    log_floor_S = equations.log_floor_for_threshold(
        log_satisfied_S, log_violated_S, constraint.threshold
    )
    floor_S = log_floor_S.exp() if constraint.threshold < 1 else torch.zeros_like(log_floor_S)
    floor_N = floor_S[rollouts.prompt_N]
    log_prompt_N = equations.floored_logprob(log_satisfied_S[rollouts.prompt_N], floor_N)
    if trainer.prefixes == "weighted":
        logits_NT = auxiliary.table.logits_of(
            evidence.factors_NTR, evidence.offset_NT, rollouts.ids_NT
        )
        log_token_NT = equations.floored_logprob(F.logsigmoid(logits_NT), floor_N[:, None])
        weights_NT = equations.prefix_logweights(log_token_NT, log_prompt_N).exp()
    else:
        satisfaction_N = log_satisfied_S[rollouts.prompt_N].exp()
        weights_N = equations.accepted_weights(labeled.labels_N, satisfaction_N, floor_N)
        weights_NT = weights_N[:, None].expand_as(rollouts.mask_NT)
    weights_NT, clipped = equations.clip_weights(
        weights_NT, trainer.max_prefix_weight, rollouts.mask_NT
    )
    metrics = {
        "target/satisfaction": float(log_satisfied_S.exp().mean()),
        "target/kl": float(equations.target_kl(log_satisfied_S, log_violated_S, floor_S).mean()),
        "target/floor": float(floor_S.mean()),
        "target/clipped_weight": float(clipped),
        "target/effective_prefixes": float(
            weights_NT.sum().square() / weights_NT.square().sum() / rollouts.mask_NT.sum()
        ),
    }
    return Target(
        labeled=labeled,
        reference_NTD=rollouts.hidden_NTD,
        head=head,
        factors_NTR=evidence.factors_NTR,
        offset_NT=evidence.offset_NT,
        table=auxiliary.table,
        floor_N=floor_N,
        has_floor=constraint.threshold < 1,
        weights_NT=weights_NT,
        metrics=metrics,
    )


def _prompt_satisfaction(
    labeled: LabeledRollouts, evidence: Evidence, auxiliary: FrozenAuxiliary, head: Head
) -> tuple[Float[Tensor, " S"], Float[Tensor, " S"]]:
    """log R(x) and log(1 - R(x)) of every prompt: one step of expectation from the prompt."""
    rollouts = labeled.rollouts
    counts_S = torch.bincount(rollouts.prompt_N, minlength=len(rollouts.prompts))
    first_S = counts_S.cumsum(0) - counts_S
    return equations.expected_satisfaction_logprobs(
        head(rollouts.hidden_NTD[first_S, 0]),
        auxiliary.table.logits(evidence.factors_NTR[first_S, 0], evidence.offset_NT[first_S, 0]),
    )
