"""Stage 1: learn the target q*, the closest distribution to the reference that satisfies C.

Shape suffixes:  S prompts, N rollouts, T completion positions, M rows of (n, t), V vocabulary,
R rank, J R's that are multiplied, D hidden width.

    q*(v | h)  ∝  p(v | h) (alpha(x) + (1 - alpha(x)) R(h v))        h = (x, y_<t)

with alpha = 0 for a threshold of 1. A `Target` owns tensors only, frozen: the reference's hidden
states and head, and what R says. Fitting R for the next iteration cannot change it, and no model
runs when the LLM update asks for log q*.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from constrained_ft import equations
from constrained_ft.auxiliary import LOGIT_LIMIT, Evidence, FrozenAuxiliary, TokenTable
from constrained_ft.config import Config, ConstraintConfig, GuardConfig
from constrained_ft.distributed import StopRequest, World, pack, unpack
from constrained_ft.fit import fit_auxiliary, quality_of
from constrained_ft.frozen_layers import StatesBelow
from constrained_ft.fused import Head, Labels, Tilt, expected_satisfaction, fused_losses
from constrained_ft.llm import FrozenLLM
from constrained_ft.mining import prompts_to_sample
from constrained_ft.parts import KL_TOLERANCE, Parts
from constrained_ft.progress import Display
from constrained_ft.randomness import generator_for
from constrained_ft.roll_ins import RollIns
from constrained_ft.rollouts import (
    LabeledRollouts,
    Rollouts,
    by_term,
    completion_hidden_states,
    with_labels_of,
    with_scores,
)
from constrained_ft.sampling import sample
from constrained_ft.scoring import Scored, Scoring, to_be_scored
from constrained_ft.term_heads import measure_terms

_FORWARD_ROWS = 32  # rollouts in one forward pass


@dataclass(frozen=True, kw_only=True)
class Reference:
    """The p inside q*, at the prefixes that the update reads."""

    hidden_NTD: Float[Tensor, "N T D"]
    head: Head


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What of a target takes passes over the vocabulary; the rest follows from it quickly."""

    log_satisfied_S: Float[Tensor, " S"]
    """log R(x) of every prompt."""
    log_violated_S: Float[Tensor, " S"]
    """log(1 - R(x))."""
    kl_N: Float[Tensor, " N"]
    """sum over prefixes of w KL(q* || reference) of every rollout, in nats."""
    entropy: float
    """Of the LLM that sampled, nats a token: the mean of -log p over what it said."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """q* of one iteration, at every prefix of the rollouts that the update reads."""

    rollouts: Rollouts
    """Their completions are the prefixes. Which LLM sampled them is in `rollouts.iteration`."""
    reference: Reference
    factors_NTJR: Float[Tensor, "N T J R"]
    offset_NTJ: Float[Tensor, "N T J"]
    table: TokenTable
    """What R says, as in `auxiliary.Evidence`."""
    floor_N: Float[Tensor, " N"]
    """alpha(x): 0 asks for satisfaction always, 1 for nothing."""
    has_floor: bool
    """Whether any alpha is above 0."""
    weights_NT: Float[Tensor, "N T"]
    """How much each prefix counts: an estimate of q*(h) / p(h); 0 past the end."""
    share_N: Float[Tensor, " N"]
    """What each rollout counts for its prompt: 1 / n_x, over its chance of being read."""
    num_prompts: int
    """Prompts that were sampled, S_x, whether or not the update reads a rollout of each."""
    completion_length: float
    """Mean tokens of a completion, over all rollouts: those that are read are not typical."""
    facts: Facts
    """Of all rollouts; with R and them, q* can be built again."""
    usable: bool
    """Whether an update may read it: false after a fault that `guard.on_failure` lets pass."""
    metrics: dict[str, float]
    below: StatesBelow | None = None
    """What frozen layers made of the rollouts, where this process kept it."""

    @property
    def iteration(self) -> int:
        """The iteration at whose start it was learned."""
        return self.rollouts.iteration

    def tilt(self, rows_M: Int[Tensor, " M"], steps_M: Int[Tensor, " M"]) -> Tilt:
        """What makes q*(v | prefix) at some positions, each weighing share_N w(h)."""
        return Tilt(
            hidden_MD=self.reference.hidden_NTD[rows_M, steps_M],
            head=self.reference.head,
            factors_MJR=self.factors_NTJR[rows_M, steps_M],
            offset_MJ=self.offset_NTJ[rows_M, steps_M],
            tokens_JVR=self.table.tokens_JVR,
            prior_JV=self.table.prior_JV,
            limit=LOGIT_LIMIT,
            # None spares a pass over the vocabulary.
            floor_M=self.floor_N[rows_M] if self.has_floor else None,
            weights_M=self.weights_NT[rows_M, steps_M] * self.share_N[rows_M],
        )

    def with_reference(
        self, reference: FrozenLLM, rows_M: Int[Tensor, " M"] | None = None
    ) -> "Target":
        """The same guidance applied to another reference: `trainer.reference=fresh`.

        Args:
            reference: the p inside q*.
            rows_M: the rollouts that will be read; None is all. The others keep the states that
                they were sampled with.
        """
        if rows_M is None:
            rows_M = torch.arange(len(self.rollouts.prompt_N), device=reference.device)
        hidden_NTD = self.reference.hidden_NTD.clone()
        rows_M = rows_M.sort().values  # the rows of a prompt are neighbours then
        if len(rows_M) > 0:
            hidden_NTD[rows_M] = states_of(reference, self.rollouts.take(rows_M), self.below)
        return replace(self, reference=Reference(hidden_NTD=hidden_NTD, head=reference.head))

    def gathered(self, rows_M: Int[Tensor, " M"], world: World) -> "Target":
        """The same with everyone's states: each rank has those of its part of some rows."""
        if world.size == 1:
            return self
        own = rows_M.tensor_split(world.size)[world.rank]
        packets = world.gather(pack({"hidden": self.reference.hidden_NTD[own]}, None))
        hidden = [unpack(packet)[0]["hidden"] for packet in packets]
        hidden_NTD = torch.cat(hidden).to(rows_M.device)
        return replace(self, reference=replace(self.reference, hidden_NTD=hidden_NTD))


