"""Measure several models side by side: the same prompts, the same uniform numbers, one table."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from constrained_ft import evaluate, metrics, paired, results
from constrained_ft.auxiliary import FrozenAuxiliary
from constrained_ft.benchmarks.tasks import check_names, left_out, load_benchmarks
from constrained_ft.compose import compose
from constrained_ft.config import Config
from constrained_ft.corpus import load_corpus
from constrained_ft.decoding import Guide
from constrained_ft.detection import Questions, load_questions
from constrained_ft.distributed import StopRequest
from constrained_ft.encoding import Row
from constrained_ft.errors import ConfigError
from constrained_ft.fluency import require_sacrebleu
from constrained_ft.llm import FrozenLLM
from constrained_ft.named_models import ModelSource, base_model, final_model, find_run, model_at
from constrained_ft.paired import differences
from constrained_ft.progress import Display
from constrained_ft.prompts import Prompt, check_prompt_lengths, load_prompts, read_prompts
from constrained_ft.results import Evaluation
from constrained_ft.run_folder import RunFolder
from constrained_ft.scorers import given_columns, probed


@dataclass(frozen=True, kw_only=True)
class _Subject:
    """A column of the table."""

    name: str
    source: ModelSource
    suffix: str = ""
    """Behind the name: how it is sampled."""
    run: RunFolder | None = None
    """The run that trained it; None for columns that only sample otherwise, and for models."""
    guided_by: RunFolder | None = None
    """The run whose auxiliary guides every token."""
    best_of: int = 1
    base: int | None
    """The column to which its KL is measured; None for a base."""


@dataclass(frozen=True, kw_only=True)
class _Material:
    """Prompts, held-out text and labelled texts in one model's tokens."""

    prompts: tuple[Prompt, ...]
    columns: Mapping[str, Mapping[str, Any]]
    validation: tuple[Row, ...]
    questions: Questions | None


def evaluate_command(  # noqa: PLR0913
    targets: Sequence[str],
    *,
    prompts_file: Path | None,
    output: Path | None,
    max_prompts: int | None,
    samples_per_prompt: int | None,
    evaluation: str | None = None,
    guided: bool = False,
    best_of: int = 1,
    benchmarks: Sequence[str] | None = None,
    benchmark_limit: int | None = None,
    seed: int,
    display: Display,
) -> list[Evaluation]:
    """Measure runs and models; show a table, and write it to a file.

    Args:
        targets: a run shows its base and its final model; a model folder or hub id shows itself.
        prompts_file: used instead of the held-out prompts.
        output: the JSON file.
        max_prompts: of each group; None takes the configured number, or all of `prompts_file`.
        samples_per_prompt: None takes the configured number.
        evaluation: an option of the group `evaluation`; None takes the first run's section.
        guided: a further column for each run: its model with its auxiliary guiding every token.
        best_of: above 1 a further column for each run: the best of so many completions.
        benchmarks: what the accuracy is measured on; None takes the configured ones.
        benchmark_limit: items of each; 0 takes all, None the configured number.
        seed: of the samples.
        display: what people watch.

    Raises:
        ConfigError: when a run is not finished, the option or a benchmark is unknown, or the output
            cannot be written.
        DataError: when the prompts, the corpus or a benchmark's data cannot be used.
        ModelError: when a model is missing.
        ScorerError: when a score is missing or invalid.
    """
    if output is not None:
        _check_output(output)
    runs = {target: run for target in targets if (run := find_run(target)) is not None}
    config = _settings(runs, evaluation, seed)
    config = _resized(config, max_prompts, samples_per_prompt, prompts_file)
    config = _with_benchmarks(config, benchmarks, benchmark_limit)
    check_names(config.evaluation.benchmarks)
    subjects = _subjects(targets, runs, guided=guided, best_of=best_of)
    for note in _warnings(config, runs, prompts_file):
        display.note(note)
    display.phase("loading", 1)
    scorers = [probed(term.scorer) for term in config.constraint.all_terms().values()]
    judges = {name: probed(one.scorer) for name, one in config.evaluation.all_judges().items()}
    if config.evaluation.self_bleu:
        require_sacrebleu()
    asked = load_benchmarks(config.evaluation.benchmarks)
    if (rows := left_out(asked)) is not None:
        display.note(rows)
    other = config.evaluation.fluency_model
    fluent = None if other is None else model_at(other).load()
    kept: dict[int, FrozenLLM] = {}
    evaluations: list[Evaluation] = []
    for place, subject in enumerate(subjects):
        llm = subject.source.load()
        if any(other.base == place for other in subjects):
            kept[place] = llm
        material = _material(config, llm.tokenizer, subject.source, prompts_file)
        given_columns([*scorers, *judges.values()], material.columns)
        base = None if subject.base is None else kept[subject.base]
        display.phase(
            f"evaluating {subject.name}",
            len(material.prompts) * config.evaluation.samples_per_prompt * subject.best_of,
        )
        evaluations.append(
            evaluate.evaluate(
                llm,
                material.prompts,
                material.validation,
                scorers,
                judges,
                config,
                other=fluent,
                guide=_guide(subject, llm),
                best_of=subject.best_of,
                benchmarks=asked,
                questions=material.questions,
                model=subject.name,
                base=base if base is not None and _same_tokens(llm, base) else None,
                display=display,
                stop=StopRequest(),
            )
        )
    title = "Held-out prompts and text" if prompts_file is None else f"Prompts of {prompts_file}"
    display.table(title, *results.table(evaluations))
    found = differences(evaluations)
    display.table("The same prompts and random numbers", *paired.table(found))
    costs = {
        subject.name: spent
        for subject in subjects
        if subject.run is not None
        and (spent := metrics.cost(metrics.read(subject.run.metrics_file)))
    }
    if costs:
        display.table("What training has cost", *metrics.cost_table(costs))
    if output is not None:
        results.save(output, evaluations, config, prompts_file, paired.plain(found), costs)
        display.note(f"written to {output}")
    return evaluations


