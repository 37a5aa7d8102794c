"""`cft report`."""

from pathlib import Path
from typing import Annotated

import typer

from constrained_ft.cli.settings import settings

__all__ = ["report"]


def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Run folders, or a sweep's folder.")
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="Where to write; RUN/report, or reports/... for several runs."
        ),
    ] = None,
) -> None:
    """Make a page of a run, or of several side by side: index.html and report.md."""
    from constrained_ft.cli.display import make_display

    with make_display(settings.console(), quiet=settings.quiet) as display:
        from constrained_ft.report import report_command

        written = report_command(runs, output)
        for reason in written.left_out:
            settings.warn(f"left out: {reason}")
        display.panel(
            "Report",
            {
                "verdict": written.headline,
                "page": str(written.page),
                "markdown": str(written.markdown),
            },
        )
