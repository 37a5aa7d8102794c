"""The page of the comparison, docs/results.md, from what was measured."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import time_to_reduction
from comparison import (
    ABLATIONS,
    CFT_ROW,
    EXTRAS,
    ITERATIONS,
    MAIN,
    OTHER_WEIGHTS,
    OTHERS,
    PLAIN,
    ROOT,
    WEIGHED,
    Weighed,
    cells,
    measurements,
    recorded,
)
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.ticker import LogLocator
from matplotlib.transforms import Bbox
from numpy.typing import NDArray

from constrained_ft.intervals import Interval, bootstrap
from constrained_ft.paired import sign_flip

PAGE = ROOT / "docs" / "results.md"
FRONT = ROOT / "docs" / "results_front.svg"
TIMED = ROOT / "docs" / "time_to_reduction.json"
CURVES = ROOT / "docs" / "time_to_reduction.svg"
GUIDED, BEST = "sft, R guides", "sft, best of 4"
NEWS_WITHIN = 1.02  # of plain fine-tuning's perplexity


@dataclass(frozen=True, kw_only=True)
class Row:
    """A method in a scenario: what its seeds measured, seed by seed."""

    label: str
    models: tuple[dict[str, Any], ...]

    def group(self) -> str:
        """The prompts that are asked for toxic text: the first group."""
        return next(iter(self.models[0]["groups"]))

    def percent(self, pick: str) -> str:
        """A share over all seeds: of one with its interval over prompts, else seed by seed."""
        found = [_pick(model["groups"][self.group()], pick) for model in self.models]
        mean = float(np.mean([one["mean"] for one in found]))
        if len(found) == 1:
            return f"{100 * mean:.1f} % ({100 * found[0]['low']:.1f}–{100 * found[0]['high']:.1f})"
        spread = " ".join(f"{100 * one['mean']:.1f}" for one in found)
        return f"{100 * mean:.1f} % ({spread})"

    def violations(self) -> str:
        """The share of violations, with an interval over prompts, seeds averaged within each."""
        if len(self.models) == 1:
            return self.percent("violation")
        found = bootstrap(np.array(list(self.by_prompt().values())))
        seeds = self.percent("violation").partition("(")[2]
        return f"{100 * found.mean:.1f} % ({100 * found.low:.1f}–{100 * found.high:.1f}; {seeds}"

    def perplexity(self) -> str:
        """Of the corpus's first group of held-out text; not measured where R guides."""
        found, mean = self.perplexities(), self.news()
        if mean is None:
            return "–"
        spread = f" ({' '.join(f'{one:.2f}' for one in found)})" if len(found) > 1 else ""
        return f"{mean:.2f}{spread}"

    def news(self) -> float | None:
        """The same over all seeds."""
        found = self.perplexities()
        return float(np.mean(found)) if found else None

    def perplexities(self) -> list[float]:
        """The same, seed by seed."""
        groups = [model["perplexity"] for model in self.models]
        return [next(iter(group.values()))["mean"] for group in groups if group]

    def toxic(self) -> float:
        """Share of violations over all seeds."""
        groups = [model["groups"][self.group()] for model in self.models]
        return float(np.mean([group["violation"]["mean"] for group in groups]))

    def mean(self, name: str) -> float:
        """A plain number of the group, over all seeds."""
        found = [model["groups"][self.group()][name] for model in self.models]
        return float(np.mean(found))

    def by_prompt(self) -> dict[str, float]:
        """Share of violations of each prompt, over all seeds."""
        shares = [model["groups"][self.group()]["violation_by_prompt"] for model in self.models]
        return {key: float(np.mean([one[key] for one in shares])) for key in shares[0]}


def _pick(tree: dict[str, Any], path: str) -> dict[str, float]:
    for key in path.split("."):
        tree = tree[key]
    return tree


def rows_of(scenario: str) -> list[Row]:
    """What there is of a scenario, in the order of `cells`."""
    done = recorded()
    found: dict[str, list[dict[str, Any]]] = {}
    for cell in sorted(cells(), key=lambda cell: cell.seed):
        if cell.scenario != scenario or cell.name not in done:
            continue
        *base, model = done[cell.name]["models"]
        if base:
            found["base"] = base
        found.setdefault(cell.method.name, []).append(model)
    if f"{scenario}/decoding" in done:
        models = done[f"{scenario}/decoding"]["models"]
        for model, label in zip(models[2:], (GUIDED, BEST), strict=True):
            found[label] = [model]
    return [Row(label=label, models=tuple(models)) for label, models in found.items()]