def states_of(
    llm: FrozenLLM, rollouts: Rollouts, below: StatesBelow | None = None
) -> Float[Tensor, "N T D"]:
    """Hidden states from a forward pass, the arithmetic that the update's own passes use."""
    rows_N = torch.arange(len(rollouts.prompt_N), device=llm.device)
    hidden = [
        completion_hidden_states(llm, rollouts, rows, below) for rows in rows_N.split(_FORWARD_ROWS)
    ]
    return torch.cat(hidden)


def learn_target(parts: Parts, config: Config, reference: FrozenLLM, iteration: int) -> Target:
    """Learn q* of `reference`: sample, score, fit R.

    Raises:
        MissingScoresError: when too many completions have no score.
        DivergedError: when a guard finds a fault and is not to go on.
        Interrupted: when asked to stop.
    """
    before = {name: tensor.clone() for name, tensor in parts.auxiliary.state_dict().items()}
    reference.below = StatesBelow() if _keeps_states_below(parts, config, iteration) else None
    labeled, metrics = learn_auxiliary(parts, config, reference, iteration)
    with parts.phases.during("target") as spent:
        auxiliary, head = parts.auxiliary.frozen(), reference.head
        target = build_target(labeled, auxiliary, head, config, world=parts.world)
        spent.tokens += int(labeled.rollouts.mask_NT.sum())
    target = replace(target, metrics=target.metrics | metrics, below=reference.below)
    fault = fault_of_target(target, config.guard)
    if fault is not None:
        parts.tolerate(f"{fault} in iteration {iteration}", config.guard, "its target is not used")
        parts.auxiliary.load_state_dict(before)
        return replace(target, usable=False)
    # A fresh one is the update's; `with_fresh_reference` says what bfloat16 has to do here.
    if config.trainer.reference != "matched" or not reference.bf16:
        return target
    with parts.phases.during("reference"):
        rows_N = torch.arange(len(target.share_N), device=reference.device)
        own_N = rows_N.tensor_split(parts.world.size)[parts.world.rank]
        mine = target.with_reference(reference, own_N)
        return mine.gathered(rows_N, parts.world)


def _keeps_states_below(parts: Parts, config: Config, iteration: int) -> bool:
    """Whether the update reads what this process samples, in this iteration.

    A checkpoint and other processes do not get what frozen layers said.
    """
    trainer = config.trainer
    return (
        parts.llm.begins_above
        and trainer.schedule == "alternating"
        and iteration <= trainer.iterations
        and trainer.learns_target
        and parts.everyone.size == 1
        and config.sampler.kind == "cft"
    )


