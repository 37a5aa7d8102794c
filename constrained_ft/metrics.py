"""One row of numbers an iteration; every name has a meaning and a unit here."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

METRICS: dict[str, tuple[str, str]] = {
    "iteration": ("outer iteration, from 1", "count"),
    "rollouts/satisfaction": ("share of this iteration's rollouts that satisfy C", "share"),
    "rollouts/guided_satisfaction": (
        "share of the rollouts whose beginning R guided that satisfy C; in no other rate",
        "share",
    ),
    "rollouts/score": ("mean score of this iteration's rollouts", "0 to 1"),
    "rollouts/missing": ("share of this iteration's rollouts that got no score", "share"),
    "rollouts/scored": ("completions scored in this iteration for training to learn from", "count"),
    "rollouts/effective_labels": (
        "(sum of labels)^2 / sum of squares: rollouts that carry the target",
        "share",
    ),
    "rollouts/length": ("mean length of a completion, end-of-text included", "tokens"),
    "rollouts/entropy": ("mean of -log p over what the LLM said: its entropy", "nats per token"),
    "rollouts/logprob_gap": (
        "mean |log p by the sampling server - log p by the LLM here| of what it sampled",
        "nats per token",
    ),
    "auxiliary/auc_first": ("ROC area of R after the first token, held-out prompts", "0 to 1"),
    "auxiliary/auc_middle": ("ROC area of R half-way, held-out prompts", "0 to 1"),
    "auxiliary/auc_last": ("ROC area of R after the last token, held-out prompts", "0 to 1"),
    "auxiliary/log_loss": ("binary cross-entropy of R at every prefix, held-out prompts", "nats"),
    "auxiliary/brier": ("mean squared error of R at every prefix, held-out prompts", "0 to 1"),
    "auxiliary/brier_first": ("the same after the first token", "0 to 1"),
    "auxiliary/brier_middle": ("the same half-way", "0 to 1"),
    "auxiliary/brier_last": ("the same after the last token", "0 to 1"),
    "auxiliary/calibration_error": ("expected calibration error of R, 10 bins", "0 to 1"),
    "auxiliary/calibration_error_first": ("the same after the first token", "0 to 1"),
    "auxiliary/calibration_error_middle": ("the same half-way", "0 to 1"),
    "auxiliary/calibration_error_last": ("the same after the last token", "0 to 1"),
    "auxiliary/bin_<k>/share": (
        "share of the prefixes, held-out prompts, whose R lies in the k-th tenth",
        "share",
    ),
    "auxiliary/bin_<k>/predicted": ("mean R of these", "0 to 1"),
    "auxiliary/bin_<k>/observed": ("mean label of these", "0 to 1"),
    "auxiliary/tower_residual": (
        "mean |log Rbar - log R|: how far R is from agreeing with its own one-step expectation",
        "nats",
    ),
    "auxiliary/epochs": (
        "epoch whose state was kept; 0 keeps the state before the fit; of a product their mean",
        "count",
    ),
    "auxiliary/examples": ("rollouts fitted, replayed ones included", "count"),
    "term/<name>/satisfaction": ("share of the rollouts that satisfy this term", "share"),
    "term/<name>/score": ("mean score of this term", "0 to 1"),
    "term/<name>/beta": ("tilt that the mean or rate asked of this term takes", "1"),
    "term/<name>/bar": ("score from which this term's label is 1", "0 to 1"),
    "term/<name>/auc": ("ROC area of this term's own head half-way, held-out prompts", "0 to 1"),
    "term/<name>/log_loss": (
        "binary cross-entropy of this term's own R at every prefix, held-out prompts; "
        "auxiliary.terms=product",
        "nats",
    ),
    "term/<name>/calibration_error": (
        "expected calibration error of this term's own R, 10 bins; auxiliary.terms=product",
        "0 to 1",
    ),
    "terms/product_gap": (
        "mean |R - product of the terms' heads| half-way: how far the terms are from independent; "
        "with auxiliary.terms=product |rate seen at such R - product of the terms' R|",
        "0 to 1",
    ),
    "terms/product_bias": (
        "mean product of the terms' R half-way - mean label of all terms, held-out prompts; "
        "auxiliary.terms=product",
        "-1 to 1",
    ),
    "terms/joint_auc": (
        "ROC area of one head for all terms together, half-way, held-out prompts",
        "0 to 1",
    ),
    "terms/product_auc": ("the same of the product of the terms' heads", "0 to 1"),
    "terms/outside_bounds": (
        "share of prefixes where R leaves the Fréchet bounds of the terms' heads by over 0.02; "
        "with auxiliary.terms=product where the rate seen at such R leaves those of the terms' R",
        "share",
    ),
    "judge/<name>/satisfaction": (
        "share of this iteration's rollouts that satisfy this judge; judges that are quick",
        "share",
    ),
    "target/satisfaction": ("mean R(x) over prompts", "share"),
    "target/kl": ("KL(q* || reference) of a completion, mean over prompts: -log R(x)", "nats"),
    "target/kl_per_token": (
        "weighted KL(q* || reference) over all rollouts: update/kl before any step",
        "nats per completion token",
    ),
    "target/floor": ("mean alpha(x) of the threshold", "share"),
    "target/clipped_weight": ("share of the prefixes' weight lost to clipping", "share"),
    "target/effective_prefixes": ("effective sample size of the prefixes' weights", "share"),
    "target/lag": ("iterations between learning the target and using it", "iterations"),
    "update/ce": ("corpus cross-entropy", "nats per corpus token"),
    "update/kl": ("weighted KL(q* || LLM), mean over the steps", "nats per completion token"),
    "update/kl_first": ("the same at the first step, before the LLM moved", "nats per token"),
    "update/kl_weight": ("lambda of this update", "1"),
    "update/loss": ("what the optimizer minimises", "nats per corpus token"),
    "update/grad_norm": ("norm of the gradient before clipping", "nats"),
    "update/learning_rate": ("learning rate after the last step", "1"),
    "update/tokens": ("corpus and completion tokens that this update was trained on", "tokens"),
    "update/skipped_steps": ("optimizer steps that a guard left out", "count"),
    "update/rolled_back": ("1 where a guard took the whole update back", "count"),
    "trl/loss": ("mean of the loss of TRL's trainer, times its weight", "1"),
    "trl/kl": ("KL to the base model, as TRL's trainer estimates it", "nats"),
    "version/llm": ("updates that the LLM had when this one began", "count"),
    "version/auxiliary": ("iteration that fitted the R in use", "iteration"),
    "version/data": ("iteration whose rollouts are read", "iteration"),
    "time/wait_target": ("waiting for peers to learn the target", "seconds"),
    "time/wait_llm": ("peers waiting for the updated LLM", "seconds"),
    "time/target": ("sampling, scoring and fitting the auxiliary", "seconds"),
    "time/update": ("updating the LLM", "seconds"),
    "time/iteration": ("the whole iteration but for writing its checkpoint", "seconds"),
    "budget/seconds": (
        "time of all iterations so far, and of scoring before the first; no measurements",
        "seconds",
    ),
    "budget/scored_samples": ("completions scored so far for training to learn from", "count"),
    "budget/scored_texts": (
        "other texts scored before the first iteration: the vocabulary for the auxiliary's prior, "
        "corpus rows for filter_corpus",
        "count",
    ),
    "budget/trained_tokens": ("corpus and completion tokens trained on so far", "tokens"),
}


def meaning(name: str) -> tuple[str, str]:
    """What a metric means, and its unit; `term/<name>/...` stands for every term, and so on.

    Raises:
        KeyError: for a metric without a meaning in `METRICS`.
    """
    return METRICS[entry(name)]


def entry(name: str) -> str:
    """The name under which `METRICS` has a metric."""
    section, _, rest = name.partition("/")
    if section in ("term", "judge"):
        return f"{section}/<name>/{rest.rpartition('/')[2]}"
    return re.sub(r"^auxiliary/bin_\d+/", "auxiliary/bin_<k>/", name)


def budget(
    before: Mapping[str, float], earlier: Sequence[Mapping[str, float]], row: Mapping[str, float]
) -> dict[str, float]:
    """What a run has cost up to an iteration, under `budget/`.

    Args:
        before: what it cost before the first one.
        earlier: the rows of the iterations before.
        row: what the iteration itself took.
    """
    so_far = earlier[-1] if earlier else before
    added = {
        "budget/seconds": row["time/iteration"],
        "budget/scored_samples": row.get("rollouts/scored", 0.0),
        "budget/scored_texts": 0.0,
        "budget/trained_tokens": row.get("update/tokens", 0.0),
    }
    return {name: so_far.get(name, 0.0) + amount for name, amount in added.items()}


def cost(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """What a run has cost by its last row; empty where that was not recorded."""
    last = rows[-1] if rows else {}
    return {name: value for name, value in last.items() if name.startswith("budget/")}


def cost_table(costs: Mapping[str, Mapping[str, float]]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows for people, a column for each run."""
    titles = {
        "budget/seconds": "seconds of training",
        "budget/scored_samples": "completions scored",
        "budget/scored_texts": "other texts scored",
        "budget/trained_tokens": "tokens trained on",
    }
    return ["", *costs], [
        [title, *(f"{spent[name]:,.0f}" for spent in costs.values())]
        for name, title in titles.items()
    ]


def append(path: Path, row: Mapping[str, float]) -> None:
    """Add one row to a JSONL file.

    Raises:
        KeyError: for a metric without a meaning in `METRICS`.
    """
    for name in row:
        meaning(name)
    with path.open("a+b") as file:
        file.truncate(_whole(path.read_bytes()))  # a full disk may have taken a part of a row
        file.write(json.dumps(dict(row)).encode() + b"\n")


def read(path: Path) -> list[dict[str, float]]:
    """All rows, oldest first; none where there is no file."""
    if not path.exists():
        return []
    content = path.read_bytes()
    return [json.loads(line) for line in content[: _whole(content)].splitlines()]


def _whole(content: bytes) -> int:
    """The bytes of the rows that are whole."""
    return content.rfind(b"\n") + 1