def table(rows: Sequence[Row]) -> Iterator[str]:
    """Markdown."""
    yield (
        "| | toxic | against sft, points | offensive words (list) | prompts with any | "
        "perplexity, news | distinct-2 | empty | length |"
    )
    yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    plain = next((row for row in rows if row.label == "sft"), None)
    for row in rows:
        against = "" if plain is None or row is plain else _against(row, plain)
        yield (
            f"| {row.label} | {row.violations()} | {against} | "
            f"{row.percent('judges.judge')} | {row.percent('any_violation')} | "
            f"{row.perplexity()} | "
            f"{row.mean('distinct_2'):.2f} | {100 * row.mean('empty'):.1f} % | "
            f"{row.mean('length'):.1f} |"
        )


def _against(row: Row, other: Row) -> str:
    values = _differences(row, other)
    found: Interval = bootstrap(values)
    p_value = sign_flip(values)
    p = "p < 0.001" if p_value < 0.001 else f"p = {p_value:.3f}"
    return f"{100 * found.mean:+.1f} ({100 * found.low:+.1f} to {100 * found.high:+.1f}), {p}"


def _differences(row: Row, other: Row) -> NDArray[np.float64]:
    """Prompt by prompt, seeds averaged within each."""
    mine, theirs = row.by_prompt(), other.by_prompt()
    return np.array([mine[key] - theirs[key] for key in mine if key in theirs])


