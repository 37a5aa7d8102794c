"""One row of scripts/bench.py."""

from collections.abc import Callable
from dataclasses import dataclass

Work = Callable[[], object]


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """One row: what we do over what is done elsewhere."""

    name: str
    ours: Work | None
    theirs: Work | None
    must: float
    aim: float
    value: Callable[[], float] | None = None
    """Where it is no ratio of times, or runs processes of its own."""
    own_load: bool = False
    """Whether what loads the machine is what is measured."""
