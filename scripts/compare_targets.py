"""What R is fitted to: the label itself, TD(lambda) targets, or a consistency loss beside it.

    python scripts/compare_targets.py

On a table, where R is known by enumeration: mean |R - exact R| over prefixes, as the model writes
them, after one fit from the start, for few and for many rollouts, over seeds. In brackets how much
less that is than with labels, and one standard error of that difference.
"""

import argparse

import numpy as np

from constrained_ft.compose import compose
from constrained_ft.rollouts import label
from constrained_ft.selfcheck import _LETTERS, _TRAINING, error_of_auxiliary
from constrained_ft.tabular import every_completion, table_parts
from constrained_ft.target import learn_auxiliary

WAYS = {
    "label (Monte Carlo)": ("auxiliary.td_lambda=1", "auxiliary.consistency_weight=0"),
    "label + 0.3 consistency": ("auxiliary.td_lambda=1", "auxiliary.consistency_weight=0.3"),
    "TD(0.95)": ("auxiliary.td_lambda=0.95", "auxiliary.consistency_weight=0"),
    "TD(0.9)": ("auxiliary.td_lambda=0.9", "auxiliary.consistency_weight=0"),
    "TD(0.5)": ("auxiliary.td_lambda=0.5", "auxiliary.consistency_weight=0"),
    "TD(0)": ("auxiliary.td_lambda=0", "auxiliary.consistency_weight=0"),
}
SAMPLES = (4, 16, 64)  # of each of 16 prompts


def error(seed: int, samples: int, overrides: tuple[str, ...]) -> float:
    """Of R after one fit."""
    config = compose(
        [
            *_TRAINING,
            "prompts.prompts_per_iteration=16",
            f"prompts.samples_per_prompt={samples}",
            f"seed={seed}",
            "auxiliary.batch_size=256",
            "auxiliary.max_epochs=60",
            *overrides,
        ]
    )
    parts = table_parts(_LETTERS, config.prompts.max_new_tokens, config)
    every = every_completion(parts.llm, config.prompts.max_new_tokens)
    labels_Y = label(every, parts.scorers, config.constraint).labels_N.double()
    learn_auxiliary(parts, config, parts.llm.frozen(), 1)
    return error_of_auxiliary(parts, every, labels_Y)


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=10)
    seeds = range(parser.parse_args().seeds)
    print("| R is fitted to | " + " | ".join(f"{16 * n} rollouts" for n in SAMPLES) + " |")
    print("| --- " * (len(SAMPLES) + 1) + "|")
    plain: dict[int, np.ndarray] = {}
    for name, overrides in WAYS.items():
        cells = []
        for samples in SAMPLES:
            errors = np.array([error(seed, samples, overrides) for seed in seeds])
            less = plain.setdefault(samples, errors) - errors  # the same rollouts, seed by seed
            spread = np.std(less, ddof=1) / len(errors) ** 0.5
            gain = f" ({less.mean():+.4f} ± {spread:.4f})" if less.any() else ""
            cells.append(f"{errors.mean():.4f}{gain}")
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
