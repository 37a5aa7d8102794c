"""How long, and how many scored completions, until the violations are half of the base model's?

    python scripts/time_to_reduction.py OUT [--minutes 38] [--trials 3] [--seeds 0 1] [KEY=VALUE]

Runs the method and, through TRL, GRPO and RLOO: the same base model, corpus, prompts, scorer,
precision, threads and number of completions an iteration. Every few iterations, outside the clock,
the LLM completes held-out prompts, always with the same random numbers, and its perplexity on
held-out corpus text is measured. A trial ends when two measurements in a row show at most half of
the base's violations, or after `--trial-seconds` on the clock. Its result is where the line through
the measurements crosses the half, if the perplexity is then at most 2 % above the base's.

Each method gets the same number of trials with the first seed, listed in `TRIALS`; the quickest one
is repeated with the other seeds. Finished trials are kept in OUT: the same command goes on after an
interruption, and after `--minutes` begins no other trial. OUT/result.json holds every measurement;
copied to docs/time_to_reduction.json it is what `scripts/reproduce.py render` shows. Overrides hold
for every run, `experiment=smoke` to try it out.
`trainer.corpus=false` leaves out the corpus, whose tokens GRPO by itself would not train on.
"""

import argparse
import json
import shlex
import shutil
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from matplotlib import rc_context
from matplotlib.figure import Figure

from constrained_ft.compose import compose
from constrained_ft.config import Config
from constrained_ft.distributed import StopRequest
from constrained_ft.errors import DivergedError, Interrupted
from constrained_ft.evaluate import choose_prompts
from constrained_ft.llm import LLM
from constrained_ft.loading import load_llm
from constrained_ft.parts import Parts, build_parts
from constrained_ft.perplexity import perplexity
from constrained_ft.progress import Silent
from constrained_ft.run_folder import RunFolder, write_atomically
from constrained_ft.sampling import sample
from constrained_ft.scorers import least_scores
from constrained_ft.train import train

TRIALS: dict[str, tuple[tuple[str, ...], ...]] = {
    "cft": (
        ("trainer.learning_rate=1.5e-3", "prompts.scored_share=0.25"),
        ("trainer.learning_rate=1.5e-3",),
        ("trainer.learning_rate=3e-3", "prompts.scored_share=0.25"),
        ("trainer.learning_rate=1.5e-3", "prompts.scored_share=0.25", "trainer.kl_weight=40"),
    ),
    "grpo": (
        ("trainer.learning_rate=1.5e-3", "trainer.trl.weight=10"),
        ("trainer.learning_rate=3e-3", "trainer.trl.weight=10"),
        ("trainer.learning_rate=1.5e-3", "trainer.trl.weight=40"),
        ("trainer.learning_rate=1.5e-3", "trainer.trl.weight=10", "trainer.trl.beta=0.04"),
    ),
    "rloo": (
        ("trainer.learning_rate=1.5e-3", "trainer.trl.weight=1"),
        ("trainer.learning_rate=1.5e-3", "trainer.trl.weight=4"),
        ("trainer.learning_rate=3e-3", "trainer.trl.weight=1"),
        ("trainer.learning_rate=1.5e-3", "trainer.trl.weight=1", "trainer.trl.beta=0"),
    ),
}
# A constant learning rate, so that how long a trial may take does not shape it; a small look at the
# base model, whose real measurement is below.
COMMON = (
    "trainer.lr_scheduler=constant",
    "evaluation.judge=null",
    "evaluation.max_prompts=24",
    "evaluation.samples_per_prompt=4",
    "evaluation.max_validation_rows=4",
)
WORSE = 1.02  # times the base's perplexity
LONG = 400  # iterations: the clock ends a trial before


@dataclass(frozen=True, kw_only=True)
class Point:
    """The LLM at one moment of a run."""

    seconds: float
    scored_samples: float
    scored_texts: float
    trained_tokens: float
    violation: float
    """Share of completions of held-out prompts of the first group."""
    toxicity: float
    """Mean of 1 - score."""
    perplexity: float
    """Of held-out rows of the corpus's first group."""
    length: float
    """Mean tokens of a completion."""


