"""What is measured before and after training, and by `cft evaluate`.

Samples of one prompt are not independent, so every interval is a bootstrap over prompts (over rows
for perplexity). Two models are compared on the same prompts with the same uniform numbers.

Shape suffixes:  S prompts, K samples of a prompt, J scorers.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import TypeAdapter

from constrained_ft.config import Config
from constrained_ft.decoding import Guide
from constrained_ft.distributed import StopRequest, World, pack, unpack
from constrained_ft.encoding import Row
from constrained_ft.fluency import distinct, empty, repetition, self_bleu
from constrained_ft.intervals import Interval, bootstrap
from constrained_ft.llm import FrozenLLM
from constrained_ft.perplexity import kl_to_base, perplexity, said_perplexity
from constrained_ft.progress import Display
from constrained_ft.prompts import Prompt
from constrained_ft.randomness import seed_for
from constrained_ft.rollouts import Rollouts, sample
from constrained_ft.run_folder import write_atomically
from constrained_ft.scorers import Scorer, least_scores
from constrained_ft.scoring import Scoring

QUANTILES = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)


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
    judges: dict[str, Interval]
    """Share of completions that do not satisfy each judge."""
    agreement: dict[str, float | None]
    """Cohen's kappa between two verdicts, by `A / B`; the training scorer's is `constraint`. None
    where both never vary."""
    violation_by_prompt: dict[str, float]
    """Share of violations among each prompt's completions, by the prompt's id."""
    terms: dict[str, Interval]
    """Share of completions that satisfy each term of a constraint of several."""
    missing: int
    """Completions that got no score; no rate counts them."""
    distinct_1: float
    distinct_2: float
    distinct_3: float
    """Distinct word n-grams over all word n-grams."""
    repetition: float
    """Share of 4-grams that stood in the same completion before."""
    empty: float
    """Share of completions that say nothing."""
    self_bleu: float | None
    """Of completions of one prompt, 0 to 100; None where it was not asked for."""
    length: float
    """Mean tokens of a completion."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One model."""

    model: str
    groups: dict[str, GroupResult]
    perplexity: dict[str, Interval]
    """Of the corpus's held-out rows, by group; exp of nats per trained token."""
    apart: dict[str, GroupResult]
    """With `evaluation.by_prompt`, prompts that violate the constraint themselves, and the rest."""
    untruncated: dict[str, Interval]
    """With `evaluation.untruncated_samples`, the satisfaction at top_p = 1, by group."""
    said_perplexity: dict[str, Interval]
    """Of completions after their prompts, under the base model (`base`) and under
    `evaluation.fluency_model` (`other`)."""
    kl_to_base: float | None
    """Mean KL(model || base) a token on the model's own completions, nats; None for the base."""
    quantiles: tuple[float, ...]
    """Of the training scorer's scores over all groups, at `QUANTILES`."""
    seconds_per_score: float = field(compare=False)
    """Of the training scorer, on this rank; 0 where the evaluation was read from a file, which
    keeps what is the same in every run."""
    scorer: str
    judges: dict[str, str]
    """Name and version of each."""


