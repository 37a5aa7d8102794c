"""Stage 2: move the LLM towards q* while it learns the corpus.

Shape suffixes:  B corpus rows, L token positions, N rollouts, T completion positions, M positions
whose logits are needed, D hidden width, V vocabulary.

One optimizer step minimises (method: the lambda of the objective, with every count global over the
step; dividing by the corpus tokens changes the scale, not the minimiser)

    L = 1 / tokens * [ sum of cross-entropies, each times the weight of its source
                       + lambda * sequences * mean over prompts of K(x) ]
    K(x) = mean over the rollouts of x of  sum_h w(h) KL(q*(. | h) || p_theta(. | h))

`sequences` counts the corpus rows that have a prompt of their own; plain text has none, there as
many tokens as the mean completion has count as one sequence. A label that a classification head
tells counts as one token, its cross-entropy being that of the head's two outputs. `tokens` is the
sum of their weights.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from constrained_ft.config import Config, GuardConfig, TrainerConfig
from constrained_ft.distributed import World
from constrained_ft.divergences import divergence_loss
from constrained_ft.encoding import Row
from constrained_ft.errors import DivergedError
from constrained_ft.frozen_layers import StatesBelow
from constrained_ft.fused import Labels, fused_losses
from constrained_ft.llm import LLM
from constrained_ft.machine import release_freed
from constrained_ft.packing import Packed, Tree
from constrained_ft.parts import KL_TOLERANCE, Parts
from constrained_ft.randomness import generator_for, seed_everything, seed_for
from constrained_ft.rollouts import completion_trees
from constrained_ft.sharding import gathered
from constrained_ft.target import Target


def update_llm(parts: Parts, target: Target, config: Config, iteration: int) -> dict[str, float]:
    """Train the LLM for one iteration; every rollout of the target is used once.

    Returns:
        `update/...` of `metrics.METRICS`, means over the steps that were taken.

    Raises:
        DivergedError: when a guard finds a fault, before the step, and is not to skip it; or when
            it skipped as many in a row as it may.
        Interrupted: when asked to stop.
    """
    llm, optimization, world = parts.llm, parts.optimization, parts.world
    trainer = config.trainer.model_copy(update={"kl_weight": parts.kl_weight})
    parts.display.phase("updating the LLM", trainer.steps_per_iteration)
    guard = config.guard
    if trainer.divergence == "accepted":  # a cross-entropy, which knows no such bound
        guard = guard.model_copy(update={"kl_limit": math.inf})
    taken: list[dict[str, float]] = []
    tokens = 0
    split = _split_rollouts(target, config, iteration)
    prompts_per_step = target.num_prompts / trainer.steps_per_iteration
    seed = seed_for(config.seed, "dropout", iteration, world.rank)
    with llm.training(), seed_everything(seed):
        for index, rows_N in enumerate(split):
            parts.stop.check()
            step = (iteration - 1) * trainer.steps_per_iteration + index
            optimization.optimizer.zero_grad()
            release_freed()
            batches = corpus_rows(parts, config, step)
            losses = backward_of_step(
                llm,
                target,
                rows_N,
                batches,
                trainer,
                prompts_per_step,
                live=trainer.reference == "live" or (trainer.reference == "fresh" and index == 0),
                world=world,
            )
            trained = llm.trained_parameters().values()
            norm = float(gathered(torch.nn.utils.clip_grad_norm_(trained, trainer.max_grad_norm)))
            fault = fault_of_step(losses, norm, guard, step)
            if fault is None:
                optimization.optimizer.step()
                taken.append(losses | {"update/grad_norm": norm})
                tokens += _trained_tokens(target, rows_N, batches, trainer)
                parts.display.advance(1, ce=losses["update/ce"], kl=losses["update/kl"])
                parts.faults = 0 if config.guard.on_failure == "skip" else parts.faults
            elif config.guard.on_failure == "skip":
                parts.tolerate(fault, config.guard, "the step is skipped")
            else:
                raise DivergedError(fault)
            optimization.pass_step()
    optimization.optimizer.zero_grad()
    means = {name: sum(row[name] for row in taken) / len(taken) for name in (taken or [{}])[0]}
    return means | {
        **({"update/kl_first": taken[0]["update/kl"]} if taken else {}),
        "update/kl_weight": parts.kl_weight,
        "update/learning_rate": float(optimization.scheduler.get_last_lr()[0]),
        "update/tokens": float(tokens),
        "update/skipped_steps": float(len(split) - len(taken)),
    }


def _trained_tokens(
    target: Target,
    rows_N: Int[Tensor, " N"],
    batches: Sequence[Sequence[Sequence[Row]]],
    config: TrainerConfig,
) -> int:
    """Corpus and completion tokens of one step, of all ranks."""
    corpus = sum(row.num_targets for rank in batches for rows in rank for row in rows)
    said = int(target.rollouts.mask_NT[rows_N].sum()) if not config.is_plain else 0
    return corpus + said


def corpus_rows(parts: Parts, config: Config, step: int) -> list[list[tuple[Row, ...]]]:
    """The corpus rows of a step: by rank, then by pass."""
    trainer, size = config.trainer, parts.world.size
    passes = trainer.gradient_accumulation_steps if trainer.corpus else 0
    return [
        [
            parts.corpus.batch(
                (step * trainer.gradient_accumulation_steps + micro) * size + rank,
                trainer.per_device_train_batch_size,
                config.seed,
            )
            for micro in range(passes)
        ]
        for rank in range(size)
    ]


def rows_after_first_step(
    target: Target, config: Config, iteration: int, world: World | None = None
) -> Int[Tensor, " N"]:
    """The rollouts whose reference this rank reads: at the first step a fresh one is the LLM."""
    world = world or World.alone()
    later = _split_rollouts(target, config, iteration)[1:]
    own = [rows_N.tensor_split(world.size)[world.rank] for rows_N in later]
    return torch.cat([*own, target.rollouts.prompt_N[:0]])


def with_fresh_reference(parts: Parts, target: Target, config: Config, iteration: int) -> Target:
    """A target whose reference is the LLM before the update, where the configuration says so.

    In float32, the states that decoding left are that already while the LLM is the one that
    sampled. In bfloat16 they differ from those of a forward pass by 8e-4 nat a token, a third of
    the KL that is trained on; two forward passes differ by 2e-6 (SmolLM2-135M, two CPU cores).
    """
    at_hand = target.iteration == iteration and not parts.llm.bf16
    if config.trainer.reference != "fresh" or at_hand:
        return target
    with parts.phases.during("reference"):
        rows_N = rows_after_first_step(target, config, iteration, parts.world)
        return target.with_reference(parts.llm.frozen(), rows_N)


def backward_of_step(  # noqa: PLR0913
    llm: LLM,
    target: Target,
    rows_N: Int[Tensor, " N"],
    batches: Sequence[Sequence[Sequence[Row]]],
    config: TrainerConfig,
    num_prompts: float,
    *,
    live: bool = False,
    world: World | None = None,
) -> dict[str, float]:
    """Add the gradient of one optimizer step's loss, in as many passes as there are batches.

    The ranks share the rollouts and have corpus rows of their own; every rank ends with the
    gradient of the whole loss, every count in it being that of all ranks. Where weights are
    sharded, it ends with its part of it, and each pass sums.

    Args:
        llm: what moves.
        target: q*.
        rows_N: the rollouts of this step, of all ranks.
        batches: corpus rows: of each rank, one entry a pass.
        config: the `trainer` section.
        num_prompts: prompts that the step's rollouts stand for, a part of one counting as a part.
        live: the p inside q* is the LLM as it is, without gradient, and no other reference.
        world: who shares the step; None is this process alone.

    Returns:
        Cross-entropy, KL and loss of the step, as in `metrics.METRICS`.
    """
    world = world or World.alone()
    tokens, sequences = _corpus_counts(
        [rows for passes in batches for rows in passes], target.completion_length
    )
    # What each rollout's KL is multiplied by.
    scale = config.kl_weight * sequences / tokens / num_prompts
    passes: Sequence[Sequence[Row]] = (
        batches[world.rank] or [()] * config.gradient_accumulation_steps
    )
    used_N = rows_N if config.kl_weight > 0 else rows_N[:0]
    own_N = used_N.tensor_split(world.size)[world.rank]
    ce_sum, kl_sum = 0.0, 0.0
    for rows, part_N in zip(passes, own_N.tensor_split(len(passes)), strict=True):
        if rows or len(part_N) > 0 or llm.is_sharded:
            with world.together() if llm.is_sharded else nullcontext():
                ce, kl = _backward_of_pass(
                    llm, target, part_N, rows, config, (1.0 / tokens, scale), live
                )
            ce_sum, kl_sum = ce_sum + ce, kl_sum + kl
    ce_sum, kl_sum = world.totals([ce_sum, kl_sum])
    if not llm.is_sharded:
        world.add_gradients(llm.trained_parameters().values())
    return {
        "update/ce": ce_sum / tokens if config.corpus else 0.0,
        "update/kl": kl_sum / num_prompts / target.completion_length,
        "update/loss": ce_sum / tokens + scale * kl_sum,
    }


def _corpus_counts(
    batches: Sequence[Sequence[Row]], completion_length: float
) -> tuple[float, float]:
    """Trained tokens, each by its weight, and sequences of one step.

    Where there is no corpus, one completion's worth.
    """
    tokens, sequences = 0.0, 0.0
    for row in (row for rows in batches for row in rows):
        tokens += row.weight * row.num_targets
        sequences += 1.0 if row.prompted else row.num_targets / completion_length
    return (tokens, sequences) if tokens else (completion_length, 1.0)


def _backward_of_pass(  # noqa: PLR0913
    llm: LLM,
    target: Target,
    rows_N: Int[Tensor, " N"],
    corpus: Sequence[Row],
    config: TrainerConfig,
    scales: tuple[float, float],
    live: bool,  # noqa: FBT001
) -> tuple[float, float]:
    """Backward of both terms, each times its scale (cross-entropy, KL), through the trunk once.

    Returns:
        The sum of cross-entropies and the sum of share w KL, unscaled, in nats.
    """
    ce_scale, kl_scale = scales
    ce, kl = llm.inside(lambda: _losses_of_pass(llm, target, rows_N, corpus, config, live))
    (kl_scale * kl + ce_scale * ce).backward()
    return float(ce.detach()), float(kl.detach())


def _losses_of_pass(
    llm: LLM,
    target: Target,
    rows_N: Int[Tensor, " N"],
    corpus: Sequence[Row],
    config: TrainerConfig,
    live: bool,  # noqa: FBT001
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """The sum of cross-entropies and the sum of share w KL, in nats."""
    rows_N = rows_N.sort().values  # the rows of a prompt are neighbours then
    trees = completion_trees(target.rollouts, rows_N)
    if not trees and not corpus:  # sharded weights: a rank without work takes part, for nothing
        trees = [Tree(stem=(0,))]
    packed, states_SD = _states_of_pass(llm, trees, corpus, target.below if len(rows_N) else None)
    head = llm.head
    slots_M, rows_M, steps_M = _kl_places(rows_N, packed)
    # Prefixes of rollouts and of the corpus are rows of their own, also where they are the same.
    hidden_MD, tilt = states_SD[slots_M], target.tilt(rows_M, steps_M)
    if live:
        tilt = replace(tilt, hidden_MD=hidden_MD, head=head)
    said_M = target.rollouts.ids_NT[rows_M, steps_M]
    if config.divergence == "forward_kl":
        kl = fused_losses(hidden_MD, head, tilt=tilt).loss
    elif config.divergence == "accepted":
        accepted = Labels(next_M=said_M, weights_M=tilt.weights_M)
        kl = fused_losses(hidden_MD, head, labels=accepted).loss
    elif config.divergence == "none":
        kl = hidden_MD.new_zeros(())
    else:
        kl = divergence_loss(
            config.divergence,
            hidden_MD,
            head,
            tilt,
            share_M=target.share_N[rows_M],
            said_M=said_M,
            rows_M=rows_M,
            steps_M=steps_M,
        )
    return _corpus_loss(llm, states_SD, corpus, packed.stems[len(trees) :]), kl


def _states_of_pass(
    llm: LLM, trees: Sequence[Tree], corpus: Sequence[Row], below: StatesBelow | None
) -> tuple[Packed, Float[Tensor, "S D"]]:
    """Completions, then corpus rows, in a batch, and their states, with gradients.

    Frozen layers read the corpus rows alone, where sampling kept what they made of the completions.
    """
    others = [Tree(stem=row.token_ids) for row in corpus]
    packed = llm.pack([*trees, *others])
    if below is None or not llm.begins_above:
        return packed, llm.packed_states(packed)
    below_SD = below.laid_out(trees, packed)
    if others:
        apart = llm.pack(others)
        here_N, there_N = _joined(packed.stems[len(trees) :]), _joined(apart.stems)
        below_SD[here_N.to(llm.device)] = llm.states_below(apart)[there_N.to(llm.device)].float()
    return packed, llm.packed_states(packed, below_SD)


def backward_of_corpus(llm: LLM, passes: Sequence[Sequence[Row]]) -> tuple[float, int]:
    """Add the gradient of the corpus cross-entropy of one step, by itself.

    Args:
        llm: what moves.
        passes: corpus rows, one entry a pass.

    Returns:
        The cross-entropy, nats per trained token, by weight, and how many of these there are.
    """
    rows_of_all = [row for rows in passes for row in rows]
    whole_weight = sum(row.weight * row.num_targets for row in rows_of_all)
    total = 0.0
    for rows in passes:
        packed = llm.pack([Tree(stem=row.token_ids) for row in rows])
        loss = _corpus_loss(llm, llm.packed_states(packed), rows, packed.stems)
        (loss / whole_weight).backward()
        total += float(loss.detach())
    return total / (whole_weight or 1.0), sum(row.num_targets for row in rows_of_all)


def _corpus_loss(
    llm: LLM,
    states_SD: Float[Tensor, "S D"],
    corpus: Sequence[Row],
    stems: Sequence[Int[Tensor, "..."]],
) -> Float[Tensor, ""]:
    """The weighted sum of cross-entropies over trained tokens and labels of rows, in nats."""
    predicting_M, next_M, weights_M = (part.to(llm.device) for part in _ce_places(corpus, stems))
    labels = Labels(next_M=next_M, weights_M=weights_M)
    loss = fused_losses(states_SD[predicting_M], llm.head, labels=labels).loss
    if llm.class_head is None:
        return loss
    asked = [
        (row, stem[-1]) for row, stem in zip(corpus, stems, strict=True) if row.label is not None
    ]
    slots_M = torch.tensor([int(slot) for _, slot in asked], dtype=torch.long, device=llm.device)
    label_M = torch.tensor([int(row.label or 0) for row, _ in asked], dtype=torch.long)
    weights_M = torch.tensor([row.weight for row, _ in asked], dtype=torch.float32)
    logits_M2 = F.linear(states_SD[slots_M].float(), llm.class_head)
    losses_M = F.cross_entropy(logits_M2, label_M.to(llm.device), reduction="none")
    return loss + losses_M @ weights_M.to(llm.device)


def _kl_places(
    rows_N: Int[Tensor, " N"], packed: Packed
) -> tuple[Int[Tensor, " M"], Int[Tensor, " M"], Int[Tensor, " M"]]:
    """Prefixes that carry the KL: their slots, their rollouts and their steps."""
    device = rows_N.device
    lengths_N = torch.tensor([len(path) for path in packed.paths], device=device, dtype=torch.long)
    steps = [torch.arange(len(path)) for path in packed.paths]
    return (
        _joined(packed.paths).to(device),
        rows_N.repeat_interleave(lengths_N),
        _joined(steps).to(device),
    )


def _ce_places(
    corpus: Sequence[Row], stems: Sequence[Int[Tensor, "..."]]
) -> tuple[Int[Tensor, " M"], Int[Tensor, " M"], Float[Tensor, " M"]]:
    """Trained tokens of the corpus: the slots that predict them, the tokens, and their weights."""
    # Position j predicts token j + 1.
    trained = [torch.tensor(row.trained[1:], dtype=torch.bool) for row in corpus]
    slots = [stem[:-1][chosen] for stem, chosen in zip(stems, trained, strict=True)]
    following = [
        torch.tensor(row.token_ids[1:])[chosen] for row, chosen in zip(corpus, trained, strict=True)
    ]
    weights = [
        torch.full((len(some),), row.weight) for some, row in zip(slots, corpus, strict=True)
    ]
    return _joined(slots), _joined(following), torch.cat([torch.zeros(0), *weights])


def _joined(parts: Sequence[Tensor]) -> Int[Tensor, " M"]:
    return torch.cat(list(parts)) if parts else torch.zeros(0, dtype=torch.long)


def _split_rollouts(
    target: Target, config: Config, iteration: int
) -> tuple[Int[Tensor, " N"], ...]:
    """A random part of the rollouts for each step; those of a prompt stay together.

    They share the computation of their prompt, and each step sees many prompts.
    """
    prompt_N = target.rollouts.prompt_N
    generator = generator_for(config.seed, "update", iteration)
    rank_S = torch.randperm(len(target.rollouts.prompts), generator=generator)
    order = rank_S.to(prompt_N.device)[prompt_N].argsort(stable=True)
    return order.tensor_split(config.trainer.steps_per_iteration)


def fault_of_step(
    losses: Mapping[str, float], norm: float, guard: GuardConfig, step: int
) -> str | None:
    """What is wrong with a step that was not taken yet; the same on all ranks."""
    loss, kl = losses["update/loss"], losses["update/kl"]
    if not math.isfinite(loss):
        return (
            f"the loss is {loss} at step {step}; lower trainer.learning_rate or trainer.kl_weight"
        )
    if kl > guard.kl_limit:
        return (
            f"KL(q* || LLM) is {kl:.3g} nats a token at step {step}, above "
            f"guard.kl_limit={guard.kl_limit}; lower trainer.learning_rate or raise the limit"
        )
    if kl < -KL_TOLERANCE:
        return (
            f"KL(q* || LLM) is {kl:.3g} nats a token at step {step}: below zero by more than "
            "rounding; set trainer.precision=fp32"
        )
    if not math.isfinite(norm):
        return f"the gradient's norm is {norm} at step {step}; lower trainer.learning_rate"
    return None
