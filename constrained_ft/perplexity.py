"""How surprising text is: held-out text to a model, and what a model says to others and to itself.

Shape suffixes:  B rows, L token positions, N rollouts, T completion positions, M positions whose
logits are needed, D hidden width, V vocabulary.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from constrained_ft.distributed import StopRequest, World
from constrained_ft.encoding import Encoder, Row, pad_id
from constrained_ft.intervals import Interval, ratio_perplexity
from constrained_ft.llm import FrozenLLM
from constrained_ft.packing import pad_right
from constrained_ft.rollouts import Rollouts, completion_hidden_states

_BATCH_ROWS = 16
_KL_ROLLOUTS = 128
_CHUNK_ROWS = 64  # five buffers of the vocabulary each
_SAID_PER_PROMPT = 2


@torch.no_grad()
def perplexity(
    llm: FrozenLLM,
    rows: Sequence[Row],
    per_group: int,
    stop: StopRequest,
    world: World | None = None,
) -> dict[str, Interval]:
    """exp of the cross-entropy per trained token, by group; the interval resamples rows.

    Rows that have a label in place of trained tokens have none.
    """
    world = world or World.alone()
    results = {}
    rows = [row for row in rows if row.label is None]
    for group in dict.fromkeys(row.group for row in rows):
        chosen = [row for row in rows if row.group == group][:per_group]
        chosen.sort(key=lambda row: len(row.token_ids))
        starts = range(0, len(chosen), _BATCH_ROWS)
        sums = np.zeros((len(chosen), 2))  # of losses, of tokens
        for start in world.share(starts):
            stop.check()
            batch = chosen[start : start + _BATCH_ROWS]
            sums[start : start + len(batch)] = _row_losses(llm, batch)
        whole = np.array(world.totals(sums.ravel().tolist())).reshape(sums.shape)
        results[group] = ratio_perplexity(whole[:, 0], whole[:, 1])
    return results


@torch.no_grad()
def kl_to_base(
    llm: FrozenLLM, base: FrozenLLM, rollouts: Rollouts, world: World | None = None
) -> float:
    """Mean KL(model || base) a token over the vocabulary, on the model's completions, nats."""
    count = len(rollouts.prompt_N)
    rows_N = torch.arange(0, count, max(1, count // _KL_ROLLOUTS), device=llm.device)
    world = world or World.alone()
    total, positions = 0.0, 0
    for rows in world.share(rows_N.split(_BATCH_ROWS)):
        mask_NT = rollouts.mask_NT[rows]
        base_MD = completion_hidden_states(base, rollouts, rows)[mask_NT]
        own_MD = completion_hidden_states(llm, rollouts, rows)[mask_NT]
        for own, other in zip(own_MD.split(_CHUNK_ROWS), base_MD.split(_CHUNK_ROWS), strict=True):
            own_MV = llm.head(own).log_softmax(-1)
            base_MV = base.head(other).log_softmax(-1)
            total += float(F.kl_div(base_MV, own_MV, reduction="sum", log_target=True))
            positions += len(own)
    total, everyones = world.totals([total, float(positions)])
    return total / everyones


@torch.no_grad()
def said_perplexity(
    llm: FrozenLLM, rollouts: Rollouts, stop: StopRequest, world: World | None = None
) -> Interval:
    """Perplexity of completions after their prompts under any model, in its own tokens.

    Two completions of each prompt; the interval resamples prompts.
    """
    world = world or World.alone()
    encoder = Encoder(llm.tokenizer)
    taken: list[int] = [0] * len(rollouts.prompts)
    rows: list[tuple[int, Row]] = []
    for place, text in zip(rollouts.prompt_N.tolist(), rollouts.texts, strict=True):
        taken[place] += 1
        if taken[place] > _SAID_PER_PROMPT:
            continue
        prompt, completion = encoder.encode([rollouts.prompts[place].text, text])
        ids = (*encoder.prefix, *prompt, *completion)
        trained = (False,) * (len(ids) - len(completion)) + (True,) * len(completion)
        if completion and len(ids) > len(completion):
            rows.append((place, Row(token_ids=ids, trained=trained, group="", prompted=True)))
    rows.sort(key=lambda one: len(one[1].token_ids))
    sums = np.zeros((len(taken), 2))
    for start in world.share(range(0, len(rows), _BATCH_ROWS)):
        stop.check()
        batch = rows[start : start + _BATCH_ROWS]
        losses = _row_losses(llm, [row for _, row in batch])
        for (place, _), (loss, count) in zip(batch, losses, strict=True):
            sums[place] += loss, count
    whole = np.array(world.totals(sums.ravel().tolist())).reshape(sums.shape)
    whole = whole[whole[:, 1] > 0]
    return ratio_perplexity(whole[:, 0], whole[:, 1])


def _row_losses(llm: FrozenLLM, rows: Sequence[Row]) -> list[tuple[float, int]]:
    """Summed cross-entropy and number of trained tokens of each row."""
    ids_BL, lengths_B = pad_right(
        [row.token_ids for row in rows], pad_id(llm.tokenizer), llm.device
    )
    hidden_BLD = llm.hidden_states(ids_BL, lengths_B)
    losses = []
    for i, row in enumerate(rows):
        trained_L = torch.tensor(row.trained[1:], device=llm.device)
        length = len(row.token_ids)
        logits_MV = llm.head(hidden_BLD[i, : length - 1][trained_L])
        loss = F.cross_entropy(logits_MV, ids_BL[i, 1:length][trained_L], reduction="sum")
        losses.append((float(loss), int(trained_L.sum())))
    return losses
