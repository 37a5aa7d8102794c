"""What helps where a constraint is rarely satisfied: guided roll-ins, balanced batches, both.

    python scripts/compare_roll_ins.py

The smoke experiment with a constraint that its base model satisfies in about 1 % of its completions
and its corpus never: at least three digits out of 0 to 7. The same number of completions whichever
way. For each seed the satisfaction of the LLM alone: of the rollouts of every iteration that R did
not guide, and at the end, on held-out prompts.
"""

import argparse

import torch

from constrained_ft.compose import compose
from constrained_ft.distributed import StopRequest
from constrained_ft.finetune import update_llm
from constrained_ft.parts import build_parts
from constrained_ft.progress import Silent
from constrained_ft.rollouts import label
from constrained_ft.sampling import sample
from constrained_ft.target import learn_target

RARE = (
    "experiment=smoke",
    "constraint=regex",
    "constraint.scorer.pattern='([0-7].*){3}'",
    "constraint.scorer.must=contain",
    "trainer.steps_per_iteration=8",
    "trainer.warmup_steps=0",
    "trainer.lr_scheduler=constant",
    "auxiliary.max_epochs=8",
)
WAYS = {
    "neither": (),
    "balanced": ("auxiliary.balanced=true",),
    "roll-ins": ("prompts.guided_roll_ins=0.3",),
    "both": ("auxiliary.balanced=true", "prompts.guided_roll_ins=0.3"),
}
COMPLETIONS = 32  # of each held-out prompt


def rates(seed: int, iterations: int, overrides: tuple[str, ...]) -> list[float]:
    """Satisfaction at the start of each iteration and at the end."""
    config = compose([*RARE, f"trainer.iterations={iterations}", f"seed={seed}", *overrides])
    parts = build_parts(config, Silent(), StopRequest())
    found = []
    for iteration in range(1, iterations + 1):
        target = learn_target(parts, config, parts.llm.frozen(), iteration)
        found.append(target.metrics["rollouts/satisfaction"])
        update_llm(parts, target, config, iteration)
    rollouts = sample(
        parts.llm.frozen(),
        parts.prompts.held_out,
        samples_per_prompt=COMPLETIONS,
        max_new_tokens=config.prompts.max_new_tokens,
        sampler=config.sampler,
        seed=seed,
        iteration=iterations + 1,
        display=Silent(),
        stop=StopRequest(),
    )
    labeled = label(rollouts, parts.scorers, config.constraint)
    return [*found, float(labeled.satisfied_N.float().mean())]


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=6)
    args = parser.parse_args()
    torch.set_num_threads(1)
    columns = [*(f"iteration {i + 1}" for i in range(args.iterations)), "held out, at the end"]
    print("| seed | | " + " | ".join(columns) + " |")
    print("| --- " * (len(columns) + 2) + "|")
    for seed in range(args.seeds):
        for name, overrides in WAYS.items():
            cells = [f"{rate:.1%}" for rate in rates(seed, args.iterations, overrides)]
            print(f"| {seed} | {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
