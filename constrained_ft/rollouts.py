"""Sample completions y ~ p(. | x) from a frozen LLM and attach the constraint's verdict.

Shape suffixes:  S prompts, N rollouts, T completion positions, D hidden width, V vocabulary,
L prompt positions, B rows decoded together.

Training samples at temperature 1 without truncation: q* is defined against the whole p. Each prompt
is prefilled once and its cache repeated for its n completions. Every rollout draws its own uniform
numbers, keyed by (seed, purpose, iteration, prompt), so results do not depend on the order of
batches.

The last hidden states that decoding computes anyway are kept for the auxiliary: hidden[:, t]
predicts completion token t.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from constrained_ft import equations
from constrained_ft.attention import grow_in_place
from constrained_ft.config import ConstraintConfig
from constrained_ft.distributed import StopRequest, generator_for
from constrained_ft.encoding import pad_id
from constrained_ft.llm import FrozenLLM
from constrained_ft.packing import Tree
from constrained_ft.progress import Display
from constrained_ft.prompts import Prompt
from constrained_ft.scorers import Scorer, score_all

_BLOCK = 256  # width of the first level of the inverse CDF

Guide = Callable[[Tensor, Tensor], Tensor]
"""Hidden states [B, t + 1, D] and completion tokens [B, t] so far -> log R of every next token."""


@dataclass(frozen=True, kw_only=True)
class Rollouts:
    """Completions of one LLM; the rows of a prompt are neighbours."""

    prompts: tuple[Prompt, ...]
    prompt_N: Int[Tensor, " N"]
    """Index into `prompts` of each row."""
    ids_NT: Int[Tensor, "N T"]
    """Completion tokens, end-of-text included."""
    mask_NT: Bool[Tensor, "N T"]
    """True at completion tokens; by position, never by token id."""
    hidden_NTD: Float[Tensor, "N T D"]
    """The sampling LLM's last hidden state that predicts each completion token."""
    texts: tuple[str, ...]
    iteration: int
    """Iteration at whose start the sampling LLM stood."""

    def take(self, rows_M: Int[Tensor, " M"]) -> "Rollouts":
        """Some of the rows."""
        return replace(
            self,
            prompt_N=self.prompt_N[rows_M],
            ids_NT=self.ids_NT[rows_M],
            mask_NT=self.mask_NT[rows_M],
            hidden_NTD=self.hidden_NTD[rows_M],
            texts=tuple(self.texts[row] for row in rows_M.tolist()),
        )

    @property
    def prompt_texts(self) -> list[str]:
        """The prompt of each row."""
        return [self.prompts[i].text for i in self.prompt_N.tolist()]


@dataclass(frozen=True, kw_only=True)
class LabeledRollouts:
    """Rollouts with the constraint's verdict."""

    rollouts: Rollouts
    scores_N: Float[Tensor, " N"]
    """The scorer's scores in [0, 1]; 1 is satisfied."""
    satisfied_N: Bool[Tensor, " N"]
    """Scores at or above `constraint.satisfied_at`."""
    labels_N: Float[Tensor, " N"]
    """C(x, y) in [0, 1], what the auxiliary learns: hard, soft or tilted."""


