"""`cft export`: a finished run as a folder to hand over, or on a hub."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from constrained_ft.cli.settings import settings

__all__ = ["export"]


class Form(StrEnum):
    """What the weights are."""

    merged = "merged"
    adapter = "adapter"


def export(
    run: Annotated[str, typer.Argument(metavar="RUN", help="The folder of a finished run.")],
    output: Annotated[
        Path, typer.Argument(metavar="OUTPUT", help="Where it goes; new, or an empty folder.")
    ],
    form: Annotated[
        Form, typer.Option(help="The whole model for transformers, or the adapter for PEFT.")
    ] = Form.merged,
    push: Annotated[
        str | None,
        typer.Option(metavar="REPO_ID", help="Also upload it to this repository of the hub."),
    ] = None,
    public: Annotated[
        bool, typer.Option("--public", help="Upload for everybody to see; private otherwise.")
    ] = False,
) -> None:
    """Write the model, its auxiliary and its card into one folder."""
    from constrained_ft.cli.display import make_display

    settings.prepare_libraries()
    with make_display(settings.console(), quiet=settings.quiet) as display:
        from constrained_ft.export import export_command

        export_command(run, output, form=form.value, push=push, public=public, display=display)
        display.note(f"{output} is ready; its README.md says how to load it")
        if push is not None:
            display.note(f"uploaded to {push}, {'public' if public else 'private'}")
