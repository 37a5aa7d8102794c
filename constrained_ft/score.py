"""What `cft score` does: a scorer on its own, without a model and without a run.

Rows are read from a JSONL file (`completion` or `text`, maybe `prompt`, maybe `label`), from a text
file (one completion a line), or from a folder of such files, where a .txt file is one completion.
"""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from constrained_ft.config import Config, TermConfig
from constrained_ft.errors import ConfigError, DataError, ScorerError
from constrained_ft.fit import area_under_curve, calibration_error
from constrained_ft.intervals import Interval, bootstrap
from constrained_ft.order import held_out_by_hash
from constrained_ft.progress import Display
from constrained_ft.scorer_config import EmbeddingScorerConfig
from constrained_ft.scorers import (
    CombinedScorer,
    Embedder,
    Probe,
    RememberingScorer,
    Score,
    ScoreCache,
    Scorer,
    build_scorer,
    given_columns,
    probed,
    user_cache,
    valid,
)

_BATCH = 512
_HELD_OUT = 0.25
_RIDGE = 1e-3
_TRUE, _FALSE = {"1", "true", "yes", "satisfied"}, {"0", "false", "no", "violated"}


@dataclass(frozen=True, kw_only=True)
class Item:
    """One completion to score."""

    prompt: str
    completion: str
    label: bool | None
    """Whether it satisfies the constraint, as far as a person said so."""
    where: str
    """The file and the row that it stands in."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """What else its row says."""


def read_items(path: Path) -> list[Item]:
    """Completions of a file or a folder.

    Raises:
        DataError: if there are none, or a row cannot be read.
    """
    if path.is_dir():
        files = sorted(f for f in path.rglob("*") if f.suffix in {".txt", ".jsonl"})
        items = [
            item
            for file in files
            for item in (_rows(file) if file.suffix == ".jsonl" else [_whole(file)])
        ]
    elif path.is_file():
        items = list(_rows(path))
    else:
        raise DataError(f"there is no file or folder {path}")
    if not items:
        raise DataError(f"{path} holds nothing to score; give .jsonl or .txt files")
    return items


def run_command(items: Sequence[Item], config: Config, display: Display) -> list[dict[str, object]]:
    """Score completions and say how long that took.

    Returns:
        A row for each: `prompt`, `completion`, `score` (null where there is none), `satisfied`, and
        `error`; with several constraints also the score of each under `terms`.

    Raises:
        ScorerError: if a scorer cannot be built.
    """
    terms = config.constraint.all_terms()
    scorers = {name: probed(term.scorer) for name, term in terms.items()}
    given_columns(list(scorers.values()), _columns(items))
    display.phase("scoring", len(items))
    started = time.monotonic()
    answers: dict[str, list[Any]] = {name: [] for name in scorers}
    for start in range(0, len(items), _BATCH):
        some = items[start : start + _BATCH]
        for name, scorer in scorers.items():
            answers[name] += valid(
                scorer, [item.prompt for item in some], [item.completion for item in some]
            )
        display.advance(len(some))
    seconds = time.monotonic() - started
    rows = [
        _row(item, {name: answers[name][i] for name in scorers}, terms)
        for i, item in enumerate(items)
    ]
    display.table(*_summary(rows, scorers, seconds))
    return rows


def test_command(items: Sequence[Item], config: Config) -> list[list[str]]:
    """What each part of the constraint says of a few completions, and why.

    Returns:
        Rows of a table: completion, part, score, why.

    Raises:
        ScorerError: if a scorer cannot be built.
    """
    terms = config.constraint.all_terms()
    scorers = {name: build_scorer(term.scorer) for name, term in terms.items()}
    given_columns(list(scorers.values()), _columns(items))
    rows: list[list[str]] = []
    for item in items:
        for name, scorer in scorers.items():
            label = name if config.constraint.terms else scorer.name.partition(" ")[0]
            bar = terms[name].satisfied_at
            rows += _explained(item, label, scorer, bar)
    return rows


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """A threshold and how good it is."""

    threshold: float
    precision: Interval
    """Of the completions at or above the threshold, the share that satisfies."""
    recall: Interval
    """Of those that satisfy, the share at or above the threshold."""
    accuracy: float
    area: float
    """Under the ROC curve."""
    brier: float
    calibration_error: float
    count: int
    satisfied: int
    missing: int


def calibrate_command(
    items: Sequence[Item],
    config: Config,
    *,
    precision: float | None,
    recall: float | None,
    plot: Path | None,
) -> Calibration:
    """The lowest threshold that reaches a precision, or the highest that reaches a recall.

    Args:
        items: with labels.
        config: of its constraint, which has one scorer.
        precision: wanted, of what is accepted; or None.
        recall: wanted, of what satisfies; or None.
        plot: where a reliability diagram goes, as PNG or SVG.

    Raises:
        ConfigError: if the constraint has several terms.
        DataError: if labels are missing or all the same.
        ScorerError: if no threshold reaches what is wanted.
    """
    if config.constraint.scorer is None:
        raise ConfigError("calibrate one scorer at a time: constraint=OPTION with a `scorer`")
    scorer = probed(config.constraint.scorer)
    given_columns([scorer], _columns(items))
    results = valid(scorer, [i.prompt for i in items], [i.completion for i in items])
    labels, values = _labelled(items, results)
    threshold = _threshold(values, labels, precision, recall)
    accepted = values >= threshold
    found = Calibration(
        threshold=threshold,
        precision=bootstrap(labels[accepted]),
        recall=bootstrap(accepted[labels]),
        accuracy=float((accepted == labels).mean()),
        area=area_under_curve(torch.tensor(values), torch.tensor(labels).float()) or 0.0,
        brier=float(np.square(values - labels).mean()),
        calibration_error=calibration_error(torch.tensor(values), torch.tensor(labels).float()),
        count=len(labels),
        satisfied=int(labels.sum()),
        missing=len(items) - len(labels),
    )
    if plot is not None:
        _reliability_plot(values, labels, found, scorer.name, plot)
    return found


def fit_command(
    items: Sequence[Item], embedding: EmbeddingScorerConfig, folder: Path
) -> dict[str, float]:
    """Train a linear probe on sentence embeddings and write it.

    Args:
        items: with labels; which quarter is held out is a matter of a hash of the text.
        embedding: the embedding model and how it is read.
        folder: where the probe goes.

    Returns:
        What it is worth on the held-out rows.

    Raises:
        DataError: if labels are missing or all the same.
        ModelError: if the embedding model is missing.
        ScorerError: if the probe cannot be written.
    """
    labels_N = torch.tensor([_label(item) for item in items], dtype=torch.float32)
    aside_N = torch.tensor(held_out_by_hash([item.completion for item in items], _HELD_OUT))
    for name, part_N in (("training", ~aside_N), ("held-out", aside_N)):
        kinds = set(labels_N[part_N].tolist())
        if len(kinds) < 2:
            raise DataError(
                f"the {int(part_N.sum())} {name} rows of {len(items)} do not have both labels; "
                "give more rows of the rarer one"
            )
    states_ND = Embedder(embedding)([item.completion for item in items])
    weight_D, bias = _logistic(states_ND[~aside_N], labels_N[~aside_N])
    probs_M = (states_ND[aside_N] @ weight_D + bias).sigmoid()
    truth_M = labels_N[aside_N]
    said_M = (probs_M >= 0.5).float()
    hits = float((said_M * truth_M).sum())
    facts = {
        "rows": float(len(truth_M)),
        "accuracy": float((said_M == truth_M).float().mean()),
        "f1": 2 * hits / max(float(said_M.sum() + truth_M.sum()), 1.0),
        "auroc": area_under_curve(probs_M, truth_M) or 0.0,
        "calibration_error": calibration_error(probs_M, truth_M),
    }
    Probe(weight_D=weight_D, bias=bias, embedding=embedding, facts=facts).save(folder)
    return facts


def cache_command(*, clear: bool) -> dict[str, int]:
    """Scores kept for all runs, by scorer; they are forgotten if asked for."""
    cache = ScoreCache(user_cache())
    counts = cache.counts()
    if clear:
        cache.clear()
    cache.close()
    return counts


def _columns(items: Sequence[Item]) -> dict[str, Mapping[str, Any]]:
    """What else rows say, by the prompt: for functions that want to know."""
    return {item.prompt: item.columns for item in reversed(items) if item.columns}


def _whole(file: Path) -> Item:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {file}: {error}") from error
    return Item(prompt="", completion=text, label=None, where=str(file))


def _rows(file: Path) -> Iterator[Item]:
    lines = _whole(file).completion.splitlines()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{file}, row {number}"
        yield (
            _from_json(line, where)
            if file.suffix == ".jsonl"
            else Item(prompt="", completion=line, label=None, where=where)
        )


def _from_json(line: str, where: str) -> Item:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where} is not JSON: {error}") from None
    text = row.get("completion", row.get("text")) if isinstance(row, dict) else None
    prompt = row.get("prompt", "") if isinstance(row, dict) else ""
    if not isinstance(text, str) or not isinstance(prompt, str):
        raise DataError(f"{where} has no text under `completion` or `text`")
    label = row.get("label", row.get("satisfied"))
    if label is not None:
        word = str(int(label) if isinstance(label, bool | float) else label).strip().lower()
        if word not in _TRUE | _FALSE:
            raise DataError(f"{where} has the label {label!r}; 1 is satisfied, 0 is violated")
        label = word in _TRUE
    more = {name: value for name, value in row.items() if name not in {"prompt", "completion"}}
    return Item(prompt=prompt, completion=text, label=label, where=where, columns=more)


def _row(item: Item, answers: dict[str, Any], terms: dict[str, TermConfig]) -> dict[str, object]:
    errors = [f"{n}: {a.error}" for n, a in answers.items() if not isinstance(a, Score)]
    scores = {n: a.value if isinstance(a, Score) else None for n, a in answers.items()}
    row: dict[str, object] = {"prompt": item.prompt, "completion": item.completion}
    if errors:
        row |= {"score": None, "satisfied": None, "error": "; ".join(errors)}
    else:
        known = {n: value for n, value in scores.items() if value is not None}
        held = all(known[n] >= term.satisfied_at for n, term in terms.items())
        row |= {"score": min(known.values()), "satisfied": held, "error": None}
    return row | ({"terms": scores} if len(terms) > 1 else {})


def _summary(
    rows: Sequence[dict[str, Any]], scorers: dict[str, Scorer], seconds: float
) -> tuple[str, list[str], list[list[str]]]:
    scored = [row for row in rows if row["score"] is not None]
    table = [["completions", f"{len(rows):,}"]]
    if scored:
        values = np.array([row["score"] for row in scored])
        share = bootstrap([float(row["satisfied"]) for row in scored])
        quantiles = np.quantile(values, [0.05, 0.25, 0.5, 0.75, 0.95])
        table += [
            ["satisfied", share.percent()],
            ["mean score", f"{values.mean():.3f}"],
            ["5 / 25 / 50 / 75 / 95 %", " / ".join(f"{q:.3f}" for q in quantiles)],
        ]
    if len(scored) < len(rows):
        last = next(row["error"] for row in reversed(rows) if row["error"])
        table.append(["without a score", f"{len(rows) - len(scored):,}, such as: {last}"])
    table.append(["time", f"{seconds:.2f} s, {len(rows) / max(seconds, 1e-9):,.0f} a second"])
    for name, scorer in scorers.items():
        table.append([f"scorer {name}", f"{scorer.name} {scorer.version}"])
        if isinstance(scorer, RememberingScorer):
            table.append(["  kept scores", f"{scorer.known:,} of {scorer.asked:,}"])
    return "Scores", ["", ""], table


def _explained(item: Item, label: str, scorer: Scorer, bar: float | None) -> list[list[str]]:
    """A row for a scorer, then one for each of its parts."""
    (result,) = valid(scorer, [item.prompt], [item.completion])
    why = getattr(scorer, "why", None)
    if isinstance(result, Score):
        score, reason = f"{result.value:.3f}", why(item.completion) if why else ""
        if bar is not None:
            score += " satisfied" if result.value >= bar else " violated"
    else:
        score, reason = "none", result.error
    rows = [[item.completion, label, score, reason]]
    if isinstance(scorer, CombinedScorer):
        for name, part in scorer.parts.items():
            indent = " " * (len(label) - len(label.lstrip()) + 2)
            rows += _explained(item, f"{indent}{name}", part, None)
    return rows


def _label(item: Item) -> float:
    if item.label is None:
        raise DataError(f"{item.where} has no `label`; 1 is satisfied, 0 is violated")
    return float(item.label)


def _labelled(items: Sequence[Item], results: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
    """Labels and scores of the rows that have both."""
    known = [
        (_label(i), r.value) for i, r in zip(items, results, strict=True) if isinstance(r, Score)
    ]
    if not known:
        raise ScorerError(f"the scorer gave no score at all: {results[-1].error}")
    labels = np.array([label for label, _ in known]) > 0.5
    if labels.all() or not labels.any():
        raise DataError("all rows have the same label; a threshold needs both")
    return labels, np.array([value for _, value in known], dtype=np.float64)


def _threshold(
    values: np.ndarray, labels: np.ndarray, precision: float | None, recall: float | None
) -> float:
    """The lowest threshold with the precision, or the highest with the recall."""
    candidates = np.unique(values)
    if recall is not None:
        reached = [t for t in candidates if (values[labels] >= t).mean() >= recall]
        return float(max(reached))
    reached = [t for t in candidates if labels[values >= t].mean() >= (precision or 0.0)]
    if not reached:
        best = max(float(labels[values >= t].mean()) for t in candidates)
        raise ScorerError(
            f"no threshold reaches the precision {precision}: the best has {best:.3f}; ask for "
            "less, or use another scorer"
        )
    return float(min(reached))


def _logistic(states_ND: Tensor, labels_N: Tensor) -> tuple[Tensor, float]:
    """Ridge-penalised logistic regression, both classes weighing the same."""
    weight_D = torch.zeros(states_ND.shape[1], requires_grad=True)
    bias = torch.zeros((), requires_grad=True)
    share = labels_N.mean()
    weights_N = torch.where(labels_N > 0.5, 0.5 / share, 0.5 / (1 - share))
    optimizer = torch.optim.LBFGS([weight_D, bias], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> float:
        optimizer.zero_grad()
        logits_N = states_ND @ weight_D + bias
        loss = F.binary_cross_entropy_with_logits(logits_N, labels_N, weight=weights_N)
        loss = loss + _RIDGE * weight_D.square().sum()
        torch.autograd.backward(loss)
        return float(loss.detach())

    optimizer.step(closure)
    return weight_D.detach(), float(bias.detach())


def _reliability_plot(
    values: np.ndarray, labels: np.ndarray, found: Calibration, name: str, file: Path
) -> None:
    """Share of satisfied completions by score, in ten bins, with their counts below."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ScorerError(
            f"--plot needs matplotlib: pip install 'constrained-ft[plot]' ({error})"
        ) from error
    figure = Figure(figsize=(5, 5.5), layout="constrained")
    upper, lower = figure.subplots(2, 1, height_ratios=[4, 1], sharex=True)
    edges = np.linspace(0, 1, 11)
    bins = np.clip(np.digitize(values, edges) - 1, 0, 9)
    shown = [b for b in range(10) if (bins == b).any()]
    shares = [bootstrap(labels[bins == b].astype(float)) for b in shown]
    means = np.array([values[bins == b].mean() for b in shown])
    heights = np.array([share.mean for share in shares])
    errors = [[s.mean - s.low for s in shares], [s.high - s.mean for s in shares]]
    upper.plot([0, 1], [0, 1], color="0.6", linestyle="--", label="calibrated")
    upper.errorbar(means, heights, yerr=errors, marker="o", capsize=3, label="measured, 95 %")
    upper.axvline(found.threshold, color="tab:red", label=f"threshold {found.threshold:.3f}")
    upper.set(ylabel="share that satisfies", ylim=(-0.02, 1.02), title=name)
    upper.legend(loc="upper left")
    lower.hist(values, bins=edges.tolist(), color="0.5")
    lower.set(xlabel="score", ylabel="rows", xlim=(0, 1))
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)
