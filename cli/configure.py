"""`cft config`: show, validate, list, copy and compare the configuration; its JSON Schema."""

import json
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from constrained_ft.cli.completion import complete_copied, complete_section
from constrained_ft.cli.launch import ConfigDirs, ConfigFile, Overrides, Request
from constrained_ft.cli.settings import settings
from constrained_ft.errors import ConfigError

if TYPE_CHECKING:
    from rich.text import Text

    from constrained_ft.config import Config
    from constrained_ft.keys import Key

__all__ = ["app"]

app = typer.Typer(
    help="Show, check, list, copy and compare the configuration.", no_args_is_help=True
)


@app.command()
def show(
    overrides: Overrides = None, config: ConfigFile = None, config_dir: ConfigDirs = None
) -> None:
    """Print the composed configuration as YAML."""
    from constrained_ft.compose import config_to_yaml

    request = Request(
        overrides=tuple(overrides or ()), config_file=config, config_dirs=tuple(config_dir or ())
    )
    typer.echo(config_to_yaml(request.config()), nl=False)


@app.command()
def validate(
    what: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[FILE.yaml] [KEY=VALUE]...", help="A complete configuration, or overrides."
        ),
    ] = None,
    config_dir: ConfigDirs = None,
) -> None:
    """Check a configuration; exit code 0 if it is right, 2 if not."""
    overrides = tuple(text for text in what or () if "=" in text or text.startswith("~"))
    files: list[Path | None] = [Path(text) for text in what or () if text not in overrides]
    if not files:
        files = [None]  # the groups of the package
    for file in files:
        folders = tuple(config_dir or ())
        config = Request(overrides=overrides, config_file=file, config_dirs=folders).config()
        if not settings.quiet:
            typer.echo(f"ok: {config.name if file is None else file}")


@app.command("list")
def list_keys(
    section: Annotated[
        str,
        typer.Argument(
            help="Only keys that begin with this, such as `trainer`.",
            autocompletion=complete_section,
        ),
    ] = "",
    config_dir: ConfigDirs = None,
) -> None:
    """List groups, their options, and every key with its meaning."""
    from rich.text import Text

    from constrained_ft.groups import default_options, groups
    from constrained_ft.keys import keys_of_schema

    console = settings.console()
    defaults = default_options()
    console.print(Text("Groups: GROUP=OPTION, the default first", style="bold"))
    for group, options in groups(tuple(config_dir or ())).items():
        if group.startswith(section.partition(".")[0]):
            ordered = sorted(options, key=lambda option: option != defaults.get(group))
            console.print(Text(f"  {group:<12}{' · '.join(ordered)}"))
    console.print(Text("\nKeys: SECTION.KEY=VALUE", style="bold"))
    keys = [key for key in keys_of_schema().values() if key.path.startswith(section)]
    # Wrapped by hand: rich takes a quarter of the command's time to wrap that many texts.
    described = [_described(key, console.width) for key in keys]
    console.print(Text("\n").join(described), soft_wrap=True)


@app.command()
def copy(
    what: Annotated[
        str,
        typer.Argument(
            metavar="GROUP/NAME",
            help="A YAML file that comes with cft, such as `trainer/alternating`.",
            autocompletion=complete_copied,
        ),
    ],
    folder: Annotated[
        Path, typer.Argument(metavar="[FOLDER]", help="Your folder of groups.")
    ] = Path("conf"),
    name: Annotated[
        str | None, typer.Option("--as", metavar="NAME", help="Its new name; my_NAME if left out.")
    ] = None,
) -> None:
    """Copy a YAML file that comes with cft into a folder of your own, to be changed there."""
    from constrained_ft.groups import copy_option

    group, _, option = what.removesuffix(".yaml").partition("/")
    file = copy_option(group, option, folder, name or f"my_{option}")
    if not settings.quiet:
        typer.echo(f"{file} is yours to change. Use it with:")
    typer.echo(f"cft train --config-dir {folder} {group}={file.stem}")


@app.command()
def diff(
    left: Annotated[Path, typer.Argument(metavar="A", help="A run folder or a YAML file.")],
    right: Annotated[Path, typer.Argument(metavar="B", help="Another one.")],
) -> None:
    """Compare the configurations of two runs or files, key by key."""
    from constrained_ft.cli.display import make_display
    from constrained_ft.compose import differences

    found = differences(_config_at(left), _config_at(right))
    if not found:
        if not settings.quiet:
            typer.echo(f"{left} and {right} have the same configuration")
        return
    rows = [[key, *(_value(one) for one in pair)] for key, pair in found.items()]
    with make_display(settings.console(), quiet=settings.quiet) as display:
        display.table("Keys that differ", ["key", str(left), str(right)], rows)
    settings.say("what a key means: cft config list KEY")


@app.command()
def schema(
    output: Annotated[
        Path | None, typer.Option(metavar="FILE.json", help="Write it to a file.")
    ] = None,
) -> None:
    """Print the JSON Schema of a configuration file, for editors."""
    from constrained_ft.json_schema import json_schema

    text = json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n"
    if output is None:
        typer.echo(text, nl=False)
        return
    from constrained_ft.run_folder import write_atomically

    write_atomically(output, text)
    if not settings.quiet:
        typer.echo(f"{output} is written. Name it in the first line of a YAML file:")
    typer.echo(f"# yaml-language-server: $schema={output}")


def _config_at(place: Path) -> "Config":
    """The configuration of a run folder or a file."""
    from constrained_ft.run_folder import RunFolder

    if place.is_dir():
        return RunFolder(place).config()
    if not place.is_file():
        raise ConfigError(f"there is no run folder or file {place}; `cft runs list` shows the runs")
    return Request(overrides=(), config_file=place, config_dirs=()).config()


def _value(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _described(key: "Key", width: int) -> "Text":
    from rich.text import Text

    text = Text("\n" * key.is_section)
    text.append(f"  {key.path}", style="bold" if key.is_section else "cyan")
    if not key.is_section:
        text.append(f"  {key.allowed}", style="dim")
    if key.doc:
        lines = textwrap.wrap(key.doc, width - 6, break_on_hyphens=False, break_long_words=False)
        text.append("".join(f"\n      {line}" for line in lines))
    return text
