"""The update's loss with another divergence than KL(q || p): dense, slower, a chunk at a time.

Shape suffixes:  M rows of (n, t), V vocabulary.

Prefixes come from the model that sampled, p, each with a weight w that makes it one of q*.
KL(q || p) reads them as q* has them, w. KL(p || q) reads them as p has them, 1. For the two others
there is no such rule, since their sums over tokens are no divergence of whole completions; they
read the mixture, (w + 1) / 2.

The gradient of KL(p || q) over whole completions is not that of the sum of its local terms: what a
token costs later counts too. With D_s the local divergence at position s it is

    sum_t  grad D_t  +  grad log p(y_t | h_t) * sum_{s > t} D_s

in expectation over completions of p; the second part is the score-function estimator, without which
a fifth of the gradient is missing. The mean over the rows of the same step is its baseline.
"""

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from constrained_ft import equations
from constrained_ft.fused import Head, Tilt, chunk_rows_for

Divergence = Literal["reverse_kl", "jsd", "tv"]


def divergence_loss(  # noqa: PLR0913
    kind: Divergence,
    hidden_MD: Float[Tensor, "M D"],
    head: Head,
    tilt: Tilt,
    *,
    share_M: Float[Tensor, " M"],
    said_M: Int[Tensor, " M"],
    rows_M: Int[Tensor, " M"],
    steps_M: Int[Tensor, " M"],
) -> Float[Tensor, ""]:
    """The weighted sum of a divergence over some prefixes, with its gradient.

    Args:
        kind: which divergence.
        hidden_MD: last hidden states of the LLM.
        head: the LLM's head.
        tilt: q of every row; its weights are share_M w.
        share_M: what each row's completion counts for its prompt.
        said_M: the token that was sampled there.
        rows_M: which completion each row belongs to.
        steps_M: its position there; rows of a completion are in order.

    Returns:
        A scalar whose value is the weighted sum of divergences, in nats.
    """
    weights_M = share_M if kind == "reverse_kl" else 0.5 * (tilt.weights_M + share_M)
    # The dense form holds more than twice as many logits of a row.
    size = chunk_rows_for(len(head.weight_VD), hidden_MD.device) // 2
    parts = [
        checkpoint(_chunk, kind, hidden_MD[rows], head, tilt, said_M, rows, use_reentrant=False)
        for rows in torch.arange(len(hidden_MD), device=hidden_MD.device).split(size)
    ]
    local_M = torch.cat([local for local, _ in parts])
    loss: Tensor = (weights_M * local_M).sum()
    if kind != "reverse_kl":
        return loss
    logprob_M = torch.cat([logprob for _, logprob in parts])
    later_M = _sum_of_later(local_M.detach(), rows_M, steps_M)
    score = (weights_M * logprob_M * (later_M - later_M.mean())).sum()
    return loss + score - score.detach()


def _chunk(
    kind: Divergence,
    hidden_MD: Tensor,
    head: Head,
    tilt: Tilt,
    said_M: Tensor,
    rows: Tensor,
) -> tuple[Tensor, Tensor]:
    """The divergence of some rows, and log p of what was said there."""
    with torch.no_grad():
        reference_MV = tilt.head(tilt.hidden_MD[rows]).float()
        u_MV = equations.auxiliary_logits(
            tilt.factors_MJR[rows],
            tilt.offset_MJ[rows],
            tilt.tokens_JVR,
            tilt.prior_JV,
            tilt.limit,
        )
        floor = 0.0 if tilt.floor_M is None else tilt.floor_M[rows]
        target_MV = equations.target_logprobs(reference_MV, u_MV, floor)
    logits_MV = head(hidden_MD).float()
    local_M = equations.divergence_to_target(kind, target_MV, logits_MV)
    logprob_M = torch.log_softmax(logits_MV, -1).gather(-1, said_M[rows, None])[:, 0]
    return local_M, logprob_M


def _sum_of_later(
    values_M: Float[Tensor, " M"], rows_M: Int[Tensor, " M"], steps_M: Int[Tensor, " M"]
) -> Float[Tensor, " M"]:
    """For each row the sum over later positions of the same completion."""
    if len(values_M) == 0:
        return values_M
    _, place_M = rows_M.unique(return_inverse=True)
    table_NT = values_M.new_zeros(int(place_M.max()) + 1, int(steps_M.max()) + 1)
    table_NT[place_M, steps_M] = values_M
    from_here_NT = table_NT.flip(-1).cumsum(-1).flip(-1)
    return (from_here_NT - table_NT)[place_M, steps_M]