def fault_of_target(target: Target, guard: GuardConfig) -> str | None:
    """What is wrong with a target; the same on all ranks that learned it."""
    facts = target.facts
    # The limit on R's logits makes a number of an infinite one, which R would never leave again.
    evidence = target.offset_NTJ, target.factors_NTJR, target.table.prior_JV
    numbers = facts.log_satisfied_S, facts.kl_N, *evidence, target.table.tokens_JVR
    if not all(torch.isfinite(part).all() for part in numbers):
        return "R or the reference is not a number for some prompt or completion"
    if float(facts.log_satisfied_S.max()) > KL_TOLERANCE:
        return f"R(x) is {float(facts.log_satisfied_S.max().exp()):.6g} for a prompt, above 1"
    least = float((facts.kl_N / target.completion_length).min())
    if least < -KL_TOLERANCE:
        return f"KL(q* || reference) of a completion is {least:.3g} nats a token, below zero"
    if not facts.entropy >= guard.min_entropy:
        return (
            f"the LLM's entropy has fallen to {facts.entropy:.3g} nats a token, below "
            f"guard.min_entropy={guard.min_entropy}: lower trainer.kl_weight or "
            "trainer.learning_rate"
        )
    return None


def learn_auxiliary(
    parts: Parts, config: Config, reference: FrozenLLM, iteration: int
) -> tuple[LabeledRollouts, dict[str, float]]:
    """Sample from `reference`, score, and fit R to it; R is changed in place."""
    display: Display = parts.display
    stop: StopRequest = parts.stop
    prompts = prompts_to_sample(parts, config, reference, iteration)
    display.phase("sampling", len(prompts) * config.prompts.samples_per_prompt)
    constraint = config.constraint

    def scored_of(said: Rollouts) -> Bool[Tensor, " N"]:
        return to_be_scored(said, prompts, config.prompts, config.seed)

    with Scoring(parts.scorers, parts.world, stop) as scoring:
        with parts.phases.during("sampling"):
            rollouts = sample(
                reference,
                prompts,
                samples_per_prompt=config.prompts.samples_per_prompt,
                max_new_tokens=config.prompts.max_new_tokens,
                sampler=config.sampler,
                seed=config.seed,
                iteration=iteration,
                display=display,
                stop=stop,
                world=parts.world,
                each=lambda part: scoring.begin(part.take(scored_of(part).nonzero()[:, 0])),
                server=parts.server,
                roll_ins=_roll_ins(parts, config),
            )
        scored_N = scored_of(rollouts)
        unscored = rollouts.take((~scored_N).nonzero()[:, 0])
        rollouts = rollouts.take(scored_N.nonzero()[:, 0])
        display.phase("scoring", len(rollouts.texts))
        with parts.phases.during("scoring") as spent:
            scored = scoring.finish(rollouts, constraint.max_missing_rate)
            before = parts.replay[0].settled if parts.replay else None
            scores = [one.scores for one in scored]
            labeled = with_scores(rollouts, scores, constraint, before)
            labeled = replace(labeled, unscored=unscored if unscored.texts else None)
            spent.tokens += int(rollouts.mask_NT.sum())
    _warn_of_missing(scored, display)
    own = labeled.unguided
    satisfaction = float(own.satisfied_N.float().mean())
    display.advance(len(rollouts.texts), satisfaction=satisfaction)
    if not parts.replay:
        for one, its in zip(parts.auxiliary.each, _of_each(own, config), strict=True):
            one.start_at(float(its.labels_N.mean()))
    parts.replay = [with_labels_of(past, labeled, constraint) for past in parts.replay]
    parts.remember(labeled, config.auxiliary.replay_iterations)
    metrics = _fit(parts, config, reference.head, labeled, own)
    if parts.server is not None and parts.server.gap is not None:
        metrics["rollouts/logprob_gap"] = parts.server.gap
    lengths_N = own.rollouts.mask_NT.sum(-1).float()
    guided_N = labeled.satisfied_N[labeled.rollouts.guided_N > 0].float()
    if len(guided_N) > 0:
        metrics["rollouts/guided_satisfaction"] = float(guided_N.mean())
    return labeled, metrics | _term_metrics(own, constraint) | {
        "rollouts/satisfaction": satisfaction,
        "rollouts/score": float(own.least_scores.mean()),
        "rollouts/missing": labeled.missing / len(rollouts.texts),
        "rollouts/scored": float(len(rollouts.texts)) * config.trainer.learns_target,
        "rollouts/effective_labels": labeled.effective / len(own.labels_N),
        "rollouts/length": float(lengths_N.mean()),
    }


