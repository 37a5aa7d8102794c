"""What came of a run, in plain words and in one table.

A change is called one only where the data say so: the interval of the differences prompt by prompt
leaves out zero, or, where there are none, the two intervals do not overlap.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from constrained_ft.intervals import Interval
from constrained_ft.paired import Difference
from constrained_ft.report.reading import Run
from constrained_ft.results import Evaluation

Change = Literal["lower", "higher", "unclear"]
Tone = Literal["as hoped", "mixed", "not as hoped", "unknown"]


@dataclass(frozen=True, kw_only=True)
class Table:
    """Columns and rows of text; the first cell of a row is its name."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One number of the base and of the fine-tuned model."""

    kind: Literal["violations", "judge", "perplexity"]
    name: str
    before: Interval
    after: Interval
    difference: Difference | None = None

    @property
    def change(self) -> Change:
        """Which way it went, if that is clear."""
        low, high = (
            (self.after.low - self.before.high, self.after.high - self.before.low)
            if self.difference is None
            else (self.difference.difference.low, self.difference.difference.high)
        )
        return "lower" if high < 0 else "higher" if low > 0 else "unclear"

    def shown(self, interval: Interval) -> str:
        """For a table."""
        return interval.plain() if self.kind == "perplexity" else interval.percent()

    def change_in_words(self) -> str:
        """For a table."""
        if self.kind == "perplexity":
            size = f"{100 * (self.after.mean / self.before.mean - 1):+.0f} %"
        elif self.difference is None:
            size = f"{100 * (self.after.mean - self.before.mean):+.1f} points"
        else:
            of = self.difference.difference
            p = self.difference.p_value
            assert p is not None  # that of violations is always there
            chance = "p < 0.001" if p < 0.001 else f"p = {p:.3f}"
            size = f"{100 * of.mean:+.1f} points ({100 * of.low:+.1f} to {100 * of.high:+.1f}, "
            size += f"{chance})"
        return size.replace("-", "−") + (", not clear" if self.change == "unclear" else "")


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a reader should take away."""

    headline: str
    tone: Tone
    sentences: list[str]
    measures: list[Measure]
    table: Table | None
    """Base and fine-tuned side by side; None where nothing was measured."""


def verdict(run: Run) -> Verdict:
    """Of one run, however far it came."""
    if len(run.evaluations) < 2:
        return _without_evaluation(run)
    base, tuned = run.evaluations[0], run.evaluations[-1]
    found = measures(base, tuned, run.differences)
    violations = _overall([one.change for one in found if one.kind == "violations"])
    judged = _overall([one.change for one in found if one.kind == "judge"])
    language = _overall([one.change for one in found if one.kind == "perplexity"][:1])
    return Verdict(
        headline=_headline(violations, language),
        tone=_tone(violations, judged, language),
        sentences=_sentences(run, base, tuned, found, violations, judged),
        measures=found,
        table=Table(
            columns=("", "base", "fine-tuned", "change"),
            rows=[
                (_title(one), one.shown(one.before), one.shown(one.after), one.change_in_words())
                for one in found
            ],
        ),
    )


def measures(
    base: Evaluation, tuned: Evaluation, differences: Sequence[Difference]
) -> list[Measure]:
    """Violations and judges of every group of prompts, perplexity of every group of text."""
    paired = {
        one.group: one
        for one in differences
        if one.other == base.model and one.measure == "violations"
    }
    found: list[Measure] = []
    for name, before in base.groups.items():
        after = tuned.groups.get(name)
        if after is None:
            continue
        found.append(
            Measure(
                kind="violations",
                name=name,
                before=before.violation,
                after=after.violation,
                difference=paired.get(name),
            )
        )
        found += [
            Measure(
                kind="judge",
                name=name if judge == "judge" else f"{name}, {judge}",
                before=before.judges[judge],
                after=after.judges[judge],
            )
            for judge in before.judges
            if judge in after.judges
        ]
    return found + [
        Measure(kind="perplexity", name=name, before=base.perplexity[name], after=now)
        for name, now in tuned.perplexity.items()
        if name in base.perplexity
    ]


def _title(one: Measure) -> str:
    words = {
        "violations": f"violations, {one.name} prompts",
        "judge": f"the same by a judge, {one.name}",
        "perplexity": f"perplexity, held-out {one.name}",
    }
    return words[one.kind]


def _overall(changes: Sequence[Change]) -> Change:
    """Worse anywhere is worse; better somewhere and worse nowhere is better."""
    if "higher" in changes:
        return "higher"
    return "lower" if "lower" in changes else "unclear"


def _headline(violations: Change, language: Change) -> str:
    first = {
        "lower": "The fine-tuned model violates the constraint less often than the base model",
        "higher": "The fine-tuned model violates the constraint more often than the base model",
        "unclear": "The fine-tuned model violates the constraint about as often as the base model",
    }
    second = {
        "lower": "and predicts held-out text of the corpus better",
        "higher": "and predicts held-out text of the corpus worse",
        "unclear": "and predicts held-out text of the corpus about as well",
    }
    return f"{first[violations]}, {second[language]}."


def _tone(violations: Change, judged: Change, language: Change) -> Tone:
    if violations == "higher" or judged == "higher":
        return "not as hoped"
    return "as hoped" if violations == "lower" and language != "higher" else "mixed"


def _sentences(
    run: Run,
    base: Evaluation,
    tuned: Evaluation,
    found: Sequence[Measure],
    violations: Change,
    judged: Change,
) -> list[str]:
    said = [_measured(run, tuned)]
    judges = [one for one in found if one.kind == "judge"]
    if not judges:
        said.append(
            "No judge was asked: nothing says that the completions are better for anyone but the "
            "training scorer."
        )
    elif judged == "higher":
        said.append("A judge that training never saw finds more violations than before.")
    elif judged == "lower":
        said.append("A judge that training never saw finds fewer violations too.")
    elif violations == "lower":
        said.append(
            "The judge that training never saw shows no clear change: look at the samples before "
            "you believe the training scorer."
        )
    if tuned.kl_to_base is not None:
        said.append(
            f"On its own completions the fine-tuned model is {tuned.kl_to_base:.2f} nats a token "
            "away from the base."
        )
    shorter = [
        f"{name}: {base.groups[name].length:.1f} → {group.length:.1f}"
        for name, group in tuned.groups.items()
        if name in base.groups and group.length < 0.95 * base.groups[name].length
    ]
    if shorter:
        said.append(
            f"Completions became shorter, which alone lowers violations a little "
            f"(tokens; {'; '.join(shorter)})."
        )
    return said


def _measured(run: Run, tuned: Evaluation) -> str:
    counts = [
        f"{group.prompts} {name} prompts x {group.samples // max(group.prompts, 1)} completions"
        for name, group in tuned.groups.items()
    ]
    words = f"Measured on {' and '.join(counts)} that training never saw, with 95 % intervals."
    if run.config.trainer.is_plain:
        words += " The run was plain fine-tuning: the constraint was measured, not asked for."
    return words


def _without_evaluation(run: Run) -> Verdict:
    last = run.config.trainer.iterations
    done = f"{run.iterations} of {last} iterations"
    headline = {
        "failed": f"The run failed after {done}.",
        "diverged": f"A guard stopped the run after {done}.",
        "interrupted": f"The run was interrupted after {done}.",
        "running": f"The run has finished {done}.",
    }.get(run.state, f"The run was not evaluated; {done} are finished.")
    said = ["The fine-tuned model was not measured on held-out prompts, so there is no verdict."]
    share = [row["rollouts/satisfaction"] for row in run.rows if "rollouts/satisfaction" in row]
    if len(share) > 1:
        said.append(
            f"Of the completions sampled in training, {100 * share[0]:.1f} % satisfied the "
            f"constraint in the first iteration and {100 * share[-1]:.1f} % in the last."
        )
    elif share:
        said.append(
            f"Of the completions sampled in training, {100 * share[0]:.1f} % satisfied the "
            "constraint."
        )
    base = run.evaluations[0] if run.evaluations else None
    rows = [] if base is None else _rows_of(base)
    return Verdict(
        headline=headline,
        tone="unknown",
        sentences=said,
        measures=[],
        table=Table(columns=("", "base"), rows=rows) if rows else None,
    )


def _rows_of(base: Evaluation) -> list[tuple[str, str]]:
    """What the base alone came to."""
    alone = measures(base, base, [])
    return [(_title(one), one.shown(one.before)) for one in alone]


def what_next(run: Run) -> str:
    """What a reader may do about the state of a run; empty for a finished one."""
    match run.state:
        case "failed" | "interrupted":
            return f"cft train --resume {run.path}"
        case "finished" if len(run.evaluations) < 2:
            return f"cft evaluate {run.path} --output {run.path / 'evaluation.json'}"
        case _:
            return ""
