"""What was measured of a model: the numbers, their file, and the table that people read.

Nothing here imports torch, so that reading results takes no time.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from constrained_ft.benchmark_results import BenchmarkResult, benchmark_rows, mean_score
from constrained_ft.classification import MEASURES, Classification
from constrained_ft.config import Config
from constrained_ft.intervals import Interval
from constrained_ft.run_folder import write_atomically

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
    benchmarks: dict[str, BenchmarkResult] = field(default_factory=dict)
    """Accuracy on `evaluation.benchmarks`, by name; training measures none."""
    detection: dict[str, Classification] = field(default_factory=dict)
    """With `evaluation.detection`, how well labelled texts are told apart, by detector."""


def save(
    path: Path,
    evaluations: Sequence[Evaluation],
    config: Config,
    prompts_file: Path | None = None,
    differences: Sequence[Mapping[str, Any]] = (),
    budgets: Mapping[str, Mapping[str, float]] | None = None,
) -> None:
    """Write results as JSON, with the settings that they depend on.

    Args:
        path: the file.
        evaluations: one for each model.
        config: what they were measured with.
        prompts_file: where the prompts came from, if not from the configuration.
        differences: of pairs of them.
        budgets: what training the models has cost, as `metrics.cost` has it.
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
        "benchmarks": measured.benchmarks,
        "benchmark_limit": measured.benchmark_limit,
    }
    models = [asdict(one) for one in evaluations]
    for model, one in zip(models, evaluations, strict=True):
        del model["seconds_per_score"]
        model["benchmark_mean"] = asdict(mean_score(one.benchmarks)) if one.benchmarks else None
    tree = {
        "settings": settings,
        "models": models,
        "differences": list(differences),
        "budgets": budgets or {},
    }
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
            shares = [one.untruncated[name].complement().percent() for one in evaluations]
            add("  violations, sampled from all tokens", shares)
    for name in evaluations[0].apart:
        rows += _group_rows(name, [one.apart[name] for one in evaluations])
    for name in evaluations[0].perplexity:
        known = [one.perplexity.get(name) for one in evaluations]
        add(f"perplexity, held-out {name}", [one.plain() if one else "–" for one in known])
    first = evaluations[0].model
    # Of folders that no run made, the first is the one that the others are held against.
    base = "the base" if first.startswith("base") else first
    for name in evaluations[0].said_perplexity:
        under = base if name == "base" else "another model"
        cells = [one.said_perplexity[name].plain() for one in evaluations]
        add(f"perplexity of completions under {under}", cells)
    rows += benchmark_rows([one.benchmarks for one in evaluations])
    kls = ["–" if one.kl_to_base is None else f"{one.kl_to_base:.3f}" for one in evaluations]
    add(f"KL to {base}, nats a token", kls)
    for detector in dict.fromkeys(name for one in evaluations for name in one.detection):
        rows += _detection_rows(detector, [one.detection.get(detector) for one in evaluations])
    return columns, rows


def _group_rows(name: str, groups: Sequence[GroupResult]) -> list[list[str]]:
    first = groups[0]
    rows: list[list[str]] = []

    def add(title: str, cell: Callable[[GroupResult], str]) -> None:
        rows.append([title, *(cell(group) for group in groups)])

    add(f"{name}: prompts x samples", lambda g: f"{g.prompts} x {g.samples // g.prompts}")
    add("  violations, training scorer", lambda g: g.violation.percent())
    for term in first.terms:
        shares = [group.terms[term].complement().percent() for group in groups]
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


def _detection_rows(detector: str, found: Sequence[Classification | None]) -> list[list[str]]:
    sizes = ["–" if one is None else f"{one.texts} ({one.positive:.0%})" for one in found]
    return [[f"detection, {detector}: texts (positive)", *sizes]] + [
        [f"  {name}", *("–" if one is None else one.measures[name].plain(3) for one in found)]
        for name in MEASURES
    ]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
