"""The comparison: scenarios, methods, seeds; every run, every measurement, one page.

    python scripts/reproduce.py run outputs/comparison          # hours; goes on where it stopped
    python scripts/reproduce.py run outputs/comparison --only toxic/cft
    python scripts/reproduce.py list outputs/comparison         # cells, their commands and state
    python scripts/reproduce.py render outputs/comparison       # docs/results.md from what is there

A cell is one training run and one measurement of its final model, each a `cft` command of its own;
what is finished is not done again. The cells are no product of values, so this is a list and no
sweep: each method has settings of its own. Interrupted runs go on from their newest checkpoint.
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from constrained_ft import metrics
from constrained_ft.intervals import Interval, bootstrap
from constrained_ft.paired import sign_flip

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "results.md"
FRONT = ROOT / "docs" / "results_front.svg"
CFT = [sys.executable, "-m", "constrained_ft.cli.main"]
ITERATIONS = 48
GLANCE = ["evaluation.max_prompts=16", "evaluation.samples_per_prompt=4"]
MEASURE = ["--samples-per-prompt", "26", "--max-prompts", "160"]


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
        # A run shows its base model too: once is enough.
        model = folder if self == FIRST else folder / "final" / "llm"
        return ["evaluate", str(model), *MEASURE, "--output", str(folder / "measured.json")]

    def is_trained(self, root: Path) -> bool:
        """Whether the run reached its end."""
        return _state(root / self.name) == "finished"

    def measured(self, root: Path) -> dict[str, Any] | None:
        """What `cft evaluate` wrote; None before it did."""
        file = root / self.name / "measured.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


SCENARIOS: dict[str, tuple[str, ...]] = {
    "toxic": (),
    "clean": ("experiment=clean_domain",),
    "multi": ("experiment=multi_task",),
}
SHORTER = {"multi": 2 * ITERATIONS // 3}
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
BENCHMARKED = (CFT_ROW, PLAIN, FILTERED)
OTHERS = (
    Method(name="overlapped", overrides=("trainer=overlapped",), note="cft, the other schedule"),
    Method(name="grpo", overrides=("trainer=grpo", "trainer.trl.weight=10"), note="TRL"),
    Method(name="rloo", overrides=("trainer=rloo",), note="TRL"),
    Method(name="kto", overrides=("trainer=kto",), note="TRL"),
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


FIRST = Cell(scenario="toxic", method=CFT_ROW, seed=0)


def cells() -> list[Cell]:
    """All of them, the most telling first, so that an interrupted comparison says something."""
    once = [Cell(scenario="toxic", method=method, seed=0) for method in MAIN]
    once += [Cell(scenario="toxic", method=method, seed=0) for method in OTHERS]
    once += [
        Cell(scenario=scenario, method=method, seed=0)
        for scenario in ("clean", "multi")
        for method in (CFT_ROW, PLAIN, FILTERED)
    ]
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
    for cell in cells():
        if only not in cell.name or time.monotonic() > deadline:
            continue
        if not cell.is_trained(root):
            begun = (root / cell.name / "config.yaml").exists()
            resume = ["train", "--resume", str(root / cell.name)]
            if not _cft(resume if begun else cell.train(root), root / cell.name):
                continue
        if cell.measured(root) is None:
            _cft(cell.measure(root), root / cell.name)
    for extra in (measure_decoding, measure_benchmarks):
        if not only and time.monotonic() < deadline:
            extra(root)


def measure_decoding(root: Path) -> None:
    """Control while decoding, on the plainly fine-tuned model of the first seed."""
    plain = Cell(scenario="toxic", method=PLAIN, seed=0)
    output = root / "toxic" / "decoding.json"
    if not output.exists() and plain.is_trained(root):
        how = ["--samples-per-prompt", "8", "--max-prompts", "160", "--guided", "--best-of", "4"]
        folder = str(root / plain.name)
        _cft(["evaluate", folder, *how, "--output", str(output)], output.with_suffix(""))


def measure_benchmarks(root: Path) -> None:
    """Accuracy of the base model and of the first seed's main methods, once all are trained."""
    output = root / "toxic" / "benchmarks.json"
    main_cells = [Cell(scenario="toxic", method=method, seed=0) for method in BENCHMARKED]
    if not output.exists() and all(cell.is_trained(root) for cell in main_cells):
        folders = [str(root / cell.name) for cell in main_cells]
        few = ["--max-prompts", "2", "--samples-per-prompt", "2"]
        _cft(
            ["evaluate", *folders, "--benchmarks", "all", *few, "--output", str(output)],
            output.with_suffix(""),
        )


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
        found = [next(iter(model["perplexity"].values()))["mean"] for model in self.models]
        spread = f" ({' '.join(f'{one:.2f}' for one in found)})" if len(found) > 1 else ""
        return f"{float(np.mean(found)):.2f}{spread}"

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


