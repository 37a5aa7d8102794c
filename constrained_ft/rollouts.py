"""Completions y ~ p(. | x) and the constraint's verdict on them; as files and messages, and back.

Shape suffixes:  S prompts, N rollouts, M some of them, T completion positions, D hidden width,
J terms of the constraint.

The last hidden states that decoding computes anyway are kept for the auxiliary: hidden[:, t]
predicts completion token t.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from constrained_ft.config import ConstraintConfig
from constrained_ft.decoding import states_of_branches
from constrained_ft.distributed import pack, unpack
from constrained_ft.frozen_layers import StatesBelow
from constrained_ft.labels import Settled, verdict
from constrained_ft.llm import FrozenLLM
from constrained_ft.packing import Tree
from constrained_ft.prompts import Prompt
from constrained_ft.scorers import Scorer, score_all


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
    guided_N: Int[Tensor, " N"]
    """Tokens that R may have guided at the start (`roll_ins`); 0 is a sample of the LLM alone."""
    iteration: int
    """Iteration at whose start the sampling LLM stood."""
    sampled_by: str
    """The sampler: `cft`, `hf`, or the adapter that a sampling server named in its answers."""

    @property
    def after_roll_in(self) -> Bool[Tensor, "N T"]:
        """Tokens behind which nothing is guided: the label is what the LLM makes of the text."""
        last_N = torch.minimum(self.guided_N, self.mask_NT.sum(-1)) - 1
        steps_T = torch.arange(self.ids_NT.shape[1], device=last_N.device)
        return self.mask_NT & (steps_T >= last_N[:, None])

    def take(self, rows_M: Int[Tensor, " M"]) -> "Rollouts":
        """Some of the rows."""
        return replace(
            self,
            prompt_N=self.prompt_N[rows_M],
            ids_NT=self.ids_NT[rows_M],
            mask_NT=self.mask_NT[rows_M],
            hidden_NTD=self.hidden_NTD[rows_M],
            texts=tuple(self.texts[row] for row in rows_M.tolist()),
            guided_N=self.guided_N[rows_M],
        )

    @property
    def prompt_texts(self) -> list[str]:
        """The prompt of each row."""
        return [self.prompts[i].text for i in self.prompt_N.tolist()]


@dataclass(frozen=True, kw_only=True)
class LabeledRollouts:
    """Rollouts with the constraint's verdict; those without a score are left out."""

    rollouts: Rollouts
    scores_NJ: Float[Tensor, "N J"]
    """The scorers' scores in [0, 1], a column for each term of the constraint; 1 is satisfied."""
    satisfied_N: Bool[Tensor, " N"]
    """Whether every term's score is at or above its `satisfied_at`."""
    labels_N: Float[Tensor, " N"]
    """C(x, y) in [0, 1], what the auxiliary learns: hard, soft or tilted."""
    missing: int
    """Completions that got no score."""
    settled: Settled
    """The tilts and bars behind the labels."""
    effective: float
    """Completions that carry the labels."""
    unscored: Rollouts | None = None
    """Completions of the LLM that no scorer was to be asked about (`prompts.scored_share`)."""

    @property
    def said(self) -> Rollouts:
        """What the LLM itself said, scored or not: the prefixes of the target."""
        own = self.unguided.rollouts
        if self.unscored is None:
            return own
        prompts = {prompt.id: prompt for prompt in (*own.prompts, *self.unscored.prompts)}
        return joined([own, self.unscored], tuple(prompts.values()))

    @property
    def least_scores(self) -> Float[Tensor, " N"]:
        """The score of the term that is satisfied least."""
        return self.scores_NJ.amin(-1)

    @property
    def unguided(self) -> "LabeledRollouts":
        """Without roll-ins: the samples of the LLM itself, which rates and q* are made of."""
        if not bool((self.rollouts.guided_N > 0).any()):
            return self
        rows_M = (self.rollouts.guided_N == 0).nonzero()[:, 0]
        return replace(
            self,
            rollouts=_some_rows(self.rollouts, rows_M.tolist()),
            scores_NJ=self.scores_NJ[rows_M],
            satisfied_N=self.satisfied_N[rows_M],
            labels_N=self.labels_N[rows_M],
        )


def label(
    rollouts: Rollouts, scorers: Sequence[Scorer], constraint: ConstraintConfig
) -> LabeledRollouts:
    """Score every completion.

    Args:
        rollouts: completions.
        scorers: one for each term of the constraint.
        constraint: the `constraint` section.

    Raises:
        ScorerError: when a completion gets no score.
    """
    scores = [score_all(one, rollouts.prompt_texts, rollouts.texts) for one in scorers]
    return with_scores(rollouts, scores, constraint)