@dataclass(kw_only=True)
class Yardstick:
    """Measures weights, in a model of its own."""

    parts: Parts
    llm: LLM
    config: Config
    options: argparse.Namespace

    def measure(self, row: Mapping[str, float]) -> Point:
        """The LLM as it stands; `row` says what it has cost."""
        prompts = self.parts.prompts.held_out
        prompts = tuple(prompt for prompt in prompts if prompt.group == prompts[0].group)
        said = sample(
            self.llm.frozen(),
            choose_prompts(prompts, self.options.prompts),
            samples_per_prompt=self.options.samples,
            max_new_tokens=self.config.prompts.max_new_tokens,
            sampler=self.config.sampler,
            top_p=0.9,
            seed=0,
            iteration=0,
            display=Silent(),
            stop=StopRequest(),
        )
        scores = least_scores(self.parts.scorers, said.prompt_texts, said.texts)
        known = [score for score in scores if score is not None]
        bar = self.config.constraint.satisfied_at
        rows = self.parts.corpus.validation
        rows = tuple(one for one in rows if one.group == rows[0].group)
        found = perplexity(self.llm.frozen(), rows, self.options.rows, StopRequest())
        return Point(
            seconds=row.get("budget/seconds", 0.0),
            scored_samples=row.get("budget/scored_samples", 0.0),
            scored_texts=row.get("budget/scored_texts", 0.0),
            trained_tokens=row.get("budget/trained_tokens", 0.0),
            violation=statistics.mean(score < bar for score in known),
            toxicity=statistics.mean(1 - score for score in known),
            perplexity=found[rows[0].group].mean,
            length=float(said.mask_NT.sum(-1).float().mean()),
        )


@dataclass(kw_only=True)
class Watch(Silent):
    """Measures a run every few iterations and ends it."""

    yardstick: Yardstick
    folder: RunFolder
    base: Point
    points: list[Point] = field(default_factory=list)

    def iteration(self, number: int, of: int, numbers: Mapping[str, float]) -> None:
        """Measure what the checkpoint holds; what passes meanwhile is on no clock."""
        options = self.yardstick.options
        over = numbers["budget/seconds"] > options.trial_seconds
        if number % options.every != 0 and not over:
            return
        file = self.folder.checkpoint(number) / "llm.safetensors"
        self.yardstick.llm.load_trained(safetensors.torch.load_file(file))
        self.points.append(self.yardstick.measure(numbers))
        last = self.points[-1]
        print(
            f"    {last.seconds:6.0f} s  {last.scored_samples:6.0f} scored  "
            f"{last.violation:6.1%} violate  toxicity {last.toxicity:.3f}  "
            f"perplexity {last.perplexity:.2f}  {last.length:.1f} tokens",
            flush=True,
        )
        half = self.base.violation / 2
        if over or (len(self.points) > 1 and all(p.violation <= half for p in self.points[-2:])):
            raise Interrupted("measured")


def crossing(base: Point, points: Sequence[Point]) -> dict[str, float] | None:
    """Where the violations come down to half for two measurements in a row; None: they do not."""
    curve = [base, *points]
    half = base.violation / 2
    for before, at, after in zip(curve, curve[1:], curve[2:], strict=False):
        if at.violation > half or after.violation > half:
            continue
        part = (before.violation - half) / max(before.violation - at.violation, 1e-12)
        found = {
            name: getattr(before, name) + part * (getattr(at, name) - getattr(before, name))
            for name in ("seconds", "scored_samples", "trained_tokens", "perplexity", "length")
        }
        return {**found, "scored_texts": at.scored_texts}
    return None


def counts(trial: Mapping[str, Any], base: Point) -> bool:
    """Whether a trial came down to half, with the language kept."""
    found = trial["crossing"]
    return found is not None and found["perplexity"] <= WORSE * base.perplexity


def run_trial(yardstick: Yardstick, base: Point, name: str, overrides: Sequence[str]) -> Path:
    """One run, measured; kept in a file."""
    out = yardstick.options.out
    file = out / f"{name}.json"
    if file.exists():
        return file
    print(f"  {name}: {' '.join(_own(overrides))}", flush=True)
    folder = out / "runs" / name
    shutil.rmtree(folder, ignore_errors=True)
    config = compose([*overrides, f"output_dir={folder}", f"trainer.iterations={LONG}"])
    started = RunFolder(folder).start(config, ["scripts/time_to_reduction.py"])
    watch = Watch(yardstick=yardstick, folder=started, base=base)
    reason = "measured"
    try:
        train(config, started, watch, StopRequest())
    except (Interrupted, DivergedError) as error:
        reason = str(error)
    finally:
        started.close()
    shutil.rmtree(started.checkpoints)
    made = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
    tree = {
        "overrides": list(overrides),
        "commit": made["git_revision"],
        "machine": f"{made['processor']}, {torch.get_num_threads()} threads, "
        f"torch {made['versions']['torch']}",
        "ended": reason,
        "crossing": crossing(base, watch.points),
        "points": [asdict(point) for point in watch.points],
    }
    write_atomically(file, json.dumps(tree, indent=2) + "\n")
    return file


