"""The report of one run."""

from functools import cache
from typing import Any

from constrained_ft import results
from constrained_ft.compose import compose, differences
from constrained_ft.config import Config
from constrained_ft.report import figures
from constrained_ft.report.content import Content, SampleTable, Section, shown
from constrained_ft.report.reading import Run
from constrained_ft.report.verdict import Table, verdict, what_next

PLACES = {"output_dir", "name"}
"""Keys that say where a run is, not what it is."""


def one_run(run: Run) -> Content:
    """The report of one run."""
    said = verdict(run)
    drawn = figures.of_run(run, said.measures)
    training = Section(title="Training", key="training", charts=drawn["training"])
    auxiliary = Section(
        title="The auxiliary R",
        key="auxiliary",
        note="R says after every token how likely it is that the completion will satisfy the "
        "constraint; q* is the model's own distribution times R.",
        charts=drawn["auxiliary"],
    )
    time = Section(title="Time", key="time", charts=drawn["time"])
    return Content(
        title=run.name,
        subtitle=_subtitle(run),
        notices=_notices(run),
        next_command=what_next(run),
        verdict=said,
        verdict_charts=drawn["verdict"],
        sections=shown(
            training, *of_samples(run), auxiliary, time, *all_numbers(run), *origin(run)
        ),
    )


def _subtitle(run: Run) -> str:
    config, trainer = run.config, run.config.trainer
    aim = "plain fine-tuning" if trainer.is_plain else f"λ = {trainer.kl_weight:g}"
    model = config.llm.model_name_or_path.partition("#")[0].rpartition("/")[2]
    started = str(run.status.get("started", ""))[:16].replace("T", " ")
    parts = (
        model,
        f"{trainer.schedule}, {aim}",
        f"{run.iterations} of {trainer.iterations} iterations",
        f"seed {config.seed}",
        started and f"started {started} UTC",
    )
    return " · ".join(part for part in parts if part)


def state_in_words(run: Run) -> str:
    """Where a run stands, and why."""
    done = f"{run.iterations} of {run.config.trainer.iterations} iterations are finished"
    reason = run.status.get("reason")
    return f"{run.state}, {done}" + (f"; {reason}" if reason else "")


def _notices(run: Run) -> list[str]:
    state = [] if run.state == "finished" else [f"This run is not finished: {state_in_words(run)}."]
    return [*state, *run.problems]


def of_samples(run: Run) -> list[Section]:
    """What was said, before and after."""
    tables = []
    heads = {"base": "base", "tuned": "fine-tuned", "guided": "fine-tuned, guided by R"}
    there = {name for sample in run.samples for name in sample.said}
    if run.samples:
        tables.append(
            SampleTable(
                title="The same prompts, before and after",
                note="One completion of each of a few held-out prompts, with the same random "
                "numbers; the latest iteration first.",
                columns=[(key, head) for key, head in heads.items() if key in there],
                samples=run.samples,
            )
        )
    if run.rollouts:
        tables.append(
            SampleTable(
                title="The worst that training sampled",
                note="Violations with the lowest scores, of the last and of the first iteration. "
                "Their prompts differ.",
                columns=[("completion", "completion")],
                samples=run.rollouts,
            )
        )
    return [Section(title="Samples", key="samples", samples=tables)]


def all_numbers(run: Run) -> list[Section]:
    """The whole table of the evaluation."""
    if not run.evaluations:
        return []
    columns, rows = results.table(run.evaluations)
    return [
        Section(
            title="All numbers",
            key="numbers",
            note="docs/evaluation.md says what each row means.",
            tables=[("Held-out prompts and text", Table(columns=columns, rows=rows))],
        )
    ]


def origin(run: Run) -> list[Section]:
    """Where the run came from."""
    environment = dict(run.environment)
    versions = environment.pop("versions", {})
    earlier = environment.pop("earlier_attempts", [])
    rows = [(str(key), str(value)) for key, value in environment.items() if value is not None]
    if isinstance(earlier, list) and earlier:
        rows.append(("earlier attempts", str(len(earlier))))
    if isinstance(versions, dict):
        rows.append(
            ("versions", ", ".join(f"{name} {version}" for name, version in versions.items()))
        )
    tables = [("Environment", Table(columns=("", ""), rows=rows))] if rows else []
    changed = _from_default(run.config)
    if changed:
        tables.append(
            (
                "Configuration, where it is not the default",
                Table(
                    columns=("key", "default", "this run"),
                    rows=[
                        (key, in_words(was), in_words(now)) for key, (was, now) in changed.items()
                    ],
                ),
            )
        )
    return [
        Section(
            title="Where it came from",
            key="provenance",
            tables=tables,
            text=run.command.strip(),
            note="The run's config.yaml holds every setting.",
        )
    ]


def _from_default(config: Config) -> dict[str, tuple[object, object]]:
    """Keys that this configuration has and whose values are not the default's."""
    tree = config.model_dump(mode="json")
    changed = differences(_default(), config).items()
    return {key: pair for key, pair in changed if key not in PLACES and _has(tree, key)}


@cache
def _default() -> Config:
    return compose(())


def _has(tree: Any, key: str) -> bool:
    name, _, rest = key.partition(".")
    if not isinstance(tree, dict) or name not in tree:
        return False
    return not rest or _has(tree[name], rest)


def in_words(value: object) -> str:
    """A value of the configuration; of files in wheels without their hashes."""
    match value:
        case None:
            return "–"
        case bool():
            return str(value).lower()
        case _:
            return str(value).partition("#sha256=")[0]