def with_scores(
    rollouts: Rollouts,
    scores: Sequence[Sequence[float | None]],
    constraint: ConstraintConfig,
    before: Settled | None = None,
) -> LabeledRollouts:
    """Attach the constraint's verdict; what has no score is left out, as are prompts of nothing.

    Args:
        rollouts: completions.
        scores: for each term of the constraint, one in [0, 1] for each completion, or None.
        constraint: the `constraint` section.
        before: tilts of the iteration before, see `labels.verdict`.
    """
    rows = [i for i, row in enumerate(zip(*scores, strict=True)) if None not in row]
    device = rollouts.ids_NT.device
    missing = len(rollouts.texts) - len(rows)
    scores_NJ = torch.tensor(
        [[term[i] for term in scores] for i in rows], dtype=torch.float32, device=device
    ).reshape(len(rows), len(scores))
    rollouts = rollouts if missing == 0 else _some_rows(rollouts, rows)
    own_N = rollouts.guided_N == 0
    said = verdict(scores_NJ[own_N], constraint, before=before)
    effective = said.effective
    if not bool(own_N.all()):
        said = verdict(scores_NJ, constraint, said.settled)
    return LabeledRollouts(
        rollouts=rollouts,
        scores_NJ=scores_NJ,
        satisfied_N=said.satisfied_NJ.all(-1),
        labels_N=said.labels_N,
        missing=missing,
        settled=said.settled,
        effective=effective,
    )


def with_labels_of(
    labeled: LabeledRollouts, other: LabeledRollouts, constraint: ConstraintConfig
) -> LabeledRollouts:
    """Rollouts with the labels that another iteration's tilts and bars give them."""
    if labeled.settled == other.settled:
        return labeled
    said = verdict(labeled.scores_NJ, constraint, other.settled)
    return replace(labeled, labels_N=said.labels_N, settled=said.settled, effective=said.effective)


def by_term(labeled: LabeledRollouts, constraint: ConstraintConfig) -> tuple[LabeledRollouts, ...]:
    """The same rollouts once for each term, with the label of that term alone."""
    said = verdict(labeled.scores_NJ, constraint, labeled.settled)
    return tuple(replace(labeled, labels_N=labels_N) for labels_N in said.labels_NJ.unbind(-1))


def _some_rows(rollouts: Rollouts, rows: Sequence[int]) -> Rollouts:
    """Some rows and their prompts."""
    some = rollouts.take(torch.tensor(rows, dtype=torch.long, device=rollouts.prompt_N.device))
    used_S, place_N = some.prompt_N.unique(return_inverse=True)
    return replace(some, prompts=tuple(some.prompts[i] for i in used_S.tolist()), prompt_N=place_N)


def completion_trees(rollouts: Rollouts, rows_M: Int[Tensor, " M"]) -> list[Tree]:
    """A tree for each prompt of some rows; the rows of a prompt have to be neighbours."""
    branches: dict[int, list[tuple[int, ...]]] = {}
    ids, lengths = rollouts.ids_NT[rows_M].tolist(), rollouts.mask_NT[rows_M].sum(-1).tolist()
    for prompt, own, length in zip(rollouts.prompt_N[rows_M].tolist(), ids, lengths, strict=True):
        # The last token predicts nothing.
        branches.setdefault(prompt, []).append(tuple(own[: max(length - 1, 0)]))
    return [
        Tree(stem=rollouts.prompts[prompt].token_ids, branches=tuple(completions))
        for prompt, completions in branches.items()
    ]


def completion_hidden_states(
    llm: FrozenLLM,
    rollouts: Rollouts,
    rows: Int[Tensor, " N"],
    below: StatesBelow | None = None,
) -> Float[Tensor, "N T D"]:
    """The hidden states of `llm` that predict each completion token of some rows.

    One forward pass, above frozen layers where what these said is in `below`; positions past a
    completion's end hold arbitrary values. The rows of a prompt have to be neighbours.
    """
    trees = completion_trees(rollouts, rows)
    return states_of_branches(llm, trees, rollouts.ids_NT.shape[1], below)


def joined(parts: Sequence[Rollouts], prompts: Sequence[Prompt]) -> Rollouts:
    """Rollouts of different prompts in one, in the order of `prompts`, padded to one length."""
    if len(parts) == 1 and parts[0].prompts == tuple(prompts):
        return parts[0]
    steps = max(part.ids_NT.shape[1] for part in parts)

    def join(tensors: Iterator[Tensor]) -> Tensor:
        padded = []
        for part in tensors:
            missing = steps - part.shape[1]
            padded.append(
                torch.cat([part, part.new_zeros(part.shape[0], missing, *part.shape[2:])], 1)
            )
        return torch.cat(padded)

    place = {prompt.id: i for i, prompt in enumerate(prompts)}
    prompt_N = torch.cat(
        [
            torch.tensor([place[prompt.id] for prompt in part.prompts])[part.prompt_N.cpu()]
            for part in parts
        ]
    ).to(parts[0].prompt_N.device)
    texts = [text for part in parts for text in part.texts]
    order = prompt_N.argsort(stable=True)
    return Rollouts(
        prompts=tuple(prompts),
        prompt_N=prompt_N[order],
        ids_NT=join(part.ids_NT for part in parts)[order],
        mask_NT=join(part.mask_NT for part in parts)[order],
        hidden_NTD=join(part.hidden_NTD for part in parts)[order],
        texts=tuple(texts[row] for row in order.tolist()),
        guided_N=torch.cat([part.guided_N for part in parts])[order],
        iteration=parts[0].iteration,
        sampled_by=parts[0].sampled_by,
    )


