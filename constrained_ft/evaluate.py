"""What is measured before and after training, and by `cft evaluate`.

Samples of one prompt are not independent, so every interval is a bootstrap over prompts (over rows
for perplexity). Two models are compared on the same prompts with the same uniform numbers.

Shape suffixes:  S prompts, K samples of a prompt, J scorers.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from numpy.typing import NDArray

from constrained_ft.benchmark_results import BenchmarkResult
from constrained_ft.benchmarks.tasks import Benchmark
from constrained_ft.config import Config
from constrained_ft.decoding import Guide
from constrained_ft.detection import Questions, detect
from constrained_ft.distributed import StopRequest, World, pack, unpack
from constrained_ft.encoding import Row
from constrained_ft.fluency import distinct, empty, repetition, self_bleu
from constrained_ft.intervals import Interval, bootstrap
from constrained_ft.llm import FrozenLLM
from constrained_ft.perplexity import kl_to_base, perplexity, said_perplexity
from constrained_ft.progress import Display
from constrained_ft.prompts import Prompt
from constrained_ft.randomness import seed_for
from constrained_ft.results import QUANTILES, Evaluation, GroupResult
from constrained_ft.rollouts import Rollouts
from constrained_ft.sampling import sample
from constrained_ft.scorers import Scorer, least_scores
from constrained_ft.scoring import Scoring


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
    benchmarks: Sequence[Benchmark] = (),
    questions: Questions | None = None,
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
        benchmarks: what the accuracy is measured on, of the LLM alone.
        questions: the labelled texts of `evaluation.detection`.
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
            name: bootstrap(_means(all_of_it.violated_SK[inside_S])).complement()
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
        benchmarks=(
            _on_benchmarks(llm, benchmarks, config, model, display, stop)
            if guide is None and best_of == 1
            else {}
        ),
        kl_to_base=None if base is None or guide else kl_to_base(llm, base, rollouts, world),
        detection=(
            detect(llm, questions, display, stop, world) if questions and guide is None else {}
        ),
        quantiles=_quantiles(scores[: len(scorers)]),
        seconds_per_score=seconds[0],
        scorer=" + ".join(f"{one.name} {one.version}" for one in scorers),
        judges={name: f"{one.name} {one.version}" for name, one in judges.items()},
    )


def choose_prompts(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """So many prompts of each group, by their ids: a choice that no order of files changes."""
    chosen: list[Prompt] = []
    for group in dict.fromkeys(prompt.group for prompt in prompts):
        members = sorted((p for p in prompts if p.group == group), key=lambda prompt: prompt.id)
        chosen += members[:count]
    return chosen


def _on_benchmarks(
    llm: FrozenLLM,
    benchmarks: Sequence[Benchmark],
    config: Config,
    model: str,
    display: Display,
    stop: StopRequest,
) -> dict[str, BenchmarkResult]:
    if not benchmarks:
        return {}
    from constrained_ft.benchmarks.harness import measure  # lm-eval is an extra

    limit = config.evaluation.benchmark_limit
    return measure(llm, benchmarks, limit, model=model, display=display, stop=stop)


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
