"""`cft chat`: prompts from the keyboard or a pipe, answered by base, tuned and guided."""

import sys
from collections.abc import Iterator
from typing import Annotated

import typer

from constrained_ft.cli.measure import Seed
from constrained_ft.cli.settings import settings
from constrained_ft.errors import DataError

__all__ = ["chat"]


def chat(
    run: Annotated[str, typer.Argument(metavar="RUN", help="The folder of a finished run.")],
    n: Annotated[int, typer.Option("--n", min=1, help="Answers of each.")] = 1,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Longest answer, in tokens; the run's own if left out."),
    ] = None,
    seed: Seed = 0,
) -> None:
    """Answer prompts by base, tuned and guided model side by side, with the scorer's scores.

    A line is a prompt, completed on its own; an empty line or /quit ends.
    """
    from constrained_ft.cli.display import clean, make_display

    settings.prepare_libraries()
    console = settings.console()
    asks = sys.stdin.isatty()
    with make_display(settings.console(stderr=True), quiet=settings.quiet) as display:
        from constrained_ft.chat import load_chat, table

        voices = load_chat(run, max_new_tokens=max_new_tokens, seed=seed, display=display)
    if asks:
        console.print("a prompt a line; an empty line or /quit ends", style="dim")
    for turn, prompt in enumerate(_prompts(asks=asks)):
        try:
            with make_display(settings.console(stderr=True), quiet=not asks) as display:
                answers = voices.answer(prompt, n=n, turn=turn, display=display)
        except DataError as error:
            # A person types another one; a script has to hear of it.
            if not asks:
                raise
            settings.complain(str(error))
            continue
        with make_display(console) as display:
            display.table(clean(prompt), *table(answers))


def _prompts(*, asks: bool) -> Iterator[str]:
    """Lines of standard input up to the end, an empty one or /quit."""
    while True:
        try:
            line = input("> ") if asks else sys.stdin.readline().removesuffix("\n")
        except (EOFError, KeyboardInterrupt):
            return
        if not line.strip() or line.strip() == "/quit":
            return
        yield line
