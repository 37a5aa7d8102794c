"""Fit the auxiliary R to labelled rollouts.

Shape suffixes:  N rollouts, T completion positions, M rows drawn for the consistency loss,
V vocabulary.

    loss = binary cross-entropy of R(x, y_<=t) against C(x, y) at every prefix    (Monte-Carlo;
           with td_lambda below 1, against TD(lambda)'s targets)
         + w_c KL(Bernoulli(Rbar(y_<t)) || Bernoulli(R(y_<t)))                    (consistency)

where Rbar is the one-step expectation of R under the reference, without gradient (NADO, arXiv
2205.14219). The first is unbiased; the second shares strength between prefixes.

Rollouts of earlier iterations are fitted again with weight `replay_weight` per iteration of age.
They come from an earlier LLM and are off-policy for R: the weight is a plain discount, no
importance ratio, because over whole suffixes ratios have more variance than the bias they remove.
The held-out slice that stops the fit early holds prompts of the newest iteration only, so a replay
that hurts is stopped by it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from constrained_ft import equations
from constrained_ft.auxiliary import Auxiliary, Evidence, FrozenAuxiliary, TokenTable
from constrained_ft.config import AuxiliaryConfig
from constrained_ft.distributed import StopRequest, World
from constrained_ft.fused import Head, expected_satisfaction
from constrained_ft.progress import Display
from constrained_ft.randomness import generator_for, seed_everything, seed_for
from constrained_ft.rollouts import LabeledRollouts

_CONSISTENCY_ROWS = 64
_CALIBRATION_ROWS = 512
_BINS = 10
_SCALAR_ROWS = 1024


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Labelled completions, ready to fit."""

    hidden_NTD: Float[Tensor, "N T D"]
    ids_NT: Int[Tensor, "N T"]
    mask_NT: Bool[Tensor, "N T"]
    labeled_NT: Bool[Tensor, "N T"]
    """The tokens whose label is one of the LLM's own continuation."""
    labels_N: Float[Tensor, " N"]
    weights_N: Float[Tensor, " N"]
    targets_NT: Float[Tensor, "N T"]
    """What R is fitted to after each token."""

    def __len__(self) -> int:
        return len(self.labels_N)

    def take(self, rows: Int[Tensor, " M"]) -> "Examples":
        """Some of the rows."""
        return Examples(
            hidden_NTD=self.hidden_NTD[rows],
            ids_NT=self.ids_NT[rows],
            mask_NT=self.mask_NT[rows],
            labeled_NT=self.labeled_NT[rows],
            labels_N=self.labels_N[rows],
            weights_N=self.weights_N[rows],
            targets_NT=self.targets_NT[rows],
        )

    @classmethod
    def of(cls, labeled: LabeledRollouts, rows: Tensor, steps: int, weight: float) -> "Examples":
        """Rows of labelled rollouts, padded to `steps` positions."""
        rollouts = labeled.rollouts
        missing = steps - rollouts.ids_NT.shape[1]
        labels_N = labeled.labels_N[rows]
        return cls(
            hidden_NTD=F.pad(rollouts.hidden_NTD[rows], (0, 0, 0, missing)),
            ids_NT=F.pad(rollouts.ids_NT[rows], (0, missing)),
            mask_NT=F.pad(rollouts.mask_NT[rows], (0, missing)),
            labeled_NT=F.pad(rollouts.after_roll_in[rows], (0, missing)),
            labels_N=labels_N,
            weights_N=torch.full_like(labels_N, weight),
            targets_NT=labels_N[:, None].expand(-1, steps),
        )

    @classmethod
    def joined(cls, parts: Sequence["Examples"]) -> "Examples":
        """All rows of several parts."""
        return cls(
            hidden_NTD=torch.cat([part.hidden_NTD for part in parts]),
            ids_NT=torch.cat([part.ids_NT for part in parts]),
            mask_NT=torch.cat([part.mask_NT for part in parts]),
            labeled_NT=torch.cat([part.labeled_NT for part in parts]),
            labels_N=torch.cat([part.labels_N for part in parts]),
            weights_N=torch.cat([part.weights_N for part in parts]),
            targets_NT=torch.cat([part.targets_NT for part in parts]),
        )