def rollout_tensors(rollouts: Rollouts) -> dict[str, Tensor]:
    """Their tensors by name, for files and other processes."""
    return {
        "prompt": rollouts.prompt_N,
        "ids": rollouts.ids_NT,
        "mask": rollouts.mask_NT,
        "hidden": rollouts.hidden_NTD,
        "guided": rollouts.guided_N,
    }


def rollout_facts(rollouts: Rollouts) -> dict[str, Any]:
    """Everything else of them, as JSON."""
    return {
        "iteration": rollouts.iteration,
        "sampled_by": rollouts.sampled_by,
        "prompts": [asdict(prompt) for prompt in rollouts.prompts],
        "texts": list(rollouts.texts),
    }


def rollouts_from(tensors: Mapping[str, Tensor], facts: Any) -> Rollouts:
    """Rollouts again, from `rollout_tensors` and `rollout_facts`.

    Raises:
        KeyError, TypeError, ValueError: when they are of something else.
    """
    prompts = [
        Prompt(**(prompt | {"token_ids": tuple(prompt["token_ids"])}))
        for prompt in facts["prompts"]
    ]
    return Rollouts(
        prompts=tuple(prompts),
        prompt_N=tensors["prompt"],
        ids_NT=tensors["ids"],
        mask_NT=tensors["mask"],
        hidden_NTD=tensors["hidden"],
        texts=tuple(facts["texts"]),
        guided_N=tensors["guided"],
        iteration=facts["iteration"],
        sampled_by=facts["sampled_by"],
    )


def labeled_tensors(labeled: LabeledRollouts) -> dict[str, Tensor]:
    """The tensors of labelled rollouts by name; everything else is `labeled_facts`."""
    tensors = rollout_tensors(labeled.rollouts) | {
        "scores": labeled.scores_NJ,
        "satisfied": labeled.satisfied_N,
        "labels": labeled.labels_N,
    }
    if labeled.unscored is not None:
        tensors |= {f"unscored.{n}": part for n, part in rollout_tensors(labeled.unscored).items()}
    return tensors


def labeled_facts(labeled: LabeledRollouts) -> dict[str, Any]:
    """Everything else of them, as JSON."""
    return rollout_facts(labeled.rollouts) | {
        "missing": labeled.missing,
        "betas": list(labeled.settled.betas),
        "bars": list(labeled.settled.bars),
        "effective": labeled.effective,
        "unscored": None if labeled.unscored is None else rollout_facts(labeled.unscored),
    }


def labeled_from(tensors: Mapping[str, Tensor], facts: Any) -> LabeledRollouts:
    """Labelled rollouts again, from `labeled_tensors` and `labeled_facts`.

    Raises:
        KeyError, TypeError, ValueError: when they are of something else.
    """
    under = "unscored."
    unscored = {n.removeprefix(under): part for n, part in tensors.items() if n.startswith(under)}
    return LabeledRollouts(
        rollouts=rollouts_from(tensors, facts),
        scores_NJ=tensors["scores"],
        satisfied_N=tensors["satisfied"],
        labels_N=tensors["labels"],
        missing=int(facts["missing"]),
        settled=Settled(betas=tuple(facts["betas"]), bars=tuple(facts["bars"])),
        effective=float(facts["effective"]),
        unscored=rollouts_from(unscored, facts["unscored"]) if unscored else None,
    )


def pack_rollouts(parts: Sequence[Rollouts]) -> bytes:
    """Rollouts for other processes."""
    tensors = {
        f"{i}.{name}": tensor
        for i, part in enumerate(parts)
        for name, tensor in rollout_tensors(part).items()
    }
    return pack(tensors, [rollout_facts(part) for part in parts])


def unpack_rollouts(packet: bytes, device: torch.device) -> list[Rollouts]:
    """What `pack_rollouts` was given."""
    tensors, facts = unpack(packet)
    assert isinstance(facts, list)
    return [
        rollouts_from(
            {
                name.partition(".")[2]: tensor.to(device)
                for name, tensor in tensors.items()
                if name.startswith(f"{i}.")
            },
            one,
        )
        for i, one in enumerate(facts)
    ]
