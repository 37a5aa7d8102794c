"""The report of several runs side by side."""

from collections.abc import Mapping, Sequence

from constrained_ft import front
from constrained_ft.compose import differences
from constrained_ft.config import Config
from constrained_ft.report import comparison
from constrained_ft.report.content import Content, Section, shown
from constrained_ft.report.one_run import (
    PLACES,
    all_numbers,
    in_words,
    of_samples,
    origin,
    state_in_words,
)
from constrained_ft.report.reading import Run
from constrained_ft.report.text import visible
from constrained_ft.report.verdict import Measure, Table, Verdict, verdict

_BEST_AT = 0.97
_NAMED = 6  # runs on the front that a sentence names


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
    notices = [f"{run.name}: {state_in_words(run)}" for run in unfinished] + list(left_out)
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
        verdict_charts=[comparison.of_front(points)] if points else [],
        sections=shown(
            Section(
                title="Side by side",
                key="runs",
                charts=comparison.of_runs(runs, chosen),
                tables=tables,
                note=""
                if changed or len(runs) == 1
                else "Their configurations are the same but for the folder.",
            )
        ),
        runs={
            f"{run.name}: {said[run.name].headline}": shown(
                *all_numbers(run), *of_samples(run), *origin(run)
            )
            for run in runs
        },
    )


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
    keys = dict.fromkeys(key for found in pairs for key in found if key not in PLACES)
    firsts = {key: next(found[key][0] for found in pairs if key in found) for key in keys}
    return {
        key: [in_words(found[key][1] if key in found else firsts[key]) for found in pairs]
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
