"""Draw what a run reports: a live picture on a terminal, plain lines anywhere else."""

import time
import unicodedata
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, JustifyMethod, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from constrained_ft.progress import Display

__all__ = ["PlainDisplay", "Several", "TerminalDisplay", "logged_display", "make_display"]

_WIDTH = 110  # wider lines are hard to read
_LOG_WIDTH = 160
_SAMPLES_SHOWN = 3
_SECONDS_BETWEEN_LINES = 60.0

# Of a row of metrics, what is shown of an iteration, and under which name.
_HEADLINE = {
    "rollouts/satisfaction": "satisfaction",
    "update/ce": "ce",
    "update/kl": "kl",
    "auxiliary/auc_last": "auc",
}
_NUMBERS_SHOWN = 5

Clock = Callable[[], float]


@contextmanager
def make_display(
    console: Console, *, quiet: bool = False
) -> "Iterator[PlainDisplay | TerminalDisplay]":
    """The display that suits a console; its live picture is taken down at the end."""
    if quiet or not console.is_terminal:
        yield PlainDisplay(console, quiet=quiet)
        return
    display = TerminalDisplay(console)
    try:
        yield display
    finally:
        display.close()


@contextmanager
def logged_display(console: Console, logs: Path, rank: int, *, quiet: bool) -> Iterator[Display]:
    """The display of one process of a run; all of it also goes into the process's log.

    Args:
        console: what the first rank draws on; the others draw nothing.
        logs: the folder of this start's logs.
        rank: which process.
        quiet: show results and errors only.
    """
    logs.mkdir(parents=True, exist_ok=True)
    with (logs / f"rank_{rank}.log").open("a", encoding="utf-8") as file:
        log = PlainDisplay(Console(file=file, width=_LOG_WIDTH, no_color=True, highlight=False))
        if rank > 0:
            yield log
            return
        with make_display(console, quiet=quiet) as drawn:
            yield Several(drawn, log)


