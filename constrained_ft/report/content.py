"""What a report consists of; `page.py` gives it its two forms."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from constrained_ft.report.drawing import Chart
from constrained_ft.report.reading import Sample
from constrained_ft.report.verdict import Table, Verdict


@dataclass(frozen=True, kw_only=True)
class SampleTable:
    """Completions side by side."""

    title: str
    note: str
    columns: Sequence[tuple[str, str]]
    """Key and heading of everything that was said."""
    samples: Sequence[Sample]


@dataclass(frozen=True, kw_only=True)
class Section:
    """One part of a report; what is empty is not shown."""

    title: str
    key: str
    note: str = ""
    charts: Sequence[Chart] = ()
    tables: Sequence[tuple[str, Table]] = ()
    samples: Sequence[SampleTable] = ()
    text: str = ""
    """Shown as it is, such as a command."""


@dataclass(frozen=True, kw_only=True)
class Content:
    """A whole report."""

    title: str
    subtitle: str
    notices: Sequence[str]
    """What a reader has to know first: the run failed, a file is damaged."""
    next_command: str
    verdict: Verdict
    verdict_charts: Sequence[Chart]
    sections: Sequence[Section]
    runs: Mapping[str, Sequence[Section]] = field(default_factory=dict)
    """Of several runs, the sections of each, folded."""

    @property
    def charts(self) -> Iterator[Chart]:
        """All figures."""
        yield from self.verdict_charts
        for section in self.sections:
            yield from section.charts


def shown(*sections: Section) -> list[Section]:
    """Those that hold something."""
    return [one for one in sections if one.charts or one.tables or one.samples or one.text]