def _check_output(output: Path) -> None:
    """See before hours of work whether the result can be written."""
    if output.is_dir():
        raise ConfigError(f"--output {output} is a folder; give a file")
    parent = output.absolute().parent
    existing = next(folder for folder in (parent, *parent.parents) if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ConfigError(f"--output {output}: cannot write to {existing}")


def _settings(runs: dict[str, RunFolder], evaluation: str | None, seed: int) -> Config:
    """The first run's configuration, or the default one, with the evaluation asked for."""
    first = next(iter(runs.values()), None)
    config = compose(()) if first is None else first.config()
    changes: dict[str, object] = {"seed": seed}
    if evaluation is not None:
        changes["evaluation"] = compose([f"evaluation={evaluation}"]).evaluation
    return Config.model_validate(dict(config) | changes)


def _resized(
    config: Config,
    max_prompts: int | None,
    samples_per_prompt: int | None,
    prompts_file: Path | None,
) -> Config:
    """With the numbers that the command line gives."""
    if max_prompts is None:
        # All prompts of a file were chosen by somebody already.
        max_prompts = config.evaluation.max_prompts if prompts_file is None else 2**31
    changes: dict[str, object] = {"max_prompts": max_prompts}
    if samples_per_prompt is not None:
        changes["samples_per_prompt"] = samples_per_prompt
    evaluation = config.evaluation.model_copy(update=changes)
    return config.model_copy(update={"evaluation": evaluation})


def _with_benchmarks(
    config: Config, benchmarks: Sequence[str] | None, benchmark_limit: int | None
) -> Config:
    """With the benchmarks that the command line gives."""
    changes: dict[str, object] = {}
    if benchmarks is not None:
        changes["benchmarks"] = tuple(benchmarks)
    if benchmark_limit is not None:
        changes["benchmark_limit"] = benchmark_limit
    evaluation = config.evaluation.model_copy(update=changes)
    return config.model_copy(update={"evaluation": evaluation})


def _subjects(
    targets: Sequence[str], runs: dict[str, RunFolder], *, guided: bool, best_of: int
) -> list[_Subject]:
    subjects: list[_Subject] = []
    for target in dict.fromkeys(targets):
        name = Path(target).name or target
        if target not in runs:
            first = 0 if subjects else None
            subjects.append(_Subject(name=name, source=model_at(target), base=first))
            continue
        base = base_model(runs[target])
        known = [subject.source for subject in subjects]
        if base not in known:
            label = "base" if len(runs) == 1 else f"base of {name}"
            subjects.append(_Subject(name=label, source=base, base=None))
            known.append(base)
        tuned = final_model(runs[target])
        column = _Subject(name=name, source=tuned, base=known.index(base))
        subjects.append(replace(column, run=runs[target]))
        if guided:
            subjects.append(replace(column, suffix=", guided", guided_by=runs[target]))
        if best_of > 1:
            subjects.append(replace(column, suffix=f", best of {best_of}", best_of=best_of))
    paths: dict[str, set[str]] = {}
    for one in subjects:
        paths.setdefault(one.name, set()).add(one.source.config.model_name_or_path)
    return [
        replace(
            one,
            name=(one.source.config.model_name_or_path if len(paths[one.name]) > 1 else one.name)
            + one.suffix,
        )
        for one in subjects
    ]


def _guide(subject: _Subject, llm: FrozenLLM) -> Guide | None:
    if subject.guided_by is None:
        return None
    return FrozenAuxiliary.load(subject.guided_by.final_auxiliary, llm.device).guide()


def _warnings(config: Config, runs: dict[str, RunFolder], prompts_file: Path | None) -> list[str]:
    """What a reader of the table has to know."""
    if prompts_file is not None:
        return []
    return [
        f"{name} was trained with other prompts or another corpus than these; some of what is "
        "held out here may have been used there"
        for name, run in runs.items()
        if (run.config().prompts, run.config().data) != (config.prompts, config.data)
    ]


def _material(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    source: ModelSource,
    prompts_file: Path | None,
) -> _Material:
    corpus = load_corpus(config.data, tokenizer)
    context = source.context_length()
    if prompts_file is None:
        found = load_prompts(config.prompts, tokenizer, config.data, context)
    else:
        found = read_prompts(str(prompts_file), tokenizer, columns=config.prompts.columns)
        check_prompt_lengths(found.held_out, config.prompts.max_new_tokens, context)
    chosen = evaluate.choose_prompts(found.held_out, config.evaluation.max_prompts)
    detection = config.evaluation.detection
    return _Material(
        prompts=tuple(chosen),
        columns=found.columns,
        validation=corpus.validation,
        questions=None if detection is None else load_questions(detection, tokenizer, context),
    )


def _same_tokens(llm: FrozenLLM, base: FrozenLLM) -> bool:
    """Whether a KL between two models means something."""
    same_size = len(llm.head.weight_VD) == len(base.head.weight_VD)
    return same_size and llm.tokenizer.get_vocab() == base.tokenizer.get_vocab()