def fit_auxiliary(  # noqa: PLR0913
    auxiliary: Auxiliary,
    head: Head,
    labeled: Sequence[LabeledRollouts],
    config: AuxiliaryConfig,
    *,
    seed: int,
    display: Display,
    stop: StopRequest,
    world: World | None = None,
) -> dict[str, float]:
    """Fit one R in place, from where it stands.

    Args:
        auxiliary: R, or of a product the R of one term.
        head: the reference's output head, for the one-step expectation.
        labeled: the newest iteration first, then earlier ones.
        config: the `auxiliary` section.
        seed: of the batches and the held-out slice.
        display: advanced once an epoch.
        stop: polled once an epoch.
        world: who shares the rows of each batch; all have the same examples and end with the same
            R. None is this process alone.

    Returns:
        How good R is on the held-out slice: `auxiliary/...` of `metrics.METRICS`.

    Raises:
        Interrupted: when asked to stop.
    """
    world = world or World.alone()
    newest = labeled[0]
    steps = max(part.rollouts.ids_NT.shape[1] for part in labeled)
    kept, held_out = [], []
    for part in labeled:
        weight = config.replay_weight ** (newest.rollouts.iteration - part.rollouts.iteration)
        kept_rows, held_out_rows = split_by_prompt(part, config, seed)
        kept.append(Examples.of(part, kept_rows, steps, weight))
        held_out.append(Examples.of(part, held_out_rows, steps, weight))
    training, validation = Examples.joined(kept), Examples.joined(held_out)
    with seed_everything(seed_for(seed, "fit", newest.rollouts.iteration)):
        epochs = _descend(auxiliary, head, training, validation, config, display, stop, world)
    quality = quality_of(auxiliary.frozen(), head, labeled, config, seed)
    return quality | {"auxiliary/epochs": float(epochs), "auxiliary/examples": float(len(training))}


def quality_of(
    auxiliary: FrozenAuxiliary,
    head: Head,
    labeled: Sequence[LabeledRollouts],
    config: AuxiliaryConfig,
    seed: int,
) -> dict[str, float]:
    """How good R is on the held-out slice of the newest rollouts, those that it guided left out.

    Args:
        auxiliary: R.
        head: the reference's output head.
        labeled: as `fit_auxiliary` was given.
        config: the `auxiliary` section.
        seed: of the held-out slice.
    """
    newest = labeled[0].unguided
    steps = max(part.rollouts.ids_NT.shape[1] for part in labeled)
    _, rows = split_by_prompt(newest, config, seed)
    return measure(auxiliary, head, Examples.of(newest, rows, steps, 1.0), seed=seed)


def _descend(  # noqa: PLR0913
    auxiliary: Auxiliary,
    head: Head,
    training: Examples,
    validation: Examples,
    config: AuxiliaryConfig,
    display: Display,
    stop: StopRequest,
    world: World,
) -> int:
    """Early-stopped AdamW; leaves the best state on the held-out slice. Returns its epoch."""
    some = torch.randperm(len(training))[:_SCALAR_ROWS].to(training.labels_N.device)
    _settle_scalars(auxiliary, training.take(some))
    optimizer = torch.optim.AdamW(
        auxiliary.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
    )
    best, best_epoch = _validation_loss(auxiliary, validation), 0
    best_state = {name: tensor.clone() for name, tensor in auxiliary.state_dict().items()}
    for epoch in range(1, config.max_epochs + 1):
        stop.check()
        if config.td_lambda < 1:
            training = _with_td_targets(auxiliary, head, training, config.td_lambda)
        order, shift = _epoch_order(training, balanced=config.balanced)
        auxiliary.train()
        for rows in order.split(config.batch_size):
            optimizer.zero_grad()
            batch = training.take(rows)
            loss = _loss(auxiliary, head, batch, shift, config.consistency_weight, world)
            if loss is not None:
                loss.backward()
            world.add_gradients(auxiliary.parameters())
            torch.nn.utils.clip_grad_norm_(auxiliary.parameters(), 1.0)
            optimizer.step()
        auxiliary.eval()
        loss_now = _validation_loss(auxiliary, validation)
        display.advance()
        if loss_now < best:
            best, best_epoch = loss_now, epoch
            best_state = {name: tensor.clone() for name, tensor in auxiliary.state_dict().items()}
        elif epoch - best_epoch >= config.patience:
            break
    auxiliary.load_state_dict(best_state)
    return best_epoch


