"""The law of lambda, predicted against measured: satisfied = (c + lambda) / (1 + lambda).

    python scripts/lambda_law.py

A language model that is a table learns a corpus of its own completions, c of which satisfy the
constraint, under the constraint; corpus and completions have the same prompts, and a table can be
anything. It is trained by the package's own stages, with an R that is fitted to samples. What it
satisfies in the end is summed over all completions that there are. Source: method, equilibrium of
the corpus term and lambda KL(q* || LLM).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from constrained_ft.compose import compose
from constrained_ft.encoding import Row
from constrained_ft.finetune import update_llm
from constrained_ft.llm import LLM
from constrained_ft.randomness import generator_for
from constrained_ft.rollouts import Rollouts, label
from constrained_ft.tabular import every_completion, table_parts
from constrained_ft.target import learn_target

LETTERS, LENGTH, ROWS = ".abc", 3, 1024
SETTINGS = (
    "llm=tiny",
    "constraint=letters",
    "constraint.scorer.letter=a",
    "constraint.scorer.at_most=0",
    "data=file",
    "data.path=none",
    "prompts=file",
    "prompts.path=none",
    "prompts.prompts_per_iteration=16",
    "prompts.samples_per_prompt=128",
    f"prompts.max_new_tokens={LENGTH}",
    "sampler.batch_size=4096",
    "evaluation.judge=null",
    # As in the selfcheck: a head can hold any R of a table.
    "auxiliary=head",
    "auxiliary.rank=4",
    "auxiliary.weight_decay=0",
    "auxiliary.consistency_weight=0.3",
    "auxiliary.learning_rate=0.01",
    "auxiliary.batch_size=4096",
    "auxiliary.max_epochs=30",
    "auxiliary.patience=5",
    "auxiliary.replay_iterations=0",
    "trainer.iterations=16",
    "trainer.steps_per_iteration=16",
    "trainer.rollouts_per_step=128",
    "trainer.per_device_train_batch_size=128",
    "trainer.learning_rate=0.1",
    "trainer.max_grad_norm=100",
)


def main(weights: Sequence[float] = (0.5, 1.0, 3.0, 9.0)) -> None:
    """Print the table."""
    print("| lambda | corpus | predicted | measured | difference, points |")
    print("| --- | --- | --- | --- | --- |")
    for weight in weights:
        corpus, measured = rest(weight)
        predicted = (corpus + weight) / (1 + weight)
        print(
            f"| {weight:g} | {corpus:.3f} | {predicted:.3f} | {measured:.3f} | "
            f"{100 * (measured - predicted):+.1f} |"
        )


def rest(kl_weight: float, *overrides: str, seed: int = 0) -> tuple[float, float]:
    """The satisfaction of the corpus and that of the model after training, both exact."""
    words = [*SETTINGS, f"trainer.kl_weight={kl_weight}", f"seed={seed}", *overrides]
    config = compose(words)
    llm = table_parts(LETTERS, LENGTH, config).llm
    every = every_completion(llm, LENGTH)
    generator = generator_for(seed, "corpus")
    drawn = torch.multinomial(
        probabilities(llm, every), ROWS, replacement=True, generator=generator
    )
    rows = [_row(every, index) for index in drawn.tolist()]
    parts = table_parts(LETTERS, LENGTH, config, rows)
    satisfied_Y = label(every, parts.scorers, config.constraint).satisfied_N.double()
    for iteration in range(1, config.trainer.iterations + 1):
        target = learn_target(parts, config, parts.llm.frozen(), iteration)
        update_llm(parts, target, config, iteration)
    measured = probabilities(parts.llm, every) @ satisfied_Y
    return float(satisfied_Y[drawn].mean()), float(measured)


@torch.no_grad()
def probabilities(llm: LLM, every: Rollouts) -> Tensor:
    """Of every completion that there is."""
    stem = torch.zeros(len(every.ids_NT), 1, dtype=torch.long)
    logits = llm.module(input_ids=torch.cat([stem, every.ids_NT[:, :-1]], 1)).logits
    chosen = logits.double().log_softmax(-1).gather(-1, every.ids_NT[..., None])[..., 0]
    return (chosen * every.mask_NT).sum(-1).exp()


def _row(every: Rollouts, index: int) -> Row:
    tokens = every.ids_NT[index][every.mask_NT[index]].tolist()
    return Row(
        token_ids=(0, *tokens), trained=(False, *[True] * len(tokens)), group="", prompted=True
    )


if __name__ == "__main__":
    main()