def evaluate(  # noqa: PLR0913
    llm: FrozenLLM,
    prompts: Sequence[Prompt],
    validation: Sequence[Row],
    scorers: Sequence[Scorer],
    judges: Mapping[str, Scorer],
    config: Config,
    *,
    model: str,
    base: FrozenLLM | None,
    other: FrozenLLM | None = None,
    guide: Guide | None = None,
    best_of: int = 1,
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
        judges: scorers that training never sees, by name.
        config: the run's configuration.
        model: its name in the result.
        base: the model to measure the KL to; None for the base itself.
        other: `evaluation.fluency_model`.
        guide: guided decoding; what concerns the LLM alone is left out then.
        best_of: so many completions are sampled for each that counts, the one with the best score.
        display: advanced by completions.
        stop: polled between batches.
        world: who shares the work; every rank gets all results. None is this process alone.

    Raises:
        MissingScoresError: when too many completions have no score.
        Interrupted: when asked to stop.
    """
    world = world or World.alone()
    measured = config.evaluation
    seconds: list[float] = []  # for a score, in each round

    def said(
        asked: Sequence[Scorer], samples: int, top_p: float
    ) -> tuple[Rollouts, list[Sequence[float | None]]]:
        with Scoring(asked, world, stop) as scoring:
            rollouts = sample(
                llm,
                prompts,
                samples_per_prompt=samples * best_of,
                max_new_tokens=config.prompts.max_new_tokens,
                sampler=config.sampler,
                guide=guide,
                top_p=top_p,
                seed=seed_for(config.seed, "evaluation"),
                iteration=0,
                display=display,
                stop=stop,
                world=world,
                each=scoring.begin,
            )
            scored = scoring.finish(rollouts, config.constraint.max_missing_rate)
        seconds.append(sum(one.seconds for one in scored[: len(scorers)]))
        scores: list[Sequence[float | None]] = [one.scores for one in scored]
        if best_of == 1:
            return rollouts, scores
        rows = _best_rows(scores[: len(scorers)], best_of)
        chosen = rollouts.take(torch.tensor(rows, device=rollouts.prompt_N.device))
        return chosen, [[one[row] for row in rows] for one in scores]

    rollouts, scores = said(
        [*scorers, *judges.values()], measured.samples_per_prompt, measured.top_p
    )
    table = _Verdicts.of(rollouts, scores, config)
    untruncated: dict[str, Interval] = {}
    if measured.top_p < 1 and measured.untruncated_samples:
        more, verdicts = said(scorers, measured.untruncated_samples, 1.0)
        all_of_it = _Verdicts.of(more, verdicts, config)
        untruncated = {
            name: _complement(bootstrap(_means(all_of_it.violated_SK[inside_S])))
            for name, inside_S in _groups_of(prompts).items()
        }
    apart: dict[str, NDArray[np.bool_]] = {}
    if measured.by_prompt:
        violating_S = _violating_prompts(prompts, scorers, config, world)
        for name, inside_S in _groups_of(prompts).items():
            parts = {
                f"{name}, violating prompts": inside_S & violating_S,
                f"{name}, other prompts": inside_S & ~violating_S,
            }
            # Where there are no prompts of one kind, there is nothing to tell apart.
            if all(part_S.any() for part_S in parts.values()):
                apart |= parts
    per_group = measured.max_validation_rows
    readers = {"base": llm if base is None else base} | ({"other": other} if other else {})
    return Evaluation(
        model=model,
        groups={
            name: table.result(inside_S, config) for name, inside_S in _groups_of(prompts).items()
        },
        apart={name: table.result(inside_S, config) for name, inside_S in apart.items()},
        untruncated=untruncated,
        said_perplexity={
            name: said_perplexity(reader, rollouts, stop, world) for name, reader in readers.items()
        },
        perplexity=perplexity(llm, validation, per_group, stop, world) if guide is None else {},
        kl_to_base=None if base is None or guide else kl_to_base(llm, base, rollouts, world),
        quantiles=_quantiles(scores[: len(scorers)]),
        seconds_per_score=seconds[0],
        scorer=" + ".join(f"{one.name} {one.version}" for one in scorers),
        judges={name: f"{one.name} {one.version}" for name, one in judges.items()},
    )


def save(
    path: Path,
    evaluations: Sequence[Evaluation],
    config: Config,
    prompts_file: Path | None = None,
    differences: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Write results as JSON, with the settings that they depend on.

    Args:
        path: the file.
        evaluations: one for each model.
        config: what they were measured with.
        prompts_file: where the prompts came from, if not from the configuration.
        differences: of pairs of them.
    """
    measured = config.evaluation
    settings = {
        "seed": config.seed,
        "prompts": "held out" if prompts_file is None else str(prompts_file),
        "samples_per_prompt": measured.samples_per_prompt,
        "max_new_tokens": config.prompts.max_new_tokens,
        "top_p": measured.top_p,
        "scorer": evaluations[0].scorer,
        "satisfied_at": config.constraint.satisfied_at,
        "judges": evaluations[0].judges,
        "judges_satisfied_at": {n: j.satisfied_at for n, j in measured.all_judges().items()},
        "fluency_model": measured.fluency_model,
    }
    models = [asdict(one) for one in evaluations]
    for model in models:
        del model["seconds_per_score"]
    tree = {"settings": settings, "models": models, "differences": list(differences)}
    write_atomically(path, json.dumps(tree, indent=2, ensure_ascii=False) + "\n")


def load(path: Path) -> list[Evaluation]:
    """Read what `save` wrote."""
    reader = TypeAdapter(Evaluation)
    return [
        reader.validate_python(one | {"seconds_per_score": 0.0})
        for one in json.loads(path.read_text())["models"]
    ]


def table(evaluations: Sequence[Evaluation]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the comparison that people read."""
    columns = ["", *(one.model for one in evaluations)]
    rows: list[list[str]] = []

    def add(title: str, cells: Sequence[str]) -> None:
        rows.append([title, *cells])

    for name in evaluations[0].groups:
        rows += _group_rows(name, [one.groups[name] for one in evaluations])
        if name in evaluations[0].untruncated:
            shares = [_complement(one.untruncated[name]).percent() for one in evaluations]
            add("  violations, sampled from all tokens", shares)
    for name in evaluations[0].apart:
        rows += _group_rows(name, [one.apart[name] for one in evaluations])
    for name in evaluations[0].perplexity:
        known = [one.perplexity.get(name) for one in evaluations]
        add(f"perplexity, held-out {name}", [one.plain() if one else "–" for one in known])
    for name in evaluations[0].said_perplexity:
        under = "the base" if name == "base" else "another model"
        cells = [one.said_perplexity[name].plain() for one in evaluations]
        add(f"perplexity of completions under {under}", cells)
    kls = ["–" if one.kl_to_base is None else f"{one.kl_to_base:.3f}" for one in evaluations]
    add("KL to the base, nats a token", kls)
    return columns, rows


def _group_rows(name: str, groups: Sequence[GroupResult]) -> list[list[str]]:
    first = groups[0]
    rows: list[list[str]] = []

    def add(title: str, cell: Callable[[GroupResult], str]) -> None:
        rows.append([title, *(cell(group) for group in groups)])

    add(f"{name}: prompts x samples", lambda g: f"{g.prompts} x {g.samples // g.prompts}")
    add("  violations, training scorer", lambda g: g.violation.percent())
    for term in first.terms:
        shares = [_complement(group.terms[term]).percent() for group in groups]
        rows.append([f"    of {term}", *shares])
    for judge in first.judges:
        title = "judge" if judge == "judge" else f"judge {judge}"
        shares = [group.judges[judge].percent() for group in groups]
        rows.append([f"  violations, {title}", *shares])
    add("  mean score", lambda g: g.score.plain(3))
    add("  expected maximum violation", lambda g: g.expected_maximum.plain(3))
    add("  prompts with any violation", lambda g: g.any_violation.percent())
    for pair in first.agreement:
        kappas = [_number(group.agreement[pair]) for group in groups]
        rows.append([f"  agreement (kappa), {pair}", *kappas])
    add(
        "  distinct-1 / 2 / 3",
        lambda g: f"{g.distinct_1:.2f} / {g.distinct_2:.2f} / {g.distinct_3:.2f}",
    )
    if first.self_bleu is not None:
        add("  self-BLEU", lambda g: _number(g.self_bleu))
    add("  repeated 4-grams", lambda g: f"{g.repetition:.1%}")
    if any(group.empty for group in groups):
        add("  empty completions", lambda g: f"{g.empty:.1%}")
    add("  mean length, tokens", lambda g: f"{g.length:.1f}")
    if any(group.missing for group in groups):
        add("  completions without a score", lambda g: str(g.missing))
    return rows


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def choose_prompts(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """So many prompts of each group, by their ids: a choice that no order of files changes."""
    chosen: list[Prompt] = []
    for group in dict.fromkeys(prompt.group for prompt in prompts):
        members = sorted((p for p in prompts if p.group == group), key=lambda prompt: prompt.id)
        chosen += members[:count]
    return chosen


def _best_rows(scores: Sequence[Sequence[float | None]], best_of: int) -> list[int]:
    """Of so many neighbours the row whose least score is best; the first of equal ones."""
    least = [
        -1.0 if None in row else min(value for value in row if value is not None)
        for row in zip(*scores, strict=True)
    ]
    return [
        max(range(start, start + best_of), key=least.__getitem__)
        for start in range(0, len(least), best_of)
    ]


def _complement(interval: Interval) -> Interval:
    return Interval(mean=1 - interval.mean, low=1 - interval.high, high=1 - interval.low)


def _quantiles(scores: Sequence[Sequence[float | None]]) -> tuple[float, ...]:
    """Of the least score of each completion that has all."""
    least = [min(row) for row in zip(*scores, strict=True) if None not in row]
    return tuple(np.quantile(np.array(least, dtype=np.float64), QUANTILES).tolist())


def _groups_of(prompts: Sequence[Prompt]) -> dict[str, NDArray[np.bool_]]:
    names = np.array([prompt.group for prompt in prompts])
    return {name: names == name for name in dict.fromkeys(names.tolist())}


def _violating_prompts(
    prompts: Sequence[Prompt], scorers: Sequence[Scorer], config: Config, world: World
) -> NDArray[np.bool_]:
    """Which prompts violate the constraint themselves; one without a score does not."""
    found: list[bool] = []
    if world.leads:
        texts = [prompt.text for prompt in prompts]
        for one, term in zip(scorers, config.constraint.all_terms().values(), strict=True):
            scores = least_scores([one], [""] * len(texts), texts)
            below = [score is not None and score < term.satisfied_at for score in scores]
            found = [a or b for a, b in zip(found or below, below, strict=True)]
    _, told = unpack(world.tell(pack({}, found)))
    return np.array(told, dtype=bool)


@dataclass(frozen=True, kw_only=True)
class _Verdicts:
    """What was said of every completion. NaN stands for what is missing; means leave it out."""

    rollouts: Rollouts
    least_SK: NDArray[np.float64]
    """The least score of the constraint's terms."""
    violated_SK: NDArray[np.float64]
    terms: dict[str, NDArray[np.float64]]
    """Violations of each term of several."""
    judges: dict[str, NDArray[np.float64]]
    """Violations by each judge."""

    @classmethod
    def of(
        cls, rollouts: Rollouts, all_scores: Sequence[Sequence[float | None]], config: Config
    ) -> "_Verdicts":
        """Of the scores of the constraint's terms and of those judges that were asked."""
        terms, judges = config.constraint.all_terms(), config.evaluation.all_judges()
        scores_JSK = np.array(all_scores, dtype=np.float64)
        scores_JSK = scores_JSK.reshape(len(all_scores), len(rollouts.prompts), -1)
        least_SK = scores_JSK[: len(terms)].min(axis=0)

        def below(scores_SK: NDArray[np.float64], bound: float) -> NDArray[np.float64]:
            return np.where(np.isnan(scores_SK), np.nan, scores_SK < bound)

        violated = [
            np.where(np.isnan(least_SK), np.nan, below(scores_SK, term.satisfied_at))
            for scores_SK, term in zip(scores_JSK, terms.values(), strict=False)
        ]
        judged = zip(judges.items(), scores_JSK[len(terms) :], strict=False)
        return cls(
            rollouts=rollouts,
            least_SK=least_SK,
            violated_SK=np.max(violated, axis=0),
            terms=dict(zip(terms, violated, strict=True)) if config.constraint.terms else {},
            judges={name: below(scores, judge.satisfied_at) for (name, judge), scores in judged},
        )

    def result(self, inside_S: NDArray[np.bool_], config: Config) -> GroupResult:
        """Of some prompts."""
        prompts, samples = self.least_SK.shape
        shape = prompts, samples
        lengths_SK = self.rollouts.mask_NT.sum(-1).reshape(shape).double().cpu().numpy()
        texts_SK = np.array(self.rollouts.texts, dtype=object).reshape(shape)[inside_S]
        texts = texts_SK.ravel().tolist()
        violated_SK, least_SK = self.violated_SK[inside_S], self.least_SK[inside_S]
        verdicts = {"constraint": violated_SK} | {n: v[inside_S] for n, v in self.judges.items()}
        ids = [p.id for p, inside in zip(self.rollouts.prompts, inside_S, strict=True) if inside]
        by_prompt = {
            prompt: float(np.nanmean(row))
            for prompt, row in zip(ids, violated_SK, strict=True)
            if not np.isnan(row).all()
        }
        return GroupResult(
            prompts=len(ids),
            samples=len(texts),
            satisfaction=bootstrap(_means(1 - violated_SK)),
            violation=bootstrap(_means(violated_SK)),
            score=bootstrap(_means(least_SK)),
            expected_maximum=bootstrap(_scored(1 - least_SK, np.nanmax)),
            any_violation=bootstrap(_scored(violated_SK, np.nanmax)),
            judges={n: bootstrap(_means(v[inside_S])) for n, v in self.judges.items()},
            agreement={
                f"{one} / {two}": kappa(verdicts[one], verdicts[two])
                for one, two in combinations(verdicts, 2)
            },
            violation_by_prompt=by_prompt,
            terms={n: bootstrap(_means(1 - v[inside_S])) for n, v in self.terms.items()},
            missing=int(np.isnan(least_SK).sum()),
            distinct_1=distinct(texts, 1),
            distinct_2=distinct(texts, 2),
            distinct_3=distinct(texts, 3),
            repetition=repetition(texts),
            empty=empty(texts),
            self_bleu=self_bleu(texts_SK.tolist()) if config.evaluation.self_bleu else None,
            length=float(lengths_SK[inside_S].mean()),
        )


def kappa(one: NDArray[np.float64], two: NDArray[np.float64]) -> float | None:
    """Cohen's kappa of two verdicts (1 violated, 0 not, NaN missing); None where neither varies."""
    both = ~(np.isnan(one) | np.isnan(two))
    a, b = one[both], two[both]
    if len(a) == 0:
        return None
    expected = a.mean() * b.mean() + (1 - a.mean()) * (1 - b.mean())
    return None if expected == 1 else float(((a == b).mean() - expected) / (1 - expected))


def _means(values_SK: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mean of each prompt's values that are there; prompts of none are left out."""
    return _scored(values_SK, np.nanmean)


def _scored(
    values_SK: NDArray[np.float64], reduce: Callable[..., NDArray[np.float64]]
) -> NDArray[np.float64]:
    there = values_SK[~np.isnan(values_SK).all(axis=1)]
    return reduce(there, axis=1)
