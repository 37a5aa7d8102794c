"""`cft train -m`: a sweep. Hydra's sweeper chooses the jobs; each is a process of its own.

A job that fails does not stop the others; the end names it, and `--resume FOLDER` repeats it.
"""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from constrained_ft.cli.job import STOPS, Runner
from constrained_ft.cli.launch import Request
from constrained_ft.cli.settings import settings
from constrained_ft.errors import ConfigError
from constrained_ft.sweep_folder import Job, SweepFolder

if TYPE_CHECKING:
    from constrained_ft.config import Config

__all__ = ["sweep"]


def sweep(request: Request, *, dry_run: bool, best_at: float) -> int:
    """Run every job of a sweep, or those that an earlier one left, and return the exit code.

    Args:
        request: what the command line says.
        dry_run: show the jobs and start none.
        best_at: the satisfaction that the best run has to have.

    Raises:
        ConfigError: if any job's configuration is wrong, or its folder holds a run; no job has
            started then.
    """
    if request.resume not in ("none", "auto"):
        return _repeat(request, dry_run=dry_run, best_at=best_at)
    from constrained_ft.overrides import expand_sweep, normalise

    for key in ("output_dir", "hydra.sweep.subdir"):
        if _given(request.overrides, key) is not None:
            raise ConfigError(
                f"a sweep names its folders; set hydra.sweep.dir=PATH instead of {key}"
            )
    prepared = normalise(request.overrides, request.config_dirs, sweep=True)
    jobs = expand_sweep(request.overrides, request.config_dirs)
    configs = _check_jobs(request, jobs)
    name = _given(request.overrides, "hydra.sweep.dir") or f"multirun/{configs[0].name}"
    folder = SweepFolder(Path(name))
    if request.resume == "none" and not request.clean:
        _refuse_used(folder, len(jobs))
    if dry_run:
        _show_plan(folder, {str(number): " ".join(job) for number, job in enumerate(jobs)})
        return 0
    if _given(request.overrides, "hydra/sweeper") in (None, "basic"):
        folder.begin(list(zip(jobs, configs, strict=True)))
    else:
        folder.begin([])  # it chooses the jobs on its way
    runner = Runner(path=folder.path.resolve(), request=request, settings=settings)
    _run_hydra(prepared, folder.path, runner)
    return _conclude(folder, best_at)


def _repeat(request: Request, *, dry_run: bool, best_at: float) -> int:
    """Run the jobs of a sweep that are not done, each with the configuration that it had."""
    if request.overrides or request.config_file is not None or request.config_dirs:
        raise ConfigError(
            f"--resume {request.resume} repeats what the sweep was asked for, so it takes no "
            "KEY=VALUE and no configuration; begin another sweep for that"
        )
    folder = SweepFolder(Path(request.resume))
    left = [job for job in folder.jobs() if job.exit_code != 0]
    if dry_run:
        _show_plan(folder, {job.number: job.overrides for job in left})
        return 0
    for job in left:
        folder.write(job.number, folder.overrides(job.number))
    runner = Runner(
        path=folder.path.resolve(), request=replace(request, resume="auto"), settings=settings
    )
    for job in left:
        runner.run(job.number, folder.overrides(job.number))
    if not left and not settings.quiet:
        settings.console().print(f"every job of {folder.path} is done", highlight=False)
    return _conclude(folder, best_at)


def _show_plan(folder: SweepFolder, jobs: dict[str, str]) -> None:
    from constrained_ft.cli.display import make_display

    rows = [[number, overrides] for number, overrides in jobs.items()]
    with make_display(settings.console()) as display:
        display.table(f"{folder.path} (dry run, nothing is started)", ["job", "overrides"], rows)


def _conclude(folder: SweepFolder, best_at: float) -> int:
    """Show what became of all jobs; returns the exit code."""
    from constrained_ft import front
    from constrained_ft.cli.display import make_display

    jobs = folder.jobs()
    words = front.differing([job.overrides for job in jobs])
    with make_display(settings.console()) as display:
        display.table(
            str(folder.path),
            ["job", "overrides", "state"],
            [[job.number, text, _state(job)] for job, text in zip(jobs, words, strict=True)],
        )
    _sum_up(folder, jobs, best_at)
    left = [job for job in jobs if job.exit_code != 0]
    if not left:
        return 0
    named = ", ".join(job.number for job in left)
    lines = [f"{len(left)} of {len(jobs)} jobs are not done: {named}"]
    lines += [
        f"  job {job.number} ({text}): {job.reason or _state(job)}"
        for job, text in zip(jobs, words, strict=True)
        if job.exit_code not in (0, None)
    ]
    lines += [f"`cft train -m --resume {folder.path}` repeats them and draws the front again"]
    settings.complain("\n".join(lines))
    codes = {job.exit_code for job in left if job.exit_code is not None}
    stopped = codes.intersection(STOPS)
    return max(stopped) if stopped else codes.pop() if len(codes) == 1 else 1


def _state(job: Job) -> str:
    match job.exit_code:
        case 0:
            return "done"
        case None:
            return "not run"
        case code if code in STOPS:
            return f"interrupted, exit code {code}"
        case code:
            return f"failed, exit code {code}"


def _sum_up(folder: SweepFolder, jobs: Sequence[Job], best_at: float) -> None:
    """What the jobs came to: a table, a plot, `sweep.json`, and the best run."""
    from constrained_ft import front
    from constrained_ft.cli.display import make_display

    points = front.read_points(
        {job.number: (job.overrides, folder.path / job.number) for job in jobs}
    )
    front.save(folder.path, points, {job.number: job.exit_code for job in jobs})
    if not points:
        return
    means = front.over_seeds(points)
    chosen = front.best(means, best_at)
    words = f"at least {best_at:.0%} satisfied, then the lowest perplexity"
    with make_display(settings.console()) as display:
        display.table("Control against the language", *front.table(points))
        if len(means) < len(points):
            title = "Means over seeds, and one standard deviation to either side"
            display.table(title, *front.table(means))
        display.note(f"{words}: {'none of them' if chosen is None else f'job {chosen.job}'}")
        if front.plot(folder.plot_file, means):
            display.note(f"plot: {folder.plot_file}")


def _check_jobs(request: Request, jobs: Sequence[list[str]]) -> "list[Config]":
    """The configurations of all jobs, validated before any starts."""
    configs = []
    for number, job in enumerate(jobs):
        try:
            configs.append(replace(request, overrides=tuple(job)).config())
        except ConfigError as error:
            raise ConfigError(f"job {number} ({' '.join(job)}): {error}") from error
        request.check(configs[-1])
    return configs


def _refuse_used(folder: SweepFolder, count: int) -> None:
    used = [str(n) for n in range(count) if folder.run(str(n)).status_file.exists()]
    if used:
        raise ConfigError(
            f"{folder.path} holds runs ({', '.join(used)}); continue them with --resume "
            f"{folder.path}, delete them with --clean, or choose another hydra.sweep.dir=PATH"
        )


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
