"""One small head for each of several constraints, for people to look at.

The heads are logistic regressions on the hidden state half-way through each completion, fitted
anew in every iteration; they train nothing, and say which constraint is hard to foresee. One more
head is fitted to "all hold". Whatever the constraints are, the rate at which all hold lies between
the Fréchet bounds  max(0, sum_j R_j - (J - 1)) <= R <= min_j R_j, and were they independent it
would be the product of the R_j.

The joint R, fitted to the product of the labels, is exact: it is held against the bounds and the
product of the heads. A product of one R for each term (`auxiliary.terms=product`) lies between its
own bounds whatever is true. There the truth is watched: the rate at which all hold, regressed on
what the terms' R say, so that few numbers are fitted to few completions.

Shape suffixes:  N rollouts, T completion positions, D hidden width, J terms.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from constrained_ft import equations
from constrained_ft.config import Config
from constrained_ft.fit import area_under_curve, split_by_prompt
from constrained_ft.randomness import seed_everything, seed_for
from constrained_ft.rollouts import LabeledRollouts

_SLACK = 0.02
_PENALTY = 1e-2  # per weight, beside a loss per rollout
_STEPS = 30


def measure_terms(
    labeled: LabeledRollouts, said_NTJ: Float[Tensor, "N T J"], config: Config
) -> dict[str, float]:
    """How well each term is foreseen half-way, and how the terms hang together.

    Args:
        labeled: an iteration's rollouts.
        said_NTJ: R after each token, for the same rollouts; of a product, the R of each term.
        config: the whole run.

    Returns:
        `term/<name>/auc` and `terms/...` of `metrics.METRICS`, on held-out prompts; nothing for a
        constraint of one term.
    """
    terms = config.constraint.terms
    if not terms:
        return {}
    rollouts = labeled.rollouts
    rows_N = torch.arange(len(labeled.labels_N), device=said_NTJ.device)
    half_N = rollouts.mask_NT.sum(-1) // 2
    states_ND = rollouts.hidden_NTD[rows_N, half_N].float()
    states_ND = F.layer_norm(states_ND, states_ND.shape[-1:])
    bounds_J = labeled.scores_NJ.new_tensor([term.satisfied_at for term in terms.values()])
    satisfied_NJ = labeled.scores_NJ >= bounds_J
    kept, held_out = split_by_prompt(labeled, config.auxiliary, config.seed)
    all_N = satisfied_NJ.all(-1)
    with seed_everything(seed_for(config.seed, "terms", rollouts.iteration)):
        probs_MJ = _foresee(states_ND[kept], satisfied_NJ[kept].float(), states_ND[held_out])
        all_M = _foresee(states_ND[kept], all_N[kept, None].float(), states_ND[held_out])[:, 0]
    metrics = {}
    for j, name in enumerate(terms):
        area = area_under_curve(probs_MJ[:, j], satisfied_NJ[held_out, j].float())
        if area is not None:
            metrics[f"term/{name}/auc"] = area
    for name, guess_M in (("joint_auc", all_M), ("product_auc", probs_MJ.prod(-1))):
        area = area_under_curve(guess_M, all_N[held_out].float())
        if area is not None:
            metrics[f"terms/{name}"] = area
    # R after the token before: what the head's hidden state has seen.
    said_NJ = said_NTJ[rows_N, (half_N - 1).clamp_min(0)]
    if config.auxiliary.terms == "product":
        labels_N, u_NJ = labeled.labels_N, torch.logit(said_NJ, eps=1e-6)
        seen_M = _foresee(u_NJ[kept], labels_N[kept, None], u_NJ[held_out])[:, 0]
        bias = said_NJ[held_out].prod(-1).mean() - labels_N[held_out].mean()
        found = _dependence(seen_M, said_NJ[held_out])
        return metrics | found | {"terms/product_bias": float(bias)}
    if not config.constraint.has_hard_labels:
        return metrics  # R is no probability of satisfaction then
    return metrics | _dependence(said_NJ[held_out, 0], probs_MJ)


def _dependence(joint_M: Float[Tensor, " M"], probs_MJ: Float[Tensor, "M J"]) -> dict[str, float]:
    """How all terms together hang together with each of them."""
    low_M, high_M = equations.frechet_bounds(probs_MJ)
    outside_M = (joint_M < low_M - _SLACK) | (joint_M > high_M + _SLACK)
    return {
        "terms/product_gap": float((joint_M - probs_MJ.prod(-1)).abs().mean()),
        "terms/outside_bounds": float(outside_M.float().mean()),
    }


def _foresee(
    states_ND: Float[Tensor, "N D"],
    labels_NJ: Float[Tensor, "N J"],
    others_MD: Float[Tensor, "M D"],
) -> Float[Tensor, "M J"]:
    """Expected labels of other states, by a ridge-penalised logistic regression."""
    width, count = states_ND.shape[1], labels_NJ.shape[1]
    weights_DJ = torch.zeros(width, count, device=states_ND.device, requires_grad=True)
    rates_J = labels_NJ.mean(0).clamp(0.01, 0.99)
    bias_J = torch.logit(rates_J).clone().requires_grad_()
    scale = width**-0.5
    optimizer = torch.optim.LBFGS(
        [weights_DJ, bias_J], max_iter=_STEPS, line_search_fn="strong_wolfe"
    )

    def closure() -> float:
        optimizer.zero_grad()
        logits_NJ = scale * states_ND @ weights_DJ + bias_J
        loss = F.binary_cross_entropy_with_logits(logits_NJ, labels_NJ)
        loss = loss + _PENALTY * weights_DJ.square().mean(0).sum()
        torch.autograd.backward(loss)
        return float(loss.detach())

    optimizer.step(closure)
    with torch.no_grad():
        logits_MJ: Tensor = scale * others_MD @ weights_DJ + bias_J
        return logits_MJ.sigmoid()
