"""The LLM's optimizer and its schedule."""

import warnings
from dataclasses import dataclass

import torch
from transformers import get_scheduler

from constrained_ft.config import TrainerConfig
from constrained_ft.llm import LLM


@dataclass(frozen=True, kw_only=True)
class Optimization:
    """AdamW and its schedule, carried from iteration to iteration."""

    optimizer: torch.optim.AdamW
    scheduler: torch.optim.lr_scheduler.LambdaLR

    def pass_step(self) -> None:
        """The learning rate of the next step, whether or not this one was taken."""
        with warnings.catch_warnings():
            # torch takes a step that a guard left out for a mistake in the order of calls.
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
            self.scheduler.step()


def build_optimization(llm: LLM, config: TrainerConfig) -> Optimization:
    """AdamW over what the LLM trains; the schedule spans the whole run."""
    optimizer = torch.optim.AdamW(
        llm.trained_parameters().values(),
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        fused=True,
    )
    scheduler = get_scheduler(
        "constant_with_warmup" if config.lr_scheduler == "constant" else config.lr_scheduler,
        optimizer,
        num_warmup_steps=config.warmup_steps,
        num_training_steps=config.iterations * config.steps_per_iteration,
    )
    return Optimization(optimizer=optimizer, scheduler=scheduler)