def result(
    base: Point, files: Mapping[str, Mapping[str, Path]], seed: int, words: Sequence[str]
) -> dict[str, Any]:
    """Every trial, and of each method the quickest over all seeds; for JSON."""
    trials = {
        method: {name: json.loads(file.read_text()) for name, file in found.items()}
        for method, found in files.items()
    }
    medians: dict[str, dict[str, float]] = {}
    for method, found in trials.items():
        chosen = quickest(found, base, seed)
        same = [t for n, t in found.items() if chosen and n.split("-seed")[0] == chosen]
        if same and all(counts(trial, base) for trial in same):
            medians[method] = {
                key: statistics.median(trial["crossing"][key] for trial in same)
                for key in ("seconds", "scored_samples")
            }
    return {
        "command": shlex.join(["python", "scripts/time_to_reduction.py", *words]),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "base": asdict(base),
        "trials": trials,
        "medians": medians,
    }


def page(tree: Mapping[str, Any]) -> Iterator[str]:
    """A result in Markdown."""
    base = Point(**tree["base"])
    trials = [trial for found in tree["trials"].values() for trial in found.values()]
    for made in dict.fromkeys(f"{one['machine']}, commit {one['commit'][:9]}" for one in trials):
        yield f"`{tree['command']}`: {tree['date']}, {made}."
    yield ""
    yield (
        f"Base: {base.violation:.1%} violate, mean toxicity {base.toxicity:.3f}, perplexity "
        f"{base.perplexity:.2f}. Half: {base.violation / 2:.1%}."
    )
    yield ""
    counts_of = {
        method: [len({name.split("-seed")[part] for name in found}) for part in (0, 1)]
        for method, found in tree["trials"].items()
    }
    said = [f"{method} {tried} and {seeds}" for method, (tried, seeds) in counts_of.items()]
    yield f"Settings that were tried, and seeds of the quickest: {', '.join(said)}."
    yield ""
    yield (
        "| trial | seconds | scored completions | other scored texts | trained tokens | perplexity "
        "| tokens of a completion |"
    )
    yield "| --- " * 7 + "|"
    for found in tree["trials"].values():
        for name, trial in found.items():
            yield _row(name, trial, base)
    yield ""
    ours = tree["medians"].get("cft")
    for method, found in tree["trials"].items():
        if method != "cft" and ours is not None and found:
            yield f"- {_beside(ours, method, found, tree['medians'].get(method))}"


def _row(name: str, trial: Mapping[str, Any], base: Point) -> str:
    title = f"{name}: {' '.join(_own(trial['overrides']))}"
    at = trial["crossing"]
    if at is None:
        spent = _spent(trial)
        return (
            f"| {title} | not in {spent['seconds']:.0f} | not in {spent['scored_samples']:,.0f} | "
            f"{spent['scored_texts']:,.0f} | {spent['trained_tokens']:,.0f} | "
            f"{spent['perplexity']:.2f} | {spent['length']:.1f} |"
        )
    mark = "" if counts(trial, base) else " (too high)"
    return (
        f"| {title} | {at['seconds']:.0f} | {at['scored_samples']:,.0f} | "
        f"{at['scored_texts']:,.0f} | {at['trained_tokens']:,.0f} | "
        f"{at['perplexity']:.2f}{mark} | {at['length']:.1f} |"
    )


def _spent(trial: Mapping[str, Any]) -> dict[str, float]:
    """Where a trial stood when it ended."""
    last: dict[str, float] = dict.fromkeys(Point.__annotations__, 0.0)
    return last | (trial["points"][-1] if trial["points"] else {})


def _beside(
    ours: Mapping[str, float],
    method: str,
    found: Mapping[str, Mapping[str, Any]],
    medians: Mapping[str, float] | None,
) -> str:
    names = ("seconds", "scored_samples")
    if medians is not None:
        time_, scored = (ours[name] / medians[name] for name in names)
        return (
            f"cft / {method}, medians of the quickest trial over its seeds: {time_:.2f} of the "
            f"time, {scored:.2f} of the scored completions."
        )
    longest = max((_spent(trial) for trial in found.values()), key=lambda spent: spent["seconds"])
    time_, scored = (ours[name] / max(longest[name], 1e-9) for name in names)
    return (
        f"cft / {method}, whose trials did not come to half with the language kept: less than "
        f"{time_:.2f} of the time, less than {scored:.2f} of the scored completions, "
        "if the longest trial had got there at its end."
    )


