"""What is measured before and after training, and by `cft evaluate`.

Samples of one prompt are not independent, so every interval is a bootstrap over prompts (over rows
for perplexity). Two models are compared on the same prompts with the same uniform numbers.

Shape suffixes:  S prompts, K samples of a prompt, M positions, V vocabulary.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from constrained_ft.config import Config
from constrained_ft.distributed import StopRequest, World
from constrained_ft.encoding import Row, pad_id
from constrained_ft.llm import FrozenLLM
from constrained_ft.packing import pad_right
from constrained_ft.progress import Display
from constrained_ft.prompts import Prompt
from constrained_ft.randomness import seed_for
from constrained_ft.rollouts import Rollouts, completion_hidden_states, sample
from constrained_ft.run_folder import write_atomically
from constrained_ft.scorers import Scorer
from constrained_ft.scoring import Scoring

QUANTILES = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)

_RESAMPLES = 1000
_BATCH_ROWS = 16
_KL_ROLLOUTS = 128
_CHUNK_ROWS = 256


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean and its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float

    def percent(self) -> str:
        """For a table: `8.3 % (6.1-10.9)`."""
        return f"{100 * self.mean:.1f} % ({100 * self.low:.1f}–{100 * self.high:.1f})"

    def plain(self, digits: int = 2) -> str:
        """For a table: `44.10 (41.72-46.80)`."""
        return f"{self.mean:.{digits}f} ({self.low:.{digits}f}–{self.high:.{digits}f})"


@dataclass(frozen=True, kw_only=True)
class GroupResult:
    """Completions of one group of prompts."""

    prompts: int
    samples: int
    satisfaction: Interval
    """Share of completions that satisfy the training scorer."""
    violation: Interval
    """1 - satisfaction."""
    score: Interval
    """Mean score of the training scorer."""
    expected_maximum: Interval
    """Mean over prompts of the largest 1 - score among the k samples."""
    any_violation: Interval
    """Share of prompts with at least one violating completion among the k samples."""
    judge_violation: Interval | None
    """Share of completions that do not satisfy the judge; None without a judge."""
    terms: dict[str, Interval]
    """Share of completions that satisfy each term of a constraint of several."""
    missing: int
    """Completions that got no score; no rate counts them."""
    distinct_1: float
    distinct_2: float
    distinct_3: float
    """Distinct word n-grams over all word n-grams."""
    length: float
    """Mean tokens of a completion."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One model."""

    model: str
    groups: dict[str, GroupResult]
    perplexity: dict[str, Interval]
    """Of the corpus's held-out rows, by group; exp of nats per trained token."""
    kl_to_base: float | None
    """Mean KL(model || base) a token on the model's own completions, nats; None for the base."""
    quantiles: tuple[float, ...]
    """Of the training scorer's scores over all groups, at `QUANTILES`."""
    seconds_per_score: float = field(compare=False)
    """Of the training scorer, on this rank; 0 where the evaluation was read from a file, which
    keeps what is the same in every run."""
    scorer: str
    judge: str | None


def evaluate(  # noqa: PLR0913
    llm: FrozenLLM,
    prompts: Sequence[Prompt],
    validation: Sequence[Row],
    scorers: Sequence[Scorer],
    judge: Scorer | None,
    config: Config,
    *,
    model: str,
    base: FrozenLLM | None,
    display: Display,
    stop: StopRequest,
    world: World | None = None,
) -> Evaluation:
    """Sample, score and measure one model.

    Args:
        llm: the model.
        prompts: held-out prompts.
        validation: held-out corpus rows; at most `evaluation.max_validation_rows` of each group.
        scorers: those of training, one for each term of the constraint.
        judge: a scorer that training never sees.
        config: the run's configuration.
        model: its name in the result.
        base: the model to measure the KL to; None for the base itself.
        display: advanced by completions.
        stop: polled between batches.
        world: who shares the work; every rank gets all results. None is this process alone.

    Raises:
        MissingScoresError: when too many completions have no score.
        Interrupted: when asked to stop.
    """
    world = world or World.alone()
    asked = [*scorers] if judge is None else [*scorers, judge]
    with Scoring(asked, world, stop) as scoring:
        rollouts = sample(
            llm,
            prompts,
            samples_per_prompt=config.evaluation.samples_per_prompt,
            max_new_tokens=config.prompts.max_new_tokens,
            sampler=config.sampler,
            top_p=config.evaluation.top_p,
            seed=seed_for(config.seed, "evaluation"),
            iteration=0,
            display=display,
            stop=stop,
            world=world,
            each=scoring.begin,
        )
        scored = scoring.finish(rollouts, config.constraint.max_missing_rate)
    per_group = config.evaluation.max_validation_rows
    return Evaluation(
        model=model,
        groups=_group_results(rollouts, [one.scores for one in scored], config),
        perplexity=perplexity(llm, validation, per_group, stop, world),
        kl_to_base=None if base is None else kl_to_base(llm, base, rollouts, world),
        quantiles=_quantiles([one.scores for one in scored[: len(scorers)]]),
        seconds_per_score=sum(one.seconds for one in scored[: len(scorers)]),
        scorer=" + ".join(f"{one.name} {one.version}" for one in scorers),
        judge=None if judge is None else f"{judge.name} {judge.version}",
    )


