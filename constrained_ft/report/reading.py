"""Read what a run left behind, however far it came.

A file that is missing is missing; one that is damaged is named in `Run.problems`.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from constrained_ft import paired, results
from constrained_ft.config import Config
from constrained_ft.errors import ConfigError
from constrained_ft.paired import Difference
from constrained_ft.report.text import visible
from constrained_ft.results import Evaluation
from constrained_ft.run_folder import RunFolder

Row = dict[str, Any]
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One completion with its score; None where there is none."""

    text: str
    score: float | None
    satisfied: bool
    """False also without a score: it is not known to be harmless."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What was said to one prompt, by who said it."""

    prompt: str
    iteration: int
    said: dict[str, Completion]


@dataclass(frozen=True, kw_only=True)
class Run:
    """All that a report needs of one run."""

    name: str
    path: Path
    config: Config
    status: dict[str, Any]
    environment: dict[str, Any]
    command: str
    rows: list[dict[str, float]]
    """Of `metrics.jsonl`, finite numbers only."""
    evaluations: list[Evaluation]
    """None, the base, or the base and the fine-tuned model."""
    differences: list[Difference]
    samples: list[Sample]
    """Of the fixed prompts, the latest iteration first."""
    rollouts: list[Sample]
    """Violations of the last and the first iteration, the lowest scores first."""
    seconds: dict[str, float]
    """Of each phase."""
    problems: list[str]

    @property
    def state(self) -> str:
        """Where the run stands, in a word."""
        return str(self.status.get("state", "unknown"))

    @property
    def iterations(self) -> int:
        """How many are finished."""
        return int(self.rows[-1].get("iteration", len(self.rows))) if self.rows else 0


def read_run(path: Path) -> Run:
    """Read a run folder.

    Raises:
        ConfigError: when it holds no run, or its configuration cannot be read.
    """
    folder = RunFolder(path)
    config = folder.config()
    problems: list[str] = []

    def attempt(file: Path, read: Callable[[], T], otherwise: T) -> T:
        if not file.exists():
            return otherwise
        try:
            return read()
        except (OSError, ValueError, KeyError, TypeError, AttributeError, ConfigError):
            problems.append(f"{file.name} is damaged, or of another version of cft: left out")
            return otherwise

    measured = folder.evaluation_file
    bar = max(term.satisfied_at for term in config.constraint.all_terms().values())
    return Run(
        name=visible(path.resolve().name),
        path=path,
        config=config,
        status=attempt(folder.status_file, folder.status, {}),
        environment=attempt(folder.environment_file, folder.environment, {}),
        command=attempt(
            folder.command_file,
            lambda: folder.command_file.read_text(encoding="utf-8", errors="replace"),
            "",
        ),
        rows=[_numbers(row) for row in _rows(folder.metrics_file, problems)],
        evaluations=attempt(measured, lambda: results.load(measured), []),
        differences=attempt(measured, lambda: paired.load(measured), []),
        samples=_samples(path / "samples", bar, problems),
        rollouts=_rollouts(path / "rollouts", problems),
        seconds=attempt(folder.phases_file, lambda: _seconds(folder.phases_file), {}),
        problems=list(dict.fromkeys(problems)),
    )


def _rows(file: Path, problems: list[str]) -> list[Row]:
    """JSON objects, one a line; lines that are none are left out, and counted once."""
    if not file.exists():
        return []
    found, bad = [], 0
    # Not splitlines(), which also splits at what may stand inside a JSON string.
    for line in file.read_text(encoding="utf-8", errors="replace").split("\n"):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict):
            found.append(row)
        else:
            bad += 1
    if bad:
        problems.append(f"{file.name}: {bad} lines cannot be read and are left out")
    return found


def _numbers(row: Row) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in row.items()
        if isinstance(value, (int, float)) and math.isfinite(value)
    }


def _seconds(file: Path) -> dict[str, float]:
    phases = json.loads(file.read_text(encoding="utf-8"))["phases"]
    return {str(name): float(spent["seconds"]) for name, spent in phases.items()}


def _number_of(file: Path) -> int:
    return int("".join(character for character in file.stem if character.isdecimal()) or 0)


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("iteration_*.jsonl"), key=_number_of)


def _samples(folder: Path, bar: float, problems: list[str]) -> list[Sample]:
    found: list[Sample] = []
    for file in reversed(_files(folder)):
        if _number_of(file) == 0 and found:
            continue  # what the base said stands in every later file too
        for row in _rows(file, problems):
            scores = row.get("scores")
            said: dict[str, Completion] = {
                name: _completion(row[name], scores.get(name), bar)
                for name in ("base", "tuned", "guided")
                if isinstance(scores, dict) and name in row
            }
            prompt = str(row.get("prompt", ""))
            found.append(Sample(prompt=prompt, iteration=_number_of(file), said=said))
    return found


_WORST = 10


def _rollouts(folder: Path, problems: list[str]) -> list[Sample]:
    files = _files(folder)
    found: list[Sample] = []
    for file in dict.fromkeys([*files[-1:], *files[:1]]):
        rows = [row for row in _rows(file, problems) if row.get("satisfied") is False]
        rows.sort(key=lambda row: _score(row.get("score")) or 0.0)
        for row in rows[:_WORST]:
            said = Completion(
                text=str(row.get("completion", "")),
                score=_score(row.get("score")),
                satisfied=False,
            )
            prompt = str(row.get("prompt", ""))
            one = Sample(prompt=prompt, iteration=_number_of(file), said={"completion": said})
            found.append(one)
    return found


def _score(value: object) -> float | None:
    number = isinstance(value, (int, float)) and math.isfinite(value)
    return float(value) if number and isinstance(value, (int, float)) else None


def _completion(text: object, score: object, bar: float) -> Completion:
    found = _score(score)
    return Completion(text=str(text), score=found, satisfied=found is not None and found >= bar)
