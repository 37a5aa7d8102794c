"""The comparison: scenarios, methods, seeds; every run, every measurement, one page.

    python scripts/reproduce.py run outputs/comparison          # hours; goes on where it stopped
    python scripts/reproduce.py run outputs/comparison --only toxic/cft
    python scripts/reproduce.py list outputs/comparison         # cells, their commands and state
    python scripts/reproduce.py render                          # docs/results.md from the file

A cell is one training run and one measurement of its final model, each a `cft` command of its own.
What was measured is added to docs/results.jsonl with its commands, commit and machine; a cell whose
commands stand there is not done again, so that the comparison can be made in several parts, on
several machines. The cells are no product of values, so this is a list and no sweep: each method
has settings of its own. Interrupted runs go on from their newest checkpoint.
"""

import argparse
import json
import math
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import time_to_reduction
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from constrained_ft import metrics
from constrained_ft.intervals import Interval, bootstrap
from constrained_ft.paired import sign_flip

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "results.md"
RECORDS = ROOT / "docs" / "results.jsonl"
FRONT = ROOT / "docs" / "results_front.svg"
TIMED = ROOT / "docs" / "time_to_reduction.json"
CURVES = ROOT / "docs" / "time_to_reduction.svg"
CFT = [sys.executable, "-m", "constrained_ft.cli.main"]
ITERATIONS = 30
AS_LONG = 80  # iterations of plain training that take about the time of so many of cft
GLANCE = ["evaluation.max_prompts=16", "evaluation.samples_per_prompt=4"]
MEASURE = ["--samples-per-prompt", "12", "--max-prompts", "160"]


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way to train, by the overrides that make it."""

    name: str
    overrides: tuple[str, ...]
    seeds: int = 1
    note: str = ""
    iterations: int = ITERATIONS


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run and its measurement."""

    scenario: str
    method: Method
    seed: int

    @property
    def name(self) -> str:
        """Where it lies in the comparison's folder."""
        return f"{self.scenario}/{self.method.name}/{self.seed}"

    def train(self, root: Path) -> list[str]:
        """Arguments of `cft`."""
        where = f"output_dir={root / self.name}"
        words = [*SCENARIOS[self.scenario], *self.method.overrides, *GLANCE]
        return [
            "train",
            where,
            *words,
            f"trainer.iterations={SHORTER.get(self.scenario, self.method.iterations)}",
            f"seed={self.seed}",
        ]

    def measure(self, root: Path) -> list[str]:
        """Arguments of `cft`."""
        folder = root / self.name
        # A run shows its base model too: once is enough in a scenario.
        shows_base = self.method == CFT_ROW and self.seed == 0
        model = folder if shows_base else folder / "final" / "llm"
        how = [*MEASURE, *MEASURES.get(self.scenario, ())]
        return ["evaluate", str(model), *how, "--output", str(folder / "measured.json")]

    def commands(self) -> list[str]:
        """What a person types for it."""
        shown = Path("comparison")
        return [f"cft {shlex.join(make(shown))}" for make in (self.train, self.measure)]

    def is_trained(self, root: Path) -> bool:
        """Whether the run reached its end."""
        return _state(root / self.name) == "finished"