def _settle_scalars(auxiliary: Auxiliary, sample: Examples) -> None:
    """Fit biases and the prior's gain alone: AdamW's small steps would take epochs over them."""
    scalars = auxiliary.scalars
    optimizer = torch.optim.LBFGS(
        scalars, max_iter=20, line_search_fn="strong_wolfe", tolerance_grad=1e-5
    )

    def closure() -> float:
        loss = _loss(auxiliary, _NO_HEAD, sample, 0.0, 0.0, _ALONE)
        assert loss is not None
        gradients = torch.autograd.grad(loss, scalars, allow_unused=True)
        for scalar, gradient in zip(scalars, gradients, strict=True):
            scalar.grad = gradient
        return float(loss.detach())

    optimizer.step(closure)


def _epoch_order(training: Examples, *, balanced: bool) -> tuple[Tensor, float]:
    """A random order of the rows, the rarer kind repeated when balanced, and the logit shift."""
    rows = torch.arange(len(training), device=training.labels_N.device)
    is_satisfied = training.labels_N >= 0.5
    satisfied, violating = rows[is_satisfied], rows[~is_satisfied]
    shift = 0.0
    if balanced and len(satisfied) > 0 and len(violating) > 0:
        rarer, other = sorted((satisfied, violating), key=len)
        copies = round(len(other) / len(rarer))
        rows = torch.cat([rows, rarer.repeat(copies - 1)])
        counts = (copies, 1) if rarer is satisfied else (1, copies)
        shift = equations.balanced_shift(*counts)
    return rows[torch.randperm(len(rows)).to(rows.device)], shift


def _loss(
    auxiliary: Auxiliary,
    head: Head,
    batch: Examples,
    shift: float,
    consistency_weight: float,
    world: World,
) -> Tensor | None:
    """Monte-Carlo loss of every prefix plus the weighted consistency loss of some.

    Of several ranks each gets the part of its own rows, None where it has none; the parts add up to
    the loss of the batch.
    """
    rows_N = world.share(torch.arange(len(batch)))
    own = batch if world.size == 1 else batch.take(rows_N)
    if len(own) == 0:
        return None
    if consistency_weight == 0:
        table, ids_NT = auxiliary.table_of(own.ids_NT)
    else:
        table, ids_NT = auxiliary.table(), own.ids_NT
    evidence = auxiliary(table, own.hidden_NTD, ids_NT, own.mask_NT)
    logits_NT = table.logits_of(evidence.factors_NTJR, evidence.offset_NTJ, ids_NT)
    weights_NT = own.labeled_NT * own.weights_N[:, None]
    whole_weight = (batch.labeled_NT * batch.weights_N[:, None]).sum()
    # The shift of balanced batches enters the loss only, so R itself stays calibrated.
    errors_NT = equations.bernoulli_cross_entropy(own.targets_NT, logits_NT + shift)
    loss: Tensor = (errors_NT * weights_NT).sum() / whole_weight
    if consistency_weight == 0:
        return loss
    # Pair the token at t with the expectation at t + 1; an end-of-text token has no successor.
    pairs_NT = batch.mask_NT[:, :-1] & batch.mask_NT[:, 1:]
    rows, columns = pairs_NT.nonzero(as_tuple=True)
    drawn = torch.randperm(len(rows), device=rows.device)[:_CONSISTENCY_ROWS]
    if len(drawn) == 0:  # completions of one token
        return loss
    mine = drawn[rows[drawn] % world.size == world.rank]
    rows, columns = rows[mine] // world.size, columns[mine]
    expected_M, complement_M = _expected(table, evidence, head, own.hidden_NTD, (rows, columns + 1))
    residuals_M = equations.consistency_divergence(
        expected_M, complement_M, logits_NT[rows, columns]
    )
    return loss + consistency_weight * residuals_M.sum() / len(drawn)


