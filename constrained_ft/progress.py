"""What a run tells the person who watches it; drawing it is the command line's business."""

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

__all__ = ["Display", "Silent"]


@runtime_checkable
class Display(Protocol):
    """Where stages report what they do. Numbers are metrics under the names that are shown."""

    def panel(self, title: str, rows: Mapping[str, str]) -> None:
        """Facts in a box, such as the resolved run before it starts."""

    def phase(self, name: str, total: int) -> None:
        """A phase begins that has `total` units of work; the one before has ended."""

    def advance(self, amount: int = 1, **numbers: float) -> None:
        """Units of work are done; the latest numbers to show beside them."""

    def iteration(self, number: int, of: int, numbers: Mapping[str, float]) -> None:
        """An iteration is finished, with its numbers."""

    def sample(self, prompt: str, before: str, after: str, score: float | None) -> None:
        """Completions of a fixed prompt before and after, with the latter's score, if any."""

    def note(self, text: str) -> None:
        """Something worth knowing, once."""

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Results."""


class Silent:
    """A display that shows nothing."""

    def panel(self, title: str, rows: Mapping[str, str]) -> None:
        """Show nothing."""

    def phase(self, name: str, total: int) -> None:
        """Show nothing."""

    def advance(self, amount: int = 1, **numbers: float) -> None:
        """Show nothing."""

    def iteration(self, number: int, of: int, numbers: Mapping[str, float]) -> None:
        """Show nothing."""

    def sample(self, prompt: str, before: str, after: str, score: float | None) -> None:
        """Show nothing."""

    def note(self, text: str) -> None:
        """Show nothing."""

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Show nothing."""
