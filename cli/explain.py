"""`cft explain`: texts coloured by what a run's auxiliary makes of them."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from constrained_ft.cli.settings import settings
from constrained_ft.errors import ConfigError

if TYPE_CHECKING:
    from rich.text import Text

    from constrained_ft.explain import ExplainedRun, Explanation, Word

__all__ = ["explain"]

_BLOCKS = "▁▂▃▄▅▆▇█"
_AGAINST, _FOR = (240, 120, 107), (99, 184, 124)


def explain(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Folders of finished runs.")],
    text: Annotated[
        list[str], typer.Option("--text", metavar="TEXT", help="May be given repeatedly.")
    ],
    prompt: Annotated[
        str, typer.Option("--prompt", metavar="TEXT", help="What the texts follow, word for word.")
    ] = "",
    html: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="Also write one page, to be kept.")
    ] = None,
    alternatives: Annotated[
        int, typer.Option(min=1, max=20, help="Next tokens shown of the model and of the target.")
    ] = 3,
) -> None:
    """Show which words speak against the constraint, and what the target would have said."""
    from constrained_ft.cli.display import make_display

    if html is not None and (html.is_dir() or not html.absolute().parent.is_dir()):
        raise ConfigError(f"--html {html}: give a file in a folder that exists")
    settings.prepare_libraries()
    console = settings.console()
    with make_display(settings.console(stderr=True), quiet=settings.quiet) as display:
        from constrained_ft.explain import explain_command, legends

        found = explain_command(
            runs, texts=text, prompt=prompt, alternatives=alternatives, display=display
        )
    if html is not None:
        from constrained_ft.explain_page import page
        from constrained_ft.run_folder import write_atomically

        write_atomically(html, page(found))
    for number in range(len(text)):
        for run in found:
            _show(run, run.texts[number])
    if not settings.quiet:
        for line in legends(found):
            console.print(f"[dim]·[/] {line}", style="dim", width=min(console.width, 100))
        if html is not None:
            console.print(f"the page is {html}", markup=False, soft_wrap=True)


def _show(run: "ExplainedRun", explanation: "Explanation") -> None:
    """One text through one run: the words, R below them, a table of the tokens."""
    from rich.text import Text

    from constrained_ft.cli.display import PlainDisplay, clean
    from constrained_ft.explain import summary

    console = settings.console()
    console.print(Text(run.name, style="bold"), soft_wrap=True)
    if explanation.prompt:
        console.print(Text(clean(explanation.prompt), style="italic cyan"))
    console.print(_coloured(explanation.words))
    line = "".join(_block(word.satisfaction) for word in explanation.words)
    console.print(Text("R, a bar for each word: ", style="dim").append(line, style="blue"))
    console.print(Text(summary(explanation)), soft_wrap=not console.is_terminal)
    columns = ["token", "evidence", "R after", "p", "q / p"]
    columns += ["likeliest of p", "likeliest of q (× q / p)"]
    PlainDisplay(console).table("", columns, list(_rows(explanation.words)))


def _coloured(words: "tuple[Word, ...]") -> "Text":
    """The text; strong evidence stands behind its word, for terminals without colours too."""
    from rich.color import Color
    from rich.style import Style
    from rich.text import Text

    from constrained_ft.cli.display import clean
    from constrained_ft.explain_page import WORTH_SAYING, strength

    line = Text()
    for word in words:
        share = strength(word.evidence)
        red, green, blue = (
            round(255 + (end - 255) * share) for end in (_AGAINST if word.evidence < 0 else _FOR)
        )
        style = Style(color="black", bgcolor=Color.from_rgb(red, green, blue))
        spaced = " " if word.text[:1].isspace() else ""
        line.append(spaced).append(clean(word.text), style=style if share > 0.05 else "")
        if abs(word.evidence) >= WORTH_SAYING:
            line.append(f"[{word.evidence:+.1f}]", style="dim")
    return line


def _block(satisfaction: float) -> str:
    return _BLOCKS[min(int(satisfaction * len(_BLOCKS)), len(_BLOCKS) - 1)]


def _rows(words: "tuple[Word, ...]") -> Iterator[list[str]]:
    from constrained_ft.explain_page import choices, percent, shown

    for word in words:
        for place, token in enumerate(word.tokens):
            yield [
                shown(token.text) if place == 0 else f"  +{shown(token.text)}",
                f"{token.evidence:+.2f}",
                f"{token.satisfaction:.2f}",
                percent(token.said.p),
                f"{token.said.ratio:.2g}",
                ", ".join(choices(token.of_model, target=False)),
                ", ".join(choices(token.of_target, target=True)),
            ]
