"""Stage 2: move the LLM towards q* while it learns the corpus.

Shape suffixes:  B corpus rows, L token positions, N rollouts, T completion positions, M positions
whose logits are needed, D hidden width, V vocabulary.

One optimizer step minimises (method: the lambda of the objective, with every count global over the
step; dividing by the corpus tokens changes the scale, not the minimiser)

    L = 1 / tokens * [ sum of cross-entropies
                       + lambda * sequences * mean over prompts of K(x) ]
    K(x) = mean over the rollouts of x of  sum_h w(h) KL(q*(. | h) || p_theta(. | h))

`sequences` counts the corpus rows that have a prompt of their own; plain text has none, there as
many tokens as the mean completion has count as one sequence.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from constrained_ft import equations
from constrained_ft.config import TrainerConfig
from constrained_ft.data import Corpus, Row, pad_id
from constrained_ft.distributed import StopRequest, generator_for
from constrained_ft.errors import DivergedError
from constrained_ft.llm import LLM
from constrained_ft.optimization import Optimization
from constrained_ft.progress import Display
from constrained_ft.rollouts import completion_hidden_states, pad_right
from constrained_ft.target import Target

_CHUNK_ROWS = 512  # positions whose logits exist at once


def update_llm(  # noqa: PLR0913
    llm: LLM,
    target: Target,
    corpus: Corpus,
    optimization: Optimization,
    config: TrainerConfig,
    *,
    iteration: int,
    seed: int,
    kl_limit: float,
    display: Display,
    stop: StopRequest,
) -> dict[str, float]:
    """Train the LLM for one iteration; every rollout of the target is used once.

    Returns:
        `update/...` of `metrics.METRICS`, means over the steps.

    Raises:
        DivergedError: when a loss is not finite or the KL is above `kl_limit`; before the step.
        Interrupted: when asked to stop.
    """
    display.phase("updating the LLM", config.steps_per_iteration)
    seen: list[dict[str, float]] = []
    parts = _split_rollouts(target, config.steps_per_iteration, seed, iteration)
    prompts_per_step = target.num_prompts / config.steps_per_iteration
    with llm.training():
        for index, rows_N in enumerate(parts):
            stop.check()
            step = (iteration - 1) * config.steps_per_iteration + index
            batches = [
                corpus.batch(
                    step * config.gradient_accumulation_steps + micro,
                    config.per_device_train_batch_size,
                    seed,
                )
                for micro in range(config.gradient_accumulation_steps if config.corpus else 0)
            ]
            optimization.optimizer.zero_grad()
            losses = backward_of_step(llm, target, rows_N, batches, config, prompts_per_step)
            _guard(losses, kl_limit, step)
            norm = torch.nn.utils.clip_grad_norm_(
                llm.trained_parameters().values(), config.max_grad_norm
            )
            if not torch.isfinite(norm):
                raise DivergedError(
                    f"the gradient's norm is {norm} at step {step}; lower trainer.learning_rate"
                )
            optimization.optimizer.step()
            optimization.scheduler.step()
            seen.append(losses | {"update/grad_norm": float(norm)})
            display.advance(1, ce=losses["update/ce"], kl=losses["update/kl"])
    means = {name: sum(row[name] for row in seen) / len(seen) for name in seen[0]}
    return means | {
        "update/kl_first": seen[0]["update/kl"],
        "update/learning_rate": float(optimization.scheduler.get_last_lr()[0]),
    }


def backward_of_step(
    llm: LLM,
    target: Target,
    rows_N: Int[Tensor, " N"],
    batches: Sequence[Sequence[Row]],
    config: TrainerConfig,
    num_prompts: float,
) -> dict[str, float]:
    """Add the gradient of one optimizer step's loss, in as many passes as there are batches.

    Args:
        llm: what moves.
        target: q*.
        rows_N: the rollouts of this step.
        batches: corpus rows, one entry a pass.
        config: the `trainer` section.
        num_prompts: prompts that the step's rollouts stand for, a part of one counting as a part.

    Returns:
        Cross-entropy, KL and loss of the step, as in `metrics.METRICS`.
    """
    tokens, sequences = _corpus_counts(batches, target.completion_length)
    # What each rollout's KL is multiplied by.
    scale = config.kl_weight * sequences / tokens / num_prompts
    passes = max(1, len(batches))
    ce_sum, kl_sum = 0.0, 0.0
    for rows in batches:
        ce_sum += _corpus_backward(llm, rows, 1.0 / tokens)
    if config.kl_weight > 0:
        for part in torch.arange(len(rows_N), device=rows_N.device).tensor_split(passes):
            if len(part) > 0:
                kl_sum += _target_backward(llm, target, rows_N[part], scale)
    return {
        "update/ce": ce_sum / tokens if batches else 0.0,
        "update/kl": kl_sum / num_prompts / target.completion_length,
        "update/loss": ce_sum / tokens + scale * kl_sum,
    }


def _corpus_counts(
    batches: Sequence[Sequence[Row]], completion_length: float
) -> tuple[float, float]:
    """Trained tokens and sequences of one step; one completion's worth where there is no corpus."""
    tokens, sequences = 0.0, 0.0
    for row in (row for rows in batches for row in rows):
        count = sum(row.trained)
        tokens += count
        sequences += 1.0 if row.prompted else count / completion_length
    return (tokens, sequences) if batches else (completion_length, 1.0)


