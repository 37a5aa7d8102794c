"""Compare forms of the auxiliary on samples of the base model; the tables of docs/auxiliary.md.

    python scripts/compare_auxiliaries.py ROLLOUTS.pt [--guided] [NAME ...]

The first call samples the base model of the default configuration (about two minutes on two cores)
and keeps the samples in ROLLOUTS.pt; later calls read them. R is fitted on completions of training
prompts, and measured on completions of prompts that it has never seen. With --guided, completions
of held-out prompts are then decoded under each R, and scored.
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from constrained_ft.auxiliary import Auxiliary
from constrained_ft.compose import compose
from constrained_ft.config import Config
from constrained_ft.distributed import StopRequest
from constrained_ft.evaluate import choose_prompts
from constrained_ft.fit import Examples, fit_auxiliary, measure
from constrained_ft.intervals import bootstrap
from constrained_ft.parts import Parts, build_auxiliary, build_parts
from constrained_ft.progress import Silent
from constrained_ft.randomness import seed_for
from constrained_ft.rollouts import LabeledRollouts, label
from constrained_ft.sampling import sample
from constrained_ft.scorers import score_all

HARD = ["constraint.labels=hard"]
VARIANTS: dict[str, list[str]] = {
    "additive": HARD,
    "additive, no prior": [*HARD, "auxiliary.vocabulary_prior=false"],
    "additive, consistency 0.1": [*HARD, "auxiliary.consistency_weight=0.1"],
    "additive, consistency 0.5": [*HARD, "auxiliary.consistency_weight=0.5"],
    "additive, balanced": [*HARD, "auxiliary.balanced=true"],
    "additive, rank 16": [*HARD, "auxiliary.rank=16"],
    "additive, rank 128": [*HARD, "auxiliary.rank=128"],
    "head": [*HARD, "auxiliary=head"],
    "transformer": [*HARD, "auxiliary=transformer"],
    "transformer, no prior": [*HARD, "auxiliary=transformer", "auxiliary.vocabulary_prior=false"],
    "additive, soft": ["constraint.labels=soft"],
    "additive, tilt 4": ["constraint.labels=tilt", "constraint.beta=4"],
    "additive, tilt 8": ["constraint.labels=tilt", "constraint.beta=8"],
    "additive, tilt 16": ["constraint.labels=tilt", "constraint.beta=16"],
}


def main() -> None:
    """Print one row a variant."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rollouts", type=Path)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--guided", action="store_true")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE")
    arguments = parser.parse_args()
    parts = build_parts(compose(arguments.set), Silent(), StopRequest())
    training, held_out = _rollouts(arguments.rollouts, parts, compose(arguments.set))
    print(f"{len(training.scores_N)} rollouts to fit, {len(held_out.scores_N)} to measure")
    print("auc: after the first, middle, last token; ll: log loss; ece; tower; epochs; seconds")
    for name in arguments.names or VARIANTS:
        config = compose([*arguments.set, *VARIANTS[name]])
        _compare(name, config, parts, training, held_out, guided=arguments.guided)


def _rollouts(path: Path, parts: Parts, config: Config) -> tuple[LabeledRollouts, LabeledRollouts]:
    if not path.exists():
        reference = parts.llm.frozen()
        drawn = []
        for prompts, count in ((parts.prompts.training, 4), (parts.prompts.held_out, 8)):
            rollouts = sample(
                reference,
                prompts[:512],
                samples_per_prompt=count,
                max_new_tokens=config.prompts.max_new_tokens,
                sampler=config.sampler,
                seed=config.seed,
                iteration=1,
                display=Silent(),
                stop=StopRequest(),
            )
            drawn.append(label(rollouts, parts.scorers, config.constraint))
        torch.save(drawn, path)
    training, held_out = torch.load(path, weights_only=False)
    return training, held_out


def _compare(
    name: str,
    config: Config,
    parts: Parts,
    training: LabeledRollouts,
    held_out: LabeledRollouts,
    *,
    guided: bool,
) -> None:
    training = label(training.rollouts, parts.scorers, config.constraint)
    torch.set_grad_enabled(True)
    auxiliary: Auxiliary = build_auxiliary(config, parts.llm, parts.llm.tokenizer, parts.scorers)
    auxiliary.start_at(float(training.labels_N.mean()))
    started = time.monotonic()
    fitted = fit_auxiliary(
        auxiliary,
        parts.llm.head,
        [training],
        config.auxiliary,
        seed=config.seed,
        display=Silent(),
        stop=StopRequest(),
    )
    seconds = time.monotonic() - started
    # Discrimination is of the verdict, whatever the labels that R was fitted to.
    truth = replace(held_out, labels_N=held_out.satisfied_N.float())
    rows = torch.arange(len(truth.labels_N))
    examples = Examples.of(truth, rows, truth.rollouts.ids_NT.shape[1], 1.0)
    found = measure(auxiliary.frozen(), parts.llm.head, examples, seed=0)
    aucs = " ".join(
        f"{found[f'auxiliary/auc_{place}']:.3f}" for place in ("first", "middle", "last")
    )
    line = (
        f"{name:28s} auc {aucs}  ll {found['auxiliary/log_loss']:.4f}  "
        f"ece {found['auxiliary/calibration_error']:.3f}  "
        f"tower {found['auxiliary/tower_residual']:.3f}  "
        f"{fitted['auxiliary/epochs']:.0f} epochs  {seconds:.0f} s"
    )
    if guided:
        line += "  guided " + _guided(auxiliary, config, parts)
    print(line, flush=True)


def _guided(auxiliary: Auxiliary, config: Config, parts: Parts) -> str:
    prompts = [
        prompt for prompt in choose_prompts(parts.prompts.held_out, 96) if prompt.group != "news"
    ]
    rollouts = sample(
        parts.llm.frozen(),
        prompts,
        samples_per_prompt=8,
        max_new_tokens=config.prompts.max_new_tokens,
        sampler=config.sampler,
        seed=seed_for(config.seed, "evaluation"),
        iteration=0,
        display=Silent(),
        stop=StopRequest(),
        guide=auxiliary.frozen().guide(),
    )
    shares = []
    for scorer, bound in ((parts.scorers[0], config.constraint.satisfied_at), (parts.judge, 0.5)):
        if scorer is not None:
            scores = np.array(score_all(scorer, rollouts.prompt_texts, rollouts.texts))
            shares.append(bootstrap((scores < bound).reshape(len(prompts), 8).mean(axis=1)))
    return ", ".join(share.percent() for share in shares)


if __name__ == "__main__":
    main()
