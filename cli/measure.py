"""`cft evaluate`, `cft generate` and `cft selfcheck`."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from constrained_ft.cli.settings import settings
from constrained_ft.errors import ConfigError, DataError

__all__ = ["evaluate", "generate", "selfcheck"]

Seed = Annotated[int, typer.Option(min=0, help="Seed of the samples.")]
PromptsFile = Annotated[
    Path | None,
    typer.Option("--prompts", metavar="FILE", help="One prompt a line, or JSONL with `prompt`."),
]


def evaluate(
    targets: Annotated[
        list[str],
        typer.Argument(metavar="RUN_OR_MODEL...", help="Run folders, model folders or hub ids."),
    ],
    prompts: PromptsFile = None,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE.json", help="Write the numbers to a file.")
    ] = None,
    max_prompts: Annotated[
        int | None, typer.Option(min=1, help="Prompts used, of each group.")
    ] = None,
    samples_per_prompt: Annotated[
        int | None, typer.Option(min=2, help="Completions sampled for each prompt.")
    ] = None,
    evaluation: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="What is measured: quick, full, detection; the run's own if left out.",
        ),
    ] = None,
    guided: Annotated[
        bool,
        typer.Option("--guided", help="Also measure each run with its auxiliary guiding decoding."),
    ] = False,
    best_of: Annotated[
        int, typer.Option(min=1, help="Also measure the best of so many completions, of each run.")
    ] = 1,
    benchmarks: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            help="Also measure accuracy on these: all, mmlu, piqa, ... (docs/evaluation.md).",
        ),
    ] = None,
    benchmark_limit: Annotated[
        int | None, typer.Option(min=0, help="Items of each benchmark; 0: all.")
    ] = None,
    seed: Seed = 0,
) -> None:
    """Measure satisfaction, a judge that training never saw, and what became of the language."""
    from constrained_ft.cli.display import make_display

    settings.prepare_libraries()
    with make_display(settings.console(), quiet=settings.quiet) as display:
        from constrained_ft.compare import evaluate_command

        evaluate_command(
            targets,
            prompts_file=prompts,
            output=output,
            max_prompts=max_prompts,
            samples_per_prompt=samples_per_prompt,
            evaluation=evaluation,
            guided=guided,
            best_of=best_of,
            benchmarks=None if benchmarks is None else _names(benchmarks),
            benchmark_limit=benchmark_limit,
            seed=seed,
            display=display,
        )


def generate(
    target: Annotated[
        str, typer.Argument(metavar="RUN_OR_MODEL", help="A run folder, model folder or hub id.")
    ],
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", metavar="TEXT", help="May be given repeatedly.")
    ] = None,
    prompts: PromptsFile = None,
    n: Annotated[int, typer.Option("--n", min=1, help="Completions of each prompt.")] = 1,
    guided: Annotated[
        bool, typer.Option("--guided", help="Let the run's auxiliary guide every token.")
    ] = False,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest completion, in tokens.")
    ] = None,
    seed: Seed = 0,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE.jsonl", help="Write the completions to a file.")
    ] = None,
) -> None:
    """Complete prompts, with or without the auxiliary's guidance."""
    from constrained_ft.cli.display import make_display

    if (prompt is None) == (prompts is None):
        raise ConfigError("give the prompts either as --prompt TEXT or as --prompts FILE")
    texts = prompt if prompts is None else _read_prompts(prompts)
    settings.prepare_libraries()
    # Standard output is for the completions.
    with make_display(settings.console(stderr=True), quiet=settings.quiet) as display:
        from constrained_ft.generate import generate_command

        rows = generate_command(
            target,
            prompts=texts or [],
            n=n,
            guided=guided,
            max_new_tokens=max_new_tokens,
            seed=seed,
            display=display,
        )
        if output is not None:
            from constrained_ft.run_folder import write_atomically

            write_atomically(output, "".join(_json_line(row) for row in rows))
            display.note(f"{len(rows):,} completions in {output}")
            return
    _print_rows(rows)


def selfcheck() -> None:
    """Verify the mathematics on this machine."""
    from constrained_ft.cli.display import make_display

    settings.prepare_libraries()
    with make_display(settings.console(), quiet=settings.quiet) as display:
        from constrained_ft.selfcheck import selfcheck as run_selfcheck

        holds = run_selfcheck(display)
    if not holds:
        settings.complain("a claim does not hold on this machine")
        raise typer.Exit(1)


def _names(listed: str) -> list[str]:
    """Names between commas."""
    return [name for part in listed.split(",") if (name := part.strip())]


def _read_prompts(file: Path) -> list[str]:
    """One prompt a line, or JSONL rows that hold a `prompt`."""
    if not file.is_file():
        raise DataError(f"there is no file {file}")
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    if file.suffix == ".jsonl":
        lines = [_prompt_of(line, f"{file}, row {number}") for number, line in enumerate(lines, 1)]
    if not lines:
        raise DataError(f"{file} holds no prompts")
    return lines


def _prompt_of(line: str, where: str) -> str:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where} is not JSON: {error}") from None
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise DataError(f"{where} has no text under `prompt`")
    return str(row["prompt"])


def _print_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    """Readable on a terminal, one JSON row a line elsewhere."""
    from rich.text import Text

    from constrained_ft.cli.display import clean

    console = settings.console()
    if not console.is_terminal:
        for row in rows:
            typer.echo(_json_line(row), nl=False)
        return
    shown = ""
    for row in rows:
        if row["prompt"] != shown:
            shown = row["prompt"]
            console.print(Text(clean(shown), style="italic cyan"))
        tail = f"  {row['score']:.2f}" if row.get("score") is not None else ""
        console.print(Text(f"  {clean(row['completion'])}").append(tail, style="dim"))


def _json_line(row: Mapping[str, Any]) -> str:
    return json.dumps(dict(row), ensure_ascii=False) + "\n"