def _roll_ins(parts: Parts, config: Config) -> RollIns | None:
    """None before R has seen anything."""
    share = config.prompts.guided_roll_ins
    if share == 0 or not parts.replay:
        return None
    return RollIns(guide=parts.auxiliary.frozen().guide(), share=share)


def _fit(
    parts: Parts, config: Config, head: Head, labeled: LabeledRollouts, own: LabeledRollouts
) -> dict[str, float]:
    """Fit R, unless the newest states are no numbers: they would spoil it, and a guard finds them.

    Earlier ones that were such are left out, too. `own` is what the LLM said by itself.
    """
    sound = [one for one in parts.replay if bool(one.rollouts.hidden_NTD.isfinite().all())]
    if not sound or sound[0] is not labeled:
        return {}
    each = parts.auxiliary.each
    parts.display.phase("fitting the auxiliary", len(each) * config.auxiliary.max_epochs)
    labels = [_of_each(past, config) for past in sound]
    with parts.phases.during("auxiliary") as spent:
        found = [
            fit_auxiliary(
                one,
                head,
                [its[j] for its in labels],
                config.auxiliary,
                seed=config.seed,
                display=parts.display,
                stop=parts.stop,
                world=parts.world,
            )
            for j, one in enumerate(each)
        ]
        spent.tokens += sum(int(past.rollouts.mask_NT.sum()) for past in sound) * len(each)
        metrics = found[0]
        if config.constraint.terms:
            fitted = parts.auxiliary.frozen()
            if config.auxiliary.terms == "product":
                quality = quality_of(fitted, head, sound, config.auxiliary, config.seed)
                metrics = _product_metrics(found, config) | quality
            metrics |= measure_terms(own, fitted.satisfaction_of_each(own.rollouts), config)
    return metrics


def _of_each(labeled: LabeledRollouts, config: Config) -> tuple[LabeledRollouts, ...]:
    """Rollouts with the label of each R: that of all terms together, or of each term alone."""
    if config.auxiliary.terms == "joint":
        return (labeled,)
    return by_term(labeled, config.constraint)


def _product_metrics(found: Sequence[Mapping[str, float]], config: Config) -> dict[str, float]:
    """How each term's R was fitted."""
    names = ("log_loss", "calibration_error")
    metrics = {
        f"term/{term}/{name}": one[f"auxiliary/{name}"]
        for term, one in zip(config.constraint.terms, found, strict=True)
        for name in names
    }
    epochs = [one["auxiliary/epochs"] for one in found]
    examples = found[0]["auxiliary/examples"]
    return metrics | {
        "auxiliary/epochs": sum(epochs) / len(epochs),
        "auxiliary/examples": examples,
    }


def _term_metrics(labeled: LabeledRollouts, constraint: ConstraintConfig) -> dict[str, float]:
    """What each term of several says, and tilts and bars that were found."""
    metrics: dict[str, float] = {}
    settled = labeled.settled
    for j, (name, term) in enumerate(constraint.all_terms().items()):
        scores_N = labeled.scores_NJ[:, j]
        if constraint.terms:
            satisfied_N = scores_N >= term.satisfied_at
            metrics[f"term/{name}/satisfaction"] = float(satisfied_N.float().mean())
            metrics[f"term/{name}/score"] = float(scores_N.mean())
        beta = settled.betas[j]
        if beta is not None:
            metrics[f"term/{name}/beta"] = beta
        if term.anneal is not None:
            metrics[f"term/{name}/bar"] = settled.bars[j]
    return metrics


def _warn_of_missing(scored: Sequence[Scored], display: Display) -> None:
    for one in scored:
        missing = one.scores.count(None)
        if missing:
            display.note(
                f"{missing} of {len(one.scores)} completions have no score and are left out: "
                f"{one.failure}"
            )


