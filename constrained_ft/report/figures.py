"""The figures of one run."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from constrained_ft.report.drawing import (
    ACCENT,
    FEW,
    GRID,
    INK,
    LINES,
    MUTED,
    PAPER,
    Chart,
    chart,
    legend,
    series,
    short,
    smooth,
)
from constrained_ft.report.reading import Run
from constrained_ft.report.verdict import Measure


def of_run(run: Run, measures: Sequence[Measure]) -> dict[str, list[Chart]]:
    """The figures of one run by the section they belong to; those without numbers are left out."""
    found = {
        "verdict": [_before_and_after(measures)],
        "training": [_satisfaction(run), _hacking(run), _ce(run), _kl(run), _kl_weight(run)],
        "auxiliary": [_reliability(run), _areas(run), _residual(run)],
        "time": [_phases(run), _timeline(run)],
    }
    return {section: [one for one in some if one is not None] for section, some in found.items()}


def _before_and_after(measures: Sequence[Measure]) -> Chart | None:
    shares = [one for one in measures if one.kind != "perplexity"]
    if not shares:
        return None

    def draw(axes: Axes) -> None:
        names = []
        for place, one in enumerate(reversed(shares)):
            # A judge's row stands right below its group's.
            judge = one.name.partition(", ")[2]
            names.append(one.name if one.kind == "violations" else f"judge {judge}".strip())
            for interval, shift, colour, mark in (
                (one.before, 0.16, MUTED, "o"),
                (one.after, -0.16, ACCENT, "D"),
            ):
                mean, low, high = (100 * v for v in (interval.mean, interval.low, interval.high))
                axes.plot([low, high], [place + shift] * 2, color=colour, linewidth=1.4)
                label = {MUTED: "base", ACCENT: "fine-tuned"}[colour] if place == 0 else None
                axes.plot([mean], [place + shift], mark, color=colour, markersize=5, label=label)
        axes.set_yticks(range(len(shares)), [short(name, 24) for name in names])
        axes.set_ylim(-0.6, len(shares) - 0.4)
        axes.set_xlim(left=0)
        axes.set_xlabel("completions that violate the constraint, %")
        axes.grid(visible=False, axis="y")
        legend(axes)

    return chart(
        "before-and-after",
        "Violations on held-out prompts",
        "Share of completions that violate the constraint, by the training scorer and by judges, "
        "with 95 % intervals.",
        draw,
        described=" ".join(
            f"{one.name}: {one.before.percent()} before, {one.after.percent()} after."
            for one in shares
        ),
        height=1.2 + 0.42 * len(shares),
    )


def _satisfaction(run: Run) -> Chart | None:
    return _lines(
        run,
        "satisfaction",
        "Satisfaction",
        {"rollouts/satisfaction": "rollouts"},
        "Share of the completions sampled in an iteration that satisfy the constraint, by the "
        "training scorer. Where prompts are mined they are the hardest ones.",
        ylabel="satisfied, %",
        scale=100.0,
    )


def _hacking(run: Run) -> Chart | None:
    judges = {
        name: "judge" if name == "judge/judge/satisfaction" else f"judge {name.split('/')[1]}"
        for name in dict.fromkeys(name for row in run.rows for name in row)
        if name.startswith("judge/")
    }
    caption = (
        "Violations among the same completions, by the scorer that training uses and by judges "
        "that it never sees. A scorer's line that falls while a judge's does not is a sign that "
        "the scorer is being gamed."
    )
    if not judges:
        caption += (
            " In this run no judge looked at the rollouts (only quick ones do): compare the "
            "verdict's judge before and after."
        )
    return _lines(
        run,
        "scorer-and-judge",
        "Training scorer against judge",
        {"rollouts/satisfaction": "training scorer", **judges},
        caption,
        ylabel="violations, %",
        scale=-100.0,
        offset=100.0,
    )


def _ce(run: Run) -> Chart | None:
    return _lines(
        run,
        "cross-entropy",
        "Cross-entropy of the corpus",
        {"update/ce": "corpus"},
        "What plain fine-tuning would lower alone.",
        ylabel="nats per token",
    )


def _kl(run: Run) -> Chart | None:
    return _lines(
        run,
        "kl",
        "KL to the target",
        {"update/kl": "KL(q* ‖ LLM)", "target/kl_per_token": "KL(q* ‖ reference)"},
        "How far the model is from the closest distribution that satisfies the constraint, during "
        "an update and before it. It nears zero when the model satisfies the constraint.",
        ylabel="nats per token",
    )


def _kl_weight(run: Run) -> Chart | None:
    return _lines(
        run,
        "lambda",
        "λ",
        {"update/kl_weight": "λ"},
        "The weight of the KL: constant as trainer.kl_weight, or moved towards "
        "trainer.target_rate.",
        ylabel="trainer.kl_weight",
    )


def _areas(run: Run) -> Chart | None:
    return _lines(
        run,
        "roc-area",
        "How well R tells what will violate",
        {f"auxiliary/auc_{place}": f"{place} token" for place in ("last", "middle", "first")},
        "ROC area of R on held-out prompts: 0.5 is chance. After the last token R has read all.",
        ylabel="ROC area",
    )


def _residual(run: Run) -> Chart | None:
    return _lines(
        run,
        "tower",
        "Tower residual of R",
        {"auxiliary/tower_residual": "|log R̄ − log R|"},
        "How far R is from its own expectation one token later; a consistent R has none.",
        ylabel="nats",
    )


def _reliability(run: Run) -> Chart | None:
    fitted = [row for row in run.rows if "auxiliary/brier" in row]
    late = fitted[-max(len(fitted) // 4, 1) :]
    points = []
    for tenth in range(1, 11):
        place = f"auxiliary/bin_{tenth}"
        some = [row for row in late if f"{place}/share" in row]
        weights = np.array([row[f"{place}/share"] for row in some])
        if not some or weights.sum() == 0:
            continue
        predicted, observed = (
            float(np.average([row[f"{place}/{name}"] for row in some], weights=weights))
            for name in ("predicted", "observed")
        )
        points.append((predicted, observed, float(weights.sum() / len(late))))
    if not points:
        return None

    def draw(axes: Axes) -> None:
        predicted, observed, shares = zip(*points, strict=True)
        axes.plot([0, 1], [0, 1], color=MUTED, linewidth=0.8, linestyle="--")
        axes.plot(predicted, observed, color=ACCENT, linewidth=1.0)
        sizes = [12 + 220 * share for share in shares]
        axes.scatter(predicted, observed, s=sizes, color=ACCENT, edgecolor=PAPER, linewidth=0.8)
        axes.set(xlabel="R says", ylabel="came true", xlim=(0, 1.03), ylim=(0, 1.03))

    return chart(
        "reliability",
        "Reliability of R",
        f"R at every prefix of held-out prompts against what came of it, over the last {len(late)} "
        "iterations; the size of a point is its share of the prefixes. On the dashed line R means "
        "what it says.",
        draw,
        described=" ".join(f"R of {p:.2f}: {o:.2f} came true." for p, o, _ in points),
    )


def _phases(run: Run) -> Chart | None:
    spent = sorted(run.seconds.items(), key=lambda pair: pair[1])
    spent = [(name, seconds) for name, seconds in spent if seconds > 0]
    if not spent:
        return None
    total = sum(run.seconds.values())

    def draw(axes: Axes) -> None:
        names, seconds = zip(*spent, strict=True)
        bars = axes.barh(names, seconds, color=MUTED, height=0.62)
        bars[-1].set_color(ACCENT)
        labels = [f"{one / total:.0%}" for one in seconds]
        axes.bar_label(bars, labels, color=INK, fontsize=8.5, padding=3)
        axes.set_xlim(right=1.15 * max(seconds))
        axes.set_xlabel("seconds")
        axes.grid(visible=False, axis="y")

    return chart(
        "phases",
        "Where the time went",
        f"Seconds of each phase in the first process; {_duration(total)} together.",
        draw,
        described=" ".join(f"{name}: {seconds:.0f} s." for name, seconds in reversed(spent)),
        height=1.0 + 0.24 * len(spent),
    )


_SHOWN_ITERATIONS = 6


def _timeline(run: Run) -> Chart | None:
    rows = [row for row in run.rows if "time/iteration" in row][-_SHOWN_ITERATIONS:]
    if not rows:
        return None
    with_peers = any("time/wait_llm" in row for row in run.rows)
    lanes: dict[str, list[tuple[float, float]]] = {"target": [], "update": [], "rest": []}
    start = 0.0
    for row in rows:
        for lane, (begin, end) in bars_of(
            row, run.config.trainer.schedule, peers=with_peers
        ).items():
            lanes[lane].append((start + begin, max(end - begin, 0.0)))
        start += row["time/iteration"]
    both = _shared(lanes["target"], lanes["update"])
    busy = sum(length for _, length in lanes["target"])
    words = f"The last {len(rows)} iterations. "
    if with_peers:
        words += (
            f"Of the time in which peers learned targets, {100 * both / max(busy, 1e-9):.0f} % "
            "passed while the model was being updated."
        )
    else:
        words += (
            "One process does one thing after the other; placement=peers with trainer=overlapped "
            "does both at once."
        )

    def draw(axes: Axes) -> None:
        shown = [(name, bars) for name, bars in lanes.items() if bars]
        for place, (name, bars) in enumerate(reversed(shown)):
            colour = {"target": MUTED, "update": ACCENT}.get(name, GRID)
            axes.broken_barh(bars, (place - 0.32, 0.64), facecolor=colour, edgecolor=PAPER)
        axes.set_yticks(range(len(shown)), [name for name, _ in reversed(shown)])
        axes.set_xlabel("seconds")
        axes.grid(visible=False, axis="y")

    return chart(
        "timeline",
        "Two stages on a time line",
        words,
        draw,
        described=f"{busy:.0f} s learning targets, {both:.0f} s of it during updates.",
        height=1.9,
    )


def bars_of(
    row: Mapping[str, float], schedule: str, *, peers: bool
) -> dict[str, tuple[float, float]]:
    """Begin and end of each stage within one iteration, in seconds from its start."""
    whole = row["time/iteration"]
    learned = row.get("time/target", 0.0)
    updated = learned + row.get("time/update", 0.0)
    if not peers:
        return {"target": (0.0, learned), "update": (learned, updated), "rest": (updated, whole)}
    # Peers work or wait for the LLM; the others update, or wait for the target.
    # In the last overlapped iteration they learn nothing.
    learning = (0.0, max(whole - row.get("time/wait_llm", whole), 0.0))
    wait = row.get("time/wait_target", 0.0)
    if schedule == "alternating":
        return {"target": learning, "update": (wait, updated)}
    return {"target": learning, "update": (0.0, updated)}


def _shared(one: Sequence[tuple[float, float]], other: Sequence[tuple[float, float]]) -> float:
    """Seconds that bars of both have in common."""
    return sum(
        max(0.0, min(a + x, b + y) - max(a, b)) for (a, x), (b, y) in zip(one, other, strict=True)
    )


def _lines(  # noqa: PLR0913
    run: Run,
    key: str,
    title: str,
    names: Mapping[str, str],
    caption: str,
    *,
    ylabel: str,
    scale: float = 1.0,
    offset: float = 0.0,
) -> Chart | None:
    """Metrics over iterations: their smoothed course, and the values themselves faintly."""
    found = {label: series(run, name) for name, label in names.items()}
    found = {label: (xs, scale * ys + offset) for label, (xs, ys) in found.items() if len(xs)}
    if not found:
        return None

    def draw(axes: Axes) -> None:
        for number, (label, (xs, ys)) in enumerate(found.items()):
            colour = ACCENT if number == 0 else INK
            style = LINES[number % len(LINES)]
            course = smooth(ys)
            if len(xs) > FEW and not np.array_equal(course, ys):
                axes.plot(xs, ys, ".", color=colour, markersize=4, alpha=0.5, markeredgewidth=0)
            mark = "o" if len(xs) <= FEW else None
            axes.plot(
                xs, course, linestyle=style, color=colour, label=label, marker=mark, markersize=3.5
            )
        axes.set(xlabel="iteration", ylabel=ylabel)
        if key == "lambda" and all(np.ptp(ys) == 0 for _, ys in found.values()):
            axes.set_ylim(0, 1.5 * max(ys[0] for _, ys in found.values()) or 1)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if len(found) > 1:
            legend(axes)

    described = " ".join(
        f"{label}: {ys[0]:.3g} in iteration {xs[0]:.0f}, {ys[-1]:.3g} in iteration {xs[-1]:.0f}."
        for label, (xs, ys) in found.items()
    )
    return chart(key, title, caption, draw, described=described)


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 1:
        return f"{seconds:.0f} seconds"
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"
