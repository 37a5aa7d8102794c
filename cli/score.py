"""`cft score`: a scorer on its own, tested, timed, calibrated and trained."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from constrained_ft.cli.launch import ConfigDirs, Overrides, Request
from constrained_ft.cli.settings import settings
from constrained_ft.errors import ConfigError

if TYPE_CHECKING:
    from constrained_ft.config import Config

__all__ = ["app"]

app = typer.Typer(
    help="A scorer on its own: run it, test it, calibrate it, train one.", no_args_is_help=True
)

Rows = Annotated[
    Path,
    typer.Argument(
        metavar="FILE_OR_FOLDER",
        help="JSONL with `completion` or `text`, lines of text, or a folder of such files.",
    ),
]
Labelled = Annotated[
    Path, typer.Argument(metavar="FILE.jsonl", help="Rows with `label`: 1 satisfied, 0 violated.")
]


@app.command()
def run(
    rows: Rows,
    overrides: Overrides = None,
    config_dir: ConfigDirs = None,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE.jsonl", help="Write the scores to a file.")
    ] = None,
) -> None:
    """Score the completions of a file or a folder; rows go to standard output or to --output."""
    from constrained_ft.cli.display import make_display

    config = _config(overrides, config_dir)
    settings.prepare_libraries()
    with make_display(settings.console(stderr=True), quiet=settings.quiet) as display:
        from constrained_ft.run_folder import write_atomically
        from constrained_ft.score import read_items, run_command

        found = run_command(read_items(rows), config, display)
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found)
        if output is not None:
            write_atomically(output, lines)
            display.note(f"{len(found):,} scores in {output}")
            return
    typer.echo(lines, nl=False)


@app.command("test")
def show(
    overrides: Overrides = None,
    text: Annotated[
        list[str] | None, typer.Option("--text", metavar="TEXT", help="May be given repeatedly.")
    ] = None,
    prompt: Annotated[
        str, typer.Option("--prompt", metavar="TEXT", help="What the texts follow.")
    ] = "",
    file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Rows as `cft score run` reads them.")
    ] = None,
    config_dir: ConfigDirs = None,
) -> None:
    """Show what a scorer says of a few texts, part by part, and why."""
    from constrained_ft.cli.display import make_display

    if (text is None) == (file is None):
        raise ConfigError("give the texts either as --text TEXT or as --file FILE")
    config = _config(overrides, config_dir)
    settings.prepare_libraries()
    from constrained_ft.score import Item, read_items, test_command

    items = (
        [Item(prompt=prompt, completion=one, label=None, where="--text") for one in text or []]
        if file is None
        else read_items(file)
    )
    rows = test_command(items, config)
    with make_display(settings.console(), quiet=False) as display:
        display.table("What the scorer says", ["text", "scorer", "score", "why"], rows)


@app.command()
def calibrate(
    rows: Labelled,
    overrides: Overrides = None,
    precision: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Wanted: of what is accepted, the share that satisfies."),
    ] = None,
    recall: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Wanted: of what satisfies, the share accepted."),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Write a reliability diagram.")
    ] = None,
    config_dir: ConfigDirs = None,
) -> None:
    """Find the threshold for a wanted precision or recall on labelled rows."""
    from constrained_ft.cli.display import make_display

    if (precision is None) == (recall is None):
        raise ConfigError("give either --precision or --recall")
    config = _config(overrides, config_dir)
    settings.prepare_libraries()
    from constrained_ft.score import calibrate_command, read_items

    found = calibrate_command(
        read_items(rows), config, precision=precision, recall=recall, plot=plot
    )
    table = [
        ["threshold", f"{found.threshold:.4f}"],
        ["precision", found.precision.percent()],
        ["recall", found.recall.percent()],
        ["accuracy", f"{100 * found.accuracy:.1f} %"],
        ["area under the ROC curve", f"{found.area:.3f}"],
        ["Brier score", f"{found.brier:.3f}"],
        ["calibration error", f"{found.calibration_error:.3f}"],
        ["rows", f"{found.count:,}, {found.satisfied:,} satisfied, {found.missing:,} unscored"],
    ]
    with make_display(settings.console(), quiet=False) as display:
        display.table("Calibration", ["", ""], table)
        if plot is not None:
            display.note(f"reliability diagram in {plot}")
        display.note(f"use it with: constraint.satisfied_at={found.threshold:.4f}")


@app.command()
def fit(
    rows: Labelled,
    output: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the probe goes.")],
    overrides: Overrides = None,
    config_dir: ConfigDirs = None,
) -> None:
    """Train a linear probe on sentence embeddings from labelled rows."""
    from constrained_ft.cli.display import make_display
    from constrained_ft.scorer_config import EmbeddingScorerConfig

    given = ["constraint=embedding", "constraint.scorer.references=[none]", *(overrides or ())]
    scorer = _config(given, config_dir).constraint.scorer
    if not isinstance(scorer, EmbeddingScorerConfig):
        raise ConfigError("cft score fit trains a probe for constraint=embedding and no other")
    settings.prepare_libraries()
    from constrained_ft.score import fit_command, read_items

    facts = fit_command(read_items(rows), scorer, output)
    table = [[name.replace("_", " "), f"{value:.4g}"] for name, value in facts.items()]
    with make_display(settings.console(), quiet=False) as display:
        display.table("Held-out rows", ["", ""], table)
        display.note(
            f"use it with: constraint=embedding constraint.scorer.probe={output} "
            "constraint.scorer.model_name_or_path=null"
        )


@app.command()
def cache(
    clear: Annotated[bool, typer.Option("--clear", help="Forget all of them.")] = False,
) -> None:
    """Show the scores that are kept for all runs, or forget them."""
    from constrained_ft.cli.display import make_display

    settings.prepare_libraries()
    from constrained_ft.score import cache_command
    from constrained_ft.scorers import user_cache

    counts = cache_command(clear=clear)
    with make_display(settings.console(), quiet=False) as display:
        rows = [[name, f"{count:,}"] for name, count in counts.items()]
        display.table("Kept scores", ["scorer", "scores"], rows)
        display.note(f"in {user_cache()}")
        if clear:
            display.note(f"forgot {sum(counts.values()):,} scores")


def _config(overrides: list[str] | None, config_dir: list[Path] | None) -> "Config":
    folders = tuple(config_dir or ())
    return Request(overrides=tuple(overrides or ()), config_file=None, config_dirs=folders).config()