@torch.no_grad()
def build_target(
    labeled: LabeledRollouts,
    auxiliary: FrozenAuxiliary,
    head: Head,
    config: Config,
    *,
    world: World | None = None,
    facts: Facts | None = None,
) -> Target:
    """q* from labelled rollouts of the reference and R fitted to them.

    Where there are more rollouts than the update reads, each is read with a chance in proportion to
    the KL that it carries, and counts for as many more (Horvitz-Thompson): the expected loss is
    that of all rollouts, and little time goes to text that the constraint has nothing to say about.

    Args:
        labeled: all rollouts of one iteration; those that R guided are left out, those without a
            label are not.
        auxiliary: R.
        head: output head of the LLM that sampled them.
        config: sections `constraint` and `trainer`, and the seed.
        world: who shares the passes over the vocabulary; None is this process alone.
        facts: what those passes gave, where a target is built again.
    """
    world = world or World.alone()
    trainer, rollouts = config.trainer, labeled.said
    evidence = auxiliary.read(rollouts)
    if facts is None:
        satisfaction = _prompt_satisfaction(rollouts, evidence, auxiliary, head, world)
    else:
        satisfaction = facts.log_satisfied_S, facts.log_violated_S
    log_satisfied_S, log_violated_S = satisfaction
    has_floor = config.constraint.threshold < 1
    log_floor_S = equations.log_floor_for_threshold(
        *_calibrated(labeled.unguided, log_satisfied_S, log_violated_S), config.constraint.threshold
    )
    floor_S = log_floor_S.exp() if has_floor else torch.zeros_like(log_floor_S)
    floor_N = floor_S[rollouts.prompt_N]
    log_prompt_N = log_satisfied_S[rollouts.prompt_N]
    if trainer.prefixes == "accepted":
        labels_N = labeled.unguided.labels_N
        weights_N = equations.accepted_weights(labels_N, log_prompt_N.exp(), floor_N)
        weights_NT = weights_N[:, None].expand_as(rollouts.mask_NT)
    else:
        weights_NT = _prefix_weights(rollouts, evidence, auxiliary.table, floor_N, log_prompt_N)
    weights_NT, clipped = equations.clip_weights(
        weights_NT, trainer.max_prefix_weight, rollouts.mask_NT
    )
    whole = Target(
        rollouts=rollouts,
        reference=Reference(hidden_NTD=rollouts.hidden_NTD, head=head),
        factors_NTJR=evidence.factors_NTJR,
        offset_NTJ=evidence.offset_NTJ,
        table=auxiliary.table,
        floor_N=floor_N,
        has_floor=has_floor,
        weights_NT=weights_NT,
        share_N=1.0 / torch.bincount(rollouts.prompt_N)[rollouts.prompt_N],
        num_prompts=len(rollouts.prompts),
        completion_length=float(rollouts.mask_NT.sum() / len(rollouts.mask_NT)),
        facts=Facts(
            log_satisfied_S=log_satisfied_S,
            log_violated_S=log_violated_S,
            kl_N=torch.zeros_like(floor_N),
            entropy=0.0,
        )
        if facts is None
        else facts,
        usable=True,
        metrics={},
    )
    if facts is None:
        kl_N, entropy = _kl_of_rollouts(whole, world)
        whole = replace(whole, facts=replace(whole.facts, kl_N=kl_N, entropy=entropy))
    kl_N = whole.facts.kl_N
    metrics = {
        "rollouts/entropy": whole.facts.entropy,
        "target/satisfaction": float(log_satisfied_S.exp().mean()),
        "target/kl": float(equations.target_kl(log_satisfied_S, log_violated_S, floor_S).mean()),
        "target/kl_per_token": float(kl_N.sum() / rollouts.mask_NT.sum()),
        "target/floor": float(floor_S.mean()),
        "target/clipped_weight": float(clipped),
        "target/effective_prefixes": float(
            weights_NT.sum().square() / weights_NT.square().sum() / rollouts.mask_NT.sum()
        ),
    }
    read = trainer.steps_per_iteration * trainer.rollouts_per_step
    chance_N = equations.inclusion_chances(kl_N, read)
    generator = generator_for(config.seed, "read", rollouts.iteration)
    drawn_N = torch.rand(len(chance_N), generator=generator).to(chance_N.device) < chance_N
    return replace(_some_rollouts(whole, drawn_N.nonzero()[:, 0], chance_N), metrics=metrics)


