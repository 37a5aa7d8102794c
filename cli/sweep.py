"""`cft train -m`: a sweep. Hydra's sweeper chooses the jobs; each is a process of its own.

A job that fails does not stop the others; the table at the end names it.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

from constrained_ft.cli.launch import Request
from constrained_ft.cli.settings import settings
from constrained_ft.errors import ConfigError

__all__ = ["sweep"]

_STOPS = (75, 130)  # exit codes of a job that was interrupted: the sweep ends there too

Outcomes = dict[str, tuple[str, int]]


def sweep(request: Request, *, dry_run: bool, best_at: float) -> int:
    """Run every job of a sweep and return the exit code.

    Args:
        request: what the command line says.
        dry_run: show the jobs and start none.
        best_at: the satisfaction that the best run has to have.

    Raises:
        ConfigError: if any job's configuration is wrong, or its folder holds a run; no job has
            started then.
    """
    from constrained_ft.cli.display import make_display
    from constrained_ft.overrides import expand_sweep, normalise

    if request.names_folder() and request.config_file is None:
        raise ConfigError(
            "a sweep names its folders; set hydra.sweep.dir=PATH instead of output_dir"
        )
    if request.resume not in ("none", "auto"):
        raise ConfigError("--resume PATH names one run; a sweep takes --resume auto")
    prepared = normalise(request.overrides, request.config_dirs, sweep=True)
    jobs = expand_sweep(request.overrides, request.config_dirs)
    name = _check_jobs(request, jobs)
    folder = Path(_given(request.overrides, "hydra.sweep.dir") or f"multirun/{name}")
    if request.resume == "none" and not request.clean:
        _refuse_used(folder, len(jobs))
    rows = [[str(number), " ".join(job)] for number, job in enumerate(jobs)]
    if dry_run:
        with make_display(settings.console()) as display:
            display.table(f"{folder} (dry run, nothing is started)", ["job", "overrides"], rows)
        return 0
    outcomes: Outcomes = {}
    _run_hydra(prepared, folder, _job(request, outcomes))
    with make_display(settings.console()) as display:
        display.table(
            str(folder),
            ["job", "overrides", "exit code"],
            [[job, text, str(code)] for job, (text, code) in outcomes.items()],
        )
    if outcomes:
        _sum_up(folder, outcomes, best_at)
    failed = {job: code for job, (_, code) in outcomes.items() if code != 0}
    if not failed:
        return 0
    settings.complain(f"{len(failed)} of {len(outcomes)} jobs failed: {', '.join(failed)}")
    for job in failed:
        settings.warn(
            f"job {job} alone: cft train {outcomes[job][0]} output_dir={folder / job} --clean"
        )
    codes = set(failed.values())
    stopped = codes & set(_STOPS)
    return max(stopped) if stopped else codes.pop() if len(codes) == 1 else 1


def _sum_up(folder: Path, outcomes: Outcomes, best_at: float) -> None:
    """What the jobs came to: a table, a plot, `sweep.json`, and the best run."""
    from constrained_ft import front
    from constrained_ft.cli.display import make_display

    points = front.read_points({job: (text, folder / job) for job, (text, _) in outcomes.items()})
    folder.mkdir(parents=True, exist_ok=True)
    front.save(folder, points, {job: code for job, (_, code) in outcomes.items()})
    if not points:
        return
    chosen = front.best(points, best_at)
    words = f"at least {best_at:.0%} satisfied, then the lowest perplexity"
    with make_display(settings.console()) as display:
        display.table("Control against the language", *front.table(points))
        display.note(
            f"{words}: none of them"
            if chosen is None
            else f"{words}: job {chosen.job}, {folder / chosen.job}"
        )
        if front.plot(folder / "front.png", points):
            display.note(f"plot: {folder / 'front.png'}")


def _check_jobs(request: Request, jobs: Sequence[list[str]]) -> str:
    """Validate all jobs before any starts; the name of the first names the sweep."""
    names = []
    for number, job in enumerate(jobs):
        try:
            names.append(replace(request, overrides=tuple(job)).config().name)
        except ConfigError as error:
            raise ConfigError(f"job {number} ({' '.join(job)}): {error}") from error
    return names[0]


def _refuse_used(folder: Path, count: int) -> None:
    used = [str(n) for n in range(count) if (folder / str(n) / "status.json").exists()]
    if used:
        raise ConfigError(
            f"{folder} holds runs ({', '.join(used)}); continue them with --resume auto, delete "
            "them with --clean, or choose another hydra.sweep.dir=PATH"
        )


def _job(request: Request, outcomes: Outcomes) -> Callable[[Any], None]:
    """What Hydra calls for each job: `cft train` in a process of its own."""
    from constrained_ft.overrides import assignment

    def run_job(tree: Any) -> None:
        from hydra.core.hydra_config import HydraConfig
        from rich.text import Text

        hydra = HydraConfig.get()
        if any(code in _STOPS for _, code in outcomes.values()):
            return
        overrides = [override.removeprefix("++") for override in hydra.overrides.task]
        folder = assignment("output_dir", str(hydra.runtime.output_dir))
        command = [sys.executable, "-m", "constrained_ft.cli.main", *settings.flags(), "train"]
        command += [*overrides, folder, *request.options()]
        if not settings.quiet:
            text = Text(f"\njob {hydra.job.num}: {' '.join(overrides)}", style="bold")
            settings.console().print(text, soft_wrap=True)
        outcomes[str(hydra.job.num)] = (" ".join(overrides), _call(command))

    return run_job


def _call(command: Sequence[str]) -> int:
    """Run a job; signals reach it, and this process outlives it."""
    with subprocess.Popen(command) as process:

        def forward(number: int, frame: FrameType | None) -> None:
            process.send_signal(number)

        # A terminal sends Ctrl-C to both processes, so SIGINT needs no forwarding.
        handlers = {
            signal.SIGINT: lambda number, frame: None,
            signal.SIGTERM: forward,
            signal.SIGUSR1: forward,
        }
        before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        try:
            code = process.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    return code if code >= 0 else 128 - code


def _run_hydra(overrides: Sequence[str], folder: Path, job: Callable[[Any], None]) -> None:
    """Hand over to Hydra's sweeper and launcher, which read their arguments from `sys.argv`."""
    import hydra

    from constrained_ft.groups import CONF, PRIMARY
    from constrained_ft.overrides import assignment

    # The run folder of a job is its own record, so Hydra writes none, and does not log.
    ours = {
        "hydra.sweep.dir": assignment("hydra.sweep.dir", str(folder)),
        "hydra.output_subdir": "hydra.output_subdir=null",
        "hydra/job_logging": "hydra/job_logging=none",
        "hydra/hydra_logging": "hydra/hydra_logging=none",
    }
    extra = [text for key, text in ours.items() if _given(overrides, key) is None]
    with _arguments(["cft train", *overrides, *extra, "--multirun"]):
        hydra.main(config_path=f"pkg://{CONF}", config_name=PRIMARY, version_base="1.3")(job)()


@contextmanager
def _arguments(arguments: list[str]) -> Iterator[None]:
    """`sys.argv` for Hydra, and its errors as they are rather than as an exit."""
    before, full_error = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv, os.environ["HYDRA_FULL_ERROR"] = arguments, "1"
    try:
        yield
    finally:
        sys.argv = before
        if full_error is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = full_error


def _given(overrides: Sequence[str], key: str) -> str | None:
    """The value that an override gives to a key."""
    for override in overrides:
        name, _, value = override.lstrip("+").partition("=")
        if name == key:
            return value.strip("'\"")
    return None