@torch.no_grad()
def _with_td_targets(
    auxiliary: Auxiliary, head: Head, examples: Examples, td_lambda: float
) -> Examples:
    """The targets that R as it stands gives, for one epoch."""
    table = auxiliary.table()
    evidence = auxiliary(table, examples.hidden_NTD, examples.ids_NT, examples.mask_NT)
    rows, columns = (examples.mask_NT[:, :-1] & examples.mask_NT[:, 1:]).nonzero(as_tuple=True)
    expected_NT = torch.zeros_like(examples.mask_NT, dtype=torch.float32)
    for some in torch.arange(len(rows), device=rows.device).split(_CALIBRATION_ROWS):
        places = rows[some], columns[some] + 1
        log_expected_M, _ = _expected(table, evidence, head, examples.hidden_NTD, places)
        expected_NT[rows[some], columns[some]] = log_expected_M.exp()
    targets_NT = equations.td_lambda_targets(
        examples.labels_N, expected_NT, examples.mask_NT, td_lambda
    )
    return replace(examples, targets_NT=targets_NT)


def _expected(
    table: TokenTable,
    evidence: Evidence,
    head: Head,
    hidden_NTD: Float[Tensor, "N T D"],
    places: tuple[Int[Tensor, " M"], Int[Tensor, " M"]],
) -> tuple[Float[Tensor, " M"], Float[Tensor, " M"]]:
    """log Rbar and log(1 - Rbar) at some rows and columns, without gradient."""
    return expected_satisfaction(
        table.guidance(
            head, hidden_NTD[places], evidence.factors_NTJR[places], evidence.offset_NTJ[places]
        )
    )


@torch.no_grad()
def _validation_loss(auxiliary: Auxiliary, validation: Examples) -> float:
    loss = _loss(auxiliary, _NO_HEAD, validation, 0.0, 0.0, _ALONE)
    assert loss is not None
    return float(loss)


_ALONE = World.alone()
_NO_HEAD = Head(weight_VD=torch.zeros(0, 0), bias_V=None, bf16_valued=False)


def split_by_prompt(
    labeled: LabeledRollouts, config: AuxiliaryConfig, seed: int
) -> tuple[Tensor, Tensor]:
    """Rows of training and of held-out prompts: rollouts of one prompt are not independent.

    Which prompts are held out is a matter of the prompt alone, so that replayed rollouts cannot
    have shown R what it is tested on. At least one prompt is on each side; of a single prompt, one
    rollout.
    """
    rollouts = labeled.rollouts
    ranks = [seed_for(seed, "auxiliary held-out", prompt.id) / 2**63 for prompt in rollouts.prompts]
    if len(ranks) == 1:
        rows_N = torch.arange(len(rollouts.prompt_N), device=rollouts.prompt_N.device)
        return rows_N[1:], rows_N[:1]
    ordered = sorted(ranks)
    bound = min(max(config.validation_share, ordered[0]), ordered[-2])
    is_held_out_S = torch.tensor(ranks, dtype=torch.float64) <= bound
    is_held_out_N = is_held_out_S.to(rollouts.prompt_N.device)[rollouts.prompt_N]
    return (~is_held_out_N).nonzero()[:, 0], is_held_out_N.nonzero()[:, 0]


