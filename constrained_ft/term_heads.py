"""One small head for each of several constraints, for people to look at.

The joint R, fitted to the product of the labels, is exact and the only one that trains the LLM. The
heads are logistic regressions on the hidden state half-way through each completion, fitted anew in
every iteration; they say which constraint is hard to foresee, and whether the constraints are
independent: were they, the product of the heads would be R. One more head, fitted to
"all hold", says what such a product would cost as a guide. Whatever they are, R lies between the
Fréchet bounds  max(0, sum_j R_j - (J - 1)) <= R <= min_j R_j.

Shape suffixes:  N rollouts, T completion positions, D hidden width, J terms.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from constrained_ft.config import Config
from constrained_ft.fit import area_under_curve, split_by_prompt
from constrained_ft.randomness import seed_everything, seed_for
from constrained_ft.rollouts import LabeledRollouts

_SLACK = 0.02
_PENALTY = 1e-2  # per weight, beside a loss per rollout
_STEPS = 30


def measure_terms(
    labeled: LabeledRollouts, joint_NT: Float[Tensor, "N T"], config: Config
) -> dict[str, float]:
    """How well each term is foreseen half-way, and how the terms hang together.

    Args:
        labeled: an iteration's rollouts.
        joint_NT: R after each token, for the same rollouts.
        config: the whole run.

    Returns:
        `term/<name>/auc` and `terms/...` of `metrics.METRICS`, on held-out prompts; nothing for a
        constraint of one term.
    """
    terms = config.constraint.terms
    if not terms:
        return {}
    rollouts = labeled.rollouts
    rows_N = torch.arange(len(labeled.labels_N), device=joint_NT.device)
    half_N = rollouts.mask_NT.sum(-1) // 2
    states_ND = rollouts.hidden_NTD[rows_N, half_N].float()
    states_ND = F.layer_norm(states_ND, states_ND.shape[-1:])
    bounds_J = labeled.scores_NJ.new_tensor([term.satisfied_at for term in terms.values()])
    satisfied_NJ = labeled.scores_NJ >= bounds_J
    kept, held_out = split_by_prompt(labeled, config.auxiliary, config.seed)
    all_N = satisfied_NJ.all(-1)
    with seed_everything(seed_for(config.seed, "terms", rollouts.iteration)):
        probs_MJ = _foresee(states_ND[kept], satisfied_NJ[kept], states_ND[held_out])
        all_M = _foresee(states_ND[kept], all_N[kept, None], states_ND[held_out])[:, 0]
    metrics = {}
    for j, name in enumerate(terms):
        area = area_under_curve(probs_MJ[:, j], satisfied_NJ[held_out, j].float())
        if area is not None:
            metrics[f"term/{name}/auc"] = area
    for name, guess_M in (("joint_auc", all_M), ("product_auc", probs_MJ.prod(-1))):
        area = area_under_curve(guess_M, all_N[held_out].float())
        if area is not None:
            metrics[f"terms/{name}"] = area
    if not config.constraint.has_hard_labels:
        return metrics  # R is no probability of satisfaction then
    # R after the token before: what the head's hidden state has seen.
    joint_M = joint_NT[held_out, (half_N[held_out] - 1).clamp_min(0)]
    low_M = (probs_MJ.sum(-1) - (len(terms) - 1)).clamp_min(0)
    high_M = probs_MJ.amin(-1)
    outside_M = (joint_M < low_M - _SLACK) | (joint_M > high_M + _SLACK)
    return metrics | {
        "terms/product_gap": float((joint_M - probs_MJ.prod(-1)).abs().mean()),
        "terms/outside_bounds": float(outside_M.float().mean()),
    }


def _foresee(
    states_ND: Float[Tensor, "N D"],
    satisfied_NJ: Bool[Tensor, "N J"],
    others_MD: Float[Tensor, "M D"],
) -> Float[Tensor, "M J"]:
    """Probabilities for other states, by a ridge-penalised logistic regression."""
    width, count = states_ND.shape[1], satisfied_NJ.shape[1]
    weights_DJ = torch.zeros(width, count, device=states_ND.device, requires_grad=True)
    rates_J = satisfied_NJ.float().mean(0).clamp(0.01, 0.99)
    bias_J = torch.logit(rates_J).clone().requires_grad_()
    scale = width**-0.5
    optimizer = torch.optim.LBFGS(
        [weights_DJ, bias_J], max_iter=_STEPS, line_search_fn="strong_wolfe"
    )

    def closure() -> float:
        optimizer.zero_grad()
        logits_NJ = scale * states_ND @ weights_DJ + bias_J
        loss = F.binary_cross_entropy_with_logits(logits_NJ, satisfied_NJ.float())
        loss = loss + _PENALTY * weights_DJ.square().mean(0).sum()
        torch.autograd.backward(loss)
        return float(loss.detach())

    optimizer.step(closure)
    with torch.no_grad():
        logits_MJ: Tensor = scale * others_MD @ weights_DJ + bias_J
        return logits_MJ.sigmoid()
