"""Small runs for tests: the smoke experiment cut down, and models of which everything is known."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from constrained_ft import metrics
from constrained_ft.compose import compose
from constrained_ft.config import Config, LoraConfig
from constrained_ft.distributed import StopRequest, World
from constrained_ft.errors import Interrupted
from constrained_ft.llm import LLM
from constrained_ft.loading import load_llm
from constrained_ft.parts import Parts, build_parts
from constrained_ft.progress import Display, Silent
from constrained_ft.prompts import Prompt
from constrained_ft.run_folder import RunFolder
from constrained_ft.sharding import gathered
from constrained_ft.tiny import byte_tokenizer
from constrained_ft.train import train

SMALL = (
    "experiment=smoke",
    "prompts.prompts_per_iteration=10",
    "prompts.samples_per_prompt=4",
    "prompts.max_new_tokens=8",
    "auxiliary.max_epochs=2",
    "trainer.iterations=3",
    "trainer.steps_per_iteration=2",
    "trainer.warmup_steps=1",
    "trainer.lr_scheduler=cosine",
    "evaluation.max_prompts=10",
    "evaluation.samples_per_prompt=4",
    "evaluation.max_validation_rows=4",
)
LORA = LoraConfig(r=4, alpha=8.0, dropout=0.0, target_modules="all-linear", first_layer=0)
SHAPES = ["llama", "gpt2", "qwen2", "gemma"]


def small_config(*overrides: str, lora: bool = False, first_layer: int = 0) -> Config:
    config = compose([*SMALL, *overrides])
    adapters = LORA.model_copy(update={"first_layer": first_layer})
    llm = config.llm.model_copy(update={"lora": adapters if lora else None})
    return config.model_copy(update={"llm": llm})


def small_parts(config: Config, world: World | None = None) -> Parts:
    return build_parts(config, Silent(), StopRequest(), world=world)


def run(config: Config, path: Path) -> RunFolder:
    """A run from its start to its end."""
    folder = RunFolder(path).start(config, ["cft", "train"])
    train(config, folder, Silent(), StopRequest())
    folder.close()
    return folder


class StopAfter(StopRequest):
    """Asks to stop once so many iterations are finished."""

    def __init__(self, folder: RunFolder, iterations: int) -> None:
        super().__init__()
        self._folder = folder
        self._iterations = iterations

    def check(self) -> None:
        if len(metrics.read(self._folder.metrics_file)) >= self._iterations:
            raise Interrupted("stopped by a test")


def stopped(config: Config, path: Path, *, after: int) -> RunFolder:
    """A run that was stopped after so many iterations."""
    folder = RunFolder(path).start(config, ["cft", "train"])
    with pytest.raises(Interrupted):
        train(config, folder, Silent(), StopAfter(folder, after))
    folder.close()
    assert len(metrics.read(folder.metrics_file)) == after
    return folder


def go_on(config: Config, path: Path, display: Display | None = None) -> RunFolder:
    """The rest of a run that was stopped."""
    folder = RunFolder(path).resume(config, ["cft", "train", "--resume"])
    train(config, folder, display or Silent(), StopRequest())
    folder.close()
    return folder


def tiny_llm(shape: str = "llama", *, lora: bool = False, sharpness: float = 1.0) -> LLM:
    """A tiny model; `sharpness` multiplies its logits, which are nearly uniform otherwise."""
    config = small_config(f"llm.model_name_or_path=tiny:{shape}", lora=lora).llm
    llm = load_llm(config, byte_tokenizer(), precision="fp32", seed=1)
    with torch.no_grad():
        llm.head.weight_VD.mul_(sharpness)
    return llm


def prompt(text: str) -> Prompt:
    ids = byte_tokenizer()(text)["input_ids"]
    return Prompt(id=text, text=text, group="prompts", token_ids=tuple(ids))


# Completions of a table: up to two letters; the dot ends them. A row of the corpus may have three.
LETTERS, LENGTH = ".abc", 3
TABLE = (
    "llm=tiny",
    "constraint=letters",
    "constraint.scorer.letter=c",
    "constraint.scorer.at_most=0",
    "constraint.labels=hard",
    "data=file",
    "data.path=none",
    "prompts=file",
    "prompts.path=none",
    "prompts.prompts_per_iteration=32",
    "prompts.samples_per_prompt=64",
    "prompts.max_new_tokens=2",
    "sampler.batch_size=2048",
    "evaluation.judge=null",
    "auxiliary=head",
    "auxiliary.rank=4",
    "auxiliary.learning_rate=0.02",
    "auxiliary.batch_size=512",
    "auxiliary.max_epochs=20",
    "auxiliary.replay_iterations=0",
    "trainer.rollouts_per_step=2048",
    "trainer.max_grad_norm=100",
    "trainer.lr_scheduler=cosine",
)


def gradients(llm: LLM) -> dict[str, Tensor]:
    """The gradients since the last call, whole; all ranks that share them have to ask."""
    found = {}
    for name, parameter in llm.trained_parameters().items():
        own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        found[name] = gathered(own.detach())
        parameter.grad = None
    return found
