"""Does R gain from the rollouts of earlier iterations? The table "Replay" of docs/auxiliary.md.

    python scripts/compare_replay.py RUN

Fits R from the start to the rollouts of the last iteration of a finished run and to 0, 1, 2, ... of
the iterations before it, which its newest checkpoint holds. Measured on completions of prompts that
R has never seen, by the LLM as it stood at that iteration: eight for each held-out prompt. Means
over eight seeds of the fit, and over them the standard error of the log loss's difference from no
replay. About three minutes on two cores.
"""

import sys
from pathlib import Path

import numpy as np
import torch

from constrained_ft import checkpoint
from constrained_ft.compose import load_config
from constrained_ft.distributed import StopRequest
from constrained_ft.fit import Examples, fit_auxiliary, measure
from constrained_ft.parts import build_auxiliary, build_parts
from constrained_ft.progress import Silent
from constrained_ft.rollouts import label
from constrained_ft.run_folder import RunFolder
from constrained_ft.sampling import sample

SEEDS = range(8)
SAMPLES = 8


def main() -> None:
    """Print one line for each number of iterations replayed."""
    folder = RunFolder(Path(sys.argv[1]))
    config = load_config(folder.path / "config.yaml")
    parts = build_parts(config, Silent(), StopRequest())
    found, _ = checkpoint.newest(folder.checkpoints)
    if found is None:
        sys.exit(f"{folder.path} holds no checkpoint")
    _, reference = checkpoint.restore(found, parts)
    drawn = sample(
        parts.llm.frozen(),
        parts.prompts.held_out,
        samples_per_prompt=SAMPLES,
        max_new_tokens=config.prompts.max_new_tokens,
        sampler=config.sampler,
        seed=config.seed,
        iteration=config.trainer.iterations + 2,
        display=Silent(),
        stop=StopRequest(),
    )
    truth = label(drawn, parts.scorers, config.constraint)
    rows = torch.arange(len(truth.labels_N))
    examples = Examples.of(truth, rows, drawn.ids_NT.shape[1], 1.0)
    violations = int((~truth.satisfied_N).sum())
    print(f"{len(rows)} completions to measure on, {violations} of them violate")
    alone: list[float] = []
    for earlier in sorted({0, 1, 2, 3, len(parts.replay) - 1}):
        if earlier >= len(parts.replay):
            continue
        found_rows = []
        for seed in SEEDS:
            auxiliary = build_auxiliary(config, parts.llm, parts.llm.tokenizer, parts.scorers)
            auxiliary.start_at(float(parts.replay[0].labels_N.mean()))
            fitted = fit_auxiliary(
                auxiliary,
                reference.head,
                parts.replay[: earlier + 1],
                config.auxiliary,
                seed=seed,
                display=Silent(),
                stop=StopRequest(),
            )
            measured = measure(auxiliary.frozen(), reference.head, examples, seed=0)
            found_rows.append(fitted | measured)
        losses = [row["auxiliary/log_loss"] for row in found_rows]
        alone = alone or losses
        gained = np.subtract(losses, alone)
        means = {name: np.mean([row[name] for row in found_rows]) for name in found_rows[0]}
        print(
            f"{earlier} earlier iterations  {means['auxiliary/examples']:5.0f} rollouts  auc "
            + " ".join(f"{means[f'auxiliary/auc_{at}']:.3f}" for at in ("first", "middle", "last"))
            + f"  log loss {means['auxiliary/log_loss']:.4f}"
            + f" ({gained.mean():+.4f} ± {gained.std(ddof=1) / len(gained) ** 0.5:.4f})"
            + f"  calibration {means['auxiliary/calibration_error']:.4f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
