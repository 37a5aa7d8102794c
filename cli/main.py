"""The `cft` command: reads arguments, prints, and turns errors into exit codes.

Nothing here imports torch, so that `cft --help` and a wrong key answer at once.
"""

import sys
import traceback
from collections.abc import Sequence
from importlib import metadata
from typing import Annotated

import typer

from constrained_ft.cli import (
    chat,
    configure,
    data,
    doctor,
    explain,
    export,
    launch,
    measure,
    report,
    runs,
    score,
    serve,
)
from constrained_ft.cli.settings import settings
from constrained_ft.errors import CftError, storage_error

__all__ = ["app", "main"]

app = typer.Typer(
    name="cft",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich",
    epilog="Exit codes: 0 done · 1 unexpected failure · 2 usage or configuration · 3 model, data "
    "or scorer is missing · 4 a guard stopped the run · 75 interrupted, --resume continues · "
    "130 Ctrl-C twice",
)


def _version(value: bool) -> bool:
    if value:
        typer.echo(f"cft {metadata.version('constrained-ft')}")
        raise typer.Exit
    return value


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Results and errors only.")] = False,
    verbose: Annotated[
        bool, typer.Option("-v", "--verbose", help="Also what other libraries have to say.")
    ] = False,
    no_color: Annotated[bool, typer.Option("--no-color", help="No colours.")] = False,
) -> None:
    """Fine-tune a language model on your text; keep an attribute of what it says under control."""
    settings.debug, settings.quiet = debug, quiet
    settings.verbose, settings.color = verbose, not no_color


app.command()(launch.train)
app.command()(measure.evaluate)
app.command()(measure.generate)
app.command()(report.report)
app.add_typer(score.app, name="score")
app.add_typer(configure.app, name="config")
app.add_typer(runs.app, name="runs")
app.command()(data.init)
app.add_typer(data.app, name="data")
app.command()(doctor.doctor)
app.command()(explain.explain)
app.command()(chat.chat)
app.command()(serve.serve)
app.command()(export.export)
app.command()(measure.selfcheck)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command and leave the process with its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if "train" in given and "--" in given[given.index("train") :]:
        place = given.index("--", given.index("train"))
        given, settings.torchrun = given[:place], tuple(given[place + 1 :])
    try:
        app(args=given, prog_name="cft")
    except Exception as raised:
        if settings.debug:
            traceback.print_exc()
        error = storage_error(raised) or raised
        if isinstance(error, CftError):
            settings.complain(str(error))
            sys.exit(error.exit_code)
        notes = [*getattr(error, "__notes__", []), "`cft --debug ...` shows the traceback"]
        settings.complain(f"unexpected {type(error).__name__}: {error} ({'; '.join(notes)})")
        sys.exit(1)


if __name__ == "__main__":
    main()