def _calibrated(
    labeled: LabeledRollouts,
    log_satisfied_S: Float[Tensor, " S"],
    log_violated_S: Float[Tensor, " S"],
) -> tuple[Float[Tensor, " S"], Float[Tensor, " S"]]:
    """log R(x) and log(1 - R(x)) with the mean of this iteration's labels.

    Within a prefix an error that all tokens share cancels; in the floor it does not: an R that is
    below delta by chance would push a model that is there already.
    """
    odds_S = equations.log_odds(log_satisfied_S, log_violated_S)
    shifted_S = equations.shifted_to_mean(odds_S, float(labeled.labels_N.mean()))
    return F.logsigmoid(shifted_S), F.logsigmoid(-shifted_S)


def _prefix_weights(
    rollouts: Rollouts,
    evidence: Evidence,
    table: TokenTable,
    floor_N: Float[Tensor, " N"],
    log_prompt_N: Float[Tensor, " N"],
) -> Float[Tensor, "N T"]:
    """w(h) before clipping, an estimate of q*(h) / p(h) by what R says of h."""
    logits_NT = table.logits_of(evidence.factors_NTJR, evidence.offset_NTJ, rollouts.ids_NT)
    log_token_NT = equations.floored_logprob(F.logsigmoid(logits_NT), floor_N[:, None])
    floored_prompt_N = equations.floored_logprob(log_prompt_N, floor_N)
    return equations.prefix_logweights(log_token_NT, floored_prompt_N).exp()


def _kl_of_rollouts(target: Target, world: World) -> tuple[Float[Tensor, " N"], float]:
    """sum over prefixes of w KL(q* || reference) of each rollout, in nats, and the entropy."""
    rollouts = target.rollouts
    rows_M, steps_M = rollouts.mask_NT.nonzero(as_tuple=True)
    positions = len(rows_M)
    mine_M = rows_M % world.size == world.rank
    rows_M, steps_M = rows_M[mine_M], steps_M[mine_M]
    tilt = target.tilt(rows_M, steps_M)
    said = Labels(
        next_M=rollouts.ids_NT[rows_M, steps_M], weights_M=torch.zeros_like(tilt.weights_M)
    )
    losses = fused_losses(tilt.hidden_MD, tilt.head, tilt=tilt, labels=said)
    assert losses.kl_M is not None
    assert losses.ce_M is not None
    kl_N = torch.zeros_like(target.share_N)
    kl_N.index_add_(0, rows_M, losses.kl_M * target.weights_NT[rows_M, steps_M])
    world.add([kl_N])
    (surprise,) = world.totals([float(losses.ce_M.sum())])
    return kl_N, surprise / positions


def _some_rollouts(
    target: Target, rows_M: Int[Tensor, " M"], chance_N: Float[Tensor, " N"]
) -> Target:
    return replace(
        target,
        rollouts=target.rollouts.take(rows_M),
        reference=replace(target.reference, hidden_NTD=target.reference.hidden_NTD[rows_M]),
        factors_NTJR=target.factors_NTJR[rows_M],
        offset_NTJ=target.offset_NTJ[rows_M],
        floor_N=target.floor_N[rows_M],
        weights_NT=target.weights_NT[rows_M],
        share_N=(target.share_N / chance_N)[rows_M],
    )


def _prompt_satisfaction(
    rollouts: Rollouts,
    evidence: Evidence,
    auxiliary: FrozenAuxiliary,
    head: Head,
    world: World,
) -> tuple[Float[Tensor, " S"], Float[Tensor, " S"]]:
    """log R(x) and log(1 - R(x)) of every prompt: one step of expectation from the prompt."""
    counts_S = torch.bincount(rollouts.prompt_N, minlength=len(rollouts.prompts))
    first_S = counts_S.cumsum(0) - counts_S
    mine_S = world.share(torch.arange(len(counts_S), device=first_S.device))
    own_S = first_S[mine_S]
    found = expected_satisfaction(
        auxiliary.table.guidance(
            head,
            rollouts.hidden_NTD[own_S, 0],
            evidence.factors_NTJR[own_S, 0],
            evidence.offset_NTJ[own_S, 0],
        )
    )
    whole = [torch.zeros(len(counts_S), device=first_S.device) for _ in found]
    for all_S, part_S in zip(whole, found, strict=True):
        all_S[mine_S] = part_S
    world.add(whole)
    return whole[0], whole[1]