class Several:
    """Several displays as one."""

    def __init__(self, *displays: Display) -> None:
        self._displays = displays

    def panel(self, title: str, rows: Mapping[str, str]) -> None:
        """Each shows it."""
        for one in self._displays:
            one.panel(title, rows)

    def phase(self, name: str, total: int) -> None:
        """Each shows it."""
        for one in self._displays:
            one.phase(name, total)

    def advance(self, amount: int = 1, **numbers: float) -> None:
        """Each shows it."""
        for one in self._displays:
            one.advance(amount, **numbers)

    def iteration(self, number: int, of: int, numbers: Mapping[str, float]) -> None:
        """Each shows it."""
        for one in self._displays:
            one.iteration(number, of, numbers)

    def sample(self, prompt: str, before: str, after: str, score: float | None) -> None:
        """Each shows it."""
        for one in self._displays:
            one.sample(prompt, before, after, score)

    def note(self, text: str) -> None:
        """Each shows it."""
        for one in self._displays:
            one.note(text)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Each shows it."""
        for one in self._displays:
            one.table(title, columns, rows)


class PlainDisplay:
    """Lines for logs and pipes: one a phase and an iteration, no control characters."""

    def __init__(
        self, console: Console, *, quiet: bool = False, clock: Clock = time.monotonic
    ) -> None:
        self._console = console
        self._quiet = quiet
        self._clock = clock
        self._begun = clock()
        self._said = self._begun
        self._phase, self._done, self._total = "", 0, 0
        self._numbers: dict[str, float] = {}

    def panel(self, title: str, rows: Mapping[str, str]) -> None:
        """The title, then one line a row."""
        width = max((len(name) for name in rows), default=0)
        self._print(title, *(f"  {name:<{width}}  {clean(text)}" for name, text in rows.items()))

    def phase(self, name: str, total: int) -> None:
        """One line when a phase begins."""
        self._phase, self._done, self._total = name, 0, total
        self._numbers.clear()
        self._say(f"{name} ({total:,})" if total > 1 else name)

    def advance(self, amount: int = 1, **numbers: float) -> None:
        """A line a minute while a phase lasts."""
        self._done += amount
        self._numbers |= numbers
        if self._clock() - self._said >= _SECONDS_BETWEEN_LINES:
            facts = [f"{self._phase} {self._done:,}/{self._total:,}", *_pairs(self._numbers)]
            self._say(", ".join(facts))

    def iteration(self, number: int, of: int, numbers: Mapping[str, float]) -> None:
        """One line when an iteration is finished."""
        self._say(f"iteration {number} of {of} done: {', '.join(_pairs(_headline(numbers)))}")

    def sample(self, prompt: str, before: str, after: str, score: float | None) -> None:
        """Three lines."""
        self._print(
            f"  prompt  {clean(prompt)}",
            f"  before  {clean(before)}",
            f"  after   {clean(after)} [{_score(score)}]",
        )

    def note(self, text: str) -> None:
        """One line."""
        self._say(text)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """The table, also when quiet: it is the result."""
        self._console.print(_table(title, columns, rows))

    def _say(self, text: str) -> None:
        self._said = self._clock()
        self._print(f"{_duration(self._said - self._begun):>7}  {text}")

    def _print(self, *lines: str) -> None:
        if not self._quiet:
            for line in lines:
                # Logs are read while they grow.
                self._console.print(line, markup=False, highlight=False, soft_wrap=True, style=None)
                self._console.file.flush()


class TerminalDisplay:
    """What is finished scrolls by; the present phase, its numbers and samples stay below."""

    def __init__(self, console: Console, *, clock: Clock = time.monotonic) -> None:
        self._console = console
        self._clock = clock
        self._begun = clock()
        self._phase, self._done, self._total = "", 0, 0
        self._phase_begun = self._begun
        self._numbers: dict[str, float] = {}
        self._samples: deque[tuple[str, str, str, float | None]] = deque(maxlen=_SAMPLES_SHOWN)
        self._iteration_begun = self._begun
        self._seconds: list[float] = []  # of each iteration seen
        self._finished, self._of = 0, 0
        self._live: Live | None = None

    def panel(self, title: str, rows: Mapping[str, str]) -> None:
        """A box of facts, names at the left."""
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="cyan", no_wrap=True)
        grid.add_column(overflow="fold")
        for name, text in rows.items():
            grid.add_row(name, clean(text))
        box = Panel(grid, title=f"[bold]{title}[/]", title_align="left", border_style="dim")
        self._print(box)

    def phase(self, name: str, total: int) -> None:
        """The live picture turns to a new phase."""
        now = self._clock()
        self._phase, self._done, self._total, self._phase_begun = name, 0, total, now
        self._numbers.clear()
        if self._live is None:
            self._live = Live(
                console=self._console,
                get_renderable=self._picture,
                refresh_per_second=4,
                transient=True,
            )
            self._live.start()
            # A second Ctrl-C ends the process at once; the cursor must not stay hidden then.
            self._console.show_cursor(True)

    def advance(self, amount: int = 1, **numbers: float) -> None:
        """The bar moves; the numbers below it are the latest."""
        self._done += amount
        self._numbers |= numbers

    def iteration(self, number: int, of: int, numbers: Mapping[str, float]) -> None:
        """One line that stays."""
        now = self._clock()
        line = Text(f"iteration {number}/{of}", style="bold")
        for pair in _pairs(_headline(numbers)):
            name, _, value = pair.rpartition(" ")
            line.append(f"   {name} ", style="dim not bold").append(value, style="cyan not bold")
        line.append(f"   {_duration(now - self._iteration_begun)}", style="dim not bold")
        self._print(line)
        self._finished, self._of = number, of
        self._seconds.append(now - self._iteration_begun)
        self._iteration_begun = now

    def sample(self, prompt: str, before: str, after: str, score: float | None) -> None:
        """The latest few stay in view."""
        self._samples.append((clean(prompt), clean(before), clean(after), score))

    def note(self, text: str) -> None:
        """One line that stays."""
        self._print(Text(text, style="yellow"))

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """The table; nothing is in progress any more."""
        self.close()
        self._console.print(_table(title, columns, rows))

    def close(self) -> None:
        """Take the live picture down."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _print(self, thing: RenderableType) -> None:
        self._console.print(thing, width=min(self._console.width, _WIDTH))

    def _picture(self) -> RenderableType:
        width = min(self._console.width, _WIDTH)
        parts: list[RenderableType] = []
        for sample in self._samples:
            parts.append(_sample_lines(*sample, width=width))
        head = Table.grid(expand=True)
        head.add_column(no_wrap=True, overflow="ellipsis")
        head.add_column(justify="right", no_wrap=True)
        head.add_row(Text(self._where(), style="bold"), Text(self._time_left(), style="dim"))
        bar = Table.grid(expand=True)
        bar.add_row(
            ProgressBar(
                total=max(self._total, 1),
                completed=self._done,
                pulse=self._total <= 1 and self._done == 0,
                complete_style="cyan",
                finished_style="cyan",
            )
        )
        foot = Table.grid(expand=True)
        foot.add_column(no_wrap=True, overflow="ellipsis")
        foot.add_column(justify="right", no_wrap=True)
        numbers = Text()
        for pair in _pairs(self._numbers):
            name, _, value = pair.rpartition(" ")
            numbers.append(f"{name} ", style="dim").append(f"{value}   ")
        foot.add_row(numbers, Text(self._run_time(), style="dim"))
        parts += [Text(), head, bar, foot]
        return Padding(Group(*parts), (0, max(0, self._console.width - width), 0, 0))

    def _where(self) -> str:
        if self._of and self._finished < self._of:
            return f"iteration {self._finished + 1}/{self._of} · {self._phase}"
        return self._phase

    def _time_left(self) -> str:
        count = f"{min(self._done, self._total):,}/{self._total:,}" if self._total > 1 else ""
        if not 0 < self._done < self._total:
            return count
        spent = self._clock() - self._phase_begun
        return f"{count} · {_duration(spent / self._done * (self._total - self._done))} left"

    def _run_time(self) -> str:
        """Time since the start and, once an iteration has been seen, what remains of them."""
        now = self._clock()
        text = f"{_duration(now - self._begun)} so far"
        if self._finished == 0 or self._finished >= self._of:
            return text
        # The first also held loading and measuring the base.
        seen = self._seconds[1:] or self._seconds
        left = (self._of - self._finished) * sum(seen) / len(seen) - (now - self._iteration_begun)
        return f"{text} · about {_duration(max(left, 0.0))} to go"


