"""Does R gain from the rollouts of earlier iterations? The table "Replay" of docs/auxiliary.md.

    python scripts/compare_replay.py RUN

Fits R from the start to the rollouts of the last iteration of a finished run and to 0, 1, 2, ... of
the iterations before it, which its newest checkpoint holds; measures it on held-out prompts of the
last iteration. About a minute on two cores.
"""

import sys
from pathlib import Path

from constrained_ft import checkpoint
from constrained_ft.compose import load_config
from constrained_ft.distributed import StopRequest
from constrained_ft.fit import fit_auxiliary
from constrained_ft.parts import build_auxiliary, build_parts
from constrained_ft.progress import Silent
from constrained_ft.run_folder import RunFolder

SEEDS = range(4)


def main() -> None:
    """Print one line for each number of iterations replayed."""
    folder = RunFolder(Path(sys.argv[1]))
    config = load_config(folder.path / "config.yaml")
    parts = build_parts(config, Silent(), StopRequest())
    found, _ = checkpoint.newest(folder.checkpoints)
    if found is None:
        sys.exit(f"{folder.path} holds no checkpoint")
    _, reference = checkpoint.restore(found, parts)
    for earlier in sorted({0, 1, 2, 4, len(parts.replay) - 1}):
        if earlier >= len(parts.replay):
            continue
        rows = []
        for seed in SEEDS:
            auxiliary = build_auxiliary(config, parts.llm, parts.llm.tokenizer, parts.scorer)
            auxiliary.start_at(float(parts.replay[0].labels_N.mean()))
            rows.append(
                fit_auxiliary(
                    auxiliary,
                    reference.head,
                    parts.replay[: earlier + 1],
                    config.auxiliary,
                    seed=seed,
                    display=Silent(),
                    stop=StopRequest(),
                )
            )
        means = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
        print(
            f"{earlier} earlier iterations  {means['auxiliary/examples']:5.0f} rollouts  auc "
            + " ".join(f"{means[f'auxiliary/auc_{at}']:.3f}" for at in ("first", "middle", "last"))
            + f"  log loss {means['auxiliary/log_loss']:.4f}"
            + f"  calibration {means['auxiliary/calibration_error']:.4f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
