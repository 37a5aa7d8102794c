"""Does R tell siblings apart? The table "Siblings" of docs/auxiliary.md.

    python scripts/sibling_test.py [KEY=VALUE ...]

Two next tokens after one prefix are siblings, and q* is made of the difference between their log R.
Here it is compared with what comes true: 64 completions of the base model after each sibling,
scored. The prefixes are cut out of completions of held-out prompts; of the 20 likeliest next tokens
the two are taken whose texts so far the scorer judges most differently, so R has no say in the
choice. R is fitted to completions of training prompts (four each, 512 prompts). About four minutes
on two cores.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy import stats

from constrained_ft.compose import compose
from constrained_ft.config import Config
from constrained_ft.distributed import StopRequest
from constrained_ft.fit import fit_auxiliary
from constrained_ft.parts import Parts, build_auxiliary, build_parts
from constrained_ft.progress import Silent
from constrained_ft.prompts import Prompt
from constrained_ft.rollouts import Rollouts, label
from constrained_ft.sampling import sample
from constrained_ft.scorers import score_all

KINDS = ("additive", "transformer", "head")
PREFIXES, COMPLETIONS, LIKELIEST, STEP = 48, 64, 20, 6
FEWEST = 0.5  # added to counts, so that no logarithm is of 0


@dataclass(frozen=True, kw_only=True)
class Siblings:
    """Two next tokens after the first tokens of a rollout."""

    row: int
    tokens: tuple[int, int]
    difference: float


def main() -> None:
    """Print one line a kind of auxiliary."""
    config = compose(sys.argv[1:])
    parts = build_parts(config, Silent(), StopRequest())
    training = _sample(parts, config, parts.prompts.training[:512], 4, 1)
    labeled = label(training, parts.scorers, config.constraint)
    held_out = _sample(parts, config, parts.prompts.held_out, 2, 2)
    siblings = _choose(parts, held_out)
    came_true = _continue(parts, config, held_out, siblings)
    truth = np.log(came_true[:, 0]) - np.log(came_true[:, 1])
    print(f"{len(siblings)} pairs, log ratio {truth.mean():.2f} on average")
    for kind in KINDS:
        own = compose([*sys.argv[1:], f"auxiliary={kind}"])
        auxiliary = build_auxiliary(own, parts.llm, parts.llm.tokenizer, parts.scorers)
        auxiliary.start_at(float(labeled.labels_N.mean()))
        fit_auxiliary(
            auxiliary,
            parts.llm.head,
            [labeled],
            own.auxiliary,
            seed=own.seed,
            display=Silent(),
            stop=StopRequest(),
        )
        frozen = auxiliary.frozen()
        with torch.no_grad():
            evidence = frozen.read(held_out)
            rows = torch.tensor([pair.row for pair in siblings])
            logits = frozen.table.logits(
                evidence.factors_NTJR[rows, STEP], evidence.offset_NTJ[rows, STEP]
            )
            tokens = torch.tensor([pair.tokens for pair in siblings])
            said = torch.nn.functional.logsigmoid(logits).gather(1, tokens)
        predicted = (said[:, 0] - said[:, 1]).double().numpy()
        slope = float((predicted * truth).sum() / (predicted**2).sum())
        print(
            f"{kind:12s} correlation {stats.pearsonr(predicted, truth).statistic:.2f}  "
            f"rank {stats.spearmanr(predicted, truth).statistic:.2f}  "
            f"same sign {float((predicted * truth > 0).mean()):.2f}  slope {slope:.2f}",
            flush=True,
        )


def _sample(
    parts: Parts, config: Config, prompts: Sequence[Prompt], count: int, iteration: int
) -> Rollouts:
    return sample(
        parts.llm.frozen(),
        prompts,
        samples_per_prompt=count,
        max_new_tokens=config.prompts.max_new_tokens,
        sampler=config.sampler,
        seed=config.seed,
        iteration=iteration,
        display=Silent(),
        stop=StopRequest(),
    )


def _choose(parts: Parts, rollouts: Rollouts) -> list[Siblings]:
    """The pairs that the scorer judges most differently, one for each prefix."""
    decode = parts.llm.tokenizer.decode
    logits = parts.llm.head(rollouts.hidden_NTD[:, STEP])
    found = []
    for row in rollouts.mask_NT[:, STEP + 1].nonzero()[:, 0].tolist():
        before = rollouts.ids_NT[row, :STEP].tolist()
        likeliest = logits[row].topk(LIKELIEST).indices.tolist()
        texts = [decode([*before, token]) for token in likeliest]
        scores = score_all(parts.scorers[0], [rollouts.prompt_texts[row]] * LIKELIEST, texts)
        best, worst = int(np.argmax(scores)), int(np.argmin(scores))
        found.append(
            Siblings(
                row=row,
                tokens=(likeliest[best], likeliest[worst]),
                difference=scores[best] - scores[worst],
            )
        )
    return sorted(found, key=lambda pair: -pair.difference)[:PREFIXES]


def _continue(
    parts: Parts, config: Config, rollouts: Rollouts, siblings: Sequence[Siblings]
) -> "np.ndarray[tuple[int, int], np.dtype[np.float64]]":
    """The expected label of the completions after each sibling: [pairs, 2]."""
    prompts, origins = [], []
    for pair in siblings:
        prompt = rollouts.prompts[int(rollouts.prompt_N[pair.row])]
        before = tuple(rollouts.ids_NT[pair.row, :STEP].tolist())
        for place, token in enumerate(pair.tokens):
            ids = (*prompt.token_ids, *before, token)
            key = f"{prompt.id}/{pair.row}/{place}"
            prompts.append(replace(prompt, id=key, token_ids=ids))
            origins.append((*before, token))
    shorter = config.prompts.model_copy(
        update={"max_new_tokens": config.prompts.max_new_tokens - STEP - 1}
    )
    config = config.model_copy(update={"prompts": shorter})
    drawn = _sample(parts, config, prompts, COMPLETIONS, 3)
    whole = [
        parts.llm.tokenizer.decode(
            [*origins[prompt], *ids[mask].tolist()], skip_special_tokens=True
        )
        for prompt, ids, mask in zip(
            drawn.prompt_N.tolist(), drawn.ids_NT, drawn.mask_NT, strict=True
        )
    ]
    labels = label(replace(drawn, texts=tuple(whole)), parts.scorers, config.constraint).labels_N
    sums = labels.reshape(-1, COMPLETIONS).sum(1).double().numpy()
    means: np.ndarray[tuple[int, int], np.dtype[np.float64]] = (
        (sums + FEWEST) / (COMPLETIONS + 2 * FEWEST)
    ).reshape(-1, 2)
    return means


if __name__ == "__main__":
    main()