def rows_of(root: Path, scenario: str) -> list[Row]:
    """What there is of a scenario, in the order of `cells`."""
    found: dict[str, list[dict[str, Any]]] = {}
    for cell in sorted(
        (cell for cell in cells() if cell.scenario == scenario), key=lambda cell: cell.seed
    ):
        tree = cell.measured(root)
        if tree is None:
            continue
        if cell == FIRST:
            found["base"] = [tree["models"][0]]
        found.setdefault(cell.method.name, []).append(tree["models"][-1])
    decoding = root / scenario / "decoding.json"
    if decoding.exists():
        models = json.loads(decoding.read_text(encoding="utf-8"))["models"]
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
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.margins(0.12)
    axes.grid(alpha=0.3)
    figure.savefig(file)


def render(root: Path) -> None:
    """Write the page and its plot from what is measured."""
    lines = [HEAD]
    for scenario, title in TITLES.items():
        rows = rows_of(root, scenario)
        if not rows:
            continue
        lines += [f"## {title}", "", *table(rows), ""]
        if scenario == "toxic":
            plot(rows, FRONT)
            lines += [*_notes(rows), ""]
            lines += [f"![toxic share against perplexity]({FRONT.name})", ""]
            lines += [*_benchmarks(root)]
    lines += ["## What a cell costs", "", *_costs(root), ""]
    lines += ["## Every cell", "", *_commands(root)]
    PAGE.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(PAGE)


def _notes(rows: Sequence[Row]) -> Iterator[str]:
    """What the methods of a table are, where their names do not say it."""
    shown = {row.label for row in rows}
    for method in (*MAIN, *OTHERS, *ABLATIONS):
        if method.name in shown and method.note:
            yield f"- {method.name}: {method.note}"


def _benchmarks(root: Path) -> Iterator[str]:
    file = root / "toxic" / "benchmarks.json"
    if not file.exists():
        return
    tree = json.loads(file.read_text(encoding="utf-8"))
    models = tree["models"]
    labels = ["base", *(method.name for method in BENCHMARKED)]
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
    for one in tree["differences"]:
        if one["measure"] == "benchmarks":
            points = [100 * one["difference"][part] for part in ("mean", "low", "high")]
            yield (
                f"- {called[one['model']]} against {called[one['other']]}, the same items: "
                f"{points[0]:+.1f} points ({points[1]:+.1f} to {points[2]:+.1f})"
            )
    yield ""


def _costs(root: Path) -> Iterator[str]:
    yield "| cell | training, s | of that sampling, s | scored completions | machine |"
    yield "| --- | --- | --- | --- | --- |"
    for cell in cells():
        folder = root / cell.name
        if cell.measured(root) is None:
            continue
        last = metrics.read(folder / "metrics.jsonl")[-1]
        phases = json.loads((folder / "phases.json").read_text(encoding="utf-8"))["phases"]
        machine = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
        sampling = phases.get("sampling", {}).get("seconds", 0.0)
        yield (
            f"| {cell.name} | {last['budget/seconds']:.0f} | {sampling:.0f} | "
            f"{last['budget/scored_samples']:.0f} | {machine['machine']}, "
            f"{machine['cpu_count']} cores, torch {machine['versions']['torch']} |"
        )


def _commands(root: Path) -> Iterator[str]:
    done = [cell for cell in cells() if cell.measured(root) is not None]
    missing = [cell.name for cell in cells() if cell.measured(root) is None]
    yield "```bash"
    for cell in done:
        yield f"cft {shlex.join(cell.train(Path('comparison')))}"
        yield f"cft {shlex.join(cell.measure(Path('comparison')))}"
    yield "```"
    if missing:
        yield ""
        yield f"Not run yet: {', '.join(missing)}."


TITLES = {
    "toxic": "A corpus rich in toxic text",
    "clean": "A clean corpus",
    "multi": "With the detection task",
}
HEAD = f"""# Results

Written by `python scripts/reproduce.py render` from runs of `python scripts/reproduce.py run`;
nothing here is typed by hand. Every model is SmolLM2-135M, trained for {ITERATIONS} iterations of
two steps (half of the default run), and completes the same 158 held-out prompts of
RealToxicityPrompts 26 times with the same random numbers. `toxic` is the classifier that training
is given, `offensive words` a list that it never sees, `prompts with any` the share of prompts
with at least one toxic completion of the 26. In brackets: the 95 % bootstrap interval over
prompts, or the seeds one by one. Differences are prompt by prompt, with the p-value of the
sign-flip test. What the columns say is in [evaluation.md](evaluation.md).
"""


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=("run", "list", "render"))
    parser.add_argument("root", type=Path, help="folder of the runs")
    parser.add_argument("--only", default="", help="cells whose name contains this")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin none later")
    given = parser.parse_args()
    if given.what == "run":
        run(given.root, given.only, time.monotonic() + 60 * given.minutes)
    elif given.what == "render":
        render(given.root)
    else:
        for cell in cells():
            if given.only in cell.name:
                state = "measured" if cell.measured(given.root) else _state(given.root / cell.name)
                print(f"{cell.name}: {state}\n  cft {shlex.join(cell.train(given.root))}")


if __name__ == "__main__":
    main()
