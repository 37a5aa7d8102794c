"""Decode completions from a frozen LLM: this package's way, and by transformers' `generate`.

Shape suffixes:  S prompts, L prompt positions, B rows decoded together, G of them that are not
finished, T completion positions, D hidden width, V vocabulary.

Each prompt is read once, without padding unless the model has a sliding window, and its cache
repeated for its completions; a token costs each row one uniform number; rows that have ended are
taken out; the hidden states that predict each token are kept.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from constrained_ft.attention import grow_in_place
from constrained_ft.encoding import pad_id
from constrained_ft.frozen_layers import StatesBelow
from constrained_ft.llm import FrozenLLM
from constrained_ft.packing import Tree, pad_right

_BLOCK = 256  # width of the first level of the inverse CDF
_TOP_K = 128  # tokens looked at first for a nucleus
_READ_ROWS = 64  # completions in one forward pass
RETIRE_AT = 0.75  # rows that ended are taken out, a copy of the cache, at this share of the rest

Guide = Callable[[Tensor, Tensor], Tensor]
"""Hidden states [B, t + 1, D] and completion tokens [B, t] so far -> what is added to the logits.

That is log R of every next token, or a multiple of it.
"""


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """Completions; the rows of a prompt are neighbours."""

    ids_BT: Int[Tensor, "B T"]
    mask_BT: Bool[Tensor, "B T"]
    """True at completion tokens, end-of-text included."""
    hidden_BTD: Float[Tensor, "B T D"]
    """The last hidden state that predicts each token."""


@torch.no_grad()
def decode(
    llm: FrozenLLM,
    prompts: Sequence[Sequence[int]],
    uniforms_BT: Float[Tensor, "B T"],
    *,
    guide: Guide | None = None,
    guided_B: Int[Tensor, " B"] | None = None,
    top_p: float = 1.0,
) -> Decoded:
    """Decode the same number of completions for each prompt, together.

    Args:
        llm: what is sampled from.
        prompts: their token ids.
        uniforms_BT: numbers in [0, 1), one for each token of each row; B is a multiple of S.
        guide: its log R is added to the log-probabilities.
        guided_B: only to those of so many tokens at the start of each row; None is all of them.
        top_p: sample from the fewest tokens with this much probability; 1 is no truncation.
    """
    *_, whole = decode_token_by_token(
        llm, prompts, uniforms_BT, guide=guide, guided_B=guided_B, top_p=top_p
    )
    return whole


@torch.no_grad()
def decode_token_by_token(
    llm: FrozenLLM,
    prompts: Sequence[Sequence[int]],
    uniforms_BT: Float[Tensor, "B T"],
    *,
    guide: Guide | None = None,
    guided_B: Int[Tensor, " B"] | None = None,
    top_p: float = 1.0,
) -> Iterator[Decoded]:
    """What `decode` returns as it grows: the completions so far, after every token.

    They are views of the same tensors; an iterator that is closed decodes no further.
    """
    rows, steps = uniforms_BT.shape
    repeats = rows // len(prompts)
    end = llm.tokenizer.eos_token_id
    usable = len(llm.tokenizer)  # a head may be padded beyond the tokenizer
    hidden_GD, cache, mask_GL = _prefill(llm, prompts, repeats)
    ids_BT = torch.zeros(rows, steps, dtype=torch.long, device=llm.device)
    mask_BT = torch.zeros(rows, steps, dtype=torch.bool, device=llm.device)
    hidden_BTD = hidden_GD.new_zeros(rows, steps, hidden_GD.shape[-1])
    kept_BTD = hidden_BTD if llm.below is not None else hidden_BTD[:, :0]
    below_BTD = torch.zeros_like(kept_BTD, dtype=torch.float32)
    # Rows that are decoded still, of all B; those among them that have not ended.
    going_G = torch.arange(rows, device=llm.device)
    alive_G = torch.ones(rows, dtype=torch.bool, device=llm.device)
    for step in range(steps):
        hidden_BTD[going_G, step] = hidden_GD
        logits_GV = llm.head(hidden_GD)[:, :usable]
        if guide is not None:
            guided_G = torch.ones_like(alive_G) if guided_B is None else guided_B[going_G] > step
            rows_M = going_G[guided_G]
            if len(rows_M) > 0:
                past = hidden_BTD[rows_M, : step + 1], ids_BT[rows_M, :step]
                logits_GV[guided_G] += guide(*past)[:, :usable]
        probs_GV = truncate(logits_GV.softmax(-1), top_p)
        token_G = inverse_cdf(probs_GV, uniforms_BT[going_G, step])
        ids_BT[going_G, step] = token_G
        mask_BT[going_G, step] = alive_G
        yield Decoded(
            ids_BT=ids_BT[:, : step + 1],
            mask_BT=mask_BT[:, : step + 1],
            hidden_BTD=hidden_BTD[:, : step + 1],
        )
        if end is not None:
            alive_G = alive_G & (token_G != end)
        count = int(alive_G.sum())
        if step == steps - 1 or count == 0:
            break
        if count <= RETIRE_AT * len(alive_G) and _can_select(cache):
            kept = alive_G.nonzero()[:, 0]
            cache.batch_select_indices(kept)
            going_G, alive_G, token_G = going_G[kept], alive_G[kept], token_G[kept]
            mask_GL = mask_GL[kept]
        mask_GL = torch.cat([mask_GL, mask_GL.new_ones(len(mask_GL), 1)], 1)
        llm.slots.add(count, len(token_G))
        with llm.watched() as seen:
            hidden_GD, cache = llm.read(token_G[:, None], mask_GL, cache)
        for below_GLD in seen:
            below_BTD[going_G, step] = below_GLD[:, 0].float()
    if llm.below is not None:
        lengths = (mask_BT.sum(-1) - 1).tolist()  # the last token was not read
        for row, (ids, length) in enumerate(zip(ids_BT.tolist(), lengths, strict=True)):
            stem, branch = tuple(prompts[row // repeats]), tuple(ids[:length])
            llm.below.keep_branch(stem, branch, below_BTD[row, :length])


def _can_select(cache: object) -> bool:
    """Whether rows can be taken out of a cache: recurrent states, for one, cannot."""
    return isinstance(cache, DynamicCache) and all(
        isinstance(layer, DynamicLayer) for layer in cache.layers
    )


def _prefill(
    llm: FrozenLLM, prompts: Sequence[Sequence[int]], repeats: int
) -> tuple[Tensor, Any, Tensor]:
    """The hidden states that predict the first tokens, the cache, and the mask, all repeated."""
    ids_SL, mask_SL = _left_padded(llm, prompts)
    found = _read_packed(llm, prompts, mask_SL) if llm.moves_caches else None
    if found is None:
        llm.slots.add(sum(map(len, prompts)), ids_SL.numel())
        with llm.watched() as seen:
            found = llm.read(ids_SL, mask_SL)
        if llm.below is not None:
            for ids, states_LD, mask_L in zip(prompts, seen[0], mask_SL.bool(), strict=True):
                llm.below.keep(tuple(ids), states_LD[mask_L].float())
    hidden_SD, cache = found
    grow_in_place(cache)
    cache.batch_repeat_interleave(repeats)
    return (
        hidden_SD.repeat_interleave(repeats, 0),
        cache,
        mask_SL.repeat_interleave(repeats, 0),
    )


def _read_packed(
    llm: FrozenLLM, prompts: Sequence[Sequence[int]], mask_SL: Int[Tensor, "S L"]
) -> tuple[Tensor, DynamicCache] | None:
    """Read prompts side by side, then move keys and values to where left padding has them.

    Padded to one length, prompts of all lengths waste half of the pass. None where the cache is no
    list of keys and values.
    """
    packed = llm.pack([Tree(stem=tuple(ids)) for ids in prompts])
    with llm.watched() as seen:
        states_PD, cache = llm.read_packed(packed)
    if not _can_select(cache):
        return None
    if llm.below is not None:
        below_PD = seen[0].flatten(0, 1).float()
        for ids, stem in zip(prompts, packed.stems, strict=True):
            llm.below.keep(tuple(ids), below_PD[stem.to(below_PD.device)])
    slots_SL = torch.zeros_like(mask_SL)  # what lies at the padding, nothing reads
    slots_SL[mask_SL.bool()] = torch.cat(packed.stems).to(llm.device)
    for layer in cache.layers:
        layer.keys, layer.values = (
            past_BGLD.transpose(1, 2).flatten(0, 1)[slots_SL].transpose(1, 2)
            for past_BGLD in (layer.keys, layer.values)
        )
    return states_PD[slots_SL[:, -1]], cache


def _left_padded(
    llm: FrozenLLM, prompts: Sequence[Sequence[int]]
) -> tuple[Int[Tensor, "S L"], Int[Tensor, "S L"]]:
    """Token ids and mask."""
    longest = max(len(ids) for ids in prompts)
    pad = pad_id(llm.tokenizer)
    rows = [[pad] * (longest - len(ids)) + list(ids) for ids in prompts]
    masks = [[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts]
    return torch.tensor(rows, device=llm.device), torch.tensor(masks, device=llm.device)


def decode_by_generate(
    llm: FrozenLLM,
    prompts: Sequence[Sequence[int]],
    *,
    repeats: int,
    max_new_tokens: int,
    top_p: float,
) -> Decoded:
    """The same by transformers' own `generate`, with torch's global random numbers: slower.

    For models that `decode` does not get right.

    Args:
        llm: what is sampled from.
        prompts: their token ids.
        repeats: completions of each.
        max_new_tokens: longest completion, T.
        top_p: sample from the fewest tokens with this much probability; 1 is no truncation.
    """
    ids_SL, mask_SL = _left_padded(llm, prompts)
    end = llm.tokenizer.eos_token_id
    beyond = range(len(llm.tokenizer), len(llm.head.weight_VD))
    ids_BT = llm.generate(
        inputs=ids_SL,
        attention_mask=mask_SL,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=top_p,
        num_return_sequences=repeats,
        max_new_tokens=max_new_tokens,
        pad_token_id=pad_id(llm.tokenizer),
        eos_token_id=end,
        suppress_tokens=list(beyond) or None,
    )[:, ids_SL.shape[1] :]
    mask_BT = torch.ones_like(ids_BT, dtype=torch.bool)
    if end is not None:
        is_end_BT = ids_BT == end
        # The first end-of-text token belongs to the completion; what follows is padding.
        mask_BT = is_end_BT.cumsum(-1) - is_end_BT.long() == 0
    return Decoded(
        ids_BT=ids_BT,
        mask_BT=mask_BT,
        hidden_BTD=_states(llm, prompts, repeats, ids_BT, mask_BT.sum(-1)),
    )


@torch.no_grad()
def read_completions(
    llm: FrozenLLM, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]
) -> Decoded:
    """Completions that something else sampled, with the hidden states of a forward pass.

    Args:
        llm: what is read with.
        prompts: their token ids.
        completions: token ids; the same number for each prompt, which are neighbours.
    """
    repeats = len(completions) // len(prompts)
    ids_BT, lengths_B = pad_right(completions, pad_id(llm.tokenizer), llm.device)
    rows = repeats * max(1, _READ_ROWS // repeats)  # whole prompts
    hidden = [
        _states(llm, prompts[start // repeats :][: rows // repeats], repeats, ids, lengths)
        for start, ids, lengths in zip(
            range(0, len(ids_BT), rows), ids_BT.split(rows), lengths_B.split(rows), strict=True
        )
    ]
    positions_T = torch.arange(ids_BT.shape[1], device=llm.device)
    return Decoded(
        ids_BT=ids_BT,
        mask_BT=positions_T < lengths_B[:, None],
        hidden_BTD=torch.cat(hidden),
    )


def _states(
    llm: FrozenLLM,
    prompts: Sequence[Sequence[int]],
    repeats: int,
    ids_BT: Int[Tensor, "B T"],
    lengths_B: Int[Tensor, " B"],
) -> Float[Tensor, "B T D"]:
    """The hidden states that predict each token of completions, by a forward pass."""
    said = zip(ids_BT.tolist(), lengths_B.tolist(), strict=True)
    branches = [tuple(ids[: max(length - 1, 0)]) for ids, length in said]
    trees = [
        Tree(stem=tuple(ids), branches=tuple(branches[repeats * i :][:repeats]))
        for i, ids in enumerate(prompts)
    ]
    return states_of_branches(llm, trees, ids_BT.shape[1])


def states_of_branches(
    llm: FrozenLLM, trees: Sequence[Tree], steps: int, below: StatesBelow | None = None
) -> Float[Tensor, "B T D"]:
    """The last hidden states that predict each token of the branches, tree by tree, and one more.

    One forward pass; positions past a branch's end hold arbitrary values.

    Args:
        llm: what reads them.
        trees: prompts, and completions without their last token, which predicts nothing.
        steps: T, at least one more than a branch has tokens.
        below: of these trees, where they were kept; None reads the whole of them.
    """
    packed = llm.pack(trees)
    slots_BT = torch.nn.utils.rnn.pad_sequence(list(packed.paths), batch_first=True)
    slots_BT = torch.nn.functional.pad(slots_BT, (0, steps - slots_BT.shape[1]))
    below_SD = None if below is None else below.laid_out(trees, packed)
    return llm.packed_states(packed, below_SD)[slots_BT.to(llm.device)]


def truncate(probs_BV: Float[Tensor, "B V"], top_p: float) -> Float[Tensor, "B V"]:
    """Keep the fewest most probable tokens whose sum reaches `top_p`; the others become 0.

    Sorts no more of the vocabulary than it must. Not normalised again: `inverse_cdf` need not.
    """
    if top_p >= 1:
        return probs_BV
    size, count = probs_BV.shape[1], _TOP_K
    while True:
        values_BK, tokens_BK = probs_BV.topk(min(count, size))
        cumulative_BK = values_BK.double().cumsum(-1)
        if count >= size or bool((cumulative_BK[:, -1] >= top_p).all()):
            break
        count *= 8
    # A token stays where those before it do not reach the share.
    before_BK = cumulative_BK - values_BK.double()
    kept_BK = torch.where(before_BK < top_p, values_BK, 0.0)
    return torch.zeros_like(probs_BV).scatter_(1, tokens_BK, kept_BK)


def inverse_cdf(
    probs_BV: Float[Tensor, "B V"], uniforms_B: Float[Tensor, " B"]
) -> Int[Tensor, " B"]:
    """One categorical draw a row by a two-level inverse CDF; never an outcome of probability 0.

    The first level searches sums of 256 neighbouring probabilities, the second within one block:
    on CPUs some 40 times faster than `torch.multinomial` at 50,000 outcomes.
    """
    rows, size = probs_BV.shape
    padding = -size % _BLOCK
    blocks_BKC = torch.nn.functional.pad(probs_BV, (0, padding)).view(rows, -1, _BLOCK)
    # Summed as they are, then converted: a copy of all outcomes in float64 takes longer than the
    # draw. Both levels use these sums, so their rounding moves probability by 1e-7 and loses none.
    mass_BK = blocks_BKC.sum(-1).double()
    cumulative_BK = mass_BK.cumsum(-1)
    point_B1 = uniforms_B[:, None].double() * cumulative_BK[:, -1:]
    block_B1 = torch.searchsorted(cumulative_BK, point_B1, right=True)
    last_B1 = _last_positive(mass_BK)
    block_B1 = torch.minimum(block_B1, last_B1)
    before_B1 = cumulative_BK.gather(1, block_B1) - mass_BK.gather(1, block_B1)
    inside_BC = blocks_BKC[torch.arange(rows, device=probs_BV.device), block_B1[:, 0]].double()
    offset_B1 = torch.searchsorted(inside_BC.cumsum(-1), point_B1 - before_B1, right=True)
    offset_B1 = torch.minimum(offset_B1, _last_positive(inside_BC))
    return (block_B1 * _BLOCK + offset_B1)[:, 0]


def _last_positive(values_BK: Float[Tensor, "B K"]) -> Int[Tensor, "B 1"]:
    """Index of the last positive value of each row: where rounding may not push a draw past."""
    index_K = torch.arange(values_BK.shape[1], device=values_BK.device)
    return torch.where(values_BK > 0, index_K, 0).amax(-1, keepdim=True)