def sample(  # noqa: PLR0913
    llm: FrozenLLM,
    prompts: Sequence[Prompt],
    *,
    samples_per_prompt: int,
    max_new_tokens: int,
    batch_size: int,
    seed: int,
    iteration: int,
    display: Display,
    stop: StopRequest,
    guide: Guide | None = None,
) -> Rollouts:
    """Sample completions at temperature 1, without truncation.

    Args:
        llm: the reference.
        prompts: each gets `samples_per_prompt` completions.
        samples_per_prompt: n.
        max_new_tokens: longest completion, T.
        batch_size: rows decoded together.
        seed: of the uniform numbers, with the iteration and each prompt's id.
        iteration: the LLM's version, kept with the rollouts.
        display: advanced by the rows finished.
        stop: polled between batches.
        guide: log R of every next token, added to the log-probabilities: guided decoding.

    Raises:
        Interrupted: when asked to stop.
    """
    per_batch = max(1, batch_size // samples_per_prompt)
    # Prompts of similar length share a batch: less padding.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].token_ids))
    decoded: dict[int, _Decoded] = {}
    for start in range(0, len(order), per_batch):
        stop.check()
        chunk = order[start : start + per_batch]
        uniforms_BT = torch.cat(
            [
                torch.rand(
                    samples_per_prompt,
                    max_new_tokens,
                    generator=generator_for(seed, "rollouts", iteration, prompts[i].id),
                    dtype=torch.float64,
                )
                for i in chunk
            ]
        )
        batch = _decode(llm, [prompts[i] for i in chunk], uniforms_BT.to(llm.device), guide)
        for row, i in enumerate(chunk):
            decoded[i] = batch.rows(row * samples_per_prompt, (row + 1) * samples_per_prompt)
        display.advance(len(chunk) * samples_per_prompt)
    return _collect(llm, prompts, [decoded[i] for i in range(len(prompts))], iteration)


def label(rollouts: Rollouts, scorer: Scorer, constraint: ConstraintConfig) -> LabeledRollouts:
    """Score every completion.

    Raises:
        ScorerError: when a score is missing, not finite, outside [0, 1] or not one per completion.
    """
    scores = score_all(scorer, rollouts.prompt_texts, rollouts.texts)
    scores_N = torch.tensor(scores, dtype=torch.float32, device=rollouts.ids_NT.device)
    satisfied_N = scores_N >= constraint.satisfied_at
    return LabeledRollouts(
        rollouts=rollouts,
        scores_N=scores_N,
        satisfied_N=satisfied_N,
        labels_N=_labels(scores_N, satisfied_N, constraint),
    )


def _labels(
    scores_N: Float[Tensor, " N"], satisfied_N: Bool[Tensor, " N"], constraint: ConstraintConfig
) -> Float[Tensor, " N"]:
    match constraint.labels:
        case "hard":
            return satisfied_N.float()
        case "soft":
            return scores_N
        case "tilt":
            return equations.tilt_labels(scores_N, constraint.beta)


def completion_trees(rollouts: Rollouts, rows_M: Int[Tensor, " M"]) -> list[Tree]:
    """A tree for each prompt of some rows; the rows of a prompt have to be neighbours."""
    branches: dict[int, list[tuple[int, ...]]] = {}
    ids, lengths = rollouts.ids_NT.tolist(), rollouts.mask_NT.sum(-1).tolist()
    prompts = rollouts.prompt_N.tolist()
    for row in rows_M.tolist():
        # The last token predicts nothing.
        branches.setdefault(prompts[row], []).append(tuple(ids[row][: max(lengths[row] - 1, 0)]))
    return [
        Tree(stem=rollouts.prompts[prompt].token_ids, branches=tuple(completions))
        for prompt, completions in branches.items()
    ]


def completion_hidden_states(
    llm: FrozenLLM, rollouts: Rollouts, rows: Int[Tensor, " N"]
) -> Float[Tensor, "N T D"]:
    """The hidden states of `llm` that predict each completion token of some rows.

    One forward pass; positions past a completion's end hold arbitrary values. The rows of a prompt
    have to be neighbours.
    """
    packed = llm.pack(completion_trees(rollouts, rows))
    slots_NT = torch.nn.utils.rnn.pad_sequence(list(packed.paths), batch_first=True)
    missing = rollouts.ids_NT.shape[1] - slots_NT.shape[1]
    slots_NT = torch.nn.functional.pad(slots_NT, (0, missing))
    return llm.packed_states(packed)[slots_NT.to(llm.device)]


def pad_right(
    sequences: Sequence[Sequence[int]], pad: int, device: torch.device
) -> tuple[Int[Tensor, "B L"], Int[Tensor, " B"]]:
    """Stack sequences of different length; returns the ids and the lengths."""
    longest = max(len(sequence) for sequence in sequences)
    ids = [list(sequence) + [pad] * (longest - len(sequence)) for sequence in sequences]
    lengths = [len(sequence) for sequence in sequences]
    return torch.tensor(ids, device=device), torch.tensor(lengths, device=device)


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


@dataclass(frozen=True, kw_only=True)
class _Decoded:
    ids_BT: Tensor
    mask_BT: Tensor
    hidden_BTD: Tensor

    def rows(self, start: int, end: int) -> "_Decoded":
        return _Decoded(
            ids_BT=self.ids_BT[start:end],
            mask_BT=self.mask_BT[start:end],
            hidden_BTD=self.hidden_BTD[start:end],
        )


@torch.no_grad()
def _decode(
    llm: FrozenLLM, prompts: Sequence[Prompt], uniforms_BT: Tensor, guide: Guide | None
) -> _Decoded:
    """Decode the same number of completions for each prompt, together."""
    rows, steps = uniforms_BT.shape
    repeats = rows // len(prompts)
    end = llm.tokenizer.eos_token_id
    usable = len(llm.tokenizer)  # a head may be padded beyond the tokenizer
    hidden_BD, cache, mask_BL = _prefill(llm, prompts, repeats)
    alive_B = torch.ones(rows, dtype=torch.bool, device=llm.device)
    ids: list[Tensor] = []
    masks: list[Tensor] = []
    hiddens: list[Tensor] = []
    for step in range(steps):
        hiddens.append(hidden_BD)
        logits_BV = llm.head(hidden_BD)[:, :usable]
        if guide is not None:
            past = torch.stack(ids, 1) if ids else mask_BL.new_empty(rows, 0)
            logits_BV = logits_BV + guide(torch.stack(hiddens, 1), past)[:, :usable]
        token_B = inverse_cdf(logits_BV.softmax(-1), uniforms_BT[:, step])
        ids.append(token_B)
        masks.append(alive_B)
        if end is not None:
            alive_B = alive_B & (token_B != end)
        if step == steps - 1 or not bool(alive_B.any()):
            break
        mask_BL = torch.cat([mask_BL, mask_BL.new_ones(rows, 1)], 1)
        hidden_BD, cache = llm.read(token_B[:, None], mask_BL, cache)
    return _Decoded(
        ids_BT=torch.stack(ids, 1),
        mask_BT=torch.stack(masks, 1),
        hidden_BTD=torch.stack(hiddens, 1),
    )


def _prefill(llm: FrozenLLM, prompts: Sequence[Prompt], repeats: int) -> tuple[Tensor, Any, Tensor]:
    """The hidden states that predict the first tokens, the cache, and the mask, all repeated."""
    longest = max(len(prompt.token_ids) for prompt in prompts)
    pad = pad_id(llm.tokenizer)
    ids, masks = [], []
    for prompt in prompts:
        missing = longest - len(prompt.token_ids)
        ids.append([pad] * missing + list(prompt.token_ids))
        masks.append([0] * missing + [1] * len(prompt.token_ids))
    mask_SL = torch.tensor(masks, device=llm.device)
    hidden_SD, cache = llm.read(torch.tensor(ids, device=llm.device), mask_SL)
    grow_in_place(cache)
    cache.batch_repeat_interleave(repeats)
    return (
        hidden_SD.repeat_interleave(repeats, 0),
        cache,
        mask_SL.repeat_interleave(repeats, 0),
    )


def _collect(
    llm: FrozenLLM, prompts: Sequence[Prompt], decoded: Sequence[_Decoded], iteration: int
) -> Rollouts:
    """Join the prompts' rows in the prompts' own order, padded to one length."""
    steps = max(part.ids_BT.shape[1] for part in decoded)

    def join(parts: Iterator[Tensor]) -> Tensor:
        padded = []
        for part in parts:
            missing = steps - part.shape[1]
            padded.append(
                torch.cat([part, part.new_zeros(part.shape[0], missing, *part.shape[2:])], 1)
            )
        return torch.cat(padded)

    ids_NT = join(part.ids_BT for part in decoded)
    mask_NT = join(part.mask_BT for part in decoded)
    end = llm.tokenizer.eos_token_id
    said = []
    for row_ids, row_mask in zip(ids_NT.tolist(), mask_NT.tolist(), strict=True):
        kept = [token for token, real in zip(row_ids, row_mask, strict=True) if real]
        # The end-of-text token is the model's way to stop, not a part of what it says.
        if kept and kept[-1] == end:
            kept.pop()
        said.append(kept)
    counts = torch.tensor([part.ids_BT.shape[0] for part in decoded])
    return Rollouts(
        prompts=tuple(prompts),
        prompt_N=torch.arange(len(prompts)).repeat_interleave(counts).to(llm.device),
        ids_NT=ids_NT,
        mask_NT=mask_NT,
        hidden_NTD=join(part.hidden_BTD for part in decoded),
        texts=tuple(llm.tokenizer.batch_decode(said)),
        iteration=iteration,
    )