def _corpus_backward(llm: LLM, rows: Sequence[Row], scale: float) -> float:
    """Backward of scale * sum of cross-entropies; returns the unscaled sum in nats."""
    ids_BL, lengths_B = pad_right(
        [row.token_ids for row in rows], pad_id(llm.tokenizer), llm.device
    )
    trained = [list(row.trained) + [False] * (ids_BL.shape[1] - len(row.trained)) for row in rows]
    trained_BL = torch.tensor(trained, device=llm.device)
    # Position j predicts token j + 1.
    hidden_MD = llm.hidden_states(ids_BL, lengths_B)[:, :-1][trained_BL[:, 1:]]
    next_M = ids_BL[:, 1:][trained_BL[:, 1:]]

    def losses(chunk_MD: Tensor, places_M: Tensor) -> tuple[Tensor, Tensor]:
        ce_M = F.cross_entropy(llm.head(chunk_MD), next_M[places_M], reduction="none")
        return ce_M.sum() * scale, ce_M.detach().sum()

    with llm.head.fast_products():
        return _backward_in_chunks(hidden_MD, losses)


def _target_backward(llm: LLM, target: Target, rows_N: Int[Tensor, " N"], scale: float) -> float:
    """Backward of scale * sum share w KL; returns the sum of share w KL in nats."""
    rollouts = target.rollouts
    hidden_NTD = completion_hidden_states(llm, rollouts, rows_N)
    places_N, steps_M = rollouts.mask_NT[rows_N, : hidden_NTD.shape[1]].nonzero(as_tuple=True)
    sources_M = rows_N[places_N]
    weights_M = target.weights_NT[sources_M, steps_M] * target.share_N[sources_M]

    def losses(chunk_MD: Tensor, places_M: Tensor) -> tuple[Tensor, Tensor]:
        log_q_MV = target.logprobs(sources_M[places_M], steps_M[places_M])
        kl_M = equations.kl_to_target(log_q_MV, llm.head(chunk_MD)) * weights_M[places_M]
        return kl_M.sum() * scale, kl_M.detach().sum()

    with llm.head.fast_products():
        return _backward_in_chunks(hidden_NTD[places_N, steps_M], losses)


def _backward_in_chunks(
    hidden_MD: Float[Tensor, "M D"], losses: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
) -> float:
    """Backward through the head a chunk of positions at a time, then once through the trunk.

    The logits of all positions never exist together; the result is exact.
    """
    leaf_MD = hidden_MD.detach().requires_grad_()
    total = 0.0
    places = torch.arange(len(leaf_MD), device=leaf_MD.device)
    for places_M in places.split(_CHUNK_ROWS):
        loss, shown = losses(leaf_MD[places_M], places_M)
        loss.backward()
        total += float(shown)
    hidden_MD.backward(leaf_MD.grad)
    return total


def _split_rollouts(
    target: Target, steps: int, seed: int, iteration: int
) -> Iterator[Int[Tensor, " N"]]:
    """A random part of the rollouts for each step; each step sees many prompts."""
    count = len(target.rollouts.prompt_N)
    order = torch.randperm(count, generator=generator_for(seed, "update", iteration))
    return iter(order.to(target.rollouts.ids_NT.device).tensor_split(steps))


def _guard(losses: dict[str, float], kl_limit: float, step: int) -> None:
    if not torch.isfinite(torch.tensor(losses["update/loss"])):
        raise DivergedError(
            f"the loss is {losses['update/loss']} at step {step}; lower trainer.learning_rate or "
            "trainer.kl_weight"
        )
    if losses["update/kl"] > kl_limit:
        raise DivergedError(
            f"KL(q* || LLM) is {losses['update/kl']:.3g} nats a token at step {step}, above "
            f"guard.kl_limit={kl_limit}; lower trainer.learning_rate or raise the limit"
        )