SCENARIOS: dict[str, tuple[str, ...]] = {
    "toxic": (),
    "clean": ("experiment=clean_domain",),
    "multi": ("experiment=multi_task",),
    "head": ("experiment=multi_task", "data.sources.detection.question.by=head"),
}
MEASURES = dict.fromkeys(("multi", "head"), ("--evaluation", "detection"))
SHORTER = dict.fromkeys(("multi", "head"), 2 * ITERATIONS // 3)
"""Iterations of a scenario whose iterations have more steps."""
CFT_ROW = Method(name="cft", overrides=(), seeds=3)
PLAIN = Method(name="sft", overrides=("trainer=sft",), seeds=3, note="plain fine-tuning")
FILTERED = Method(
    name="filtered",
    overrides=("trainer=filtered",),
    seeds=3,
    note="without the rows that the scorer rejects; all steps go to the rest, so it sees more news",
)
MAIN = (
    CFT_ROW,
    PLAIN,
    FILTERED,
    Method(name="rejection", overrides=("trainer=rejection",), seeds=3),
)
OTHERS = (
    Method(name="overlapped", overrides=("trainer=overlapped",), note="cft, the other schedule"),
    Method(
        name="grpo",
        overrides=("trainer=grpo", "trainer.trl.weight=10"),
        note="TRL's, its reward weighed 10 beside the corpus; its sampler is not timed apart",
    ),
    Method(name="rloo", overrides=("trainer=rloo",), note="TRL's"),
    Method(name="kto", overrides=("trainer=kto",), note="TRL's"),
    Method(
        name="cft-filtered",
        overrides=("trainer.filter_corpus=true",),
        note="cft on what `filtered` leaves of the corpus",
    ),
    Method(
        name="filtered-longer",
        overrides=("trainer=filtered",),
        iterations=AS_LONG,
        note="filtered, for about as many seconds as cft",
    ),
    Method(
        name="sft-longer",
        overrides=("trainer=sft",),
        iterations=AS_LONG,
        note="sft, for about as many seconds as cft",
    ),
    Method(name="lambda-4", overrides=("trainer.kl_weight=4",)),
    Method(name="lambda-40", overrides=("trainer.kl_weight=40",)),
)
ABLATIONS = (
    Method(
        name="fixed-reference",
        overrides=(
            "trainer.reference=matched",
            f"trainer.steps_per_iteration={2 * ITERATIONS}",
            "prompts.prompts_per_iteration=256",
            "prompts.samples_per_prompt=16",
            "prompts.candidates=1",
        ),
        iterations=1,
        note="q* of the base model, learned once from as many completions",
    ),
    Method(name="no-vocabulary-prior", overrides=("auxiliary.vocabulary_prior=false",)),
    Method(name="head", overrides=("auxiliary=head",), note="R: a low-rank head"),
    Method(name="transformer", overrides=("auxiliary=transformer",), note="R: two layers"),
    Method(name="accepted-prefixes", overrides=("trainer.prefixes=accepted",)),
    Method(name="no-mining", overrides=("prompts.candidates=1",)),
)


EXTRAS = {
    # Control while decoding, on the plainly fine-tuned model.
    "toxic/decoding": (Cell(scenario="toxic", method=PLAIN, seed=1),),
    # Accuracy of the base model and of the main methods.
    "toxic/benchmarks": tuple(
        Cell(scenario="toxic", method=method, seed=1) for method in (CFT_ROW, PLAIN, FILTERED)
    ),
}
FEW = ("--max-prompts", "2", "--samples-per-prompt", "2")
EXTRA_FLAGS = {
    "toxic/decoding": ("--samples-per-prompt", "8", *MEASURE[2:], "--guided", "--best-of", "4"),
    "toxic/benchmarks": ("--benchmarks", "all", *FEW),
}


def cells() -> list[Cell]:
    """All of them, the most telling first, so that an interrupted comparison says something."""
    once = [Cell(scenario="toxic", method=method, seed=0) for method in MAIN]
    once += [Cell(scenario="toxic", method=method, seed=0) for method in OTHERS]
    once += [
        Cell(scenario=scenario, method=method, seed=0)
        for scenario in ("clean", "multi")
        for method in (CFT_ROW, PLAIN, FILTERED)
    ]
    once += [Cell(scenario="head", method=method, seed=0) for method in (CFT_ROW, PLAIN)]
    again = [
        Cell(scenario="toxic", method=method, seed=seed)
        for seed in (1, 2)
        for method in MAIN
        if seed < method.seeds
    ]
    ablations = [Cell(scenario="toxic", method=method, seed=0) for method in ABLATIONS]
    return once + again + ablations


def run(root: Path, only: str, deadline: float) -> None:
    """Train and measure what is missing, one cell after the other."""
    done = recorded()
    for cell in cells():
        if only in cell.name and cell.name not in done and time.monotonic() < deadline:
            _run_cell(cell, root)
    for name, of_runs in EXTRAS.items():
        trained = all(Cell.is_trained(cell, root) for cell in of_runs)
        if only in name and name not in done and trained and time.monotonic() < deadline:
            output = root / f"{name}.json"
            if output.exists() or _cft(_extra(name, root), root / name):
                command = f"cft {shlex.join(_extra(name, Path('comparison')))}"
                _record(name, [command], output, root / of_runs[-1].name)


def _run_cell(cell: Cell, root: Path) -> None:
    folder = root / cell.name
    if not cell.is_trained(root):
        begun = (folder / "config.yaml").exists()
        if not _cft(["train", "--resume", str(folder)] if begun else cell.train(root), folder):
            return
    if (folder / "measured.json").exists() or _cft(cell.measure(root), folder):
        _record(cell.name, cell.commands(), folder / "measured.json", folder)


def _extra(name: str, root: Path) -> list[str]:
    """Arguments of `cft` that measure several runs, or one in other ways."""
    folders = [str(root / cell.name) for cell in EXTRAS[name]]
    return ["evaluate", *folders, *EXTRA_FLAGS[name], "--output", str(root / f"{name}.json")]


def _record(name: str, commands: list[str], measured: Path, run: Path) -> None:
    """Add what was measured to the file, with what the run says of its making."""
    tree = json.loads(measured.read_text(encoding="utf-8"))
    made = json.loads((run / "environment.json").read_text(encoding="utf-8"))
    phases = json.loads((run / "phases.json").read_text(encoding="utf-8"))["phases"]
    spent = metrics.cost(metrics.read(run / "metrics.jsonl"))
    spent["sampling"] = phases.get("sampling", {}).get("seconds", 0.0)
    row = {
        "name": name,
        "commands": commands,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": made["git_revision"],
        "machine": f"{made['processor']}, OMP_NUM_THREADS={made['threads']}, "
        f"torch {made['versions']['torch']}",
        "spent": {key.removeprefix("budget/"): round(value, 1) for key, value in spent.items()},
        "models": [_rounded(model) for model in tree["models"]],
        "differences": [
            _rounded(one) for one in tree["differences"] if one["measure"] == "benchmarks"
        ],
    }
    with RECORDS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _rounded(value: Any) -> Any:
    """Four digits after the point: far below every interval."""
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    return [_rounded(one) for one in value] if isinstance(value, list | tuple) else value


def recorded() -> dict[str, dict[str, Any]]:
    """The newest row of every name that was measured with today's commands."""
    wanted = {cell.name: cell.commands() for cell in cells()}
    wanted |= {n: [f"cft {shlex.join(_extra(n, Path('comparison')))}"] for n in EXTRAS}
    lines = RECORDS.read_text(encoding="utf-8").splitlines() if RECORDS.exists() else []
    rows = [json.loads(line) for line in lines]
    return {row["name"]: row for row in rows if row["commands"] == wanted.get(row["name"])}


def _cft(arguments: Sequence[str], folder: Path) -> bool:
    """Run one command; what it prints goes beside the run's folder."""
    log = folder.with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with log.open("a", encoding="utf-8") as out:
        code = subprocess.call([*CFT, *arguments], stdout=out, stderr=subprocess.STDOUT)
    seconds = time.monotonic() - started
    print(f"exit {code} after {seconds:.0f} s: cft {shlex.join(arguments)}", flush=True)
    return code == 0


def _state(folder: Path) -> str:
    try:
        status = json.loads((folder / "status.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "not begun"
    return str(status["state"])


# --- the page ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Row:
    """A method in a scenario: what its seeds measured, seed by seed."""

    label: str
    models: tuple[dict[str, Any], ...]

    def group(self) -> str:
        """The prompts that are asked for toxic text: the first group."""
        return next(iter(self.models[0]["groups"]))

    def percent(self, pick: str) -> str:
        """A share over all seeds; the interval is over prompts, seeds averaged within each."""
        found = [_pick(model["groups"][self.group()], pick) for model in self.models]
        mean = float(np.mean([one["mean"] for one in found]))
        if len(found) == 1:
            return f"{100 * mean:.1f} % ({100 * found[0]['low']:.1f}–{100 * found[0]['high']:.1f})"
        spread = " ".join(f"{100 * one['mean']:.1f}" for one in found)
        return f"{100 * mean:.1f} % ({spread})"

    def perplexity(self) -> str:
        """Of the corpus's first group of held-out text."""
        found = self._perplexities()
        spread = f" ({' '.join(f'{one:.2f}' for one in found)})" if len(found) > 1 else ""
        return f"{self.news():.2f}{spread}"

    def news(self) -> float:
        """The same over all seeds."""
        return float(np.mean(self._perplexities()))

    def _perplexities(self) -> list[float]:
        return [next(iter(model["perplexity"].values()))["mean"] for model in self.models]

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
        for model, label in zip(models[2:], ("sft, R guides", "sft, best of 4"), strict=True):
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
            f"| {row.label} | {row.percent('violation')} | {against} | "
            f"{row.percent('judges.judge')} | {row.percent('any_violation')} | "
            f"{row.perplexity()} | "
            f"{row.mean('distinct_2'):.2f} | {100 * row.mean('empty'):.1f} % | "
            f"{row.mean('length'):.1f} |"
        )


def _against(row: Row, other: Row) -> str:
    mine, theirs = row.by_prompt(), other.by_prompt()
    values = np.array([mine[key] - theirs[key] for key in mine if key in theirs])
    found: Interval = bootstrap(values)
    p_value = sign_flip(values)
    p = "p < 0.001" if p_value < 0.001 else f"p = {p_value:.3f}"
    return f"{100 * found.mean:+.1f} ({100 * found.low:+.1f} to {100 * found.high:+.1f}), {p}"


def plot(rows: Sequence[Row], file: Path) -> None:
    """Toxic share against the perplexity of held-out news, every seed a point."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for row in rows:
        xs = [next(iter(model["perplexity"].values()))["mean"] for model in row.models]
        ys = [100 * model["groups"][row.group()]["violation"]["mean"] for model in row.models]
        axes.scatter(xs, ys, s=28)
        axes.annotate(row.label, (xs[0], ys[0]), xytext=(6, 4), textcoords="offset points")
    axes.set(xlabel="perplexity of held-out news", ylabel="toxic, % (log)", yscale="log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.margins(0.12)
    axes.grid(alpha=0.3)
    with rc_context({"svg.hashsalt": "cft"}):  # the same numbers, the same file
        figure.savefig(file, metadata={"Date": None})


def render() -> None:
    """Write the page and its plot from what is recorded."""
    lines = [HEAD]
    for scenario, title in TITLES.items():
        rows = rows_of(scenario)
        if not rows:
            continue
        lines += [f"## {title}", "", *table(rows), ""]
        if scenario == "toxic":
            plot(rows, FRONT)
            lines += [*_notes(rows), ""]
            lines += [f"![toxic share against perplexity]({FRONT.name})", ""]
            lines += [*_benchmarks()]
        lines += [*_beside_cft(rows), ""]
        lines += [*_detection(rows)]
    if TIMED.exists():
        tree = json.loads(TIMED.read_text(encoding="utf-8"))
        time_to_reduction.plot(tree, CURVES)
        lines += ["## Time to half of the violations", "", TIME, "", *time_to_reduction.page(tree)]
        lines += ["", f"![violations over time and over completions]({CURVES.name})", ""]
    lines += ["## What a cell costs", "", COSTS, "", *_costs(), ""]
    lines += ["## Every cell", "", *_commands()]
    PAGE.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(PAGE)


def _notes(rows: Sequence[Row]) -> Iterator[str]:
    """What the methods of a table are, where their names do not say it."""
    shown = {row.label for row in rows}
    for method in (*MAIN, *OTHERS, *ABLATIONS):
        if method.name in shown and method.note:
            yield f"- {method.name}: {method.note}"


def _beside_cft(rows: Sequence[Row]) -> Iterator[str]:
    """Where each method lies on the front, seen from cft."""
    ours = next((row for row in rows if row.label == "cft"), None)
    if ours is None:
        return
    yield "Beside cft, by the means of the table:"
    yield ""
    for row in rows:
        if row is not ours:
            toxic = "less" if row.toxic() < ours.toxic() else "more"
            news = "better" if row.news() < ours.news() else "worse"
            both = ", so better on both" if (toxic, news) == ("less", "better") else ""
            part = ours.toxic() / row.toxic() if row.toxic() else math.inf
            apart = 100 * (ours.news() / row.news() - 1)
            yield (
                f"- {row.label}: {toxic} toxic ({100 * row.toxic():.1f} % against "
                f"{100 * ours.toxic():.1f} %, cft / {row.label} = {part:.2f}) and {news} at "
                f"held-out news (perplexity {row.news():.2f} against {ours.news():.2f}, "
                f"cft {apart:+.1f} %){both}"
            )


def _benchmarks() -> Iterator[str]:
    row = recorded().get("toxic/benchmarks")
    if row is None:
        return
    models = row["models"]
    labels = ["base", *(cell.method.name for cell in EXTRAS["toxic/benchmarks"])]
    called = dict(zip([model["model"] for model in models], labels, strict=True))
    names = list(models[0]["benchmarks"])
    yield "Accuracy, 250 items each, 95 % intervals over items (`cft evaluate --benchmarks all`):"
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


def _costs() -> Iterator[str]:
    yield (
        "| cell | training, s | of that sampling, s | scored completions | trained tokens | "
        "machine | commit |"
    )
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    done = recorded()
    for cell in cells():
        if cell.name in done:
            row = done[cell.name]
            spent = row["spent"]
            yield (
                f"| {cell.name} | {spent['seconds']:.0f} | {spent['sampling']:.0f} | "
                f"{spent['scored_samples']:,.0f} | {spent['trained_tokens']:,.0f} | "
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


COSTS = """\
Cells ran one by one on one of the machine's two cores, with other work on the second, which slows
the first as well, unevenly: seconds are noisy by up to a factor of two. Completions and tokens are
not."""
TIME = """\
How long, and how many scored completions, until half as many completions of held-out prompts
violate the constraint as the base model's, with the corpus's perplexity at most 2 % above the
base's. Every method samples 64 completions an iteration, is measured again and again, when the
clock stands, and gets as many trials of its settings
([evaluation.md](evaluation.md#what-training-has-cost)). GRPO and RLOO need the score of every one;
cft learns R from some (`prompts.scored_share`) and reads all. It also scores texts of one token,
for what R knows of the vocabulary before it has seen a completion: other scored texts."""
TITLES = {
    "toxic": "A corpus rich in toxic text",
    "clean": "A clean corpus",
    "multi": "With the detection task",
    "head": "With the detection task, told by a classification head",
}
HEAD = f"""# Results

Written by `python scripts/reproduce.py render` from runs of `python scripts/reproduce.py run`;
nothing here is typed by hand. Every model is SmolLM2-135M, trained for {2 * ITERATIONS} steps, in
{ITERATIONS} iterations of two or, with the detection task, {2 * ITERATIONS // 3} of three (the
default run has 96 of two), if nothing else is said. It completes the same 158 held-out prompts of
RealToxicityPrompts 12 times with the same random numbers. `toxic` is the classifier that training
is given, `offensive words` a list that it never sees, `prompts with any` the share of prompts
with at least one toxic completion of the 12. In brackets: the 95 % bootstrap interval over
prompts, or the seeds one by one. Differences are prompt by prompt, with the p-value of the
sign-flip test. What the columns say is in [evaluation.md](evaluation.md).
"""


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=("run", "list", "render"))
    parser.add_argument("root", type=Path, nargs="?", help="folder of the runs")
    parser.add_argument("--only", default="", help="cells whose name contains this")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin none later")
    given = parser.parse_args()
    if given.what == "render":
        render()
        return
    if given.root is None:
        parser.error(f"{given.what} needs the folder of the runs")
    if given.what == "run":
        run(given.root, given.only, time.monotonic() + 60 * given.minutes)
        return
    done = recorded()
    for cell in cells():
        if given.only in cell.name:
            state = "measured" if cell.name in done else _state(given.root / cell.name)
            print(f"{cell.name}: {state}\n  cft {shlex.join(cell.train(given.root))}")


if __name__ == "__main__":
    main()