@torch.no_grad()
def measure(
    auxiliary: FrozenAuxiliary, head: Head, examples: Examples, *, seed: int
) -> dict[str, float]:
    """Discrimination and calibration of R on examples that it was not fitted to.

    Returns:
        `auxiliary/auc_*`, `brier_*` and `calibration_error_*` after the first, the middle and the
        last token, the last two also over all tokens, `log_loss`, `tower_residual` and the
        reliability diagram's `bin_<k>/...`, as in `metrics.METRICS`. The ROC area needs both
        classes and is left out otherwise.
    """
    evidence = auxiliary.read_examples(examples.hidden_NTD, examples.ids_NT, examples.mask_NT)
    logits_NT = auxiliary.table.logits_of(
        evidence.factors_NTJR, evidence.offset_NTJ, examples.ids_NT
    )
    probs_NT = logits_NT.sigmoid()
    lengths_N = examples.mask_NT.sum(-1)
    rows_N = torch.arange(len(examples), device=lengths_N.device)
    places = {"first": torch.zeros_like(lengths_N), "middle": lengths_N // 2, "last": lengths_N - 1}
    metrics = {}
    for name, place_N in places.items():
        at_N = probs_NT[rows_N, place_N.clamp_min(0)]
        auc = area_under_curve(at_N, examples.labels_N)
        if auc is not None:
            metrics[f"auxiliary/auc_{name}"] = auc
        metrics[f"auxiliary/brier_{name}"] = float((at_N - examples.labels_N).square().mean())
        metrics[f"auxiliary/calibration_error_{name}"] = calibration_error(at_N, examples.labels_N)
    labels_NT = examples.labels_N[:, None].expand_as(probs_NT)
    probs, labels = probs_NT[examples.mask_NT], labels_NT[examples.mask_NT]
    losses = equations.bernoulli_cross_entropy(labels, logits_NT[examples.mask_NT])
    metrics["auxiliary/log_loss"] = float(losses.mean())
    metrics["auxiliary/brier"] = float((probs - labels).square().mean())
    metrics["auxiliary/calibration_error"] = calibration_error(probs, labels)
    for one in bins(probs, labels):
        place = f"auxiliary/bin_{one.number}"
        metrics[f"{place}/share"] = one.share
        metrics[f"{place}/predicted"] = one.predicted
        metrics[f"{place}/observed"] = one.observed
    pairs_NT = examples.mask_NT[:, :-1] & examples.mask_NT[:, 1:]
    rows, columns = pairs_NT.nonzero(as_tuple=True)
    generator = generator_for(seed, "tower")
    drawn = torch.randperm(len(rows), generator=generator)[:_CALIBRATION_ROWS].to(rows.device)
    rows, columns = rows[drawn], columns[drawn]
    expected_M, _ = _expected(
        auxiliary.table, evidence, head, examples.hidden_NTD, (rows, columns + 1)
    )
    residual_M = (expected_M - F.logsigmoid(logits_NT[rows, columns])).abs()
    metrics["auxiliary/tower_residual"] = float(residual_M.mean())
    return metrics


def area_under_curve(scores_N: Float[Tensor, " N"], labels_N: Float[Tensor, " N"]) -> float | None:
    """Area under the ROC curve, ties counted half; None when only one class is present."""
    positive_N = labels_N >= 0.5
    scores_P, others_M = scores_N[positive_N].contiguous(), scores_N[~positive_N].sort().values
    if len(scores_P) == 0 or len(others_M) == 0:
        return None
    below_P = torch.searchsorted(others_M, scores_P)
    not_above_P = torch.searchsorted(others_M, scores_P, right=True)
    return float((below_P + not_above_P).double().mean() / (2 * len(others_M)))


def calibration_error(probs_N: Float[Tensor, " N"], labels_N: Float[Tensor, " N"]) -> float:
    """Expected calibration error over 10 bins of equal width."""
    return sum(one.share * abs(one.predicted - one.observed) for one in bins(probs_N, labels_N))


@dataclass(frozen=True, kw_only=True)
class Bin:
    """One point of a reliability diagram."""

    number: int
    """Which tenth of [0, 1], from 1."""
    share: float
    predicted: float
    observed: float


def bins(probs_N: Float[Tensor, " N"], labels_N: Float[Tensor, " N"]) -> list[Bin]:
    """Predictions by tenths; only those that hold any."""
    tenths_N = (probs_N * _BINS).long().clamp_max(_BINS - 1)
    return [
        Bin(
            number=int(tenth) + 1,
            share=float((tenths_N == tenth).float().mean()),
            predicted=float(probs_N[tenths_N == tenth].mean()),
            observed=float(labels_N[tenths_N == tenth].mean()),
        )
        for tenth in tenths_N.unique()
    ]