def bootstrap(values: Sequence[float] | NDArray[np.generic], seed: int = 0) -> Interval:
    """Mean of independent values and the percentile interval of its bootstrap distribution."""
    array = np.asarray(values, dtype=np.float64)
    draws = np.random.default_rng(seed).integers(len(array), size=(_RESAMPLES, len(array)))
    low, high = np.quantile(array[draws].mean(axis=1), [0.025, 0.975])
    return Interval(mean=float(array.mean()), low=float(low), high=float(high))


@torch.no_grad()
def perplexity(
    llm: FrozenLLM,
    rows: Sequence[Row],
    per_group: int,
    stop: StopRequest,
    world: World | None = None,
) -> dict[str, Interval]:
    """exp of the cross-entropy per trained token, by group; the interval resamples rows."""
    world = world or World.alone()
    results = {}
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
        results[group] = _ratio_perplexity(whole[:, 0], whole[:, 1])
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


def distinct(texts: Sequence[str], n: int) -> float:
    """Distinct word n-grams over all word n-grams; 0 where there are none."""
    grams = [
        tuple(words[i : i + n])
        for text in texts
        for words in [text.split()]
        for i in range(len(words) - n + 1)
    ]
    return len(set(grams)) / len(grams) if grams else 0.0


def save(
    path: Path,
    evaluations: Sequence[Evaluation],
    config: Config,
    prompts_file: Path | None = None,
) -> None:
    """Write results as JSON, with the settings that they depend on.

    Args:
        path: the file.
        evaluations: one for each model.
        config: what they were measured with.
        prompts_file: where the prompts came from, if not from the configuration.
    """
    measured = config.evaluation
    settings = {
        "seed": config.seed,
        "prompts": "held out" if prompts_file is None else str(prompts_file),
        "samples_per_prompt": measured.samples_per_prompt,
        "max_new_tokens": config.prompts.max_new_tokens,
        "scorer": evaluations[0].scorer,
        "satisfied_at": config.constraint.satisfied_at,
        "judge": evaluations[0].judge,
        "judge_satisfied_at": measured.judge_satisfied_at,
    }
    models = [asdict(one) for one in evaluations]
    for model in models:
        del model["seconds_per_score"]
    tree = {"settings": settings, "models": models}
    write_atomically(path, json.dumps(tree, indent=2, ensure_ascii=False) + "\n")


def load(path: Path) -> list[Evaluation]:
    """Read what `save` wrote."""

    def interval(value: dict[str, float] | None) -> Interval | None:
        return None if value is None else Interval(**value)

    def group(value: dict[str, object]) -> GroupResult:
        fields = {
            name: interval(part) if isinstance(part, dict) and name != "terms" else part
            for name, part in value.items()
        }
        terms = value["terms"]
        assert isinstance(terms, dict)
        fields["terms"] = {name: Interval(**part) for name, part in terms.items()}
        return GroupResult(**fields)  # type: ignore[arg-type]  # as written by `save`

    return [
        Evaluation(
            **(
                one
                | {
                    "groups": {name: group(value) for name, value in one["groups"].items()},
                    "quantiles": tuple(one["quantiles"]),
                    "seconds_per_score": 0.0,
                    "perplexity": {
                        name: Interval(**value) for name, value in one["perplexity"].items()
                    },
                }
            )
        )
        for one in json.loads(path.read_text())["models"]
    ]


