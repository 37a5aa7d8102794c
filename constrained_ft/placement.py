"""Where stage 1 runs. The schedule, which target an update reads, is decided in `train`."""

from collections.abc import Callable
from typing import ParamSpec, Protocol, runtime_checkable

from constrained_ft.target import Target

P = ParamSpec("P")


@runtime_checkable
class Pending(Protocol):
    """A target being learned."""

    def wait(self) -> Target:
        """The target, once it is there; the same one however often it is asked for."""
        ...


@runtime_checkable
class Placement(Protocol):
    """Runs stage 1 somewhere."""

    def start(self, learn: Callable[P, Target], *args: P.args, **kwargs: P.kwargs) -> Pending:
        """Begin to learn a target."""
        ...


class Done:
    """A target that is already learned."""

    def __init__(self, target: Target) -> None:
        self._target = target

    def wait(self) -> Target:
        """The target."""
        return self._target


class Inline:
    """This process learns the target at once, before `start` returns.

    The reference is a frozen copy, so learning before the LLM update gives what learning meanwhile
    would give: the overlapped algorithm, run serially.
    """

    def start(self, learn: Callable[P, Target], *args: P.args, **kwargs: P.kwargs) -> Pending:
        """Learn the target now."""
        return Done(learn(*args, **kwargs))
