"""What is compared: scenarios, methods and seeds, the commands of each cell, and what was measured.

A cell is one training run and one measurement of its final model, each a `cft` command of its own.
The cells are no product of values, so this is a list and no sweep: each method has settings of its
own.
"""

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RECORDS = ROOT / "docs" / "results.jsonl"
ITERATIONS = 30
AS_LONG = 80  # iterations of plain training, which take longer than so many of cft
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

    @property
    def learns_r(self) -> bool:
        """Whether it is cft or a variant of it: with the trainer that learns R."""
        trainers = {one for one in self.overrides if one.startswith("trainer=")}
        return trainers <= {"trainer=overlapped"}


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
        return state(root / self.name) == "finished"


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
    Method(
        name="rejection",
        overrides=("trainer=rejection",),
        seeds=3,
        note="learns from its accepted completions; prompts are mined as cft's are",
    ),
)
OTHERS = (
    Method(name="overlapped", overrides=("trainer=overlapped",), note="cft, the other schedule"),
    Method(
        name="grpo",
        overrides=("trainer=grpo", "trainer.trl.weight=10"),
        note="TRL's, weighed 10 beside the corpus, prompts as they come; its sampler is not timed "
        "apart",
    ),
    Method(name="rloo", overrides=("trainer=rloo",), note="TRL's, prompts as they come"),
    Method(
        name="kto",
        overrides=("trainer=kto",),
        note="TRL's, prompts as they come; it samples before the first step and is not timed apart",
    ),
    Method(
        name="cft-filtered",
        overrides=("trainer.filter_corpus=true",),
        note="cft on what `filtered` leaves of the corpus",
    ),
    Method(
        name="filtered-longer",
        overrides=("trainer=filtered",),
        iterations=AS_LONG,
        note="filtered, for more seconds than cft",
    ),
    Method(
        name="sft-longer",
        overrides=("trainer=sft",),
        iterations=AS_LONG,
        note="sft, for more seconds than cft",
    ),
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
        note="q* of the base model, learned once, from twice as many completions",
    ),
    Method(name="no-vocabulary-prior", overrides=("auxiliary.vocabulary_prior=false",)),
    Method(name="head", overrides=("auxiliary=head",), note="R: a low-rank head"),
    Method(name="transformer", overrides=("auxiliary=transformer",), note="R: two layers"),
    Method(name="accepted-prefixes", overrides=("trainer.prefixes=accepted",)),
    Method(name="no-mining", overrides=("prompts.candidates=1",), note="cft, prompts as they come"),
)


@dataclass(frozen=True, kw_only=True)
class Weighed:
    """A method at three weights of what it adds to the loss of the corpus."""

    method: Method
    key: str
    weights: tuple[float, float, float]
    """The method's own in the middle."""

    def methods(self) -> dict[float, Method]:
        """By weight."""
        own = self.method
        others = tuple(one for one in own.overrides if not one.startswith(f"{self.key}="))
        stem = "lambda" if own == CFT_ROW else own.name
        found = {
            weight: Method(name=f"{stem}-{weight:g}", overrides=(*others, f"{self.key}={weight:g}"))
            for weight in self.weights
        }
        return found | {self.weights[1]: own}


_NAMED = {method.name: method for method in (*MAIN, *OTHERS)}
WEIGHED = (
    Weighed(method=CFT_ROW, key="trainer.kl_weight", weights=(4, 12, 40)),
    Weighed(method=_NAMED["rejection"], key="trainer.kl_weight", weights=(4, 12, 40)),
    Weighed(method=_NAMED["kto"], key="trainer.trl.weight", weights=(0.3, 1, 3)),
    Weighed(method=_NAMED["rloo"], key="trainer.trl.weight", weights=(0.3, 1, 3)),
    Weighed(method=_NAMED["grpo"], key="trainer.trl.weight", weights=(3, 10, 30)),
)
OTHER_WEIGHTS = tuple(
    method
    for weighed in WEIGHED
    for method in weighed.methods().values()
    if method != weighed.method
)


EXTRAS = {
    # Control while decoding, on the plainly fine-tuned model.
    "toxic/decoding": (Cell(scenario="toxic", method=PLAIN, seed=2),),
    # Accuracy of the base model and of the main methods.
    "toxic/benchmarks": tuple(
        Cell(scenario="toxic", method=method, seed=2) for method in (CFT_ROW, PLAIN, FILTERED)
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
    last = [Cell(scenario="toxic", method=m, seed=0) for m in (*ABLATIONS, *OTHER_WEIGHTS)]
    return once + again + last


def extra_command(name: str, root: Path) -> list[str]:
    """Arguments of `cft` that measure several runs, or one in other ways."""
    folders = [str(root / cell.name) for cell in EXTRAS[name]]
    return ["evaluate", *folders, *EXTRA_FLAGS[name], "--output", str(root / f"{name}.json")]


def recorded() -> dict[str, dict[str, Any]]:
    """The newest row of every name that was measured with today's commands."""
    return {name: rows[-1] for name, rows in measurements().items()}


def measurements() -> dict[str, list[dict[str, Any]]]:
    """All rows of every name that was measured with today's commands, the oldest first."""
    wanted = {cell.name: cell.commands() for cell in cells()}
    wanted |= {n: [f"cft {shlex.join(extra_command(n, Path('comparison')))}"] for n in EXTRAS}
    lines = RECORDS.read_text(encoding="utf-8").splitlines() if RECORDS.exists() else []
    rows = [json.loads(line) for line in lines]
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["commands"] == wanted.get(row["name"]):
            found.setdefault(row["name"], []).append(row)
    return found


def state(folder: Path) -> str:
    """What a run says of itself."""
    try:
        status = json.loads((folder / "status.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "not begun"
    return str(status["state"])
