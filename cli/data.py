"""`cft init` and `cft data`: the user's own data, looked at before anything is trained."""

from pathlib import Path
from typing import Annotated

import typer

from constrained_ft.cli.completion import complete_override
from constrained_ft.cli.launch import ConfigDirs, ConfigFile, Overrides, Request
from constrained_ft.cli.settings import settings
from constrained_ft.errors import ConfigError

__all__ = ["app", "init"]

app = typer.Typer(help="Look at the training data.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Look at the training data."""


@app.command()
def check(
    overrides: Overrides = None,
    config: ConfigFile = None,
    config_dir: ConfigDirs = None,
    row: Annotated[
        int, typer.Option("--row", min=1, metavar="N", help="Which row is shown token by token.")
    ] = 1,
    scored: Annotated[
        int | None,
        typer.Option(
            min=0,
            metavar="N",
            help="Rows of each group that the scorer is asked about; 1,000 if left out, and none "
            "for scorers that run a model or ask a service.",
        ),
    ] = None,
) -> None:
    """Show lengths, what is cut, one row with its mask, duplicates, and what the scorer rejects."""
    from constrained_ft.cli.display import make_display

    request = Request(
        overrides=tuple(overrides or ()), config_file=config, config_dirs=tuple(config_dir or ())
    )
    checked = request.config()
    settings.prepare_libraries()
    with make_display(settings.console(), quiet=settings.quiet) as display:
        from constrained_ft.data_check import check_command

        report = check_command(checked, display, row=row, scored=scored)
        display.table("Corpus", *report.groups)
        display.table(f"{report.shown}, as it is trained", *report.tokens)
        if report.scores[1]:
            display.table("What the constraint says of it", *report.scores)
    for remark in report.remarks:
        settings.say(f"note: {remark}")
    words = [*(overrides or []), *(["--config", str(config)] if config else [])]
    words += [part for folder in config_dir or [] for part in ("--config-dir", str(folder))]
    settings.say(f"next: {command('train', *words)}")


def init(
    data: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[DATA_FILE] [KEY=VALUE]...",
            help="Your corpus (JSONL, CSV, Parquet, text), and what you know already, such as "
            "constraint=function constraint.scorer.path=my_scorer.py:score.",
            autocompletion=complete_override,
        ),
    ] = None,
    output: Annotated[
        Path, typer.Option(metavar="FILE.yaml", help="Where the configuration goes.")
    ] = Path("cft.yaml"),
    config_dir: ConfigDirs = None,
) -> None:
    """Look at your data and write a commented configuration for it; never over another file.

    [dim]cft init corpus.jsonl · cft init corpus.csv data.text_column=body llm=tiny[/]
    """
    from constrained_ft.cli.display import make_display

    overrides = [text for text in data or () if "=" in text]
    files = [text for text in data or () if "=" not in text]
    if len(files) > 1:
        raise ConfigError(
            f"{len(files)} files are given; write a glob in quotes, such as 'part_*.jsonl'"
        )
    if output.exists():
        raise ConfigError(f"{output} exists; give another name with --output FILE.yaml")
    settings.prepare_libraries()
    with make_display(settings.console(), quiet=settings.quiet) as display:
        from constrained_ft.run_folder import write_atomically
        from constrained_ft.starter import draft

        made = draft(files[0] if files else None, overrides, tuple(config_dir or ()), output)
        write_atomically(output, made.text)
        if made.facts:
            display.panel("Your data", made.facts)
    for remark in made.remarks:
        settings.say(f"note: {remark}")
    settings.say(f"{output} is written; read it, and change what you like. Then:")
    folders = [part for folder in config_dir or [] for part in ("--config-dir", str(folder))]
    typer.echo(command("train", "--config", str(output), *folders))


def command(*words: str) -> str:
    """A command line of cft as one would type it."""
    import shlex

    return shlex.join(["cft", *words])
