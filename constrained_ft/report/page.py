"""What a report says, and its two forms: a page of HTML and Markdown.

The page holds its style, script and figures itself and asks for nothing. Its content security
policy allows its one script only, so that no text in it could run even if it were not escaped.
"""

import hashlib
from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from constrained_ft import front, results
from constrained_ft.compose import compose, differences
from constrained_ft.config import Config
from constrained_ft.report import figures
from constrained_ft.report.figures import Chart
from constrained_ft.report.reading import Run, Sample
from constrained_ft.report.text import markdown, visible
from constrained_ft.report.verdict import Measure, Table, Verdict, verdict, what_next

_BEST_AT = 0.97
_NAMED = 6  # runs on the front that a sentence names
_PLACES = {"output_dir", "name"}
"""Keys that say where a run is, not what it is."""


@dataclass(frozen=True, kw_only=True)
class SampleTable:
    """Completions side by side."""

    title: str
    note: str
    columns: Sequence[tuple[str, str]]
    """Key and heading of everything that was said."""
    samples: Sequence[Sample]


@dataclass(frozen=True, kw_only=True)
class Section:
    """One part of a report; what is empty is not shown."""

    title: str
    key: str
    note: str = ""
    charts: Sequence[Chart] = ()
    tables: Sequence[tuple[str, Table]] = ()
    samples: Sequence[SampleTable] = ()
    text: str = ""
    """Shown as it is, such as a command."""


@dataclass(frozen=True, kw_only=True)
class Content:
    """A whole report."""

    title: str
    subtitle: str
    notices: Sequence[str]
    """What a reader has to know first: the run failed, a file is damaged."""
    next_command: str
    verdict: Verdict
    verdict_charts: Sequence[Chart]
    sections: Sequence[Section]
    runs: Mapping[str, Sequence[Section]] = field(default_factory=dict)
    """Of several runs, the sections of each, folded."""

    @property
    def charts(self) -> Iterator[Chart]:
        """All figures."""
        yield from self.verdict_charts
        for section in self.sections:
            yield from section.charts


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
        sections=_shown(
            training, *_of_samples(run), auxiliary, time, *_numbers(run), *_origin(run)
        ),
    )


def several_runs(runs: Sequence[Run], left_out: Sequence[str]) -> Content:
    """The report of several runs side by side."""
    runs = _named_apart(runs)
    said = {run.name: verdict(run) for run in runs}
    changed = _between([run.config for run in runs])
    words = {
        run.name: " ".join(f"{key}={values[i]}" for key, values in changed.items())
        for i, run in enumerate(runs)
    }
    measured = [run for run in runs if len(run.evaluations) > 1]
    points = front.read_points({run.name: (words[run.name], run.path) for run in measured})
    best = front.best(points, _BEST_AT)
    unfinished = [run for run in runs if run.state != "finished"]
    notices = [f"{run.name}: {_state(run)}" for run in unfinished] + list(left_out)
    notices += [f"{run.name}: {problem}" for run in runs for problem in run.problems]
    tables = [("Runs", _overview(runs, said))]
    if points:
        columns, rows = front.table(points)
        tables.append(("The front", Table(columns=columns, rows=rows)))
    if changed:
        tables.append(("What differs in their configurations", _config_table(runs, changed)))
    chosen = None if best is None else best.job
    return Content(
        title=f"{len(runs)} runs",
        subtitle=", ".join(run.name for run in runs),
        notices=notices,
        next_command="",
        verdict=_verdict_of_several(runs, points, chosen),
        verdict_charts=[figures.of_front(points)] if points else [],
        sections=_shown(
            Section(
                title="Side by side",
                key="runs",
                charts=figures.of_runs(runs, chosen),
                tables=tables,
                note=""
                if changed or len(runs) == 1
                else "Their configurations are the same but for the folder.",
            )
        ),
        runs={
            f"{run.name}: {said[run.name].headline}": _shown(
                *_numbers(run), *_of_samples(run), *_origin(run)
            )
            for run in runs
        },
    )


