"""Where a run's time goes: seconds, tokens and padding of each phase."""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from constrained_ft.packing import Slots


@dataclass(kw_only=True)
class Spent:
    """What one phase took, over all iterations of this process."""

    seconds: float = 0.0
    tokens: int = 0
    """Tokens read by the LLM; for phases that run no LLM, tokens scored or fitted."""
    slots: int = 0
    """Places computed for the tokens that the LLM read; the rest of them is padding."""


class Phases:
    """A stopwatch for each phase; one runs at a time."""

    def __init__(self, slots: Slots, clock: Callable[[], float] = time.monotonic) -> None:
        self._slots = slots
        self._clock = clock
        self._begun = clock()
        self._spent: dict[str, Spent] = {}

    @contextmanager
    def during(self, name: str) -> Iterator[Spent]:
        """Add what happens inside to a phase. Where no LLM runs, add its `tokens` by hand."""
        spent = self._spent.setdefault(name, Spent())
        started, used, total = self._clock(), self._slots.used, self._slots.total
        try:
            yield spent
        finally:
            spent.seconds += self._clock() - started
            spent.tokens += self._slots.used - used
            spent.slots += self._slots.total - total

    def spent(self) -> dict[str, Spent]:
        """All phases; `idle` is the time since the beginning that belongs to none."""
        idle = self._clock() - self._begun - sum(one.seconds for one in self._spent.values())
        return {**self._spent, "idle": Spent(seconds=idle)}


def table(spent: Mapping[str, Spent]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows for people."""
    total = sum(one.seconds for one in spent.values())
    columns = ["", "seconds", "share", "tokens", "tokens/s", "padding"]
    return columns, [_row(name, one, total) for name, one in spent.items()]


def _row(name: str, one: Spent, total: float) -> list[str]:
    return [
        name,
        f"{one.seconds:.1f}",
        f"{one.seconds / total:.0%}",
        f"{one.tokens:,}" if one.tokens else "–",
        f"{one.tokens / one.seconds:,.0f}" if one.tokens and one.seconds else "–",
        f"{1 - one.tokens / one.slots:.1%}" if one.slots else "–",
    ]


def save(path: Path, spent: Mapping[str, Spent], memory: Mapping[str, int | None]) -> None:
    """Write it as JSON: seconds, tokens and slots of each phase, and memory in bytes."""
    phases = {name: vars(one) for name, one in spent.items()}
    path.write_text(json.dumps({"phases": phases, "memory": memory}, indent=2) + "\n")