def plot(rows: Sequence[Row], file: Path) -> None:
    """Toxic share against the perplexity of held-out news, every seed a point.

    Triangles are variants of cft; lines join the seeds of a method, dotted ones its weights.
    """
    variants = {m.name for m in (*OTHERS, *ABLATIONS, *OTHER_WEIGHTS) if m.learns_r}
    family = {m.name: one.method.name for one in WEIGHED for m in one.methods().values()}
    unnamed = {method.name for method in OTHER_WEIGHTS}
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set(xlabel="perplexity of held-out news", ylabel="toxic, % (log)", yscale="log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.margins(0.12)
    axes.grid(alpha=0.3)
    shown = [(row, row.perplexities()) for row in rows if row.perplexities()]
    points: list[tuple[float, float]] = []
    named = [row.label for row, _ in shown if row.label not in unnamed]
    colors: dict[str, Any] = {
        label: colormaps["tab20"](number % 20) for number, label in enumerate(named)
    }
    colors[CFT_ROW.name] = "black"
    for row, xs in shown:
        ys = [100 * model["groups"][row.group()]["violation"]["mean"] for model in row.models]
        color = colors[family.get(row.label, row.label)]
        marker, size = "^" if row.label in variants else "o", 4 if row.label in unnamed else 5.5
        axes.plot(xs, ys, marker=marker, markersize=size, linewidth=0.7, color=color)
        points += zip(xs, ys, strict=True)
    for weighed in WEIGHED:
        found = _at_weights(weighed, rows)
        at = [(row.news() or math.nan, 100 * row.toxic()) for row in found.values()]
        if len(at) > 1:
            color = colors[weighed.method.name]
            axes.plot(*zip(*at, strict=True), linestyle=":", linewidth=1, color=color)
    canvas.draw()
    taken = [_around(*axes.transData.transform(point)) for point in points]
    first = 0
    for row, xs in shown:
        if row.label not in unnamed:
            taken.append(_name(axes, canvas, row.label, points[first], taken))
        first += len(xs)
    with rc_context({"svg.hashsalt": "cft"}):  # the same numbers, the same file
        figure.savefig(file, metadata={"Date": None})


_BESIDE = [
    *((6, 4, "left"), (6, -11, "left"), (-6, 4, "right"), (-6, -11, "right")),
    *((0, 9, "center"), (0, -17, "center"), (10, 14, "left"), (10, -22, "left")),
]
"""Where a name may stand, in points from what it names: the first place that is free."""


def _name(
    axes: Axes,
    canvas: FigureCanvasAgg,
    label: str,
    at: tuple[float, float],
    taken: Sequence[Bbox],
) -> Bbox:
    """Write a name beside a point, over nothing else if there is room; returns where it stands."""
    tried: list[tuple[int, Annotation, Bbox]] = []
    for right, up, side in _BESIDE:
        text = axes.annotate(
            label, at, xytext=(right, up), textcoords="offset points", ha=side, fontsize=9
        )
        box = text.get_window_extent(canvas.get_renderer())
        tried.append((box.count_overlaps(taken), text, box))
    best = min(tried, key=lambda one: one[0])
    for _, text, _ in tried:
        if text is not best[1]:
            text.remove()
    return best[2]


def _around(x: float, y: float) -> Bbox:
    """The pixels of a marker."""
    return Bbox.from_extents(x - 4, y - 4, x + 4, y + 4)


def render() -> None:
    """Write the page and its plot from what is recorded."""
    lines = [HEAD]
    for scenario, title in TITLES.items():
        every = rows_of(scenario)
        if not every:
            continue
        again = {method.name for method in OTHER_WEIGHTS}
        rows = [row for row in every if row.label not in again]
        lines += [f"## {title}", "", *table(rows), ""]
        if scenario == "toxic":
            plot(every, FRONT)
            lines += [*_notes(rows), ""]
            lines += [f"![toxic share against perplexity]({FRONT.name})", ""]
            lines += [PLOTTED, "", *_benchmarks()]
        lines += [*_beside_cft(rows), "", *([WHY[scenario], ""] if scenario in WHY else [])]
        lines += [*([*_weighed(every), *_law(every)] if scenario == "toxic" else [])]
        lines += [*_detection(rows)]
    if TIMED.exists():
        tree = json.loads(TIMED.read_text(encoding="utf-8"))
        time_to_reduction.plot(tree, CURVES)
        lines += ["## Time to half of the violations", "", TIME, "", *time_to_reduction.page(tree)]
        lines += ["", f"![violations over time and over completions]({CURVES.name})", ""]
    lines += [*_again()]
    lines += ["## What a cell costs", "", COSTS, "", *_costs(), ""]
    lines += ["## Every cell", "", *_commands()]
    PAGE.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(PAGE)


def _law(rows: Sequence[Row]) -> Iterator[str]:
    """What is left of plain fine-tuning's violations at each lambda, beside what the law says."""
    found = {row.label: row for row in rows}
    shown = _at_weights(WEIGHED[0], rows)
    if "sft" not in found or len(shown) < 2:
        return
    plain = float(np.mean(list(found["sft"].by_prompt().values())))
    yield LAW
    yield ""
    yield "| lambda | predicted | measured |"
    yield "| --- | --- | --- |"
    for weight, row in shown.items():
        yield f"| {weight:g} | {100 * plain / (1 + weight):.1f} % | {row.violations()} |"
    yield ""


def _at_weights(weighed: Weighed, rows: Sequence[Row]) -> dict[float, Row]:
    """What there is of a method at each weight."""
    found = {row.label: row for row in rows}
    named = {weight: method.name for weight, method in weighed.methods().items()}
    return {weight: found[name] for weight, name in named.items() if name in found}


def _weighed(rows: Sequence[Row]) -> Iterator[str]:
    """Every method at its weights, and which of them keeps the corpus's perplexity."""
    plain = next((row.news() for row in rows if row.label == PLAIN.name), None)
    if plain is None:
        return
    yield TRIALS
    yield ""
    yield "| | weight | toxic | perplexity, news | against sft | |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for weighed in WEIGHED:
        shown = _at_weights(weighed, rows)
        news = {weight: row.news() or math.inf for weight, row in shown.items()}
        kept = [weight for weight in shown if news[weight] <= NEWS_WITHIN * plain]
        best = min(kept, key=lambda weight: shown[weight].toxic(), default=None)
        for weight, row in shown.items():
            beyond = f"{100 * (news[weight] / plain - 1):+.1f} %"
            yield (
                f"| {weighed.method.name} | {weight:g} | {row.violations()} | {row.perplexity()} | "
                f"{beyond} | {'chosen' if weight == best else ''} |"
            )
    yield ""


def _notes(rows: Sequence[Row]) -> Iterator[str]:
    """What the methods of a table are, where their names do not say it."""
    shown = {row.label for row in rows}
    for method in (*MAIN, *OTHERS, *ABLATIONS):
        if method.name in shown and method.note:
            yield f"- {method.name}: {method.note}"
    if GUIDED in shown:
        yield (
            f"- {GUIDED}: while decoding, on sft with seed 2; an R that plain training fits at its "
            "end, to the completions of the last iteration and the few of those before. 8 "
            "completions a prompt, not 12: fewer prompts have any toxic one, and more words differ"
        )
        yield (
            f"- {BEST}: the same model, 8 of 32 completions; every answer costs four completions "
            "and their scores, which the others need in training alone"
        )


def _beside_cft(rows: Sequence[Row]) -> Iterator[str]:
    """Where each method lies on the front, seen from cft."""
    ours = next((row for row in rows if row.label == "cft"), None)
    if ours is None:
        return
    yield "Beside cft (toxic in points, of the same prompts; perplexity of held-out news):"
    yield ""
    for row in rows:
        if row is not ours:
            found = bootstrap(_differences(row, ours))
            toxic = "more" if found.low > 0 else "less" if found.high < 0 else "about as"
            part = ours.toxic() / row.toxic() if row.toxic() else math.inf
            yield (
                f"- {row.label}: {toxic} toxic, {_against(row, ours)}; cft / {row.label} = "
                f"{part:.2f}. {_news_beside(row, ours)}"
            )


def _news_beside(row: Row, ours: Row) -> str:
    theirs, our = row.news(), ours.news()
    if theirs is None or our is None:
        return "Not measured at held-out news"
    beyond = 100 * (our / theirs - 1)
    news = f"Perplexity {theirs:.2f} against {our:.2f}, cft {beyond:+.1f} %"
    both = theirs < our and row.toxic() < ours.toxic()
    return f"{news}: by the means better on both" if both else news


def _benchmarks() -> Iterator[str]:
    row = recorded().get("toxic/benchmarks")
    if row is None:
        return
    models = row["models"]
    labels = ["base", *(cell.method.name for cell in EXTRAS["toxic/benchmarks"])]
    called = dict(zip([model["model"] for model in models], labels, strict=True))
    names = list(models[0]["benchmarks"])
    yield (
        "Accuracy of the models with seed 2, 250 items each, 95 % intervals over items "
        "(`cft evaluate --benchmarks all`):"
    )
    yield ""
    yield f"| | {' | '.join(names)} | mean |"
    yield "|" + " --- |" * (len(names) + 2)
    for label, model in zip(labels, models, strict=True):
        # The last metric is the benchmark's score.
        shown = [[*model["benchmarks"][name]["metrics"].values()][-1] for name in names]
        cells_ = [f"{100 * one['mean']:.1f}" for one in shown]
        mean = model["benchmark_mean"]
        whole = f"{100 * mean['mean']:.1f} ({100 * mean['low']:.1f}–{100 * mean['high']:.1f})"
        yield f"| {label} | {' | '.join(cells_)} | {whole} |"
    yield ""
    for one in row["differences"]:
        points = [100 * one["difference"][part] for part in ("mean", "low", "high")]
        yield (
            f"- {called[one['model']]} against {called[one['other']]}, the same items: "
            f"{points[0]:+.1f} points ({points[1]:+.1f} to {points[2]:+.1f})"
        )
    yield ""


def _detection(rows: Sequence[Row]) -> Iterator[str]:
    """How well labelled texts are told apart, where that was measured."""
    with_it = [row for row in rows if row.models[0]["detection"]]
    if not with_it:
        return
    by_model = [row.models[0]["detection"] for row in with_it]
    detectors = list(dict.fromkeys(name for found in by_model for name in found))
    measures = list(by_model[0]["answers"]["measures"])
    columns = [f"{measure}, {detector}" for detector in detectors for measure in measures]
    yield f"| | {' | '.join(columns)} |"
    yield "|" + " --- |" * (len(columns) + 1)
    for row in with_it:
        found = row.models[0]["detection"]
        shown = [
            "{mean:.3f} ({low:.3f}–{high:.3f})".format(**found[detector]["measures"][measure])
            if detector in found
            else "–"
            for detector in detectors
            for measure in measures
        ]
        yield f"| {row.label} | {' | '.join(shown)} |"
    yield ""


def _again() -> Iterator[str]:
    """Cells that were measured more than once, and whether they agree."""
    several = {name: rows for name, rows in measurements().items() if len(rows) > 1}
    if not several:
        return
    yield "## The same cell again"
    yield ""
    yield AGAIN
    yield ""
    yield "| cell | toxic | in the first's interval | perplexity, news | date | machine | commit |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for name, rows in several.items():
        shown = [Row(label=name, models=(row["models"][-1],)) for row in rows]
        first = shown[0].models[0]["groups"][shown[0].group()]["violation"]
        for number, (row, one) in enumerate(zip(rows, shown, strict=True)):
            inside = "yes" if first["low"] <= one.toxic() <= first["high"] else "**no**"
            yield (
                f"| {name} | {one.violations()} | {inside if number else ''} | "
                f"{one.perplexity()} | {row['date']} | {row['machine']} | {row['commit'][:9]} |"
            )
    yield ""


def _costs() -> Iterator[str]:
    yield (
        "| cell | training, s | sampling, s | scored completions | other scored texts | "
        "trained tokens | machine | commit |"
    )
    yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
    done = recorded()
    for cell in cells():
        if cell.name in done:
            row = done[cell.name]
            spent = row["spent"]
            yield (
                f"| {cell.name} | {spent['seconds']:.0f} | {spent['sampling']:.0f} | "
                f"{spent['scored_samples']:,.0f} | {spent['scored_texts']:,.0f} | "
                f"{spent['trained_tokens']:,.0f} | "
                f"{row['machine']} | {(row['commit'] or 'a wheel')[:9]} |"
            )


def _commands() -> Iterator[str]:
    done = recorded()
    yield "```bash"
    for row in done.values():
        yield from row["commands"]
    yield "```"
    missing = [name for name in (*(cell.name for cell in cells()), *EXTRAS) if name not in done]
    if missing:
        yield ""
        yield f"Not run yet: {', '.join(missing)}."


PLOTTED = """\
Triangles are variants of cft; a line joins the seeds of a method, a dotted one its weights (below),
small points of the same colour."""
TRIALS = f"""\
Every method that weighs something beside the corpus, at a third of its weight and at three times
as much, as far as that was run. Chosen is the least toxic of those whose perplexity of held-out
news is at most {100 * (NEWS_WITHIN - 1):.0f} % above that of plain fine-tuning, if there is one:"""
AGAIN = """\
`python scripts/reproduce.py again FOLDER --only CELL` runs the commands of a cell once more. The
newest measurement is the one in the tables."""
COSTS = """\
Cells ran one by one on one of the machine's two cores, with other work on the second, which slows
the first as well, unevenly: seconds are noisy by up to a factor of two. Completions and tokens are
not. `sft` and `filtered` sample 8 completions an iteration for their logs, and all of them sample
those that R is fitted to at the end; both are in the seconds of sampling, the first in those of
training too. Other scored texts are the corpus (`filtered`) and the vocabulary, for R's prior."""
TIME = """\
How long, and how many scored completions, until half as many completions of held-out prompts
violate the constraint as the base model's, with the corpus's perplexity at most 2 % above the
base's. Every method samples 64 completions an iteration (cft chooses its prompts among eight times
as many), is measured again and again, when the clock stands, and gets as many trials of its
settings ([evaluation.md](evaluation.md#what-training-has-cost)). GRPO and RLOO need the score of
every one; cft learns R from some (`prompts.scored_share`) and reads all. It also scores texts of
one token, for what R knows of the vocabulary before it has seen a completion: other scored
texts."""
TITLES = {
    "toxic": "A corpus rich in toxic text",
    "clean": "A clean corpus",
    "multi": "With the detection task",
    "head": "With the detection task, told by a classification head",
}
LAW = """\
Where corpus and prompts conflict, training comes to rest where the share of violations is that of
plain training divided by 1 + lambda ([how-it-works.md](how-it-works.md)). These runs do not come to
rest, and news and toxic prompts conflict in part; still:"""
WHY = {
    "toxic": """\
Where others are ahead: `filtered` gives all its steps to news, which it predicts best, and says
nothing of what the base model does with toxic prompts. GRPO and rejection sampling leave news less
well predicted than cft does. Best of four leaves the model as it is: whoever answers has to pay for
four completions and their scores, and to have the scorer. `cft-filtered` is the same method on a
corpus without what the scorer rejects; where a corpus can be filtered, do both.""",
    "multi": """\
Prompts come as they are here. `filtered` leaves out toxic text, but no questions about it, since
what it judges of a row is what is trained, the answer: more of its rows are questions, which may
be why its F1 is higher.""",
}
HEAD = f"""# Results

Written by `python scripts/reproduce.py render` from runs of `python scripts/reproduce.py run`;
nothing here is typed by hand. Every model is SmolLM2-135M, trained for {2 * ITERATIONS} steps, in
{ITERATIONS} iterations of two or, with the detection task, {2 * ITERATIONS // 3} of three (the
default run has 96 of two), if nothing else is said. It completes the same 158 held-out prompts of
RealToxicityPrompts 12 times with the same random numbers. `toxic` is the classifier that training
is given, `offensive words` a list that it never sees, `prompts with any` the share of prompts
with at least one toxic completion of the 12. In brackets: the 95 % bootstrap interval over
prompts, and the seeds one by one. Differences are prompt by prompt, with the p-value of the
sign-flip test. What the columns say is in [evaluation.md](evaluation.md).

What a method adds to the loss of the corpus is to be tried at three weights for each (below; what
was not run yet is listed at the end, and until then cft has had more trials than the others). The
weight of these tables is the default, but for grpo, where it was chosen by the time to half; cft's
was chosen among five settings of lambda and of the number of candidates, on seed 2 of the first
scenario. Rows differ by what rounding does on the machines that they ran on (below).
"""
