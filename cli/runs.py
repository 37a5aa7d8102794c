"""`cft runs`: the runs that there are, one of them, and which may go."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from constrained_ft.cli.settings import settings
from constrained_ft.errors import ConfigError

if TYPE_CHECKING:
    from constrained_ft.progress import Display
    from constrained_ft.runs import Run

__all__ = ["app"]

app = typer.Typer(
    help="The runs that there are: list them, show one, delete.", no_args_is_help=True
)

Places = Annotated[
    list[Path] | None,
    typer.Argument(metavar="[FOLDER]...", help="Where to look; outputs and multirun if left out."),
]
_DECIMAL = 1000


@app.command("list")
def list_runs(places: Places = None) -> None:
    """List runs, the newest first: state, iterations, results."""
    from constrained_ft.cli.display import make_display

    runs = _found(places)
    with make_display(settings.console(), quiet=settings.quiet) as display:
        if not runs:
            settings.say("no runs here; start one with: cft train")
            return
        columns = ["run", "state", "iterations", "started", "satisfied", "perplexity", "size"]
        display.table("Runs", columns, [_row(run) for run in runs])
        waiting = [run for run in runs if run.state in ("died", "interrupted", "failed")]
        if waiting:
            settings.say(f"continue one with: cft train --resume {waiting[0].folder.path}")
        else:
            settings.say(f"look at one with: cft runs show {runs[0].folder.path}")


@app.command()
def show(
    path: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
) -> None:
    """Show one run: where it stands, its results, and what can be done with it."""
    from constrained_ft.cli.display import make_display
    from constrained_ft.runs import read_run

    run = read_run(path)
    with make_display(settings.console(), quiet=settings.quiet) as display:
        display.panel(str(path), _facts(run))
        _show_numbers(run, display)
        for command in _next(run):
            settings.say(command)


@app.command()
def prune(
    places: Places = None,
    unfinished: Annotated[
        bool, typer.Option("--unfinished", help="Only runs that did not come to their end.")
    ] = False,
    older_than: Annotated[
        float | None,
        typer.Option(
            "--older-than", min=0, metavar="DAYS", help="Only runs that are as old as this."
        ),
    ] = None,
    keep: Annotated[
        int | None, typer.Option("--keep", min=0, metavar="N", help="Not the newest N of all.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Delete them.")] = False,
) -> None:
    """Show which runs may go; delete them with --yes. A run that is running stays."""
    from constrained_ft.cli.display import make_display
    from constrained_ft.runs import what_may_go

    if not unfinished and older_than is None and keep is None:
        raise ConfigError("say which runs may go: --unfinished, --older-than DAYS or --keep N")
    runs = _found(places)
    going = what_may_go(runs, unfinished=unfinished, older_than=older_than, keep=keep)
    with make_display(settings.console(), quiet=settings.quiet) as display:
        if not going:
            settings.say(f"none of {len(runs)} runs may go; see them with: cft runs list")
            return
        columns = ["run", "state", "iterations", "started", "satisfied", "perplexity", "size"]
        title = "Deleted" if yes else "May go (nothing is deleted yet)"
        if yes:
            for run in going:
                run.folder.delete()
        display.table(title, columns, [_row(run) for run in going])
        freed = _bytes(sum(run.size for run in going))
        if yes:
            settings.say(f"{len(going)} runs deleted, {freed}")
        else:
            settings.say(f"{len(going)} of {len(runs)} runs, {freed}; add --yes to delete them")


def _found(places: list[Path] | None) -> "list[Run]":
    from constrained_ft.runs import PLACES, find_runs

    return find_runs(places or PLACES)


def _row(run: "Run") -> list[str]:
    result = run.result
    return [
        str(run.folder.path),
        run.state,
        _iterations(run),
        "" if run.started is None else f"{run.started.astimezone():%Y-%m-%d %H:%M}",
        "" if result is None else f"{100 * result.satisfaction:.1f} %",
        "" if result is None else f"{next(iter(result.perplexity.values())):.2f}",
        _bytes(run.size),
    ]


def _iterations(run: "Run") -> str:
    return f"{run.iteration}/{'?' if run.iterations is None else run.iterations}"


def _facts(run: "Run") -> dict[str, str]:
    times = {"started": run.started, "last written": run.updated}
    facts = {"state": run.state, "iterations": _iterations(run)}
    facts |= {name: f"{at.astimezone():%Y-%m-%d %H:%M}" for name, at in times.items() if at}
    if run.reason:
        facts["reason"] = run.reason
    if run.folder.command_file.exists():
        command = run.folder.command_file.read_text(encoding="utf-8").splitlines()
        facts["command"] = command[1].partition(" && ")[2] if len(command) > 1 else ""
    return facts | {"size": _bytes(run.size)}


def _show_numbers(run: "Run", display: "Display") -> None:
    """The last iteration, and the table at the end."""
    from constrained_ft.runs import last_metrics, results

    numbers = last_metrics(run.folder)
    if numbers:
        display.iteration(run.iteration, run.iterations or run.iteration, numbers)
    if run.result is not None:
        display.table("Held-out prompts and text", *results(run.folder))


def _next(run: "Run") -> list[str]:
    path = run.folder.path
    if run.is_finished:
        return [
            f"try it with: cft generate {path} --prompt TEXT --guided",
            f"its configuration: cft config show --config {run.folder.config_file}",
        ]
    if run.state == "running":
        return [f"it writes its log to {run.folder.path / 'logs'}"]
    return [f"continue it with: cft train --resume {path}"]


def _bytes(size: int) -> str:
    """In decimal units, as disks are sold."""
    number = float(size)
    for unit in ("B", "kB", "MB", "GB"):
        if number < _DECIMAL:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= _DECIMAL
    return f"{number:.1f} TB"
