"""A run's numbers in a tracker too: TensorBoard, trackio, W&B or MLflow, beside `metrics.jsonl`.

A tracker follows the files of the run folder: after each iteration it is sent the rows of
`metrics.jsonl` that it has not seen, at the end the results of `evaluation.json`. The id of its run
and the last iteration that was sent stand in `tracker/run.json`, so that a resumed run goes on
there. A tracker that fails is named once and left alone from then on: it never stops a run.
"""

import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any
from uuid import uuid4

from constrained_ft import metrics
from constrained_ft.compose import config_to_yaml, flat
from constrained_ft.config import Config, TrackerConfig
from constrained_ft.errors import CftError, ExtraError, Interrupted
from constrained_ft.progress import Display, Silent
from constrained_ft.run_folder import RunFolder, State, write_atomically

__all__ = ["require_installed", "results", "tracked"]

Numbers = Mapping[str, float]

_STATE = "run.json"
_SECONDS = 60  # that a tool may take to begin, and to upload what is left at the end
_MLFLOW_STATES = {"finished": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}
_PARAMETERS_AT_ONCE, _LONGEST_PARAMETER = 100, 6000  # of MLflow's API


@dataclass(frozen=True, kw_only=True)
class Tool:
    """An open run of a tool: what it is called, where to look at it, and what it takes."""

    id: str
    where: str
    row: Callable[[Numbers, int], object]
    """Takes the numbers of an iteration."""
    results: Callable[[Numbers, int], object]
    """Takes the results, after the last iteration."""
    close: Callable[[State], object]
    """Ends it; how the run stands."""


@dataclass(frozen=True, kw_only=True)
class _Run:
    """What a tool is told when it opens a run."""

    config: Config
    folder: Path
    """Its own folder."""
    project: str
    name: str
    id: str | None
    """Of the run to continue; None begins one."""
    sent: int
    """The last iteration that it has; 0 for none."""

    @property
    def tree(self) -> dict[str, Any]:
        """The configuration as plain values."""
        return self.config.model_dump(mode="json")


def require_installed(config: TrackerConfig) -> None:
    """See that the tracker can be imported.

    Raises:
        ExtraError: if its package is not installed.
    """
    if config.kind != "none" and find_spec(config.kind) is None:
        raise ExtraError(
            f"tracker={config.kind} needs the package {config.kind}: pip install {config.kind}, or "
            "pip install 'constrained-ft[track]' for every tracker"
        )


@contextmanager
def tracked(
    config: Config, folder: RunFolder, display: Display, *, leads: bool = True
) -> Iterator[Display]:
    """A display that sends what a run measures to its tracker; closed on every way out.

    Args:
        config: the run.
        folder: where its numbers are.
        display: told where to look, and once if the tracker fails.
        leads: whether this is the first rank; the others send nothing.

    Raises:
        ExtraError: if the tracker's package is not installed.
    """
    if config.tracker.kind == "none" or not leads:
        yield Silent()
        return
    require_installed(config.tracker)
    tracker = Tracked(config, folder, display)
    tracker.open()
    state: State = "failed"
    try:
        yield tracker
        state = "finished"
    except (Interrupted, KeyboardInterrupt):
        state = "interrupted"
        raise
    finally:
        tracker.close(state)


class Tracked(Silent):
    """Follows a run folder."""

    def __init__(self, config: Config, folder: RunFolder, display: Display) -> None:
        self._config, self._folder, self._display = config, folder, display
        self._file = folder.tracker / _STATE
        self._tool: Tool | None = None
        self._sent = 0

    def open(self) -> None:
        """Begin a run of the tool, or go on with that of the folder."""
        kept = json.loads(self._file.read_text()) if self._file.exists() else {}
        self._sent = int(kept.get("sent", 0))
        settings = self._config.tracker
        run = _Run(
            config=self._config,
            folder=self._folder.tracker,
            project=settings.project,
            name=settings.name or _name_of(self._folder.path.resolve()),
            id=kept.get("id"),
            sent=self._sent,
        )
        with self._forgiven():
            self._folder.tracker.mkdir(parents=True, exist_ok=True)
            self._tool = _open(settings.kind, run)
            self._keep()
        if self._tool is not None:
            self._display.note(f"tracker: {self._tool.where}")

    def iteration(self, number: int, of: int, numbers: Mapping[str, float]) -> None:
        """Send what `metrics.jsonl` has and the tool has not."""
        with self._forgiven():
            self._follow()

    def close(self, state: State) -> None:
        """Send what is left, and of a finished run the results."""
        with self._forgiven():
            self._follow()
            if state == "finished" and self._tool is not None:
                self._tool.results(results(self._folder.evaluation_file), self._sent)
        tool, self._tool = self._tool, None
        with self._forgiven():
            if tool is not None:
                tool.close(state)

    def _follow(self) -> None:
        if self._tool is None:
            return
        for row in metrics.read(self._folder.metrics_file):
            iteration = int(row["iteration"])
            if iteration > self._sent:
                self._tool.row({k: v for k, v in row.items() if k != "iteration"}, iteration)
                self._sent = iteration
                self._keep()

    def _keep(self) -> None:
        assert self._tool is not None
        kept = {"kind": self._config.tracker.kind, "id": self._tool.id, "sent": self._sent}
        write_atomically(self._file, json.dumps(kept) + "\n")

    @contextmanager
    def _forgiven(self) -> Iterator[None]:
        """What a tool raises is said once; then it is left alone."""
        try:
            yield
        except Exception as error:
            self._tool = None
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            self._display.note(
                f"tracker: {self._config.tracker.kind} failed and gets nothing more; the run goes "
                f"on, and metrics.jsonl has everything ({first})"
            )