def clean(text: str) -> str:
    """One line of what a model wrote, without what could move the cursor."""
    kept = "".join(c if unicodedata.category(c)[0] != "C" else " " for c in text)
    return " ".join(kept.split())


def _headline(numbers: Mapping[str, float]) -> dict[str, float]:
    """The few numbers of an iteration that fit on a line."""
    chosen = {short: numbers[name] for name, short in _HEADLINE.items() if name in numbers}
    return chosen or dict(list(numbers.items())[:_NUMBERS_SHOWN])


def _pairs(numbers: Mapping[str, float]) -> list[str]:
    """`name value`, in the order given."""
    return [f"{name.replace('_', ' ')} {_number(value)}" for name, value in numbers.items()]


def _number(value: float) -> str:
    if value == int(value) and abs(value) >= 10:
        return f"{int(value):,}"
    return f"{value:.3f}" if 0.0005 <= abs(value) < 1000 or value == 0 else f"{value:.2e}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _score(score: float | None) -> str:
    return "no score" if score is None else f"{score:.2f}"


def _sample_lines(prompt: str, before: str, after: str, score: float | None, *, width: int) -> Text:
    """Prompt and both completions, one line each."""
    lines = Text()
    for name, text, style in (
        ("prompt", prompt, "italic"),
        ("before", before, "dim"),
        ("after", after, ""),
    ):
        tail = f"  {_score(score)}" if name == "after" else ""
        room = width - 9 - len(tail)
        lines.append(f"{name:>6}  ", style="dim")
        shown = Text(text, style=style)
        shown.truncate(room, overflow="ellipsis")
        lines.append_text(shown).append(tail, style="cyan").append("\n")
    lines.rstrip()
    return lines


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        header_style="bold",
        border_style="dim",
        box=SIMPLE_HEAD,
    )
    for index, column in enumerate(columns):
        numbers = all(row[index][:1] in "0123456789-–+." for row in rows)
        side: JustifyMethod = "right" if numbers and index > 0 else "left"
        # A narrow terminal gets more lines, never half a number.
        table.add_column(column, justify=side, overflow="fold")
    for row in rows:
        table.add_row(*(Text(clean(cell)) for cell in row))
    return table
