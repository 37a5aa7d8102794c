"""`cft config`: show, validate and list the configuration."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from constrained_ft.cli.launch import ConfigDirs, ConfigFile, Overrides, Request
from constrained_ft.cli.settings import settings

if TYPE_CHECKING:
    from rich.console import RenderableType

    from constrained_ft.keys import Key

__all__ = ["app"]

app = typer.Typer(help="Show, validate and list the configuration.", no_args_is_help=True)


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
        str, typer.Argument(help="Only keys that begin with this, such as `trainer`.")
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
    for key in keys_of_schema().values():
        if key.path.startswith(section):
            console.print(_described(key))


def _described(key: "Key") -> "RenderableType":
    from rich.console import Group
    from rich.padding import Padding
    from rich.text import Text

    head = Text("\n" * key.is_section)
    head.append(f"  {key.path}", style="bold" if key.is_section else "cyan")
    if not key.is_section:
        head.append(f"  {key.allowed}", style="dim")
    return Group(head, Padding(Text(key.doc), (0, 0, 0, 6))) if key.doc else head