def render(content: Content) -> tuple[str, str]:
    """The page and the Markdown."""
    loader = PackageLoader("constrained_ft.report")
    html = Environment(
        loader=loader,
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    html.filters["visible"] = visible
    source = html.loader
    assert source is not None
    script = source.get_source(html, "script.js")[0]
    style = source.get_source(html, "style.css")[0]
    page = html.get_template("page.html").render(
        content=content,
        style=Markup(style),
        script=Markup(script),
        script_hash=b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        markup=Markup,
    )
    plain = Environment(
        loader=loader,
        finalize=_plain,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    plain.filters["visible"] = visible
    text = plain.get_template("report.md").render(content=content, markup=Markup)
    return page, text


def _plain(value: Any) -> str:
    return markdown(value)


# Parts of one run ---------------------------------------------------------------------------------


def _shown(*sections: Section) -> list[Section]:
    return [one for one in sections if one.charts or one.tables or one.samples or one.text]


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


def _state(run: Run) -> str:
    done = f"{run.iterations} of {run.config.trainer.iterations} iterations are finished"
    reason = run.status.get("reason")
    return f"{run.state}, {done}" + (f"; {reason}" if reason else "")


def _notices(run: Run) -> list[str]:
    state = [] if run.state == "finished" else [f"This run is not finished: {_state(run)}."]
    return [*state, *run.problems]


def _of_samples(run: Run) -> list[Section]:
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


def _numbers(run: Run) -> list[Section]:
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


def _origin(run: Run) -> list[Section]:
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
                    rows=[(key, _value(was), _value(now)) for key, (was, now) in changed.items()],
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
    return {key: pair for key, pair in changed if key not in _PLACES and _has(tree, key)}


@cache
def _default() -> Config:
    return compose(())


def _has(tree: Any, key: str) -> bool:
    name, _, rest = key.partition(".")
    if not isinstance(tree, dict) or name not in tree:
        return False
    return not rest or _has(tree[name], rest)


def _value(value: object) -> str:
    match value:
        case None:
            return "–"
        case bool():
            return str(value).lower()
        case _:
            return str(value).partition("#sha256=")[0]


# Several runs -------------------------------------------------------------------------------------


def _named_apart(runs: Sequence[Run]) -> list[Run]:
    """Runs of the same name get the folder above as well."""
    names = [run.name for run in runs]
    return [
        run
        if names.count(run.name) == 1
        else Run(**(vars(run) | {"name": visible(f"{run.path.resolve().parent.name}/{run.name}")}))
        for run in runs
    ]


def _between(configs: Sequence[Config]) -> dict[str, list[str]]:
    """Keys whose values differ among runs, with the value of each."""
    pairs = [differences(configs[0], one) for one in configs]
    keys = dict.fromkeys(key for found in pairs for key in found if key not in _PLACES)
    firsts = {key: next(found[key][0] for found in pairs if key in found) for key in keys}
    return {
        key: [_value(found[key][1] if key in found else firsts[key]) for found in pairs]
        for key in keys
    }


def _config_table(runs: Sequence[Run], changed: Mapping[str, Sequence[str]]) -> Table:
    return Table(
        columns=["run", *changed],
        rows=[
            [run.name, *(values[i] for values in changed.values())] for i, run in enumerate(runs)
        ],
    )


def _overview(runs: Sequence[Run], said: Mapping[str, Verdict]) -> Table:
    """A row for each run: the violations, judges and perplexity of the first groups."""
    titles: dict[tuple[str, str], str] = {}
    for one in said.values():
        for measure in one.measures:
            head = {"violations": "violations", "judge": "judge", "perplexity": "perplexity"}
            titles.setdefault((measure.kind, measure.name), f"{head[measure.kind]}, {measure.name}")

    def cell(measures: Sequence[Measure], wanted: tuple[str, str]) -> str:
        found = [one for one in measures if (one.kind, one.name) == wanted]
        return f"{found[0].shown(found[0].after)}" if found else "–"

    return Table(
        columns=["run", "state", "iterations", *titles.values()],
        rows=[
            [
                run.name,
                run.state,
                f"{run.iterations} of {run.config.trainer.iterations}",
                *(cell(said[run.name].measures, wanted) for wanted in titles),
            ]
            for run in runs
        ],
    )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= _NAMED else f"the {len(names)} on the front"


def _verdict_of_several(
    runs: Sequence[Run], points: Sequence[front.Point], best: str | None
) -> Verdict:
    finished = f"{len(points)} of {len(runs)} runs are finished and measured."
    if not points:
        return Verdict(
            headline="None of these runs was measured on held-out prompts.",
            tone="unknown",
            sentences=["There is no verdict; the curves show what is known."],
            measures=[],
            table=None,
        )
    on_front = [point.job for point in points if point.on_front]
    sentences = [
        finished,
        f"No other run beats {_listed(on_front)} in both satisfaction and perplexity of held-out "
        f"{next(iter(points[0].perplexity))}.",
        "Runs whose intervals overlap may differ by chance.",
    ]
    if best is None:
        headline = f"No run satisfies the constraint in {100 * _BEST_AT:.0f} % of completions."
        most = max(points, key=lambda point: point.satisfaction)
        sentences.insert(0, f"The most satisfied is {most.job}: {100 * most.satisfaction:.1f} %.")
    else:
        one = next(point for point in points if point.job == best)
        group, perplexity = next(iter(one.perplexity.items()))
        headline = f"Run {best} satisfies the constraint often enough at the least cost."
        sentences.insert(
            0,
            f"It satisfies it in {100 * one.satisfaction:.1f} % ({100 * one.low:.1f}–"
            f"{100 * one.high:.1f}) of held-out completions, and of the runs with at least "
            f"{100 * _BEST_AT:.0f} % it has the lowest perplexity of held-out {group}: "
            f"{perplexity:.2f}.",
        )
    return Verdict(
        headline=headline,
        tone="unknown",
        sentences=sentences,
        measures=[],
        table=None,
    )