def results(evaluation: Path) -> dict[str, float]:
    """What is worth a curve's end: of each model the rates of each group, perplexities, the KL."""
    found: dict[str, float | None] = {}
    for model in json.loads(evaluation.read_text(encoding="utf-8"))["models"]:
        at = f"result/{model['model']}"
        for group, measured in model["groups"].items():
            found[f"{at}/{group}/satisfaction"] = measured["satisfaction"]["mean"]
            found[f"{at}/{group}/score"] = measured["score"]["mean"]
            for judge, violation in measured["judges"].items():
                found[f"{at}/{group}/violation_{judge}"] = violation["mean"]
        for group, interval in model["perplexity"].items():
            found[f"{at}/perplexity/{group}"] = interval["mean"]
        found[f"{at}/kl_to_base"] = model["kl_to_base"]
    return {name: float(value) for name, value in found.items() if value is not None}


def _name_of(folder: Path) -> str:
    """The folder's name; jobs of a sweep are numbers, which say nothing alone."""
    return f"{folder.parent.name}-{folder.name}" if folder.name.isdecimal() else folder.name


def _open(kind: str, run: _Run) -> Tool:
    match kind:
        case "tensorboard":
            return _tensorboard(run)
        case "trackio":
            return _trackio(run)
        case "wandb":
            return _wandb(run)
        case "mlflow":
            return _mlflow(run)
        case _:
            raise AssertionError(kind)


def _tensorboard(run: _Run) -> Tool:
    """Event files in the run folder."""
    from torch.utils.tensorboard import SummaryWriter

    # What was written after the last row that counts, by a process that was killed, is dropped.
    writer = SummaryWriter(str(run.folder), purge_step=run.sent + 1 if run.id else None)
    if run.id is None:
        text = config_to_yaml(run.config)
        writer.add_text("config", "\n".join(f"    {line}" for line in text.splitlines()))

    def row(numbers: Numbers, step: int) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return Tool(
        id=run.id or run.name,
        where=f"tensorboard --logdir {run.folder}",
        row=row,
        results=row,
        close=lambda state: writer.close(),
    )


def _trackio(run: _Run) -> Tool:
    """A local database, or what TRACKIO_SPACE_ID and TRACKIO_SERVER_URL name."""
    import trackio

    # A run is found again by its name, so the name has to be its own.
    name = run.id or f"{run.name}-{uuid4().hex[:6]}"
    with redirect_stdout(StringIO()):  # it greets
        opened = trackio.init(
            project=run.project,
            name=name,
            config=run.tree,
            resume="allow",
            embed=False,
            auto_log_cpu=False,
            auto_log_gpu=False,
        )

    def close(state: State) -> None:
        with redirect_stdout(StringIO()):
            trackio.finish()  # the run alone would be finished again when the process ends

    return Tool(
        id=name,
        where=f"trackio show --project {run.project}, run {name}",
        row=lambda numbers, step: opened.log(dict(numbers), step=step),
        results=lambda numbers, step: opened.log(dict(numbers), step=step),
        close=close,
    )


def _wandb(run: _Run) -> Tool:
    """A server, or with WANDB_MODE=offline files in the run folder."""
    import wandb

    settings = wandb.Settings(
        silent=True, console="off", init_timeout=_SECONDS, finish_timeout=_SECONDS
    )
    # Without a key it would ask for one in the middle of the display.
    if wandb.setup(settings).settings.mode == "online" and not wandb.login(prompt=False):
        raise CftError("not logged in: run `wandb login`, or set WANDB_MODE=offline")
    opened = wandb.init(
        project=run.project,
        name=run.name,
        id=run.id or uuid4().hex[:8],
        config=run.tree,
        dir=run.folder,
        resume="allow",
        settings=settings,
    )
    return Tool(
        id=opened.id,
        where=opened.url or f"wandb sync {run.folder / 'wandb'}/offline-run-*",
        row=lambda numbers, step: opened.log(dict(numbers), step=step, commit=True),
        results=lambda numbers, step: opened.summary.update(dict(numbers)),
        close=lambda state: opened.finish(exit_code=0 if state == "finished" else 1),
    )


def _mlflow(run: _Run) -> Tool:
    """What MLFLOW_TRACKING_URI names, or a local database."""
    # A server that does not answer costs a minute once, not a quarter of an hour.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param

    logging.getLogger("mlflow").setLevel(logging.WARNING)
    client = MlflowClient()
    if run.id is None:
        experiment = client.get_experiment_by_name(run.project)
        place = experiment.experiment_id if experiment else client.create_experiment(run.project)
        opened = str(client.create_run(place, run_name=run.name).info.run_id)
        values = [
            Param(_plain(key), str(value)[:_LONGEST_PARAMETER])
            for key, value in flat(run.tree).items()
        ]
        for first in range(0, len(values), _PARAMETERS_AT_ONCE):
            client.log_batch(opened, params=values[first : first + _PARAMETERS_AT_ONCE])
    else:
        opened = run.id
        client.update_run(opened, status="RUNNING")

    def row(numbers: Numbers, step: int) -> None:
        now = int(1000 * time.time())
        client.log_batch(
            opened, metrics=[Metric(_plain(name), v, now, step) for name, v in numbers.items()]
        )

    return Tool(
        id=opened,
        where=f"MLflow, experiment {run.project}, run {opened}",
        row=row,
        results=row,
        close=lambda state: client.set_terminated(opened, _MLFLOW_STATES[state]),
    )


def _plain(name: str) -> str:
    """A name that MLflow takes."""
    return re.sub(r"[^\w\-. :/]", "_", name)