def table(evaluations: Sequence[Evaluation]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the comparison that people read."""
    columns = ["", *(one.model for one in evaluations)]
    rows: list[list[str]] = []

    def add(title: str, cells: Sequence[str]) -> None:
        rows.append([title, *cells])

    for name in evaluations[0].groups:
        groups = [one.groups[name] for one in evaluations]
        add(
            f"{name}: prompts x samples",
            [f"{g.prompts} x {g.samples // g.prompts}" for g in groups],
        )
        add("  violations, training scorer", [g.violation.percent() for g in groups])
        for term in groups[0].terms:
            add(f"    of {term}", [_complement(g.terms[term]).percent() for g in groups])
        if evaluations[0].judge is not None:
            shares = [g.judge_violation.percent() if g.judge_violation else "–" for g in groups]
            add("  violations, judge", shares)
        add("  mean score", [g.score.plain(3) for g in groups])
        add("  expected maximum violation", [g.expected_maximum.plain(3) for g in groups])
        add("  prompts with any violation", [g.any_violation.percent() for g in groups])
        distincts = [
            f"{g.distinct_1:.2f} / {g.distinct_2:.2f} / {g.distinct_3:.2f}" for g in groups
        ]
        add("  distinct-1 / 2 / 3", distincts)
        add("  mean length, tokens", [f"{g.length:.1f}" for g in groups])
        if any(g.missing for g in groups):
            add("  completions without a score", [str(g.missing) for g in groups])
    for name in evaluations[0].perplexity:
        add(f"perplexity, held-out {name}", [one.perplexity[name].plain() for one in evaluations])
    kls = ["–" if one.kl_to_base is None else f"{one.kl_to_base:.3f}" for one in evaluations]
    add("KL to the base, nats a token", kls)
    return columns, rows


def choose_prompts(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """So many prompts of each group, by their ids: a choice that no order of files changes."""
    chosen: list[Prompt] = []
    for group in dict.fromkeys(prompt.group for prompt in prompts):
        members = sorted((p for p in prompts if p.group == group), key=lambda prompt: prompt.id)
        chosen += members[:count]
    return chosen


def _complement(interval: Interval) -> Interval:
    return Interval(mean=1 - interval.mean, low=1 - interval.high, high=1 - interval.low)


def _quantiles(scores: Sequence[Sequence[float | None]]) -> tuple[float, ...]:
    """Of the least score of each completion that has all."""
    least = [min(row) for row in zip(*scores, strict=True) if None not in row]
    return tuple(np.quantile(np.array(least, dtype=np.float64), QUANTILES).tolist())


def _group_results(
    rollouts: Rollouts, all_scores: Sequence[Sequence[float | None]], config: Config
) -> dict[str, GroupResult]:
    """Of the scores of the constraint's terms and, where there are more, the judge's."""
    terms = config.constraint.all_terms()
    prompts, samples = len(rollouts.prompts), config.evaluation.samples_per_prompt
    # NaN stands for what is missing, and every mean below leaves it out.
    scores_JSK = np.array(all_scores, dtype=np.float64).reshape(-1, prompts, samples)
    least_SK = scores_JSK[: len(terms)].min(axis=0)
    missing_SK = np.isnan(least_SK)
    bounds = np.array([term.satisfied_at for term in terms.values()])
    violated_JSK = np.where(missing_SK, np.nan, scores_JSK[: len(terms)] < bounds[:, None, None])
    violated_SK = violated_JSK.max(axis=0)
    lengths_SK = rollouts.mask_NT.sum(-1).reshape(prompts, samples).double().cpu().numpy()
    results = {}
    for group in dict.fromkeys(prompt.group for prompt in rollouts.prompts):
        inside = np.array([prompt.group == group for prompt in rollouts.prompts])
        texts = [
            text
            for text, i in zip(rollouts.texts, rollouts.prompt_N.tolist(), strict=True)
            if inside[i]
        ]
        judge_violation = None
        if len(scores_JSK) > len(terms):
            judged_SK = scores_JSK[-1]
            below = np.where(
                np.isnan(judged_SK), np.nan, judged_SK < config.evaluation.judge_satisfied_at
            )
            judge_violation = bootstrap(_means(below[inside]))
        named = zip(terms, violated_JSK, strict=True) if config.constraint.terms else ()
        results[group] = GroupResult(
            prompts=int(inside.sum()),
            samples=int(inside.sum()) * samples,
            satisfaction=bootstrap(_means(1 - violated_SK[inside])),
            violation=bootstrap(_means(violated_SK[inside])),
            score=bootstrap(_means(least_SK[inside])),
            expected_maximum=bootstrap(_scored(1 - least_SK[inside], np.nanmax)),
            any_violation=bootstrap(_scored(violated_SK[inside], np.nanmax)),
            judge_violation=judge_violation,
            terms={name: bootstrap(_means(1 - one_SK[inside])) for name, one_SK in named},
            missing=int(missing_SK[inside].sum()),
            distinct_1=distinct(texts, 1),
            distinct_2=distinct(texts, 2),
            distinct_3=distinct(texts, 3),
            length=float(lengths_SK[inside].mean()),
        )
    return results


def _means(values_SK: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mean of each prompt's values that are there; prompts of none are left out."""
    return _scored(values_SK, np.nanmean)


def _scored(
    values_SK: NDArray[np.float64], reduce: Callable[..., NDArray[np.float64]]
) -> NDArray[np.float64]:
    there = values_SK[~np.isnan(values_SK).all(axis=1)]
    return reduce(there, axis=1)


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


def _ratio_perplexity(losses: np.ndarray, counts: np.ndarray) -> Interval:
    """exp(sum of losses / sum of tokens) and its bootstrap over rows."""
    draws = np.random.default_rng(0).integers(len(losses), size=(_RESAMPLES, len(losses)))
    resampled = np.exp(losses[draws].sum(axis=1) / counts[draws].sum(axis=1))
    low, high = np.quantile(resampled, [0.025, 0.975])
    mean = float(np.exp(losses.sum() / counts.sum()))
    return Interval(mean=mean, low=float(low), high=float(high))