def plot(tree: Mapping[str, Any], file: Path) -> None:
    """Violations over the clock and over scored completions, every trial a line."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    titles = {"seconds": "seconds of training", "scored_samples": "scored completions"}
    base = tree["base"]
    for axes, (name, title) in zip(panels, titles.items(), strict=True):
        for number, (method, found) in enumerate(tree["trials"].items()):
            for place, trial in enumerate(found.values()):
                curve = [base, *trial["points"]]
                axes.plot(
                    [point[name] for point in curve],
                    [100 * point["violation"] for point in curve],
                    color=f"C{number}",
                    marker=".",
                    alpha=0.8,
                    label=method if place == 0 else None,
                )
        axes.axhline(50 * base["violation"], color="grey", linestyle=":")
        axes.set(xlabel=title, xlim=(0, None), ylim=(0, None))
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("violating, %")
    panels[1].legend()
    with rc_context({"svg.hashsalt": "cft"}):  # the same numbers, the same file
        figure.savefig(file, metadata={"Date": None})


def quickest(found: Mapping[str, Mapping[str, Any]], base: Point, seed: int) -> str | None:
    """The trial of the first seed that was first at half, without its seed."""
    good = {
        name.split("-seed")[0]: trial["crossing"]["seconds"]
        for name, trial in found.items()
        if name.endswith(f"-seed{seed}") and counts(trial, base)
    }
    return min(good, key=lambda name: good[name], default=None)


def _own(overrides: Sequence[str]) -> list[str]:
    shared = (*COMMON, "trainer=", "seed=")
    return [one.removeprefix("trainer.") for one in overrides if not one.startswith(shared)]


def main() -> None:
    """Tune, repeat, report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--methods", nargs="+", choices=list(TRIALS), default=list(TRIALS))
    parser.add_argument("--trials", type=int, default=3, help="of each method")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--minutes", type=float, default=38, help="begin no trial after these")
    parser.add_argument("--trial-seconds", type=float, default=180)
    parser.add_argument("--every", type=int, default=3, help="iterations between measurements")
    parser.add_argument("--prompts", type=int, default=96)
    parser.add_argument("--samples", type=int, default=6, help="completions of each prompt")
    parser.add_argument("--rows", type=int, default=48, help="corpus rows for the perplexity")
    options = parser.parse_intermixed_args()
    options.out.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    config = compose([*COMMON, *options.overrides])
    parts = build_parts(config, Silent(), StopRequest())
    tokenizer = parts.llm.tokenizer
    llm = load_llm(config.llm, tokenizer, precision=config.trainer.precision, seed=0)
    yardstick = Yardstick(parts=parts, llm=llm, config=config, options=options)
    base = yardstick.measure({})
    print(f"base: {base.violation:.1%} violate, perplexity {base.perplexity:.2f}", flush=True)
    files: dict[str, dict[str, Path]] = {method: {} for method in options.methods}
    first = options.seeds[0]

    def trial(method: str, place: int, seed: int) -> None:
        if time.monotonic() - begun > 60 * options.minutes:
            return
        group = "alternating" if method == "cft" else method
        asked = [*COMMON, *options.overrides, f"trainer={group}", *TRIALS[method][place]]
        name = f"{method}-{place}-seed{seed}"
        files[method][name] = run_trial(yardstick, base, name, [*asked, f"seed={seed}"])

    for place in range(options.trials):
        for method in options.methods:
            trial(method, place, first)
    for seed in options.seeds[1:]:
        for method in options.methods:
            found = {n: json.loads(f.read_text()) for n, f in files[method].items()}
            chosen = quickest(found, base, first)
            if chosen is not None:
                trial(method, int(chosen.rpartition("-")[2]), seed)
    words = ["OUT" if word == str(options.out) else word for word in sys.argv[1:]]
    tree = result(base, files, first, words)
    write_atomically(options.out / "result.json", json.dumps(tree, indent=2) + "\n")
    plot(tree, options.out / "result.svg")
    print("\n".join(page(tree)))


if __name__ == "__main__":
    main()
