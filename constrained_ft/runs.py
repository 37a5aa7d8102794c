"""The runs below some folders: where they stand, what they came to, and which may go.

Only small files are read and nothing here imports torch: hundreds of runs are listed at once.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from constrained_ft.errors import ConfigError
from constrained_ft.front import Point, read_points
from constrained_ft.run_folder import RunFolder

PLACES = (Path("outputs"), Path("multirun"))
_DEPTH = 3  # a sweep's job is PLACE/SWEEP/JOB
_ITERATIONS = re.compile(r"^trainer:\n(?:  .*\n)*?  iterations: (\d+)$", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run as its folder tells it."""

    folder: RunFolder
    state: str
    """Of `status.json`; `running` only while a process has the lock, else `died`."""
    iteration: int
    iterations: int | None
    """None where the configuration cannot be read."""
    started: datetime | None
    updated: datetime | None
    reason: str
    """Why it stopped; empty where it did not, or did not say."""
    size: int
    """Bytes on disk."""
    result: Point | None
    """What it came to; None where it did not finish."""

    @property
    def is_finished(self) -> bool:
        """Whether it came to its end."""
        return self.state == "finished"


def find_runs(places: Sequence[Path]) -> list[Run]:
    """The runs in or below some folders, the newest first.

    Raises:
        ConfigError: for a place that was asked for and is not there.
    """
    for place in places:
        if not place.is_dir() and place not in PLACES:
            raise ConfigError(f"there is no folder {place}; name one that holds runs")
    patterns = ["/".join(["*"] * depth + ["status.json"]) for depth in range(_DEPTH + 1)]
    files = {file for place in places for pattern in patterns for file in place.glob(pattern)}
    runs = [read_run(file.parent) for file in files]
    oldest = datetime.min.replace(tzinfo=UTC)
    return sorted(runs, key=lambda run: (run.started or oldest, run.folder.path), reverse=True)


def read_run(path: Path) -> Run:
    """A run by its folder.

    Raises:
        ConfigError: if the folder holds none.
    """
    folder = RunFolder(path)
    try:
        status = folder.status()
    except ConfigError as error:
        status = {"state": "unreadable", "reason": str(error)}
    if not status:
        raise ConfigError(f"{path} holds no run; `cft runs list` shows those that there are")
    state = str(status.get("state", "unreadable"))
    if folder.is_running():
        state = "running"
    elif state == "running":
        state = "died"
    points = read_points({"": ("", path)})
    return Run(
        folder=folder,
        state=state,
        iteration=int(status.get("iteration") or 0),
        iterations=_iterations(folder),
        started=_time(status.get("started")),
        updated=_time(status.get("updated")),
        reason=str(status.get("reason") or ""),
        size=sum(file.stat().st_size for file in path.rglob("*") if file.is_file()),
        result=points[0] if points else None,
    )


def what_may_go(
    runs: Sequence[Run], *, unfinished: bool, older_than: float | None, keep: int | None
) -> list[Run]:
    """The runs that meet every condition given; one that is running never does.

    Args:
        runs: the newest first.
        unfinished: only those that did not come to their end.
        older_than: only those that nothing was written to for so many days.
        keep: not the newest so many.
    """
    limit = None if older_than is None else datetime.now(UTC) - timedelta(days=older_than)
    return [
        run
        for number, run in enumerate(runs)
        if run.state != "running"
        and not (unfinished and run.is_finished)
        and (limit is None or (run.updated is not None and run.updated < limit))
        and (keep is None or number >= keep)
    ]


def last_metrics(folder: RunFolder) -> dict[str, float]:
    """The numbers of the last iteration; none where there was none, or it was not written whole."""
    try:
        *_, last = folder.metrics_file.read_text(encoding="utf-8").splitlines()
        row = json.loads(last)
    except (OSError, ValueError):
        return {}
    return {name: float(n) for name, n in row.items() if isinstance(n, int | float)}


def results(folder: RunFolder) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the run's table, before and after; of any version that wrote it."""
    models = json.loads(folder.evaluation_file.read_text(encoding="utf-8"))["models"]
    rows = [
        [f"{group}, satisfied", *(_percent(one["groups"][group]["satisfaction"]) for one in models)]
        for group in models[0]["groups"]
    ]
    rows += [
        [f"perplexity, {group}", *(f"{one['perplexity'][group]['mean']:.2f}" for one in models)]
        for group in models[0]["perplexity"]
    ]
    return ["", *(str(one["model"]) for one in models)], rows


def _percent(share: dict[str, float]) -> str:
    low, high = 100 * share["low"], 100 * share["high"]
    return f"{100 * share['mean']:.1f} % ({low:.1f}–{high:.1f})"


def _iterations(folder: RunFolder) -> int | None:
    """How many iterations the run has; reading all of the YAML would take longer."""
    try:
        found = _ITERATIONS.search(folder.config_file.read_text(encoding="utf-8"))
    except OSError:
        return None
    return int(found[1]) if found else None


def _time(text: object) -> datetime | None:
    try:
        return datetime.fromisoformat(str(text))
    except ValueError:
        return None
