"""Ranks with parts of the weights do what one process does; what they leave behind is whole."""

import itertools
import json
import math
import os
import pickle
import re
import resource
import shutil
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import safetensors.torch
import torch
from several import started, together
from small import run, small_config, small_parts
from test_checkpoint import CRAFTED, Canary
from test_distributed import step_in_float64
from test_launch import digests, rows
from torch import Tensor
from transformers import AutoModelForCausalLM

from constrained_ft import checkpoint, finetune
from constrained_ft.compose import compose
from constrained_ft.config import Config
from constrained_ft.distributed import StopRequest, World
from constrained_ft.errors import CheckpointError, ConfigError, Interrupted, ScorerError
from constrained_ft.finetune import update_llm
from constrained_ft.memory import estimate_memory
from constrained_ft.parts import shard_llm
from constrained_ft.progress import Silent
from constrained_ft.run_folder import RunFolder
from constrained_ft.sharding import own_part
from constrained_ft.target import learn_target
from constrained_ft.train import train

SHARDED = "trainer.sharding=fsdp2"
# Tied and untied heads, all weights and LoRA.
MODELS = [
    (("llm.model_name_or_path=tiny:llama",), False),
    (("llm.model_name_or_path=tiny:llama",), True),
    (("llm.model_name_or_path=tiny:qwen2", "trainer.divergence=jsd"), False),
    (("llm.model_name_or_path=tiny:qwen2", "llm.gradient_checkpointing=true"), True),
]
STEPS = [
    ((), 12),
    ((), 1),  # a rank without rollouts
    (("trainer.corpus=false",), 1),  # a rank without any work
    (("trainer.gradient_accumulation_steps=3",), 8),
    (("trainer.kl_weight=0",), 8),
    (("llm.gradient_checkpointing=true",), 8),
]
WHOLE_RUN = ("trainer.lr_scheduler=constant", "trainer.warmup_steps=0")

# What ranks run; spawned processes import it from here -------------------------------------------


def config_of(overrides: Sequence[str], batch: int, *, lora: bool = False) -> Config:
    rows = f"trainer.per_device_train_batch_size={batch}"
    return small_config(*overrides, SHARDED, rows, lora=lora)


def gradients_of_steps(world: World, stop: StopRequest) -> list[dict[str, Tensor]]:
    gpt2 = "llm.model_name_or_path=tiny:gpt2"  # in float64 from end to end
    batch = 8 // world.size
    configs = [(config_of((*overrides, gpt2), batch), count) for overrides, count in STEPS]
    return [step_in_float64(config, world, count)[0] for config, count in configs]


def five_steps(world: World, stop: StopRequest) -> list[tuple[dict[str, Tensor], Tensor]]:
    """Of each model the weights afterwards, and what it says."""
    found = []
    for overrides, lora in MODELS:
        steps = ("trainer.steps_per_iteration=5", "trainer.iterations=1")
        config = config_of((*overrides, *steps), 8 // world.size, lora=lora)
        parts = small_parts(config)
        target = learn_target(parts, config, parts.llm.frozen(), 1)
        parts.world = world
        whole = parts.llm.trained_parameters().values()
        numbers = sum(parameter.numel() for parameter in whole)
        shard_llm(parts, config)
        assert parts.llm.is_sharded == (world.size > 1)
        # The rehearsal of an update is all ranks' too, and leaves nothing behind.
        assert estimate_memory(parts.llm, parts.prompts, config, world=world) is not None
        trained = parts.llm.trained_parameters().values()
        assert all(parameter.grad is None for parameter in trained)
        own = sum(own_part(one).numel() for one in trained)
        assert world.totals([float(own)]) == [numbers]
        # A gradient of nothing but rounding, divided by its own size, would be a whole step.
        parts.optimization.optimizer.param_groups[0]["eps"] = 1e-4
        update_llm(parts, target, config, 1)
        frozen = parts.llm.frozen()
        ids_BL = torch.arange(60, 68)[None]
        said_BL = frozen.generate(input_ids=ids_BL, max_new_tokens=4, do_sample=False)
        states = frozen.hidden_states(said_BL, torch.tensor([12]))
        with parts.llm.gathered():
            again = parts.llm.frozen().hidden_states(said_BL, torch.tensor([12]))
        assert torch.equal(states, again)
        found.append((parts.llm.whole_trained(), said_BL))
    return found


class Until(Silent):
    """Leaves after an iteration, once it is saved."""

    def __init__(self, last: int) -> None:
        self.last = last

    def iteration(self, number: int, of: int, numbers: Mapping[str, float]) -> None:
        if number == self.last:
            raise Interrupted("far enough")


def train_all(world: World, stop: StopRequest, runs: Sequence[tuple[Config, Path]]) -> None:
    for config, path in runs:
        train(config, RunFolder(path), Silent(), stop, world)


def killed_while_saving(world: World, stop: StopRequest, config: Config, path: Path) -> None:
    usual = checkpoint._write_tensors

    def write(file: Path, tensors: Mapping[str, Tensor]) -> None:
        if "iteration_0002" in str(file):
            os.kill(os.getpid(), signal.SIGKILL)
        usual(file, tensors)

    checkpoint._write_tensors = write
    train(config, RunFolder(path), Silent(), stop, world)


def train_without_space(
    world: World, stop: StopRequest, config: Config, path: Path, rank: int
) -> None:
    """From the second iteration's checkpoint on, one rank can write no file above 4 KiB."""
    usual, saves = checkpoint.write_shards, itertools.count(1)

    def write(*arguments: object) -> None:
        if next(saves) == 3 and world.rank == rank:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
        usual(*arguments)  # type: ignore[arg-type]

    checkpoint.write_shards = write
    train(config, RunFolder(path), Silent(), stop, world)


def train_with_a_fault(world: World, stop: StopRequest, config: Config, path: Path) -> None:
    """The last step's loss is no number, after the steps before it have changed the weights."""
    usual, steps = finetune.backward_of_step, itertools.count(1)
    last = config.trainer.iterations * config.trainer.steps_per_iteration

    def backward(*arguments: object, **named: object) -> dict[str, float]:
        losses = usual(*arguments, **named)  # type: ignore[arg-type]
        return losses | ({"update/loss": math.nan} if next(steps) == last else {})

    finetune.backward_of_step = backward
    train(config, RunFolder(path), Silent(), stop, world)


def fail_in_a_pass(world: World, stop: StopRequest) -> None:
    usual = finetune._losses_of_pass

    def losses(*arguments: object) -> tuple[Tensor, Tensor]:
        if world.rank == 1:
            raise ScorerError("out of memory, say")
        return usual(*arguments)  # type: ignore[arg-type]

    finetune._losses_of_pass = losses
    step_in_float64(config_of(("llm.model_name_or_path=tiny:gpt2",), 4), world, 8)


# Steps -------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_sharded_ranks_have_the_gradient_of_one_process() -> None:
    alone = gradients_of_steps(World.alone(), StopRequest())
    first, second = together(gradients_of_steps, 2)
    for (overrides, count), whole, ours, others in zip(STEPS, alone, first, second, strict=True):
        assert any(gradient.abs().max() > 0 for gradient in whole.values())
        for name, gradient in whole.items():
            case = (overrides, count, name)
            assert gradient.dtype == torch.float64
            scale = gradient.abs().max().clamp_min(1e-12)
            assert (ours[name] - gradient).abs().max() <= 1e-9 * scale, case
            assert torch.equal(ours[name], others[name]), case


def distance(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """Of all weights together, relative to them."""
    assert ours.keys() == theirs.keys()
    gap = sum(float((ours[n] - theirs[n]).double().norm() ** 2) for n in ours)
    size = sum(float(theirs[n].double().norm() ** 2) for n in ours)
    return float((gap / size) ** 0.5)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_after_five_steps_two_ranks_have_the_weights_of_one_process() -> None:
    alone = five_steps(World.alone(), StopRequest())
    first, second = together(five_steps, 2)
    for case, whole, ours, others in zip(MODELS, alone, first, second, strict=True):
        assert all(torch.equal(ours[0][name], others[0][name]) for name in ours[0]), case
        assert distance(ours[0], whole[0]) <= 1e-5, case
        assert torch.equal(ours[1], whole[1]), case


def test_what_one_rank_fails_with_in_a_pass_reaches_the_other() -> None:
    first, second = together(fail_in_a_pass, 2)
    assert [type(first), type(second)] == [ScorerError, ScorerError]
    assert str(first) == "rank 1: out of memory, say"


# Whole runs --------------------------------------------------------------------------------------


def begun(config: Config, path: Path) -> Path:
    RunFolder(path).start(config, ["cft", "train"]).close()
    return path


def said(folder: Path, iteration: int) -> list[str]:
    return RunFolder(folder).rollouts_file(iteration).read_text().splitlines()


def shards(folder: Path, iteration: int = 3) -> dict[tuple[str, str], Tensor]:
    """All that is in a checkpoint's shards, by file and name."""
    files = sorted((folder / f"checkpoints/iteration_{iteration:04d}/shards").iterdir())
    loaded = {file.name: safetensors.torch.load_file(file) for file in files}
    return {(file, name): t for file, tensors in loaded.items() for name, t in tensors.items()}


def weights(folder: Path) -> dict[str, Tensor]:
    return safetensors.torch.load_file(folder / "model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "lora"), [("llama", False), ("qwen2", True)], ids=["tied, full", "untied, lora"]
)
def test_runs_are_continued_to_the_bit_and_by_another_number_of_ranks(
    shape: str, tmp_path: Path, *, lora: bool
) -> None:
    overrides = (*WHOLE_RUN, f"llm.model_name_or_path=tiny:{shape}")
    config, alone = (config_of(overrides, batch, lora=lora) for batch in (4, 8))
    straight = begun(config, tmp_path / "straight")
    assert together(train_all, 2, [(config, straight)]) == [None, None]

    killed = begun(config, tmp_path / "killed")
    assert started(killed_while_saving, 2, config, killed)[0] == -signal.SIGKILL
    assert list((killed / "checkpoints").glob(".tmp-iteration_0002-*/shards/*.safetensors"))
    mixed = tmp_path / "mixed"
    shutil.copytree(killed, mixed)
    with pytest.raises(Interrupted, match="far enough"):
        train(alone, RunFolder(mixed), Until(2), StopRequest())
    assert together(train_all, 2, [(config, killed), (config, mixed)]) == [None, None]

    # The same ranks: the same bits. A shard's header has no fixed order, its tensors are compared.
    assert digests(killed) == digests(straight)
    ours, theirs = shards(killed), shards(straight)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    losses = [[row["update/loss"] for row in rows(path)] for path in (killed, straight)]
    assert losses[0] == losses[1]
    # One rank in between: the same samples in the same order.
    for iteration in (2, 3):
        assert said(mixed, iteration) == said(straight, iteration)
    for ours, theirs in zip(rows(mixed), rows(straight), strict=True):
        assert ours["update/loss"] == pytest.approx(theirs["update/loss"], rel=1e-3)

    # What is left is whole: the export of a run in one process, without sharding. (Of the untied
    # model R learns next to nothing, and rounding decides which of its epochs was the best.)
    exported = weights(straight / "final" / "llm")
    if not lora:
        plain = alone.model_copy(
            update={"trainer": alone.trainer.model_copy(update={"sharding": "none"})}
        )
        other = run(plain, tmp_path / "plain")
        assert distance(exported, weights(other.final_llm)) <= 1e-4  # R's fit is in it
    AutoModelForCausalLM.from_pretrained(straight / "final" / "llm")
    newest = straight / "checkpoints" / "iteration_0003"
    parts = small_parts(alone)
    checkpoint.restore_llm(newest, parts)
    saved = parts.llm.trained_parameters()
    if lora:
        file = straight / "final" / "adapter" / "adapter_model.safetensors"
        exported = safetensors.torch.load_file(file)
        saved = parts.llm.frozen().adapter()
    assert exported.keys() == saved.keys()
    assert all(torch.equal(exported[name], one) for name, one in saved.items())
    manifest = json.loads((newest / "manifest.json").read_text())
    assert {name for name in manifest if "/" in name} == {
        f"shards/shard-0000{rank}-model-00001-of-00001.safetensors" for rank in (1, 2)
    }
    assert {Path(name).suffix for name in manifest} == {".safetensors", ".json"}
    refuses_what_does_not_fit(newest)
    sees_harm(newest)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_shard_that_cannot_be_written_ends_the_run_on_all_ranks(
    rank: int, tmp_path: Path
) -> None:
    config = config_of(WHOLE_RUN, 4)
    straight, full = (begun(config, tmp_path / name) for name in ("straight", "full"))
    assert together(train_all, 2, [(config, straight)]) == [None, None]
    for error in together(train_without_space, 2, config, full, rank):
        assert isinstance(error, CheckpointError)
        assert error.exit_code == 3
        message = r"cannot write the checkpoint .*iteration_0002: shards: .*File too large"
        assert re.search(message, str(error))
    left = sorted(one.name for one in (full / "checkpoints").iterdir())
    assert left == ["iteration_0000", "iteration_0001"]
    assert checkpoint.newest(full / "checkpoints") == (full / "checkpoints/iteration_0001", [])
    assert together(train_all, 2, [(config, full)]) == [None, None]
    assert digests(full) == digests(straight)


def test_rollback_takes_the_whole_update_back_on_all_ranks(tmp_path: Path) -> None:
    config = config_of((*WHOLE_RUN, "guard.on_failure=rollback", "trainer.iterations=2"), 4)
    folder = begun(config, tmp_path / "run")
    assert together(train_with_a_fault, 2, config, folder) == [None, None]
    assert [row.get("update/rolled_back") for row in rows(folder)] == [None, 1.0]
    before, after = shards(folder, 1), shards(folder, 2)
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert torch.equal(tensor, after[key]), key
    start = small_parts(config).llm.trained_parameters()
    whole = {name: one.detach() for name, one in start.items()}
    assert distance(weights(folder / "final" / "llm"), whole) > 0  # the first update stays


def refuses_what_does_not_fit(newest: Path) -> None:
    other = small_parts(small_config("llm.model_name_or_path=tiny:qwen2"))
    before = {name: one.clone() for name, one in other.llm.trained_parameters().items()}
    with pytest.raises(CheckpointError, match="does not fit this run"):
        checkpoint.restore_llm(newest, other)
    now = other.llm.trained_parameters()
    assert all(torch.equal(one, now[name]) for name, one in before.items())


def sees_harm(newest: Path) -> None:
    shard = next((newest / "shards").iterdir())
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)
    found, faults = checkpoint.newest(newest.parent)
    assert found == newest.parent / "iteration_0002"
    assert faults == [f"iteration_0003: shards/{shard.name} is damaged"]


@pytest.mark.slow
def test_with_adapters_and_a_peer_the_run_is_that_of_one_process(tmp_path: Path) -> None:
    overrides = (*WHOLE_RUN, "trainer=overlapped")
    config = config_of((*overrides, "placement=peers"), 4, lora=True)
    folder = begun(config, tmp_path / "peers")
    assert together(train_all, 3, [(config, folder)]) == [None] * 3
    alone = run(config_of(overrides, 8, lora=True), tmp_path / "alone")
    ours, theirs = (
        safetensors.torch.load_file(path / "final" / "adapter" / "adapter_model.safetensors")
        for path in (folder, alone.path)
    )
    assert distance(ours, theirs) <= 1e-4
    ours, theirs = weights(folder / "final" / "llm"), weights(alone.final_llm)
    assert distance(ours, theirs) <= 1e-5


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Config]:
    """A checkpoint with shards, all of them one rank's."""
    config = config_of((), 4)
    folder = tmp_path_factory.mktemp("checkpoints")
    return checkpoint.save(folder, small_parts(config), config, None, {"iteration": 0.0}), config


@pytest.mark.parametrize("kind", [*CRAFTED, "pickle", "a hole", "twice"])
def test_crafted_shards_are_refused_and_run_nothing(
    kind: str, sharded: tuple[Path, Config], tmp_path: Path
) -> None:
    copied, canary = tmp_path / "copied", tmp_path / "canary"
    shutil.copytree(sharded[0], copied)
    (shard,) = (copied / "shards").iterdir()
    if kind in ("a hole", "twice"):
        with safetensors.safe_open(shard, "pt") as opened:
            facts = opened.metadata()
        tensors = safetensors.torch.load_file(shard)
        places = json.loads(facts["DCP_SHARDING_INFO"])
        name = next(name for name, tensor in tensors.items() if tensor.ndim == 2)
        half = len(tensors[name]) // 2
        other = tensors[name][half:].clone()
        if kind == "a hole":  # its second half is all there is of a tensor
            tensors[name] = other
        else:
            safetensors.torch.save_file(
                {name: other},
                shard.with_name("more.safetensors"),
                {"DCP_SHARDING_INFO": json.dumps({name: {"saved_offsets": [half, 0]}})},
            )
        places[name]["saved_offsets"] = [half * (kind == "a hole"), 0]
        facts["DCP_SHARDING_INFO"] = json.dumps(places)
        safetensors.torch.save_file(tensors, shard, facts)
    else:
        crafted = pickle.dumps(Canary(canary)) if kind == "pickle" else CRAFTED[kind]
        shard.write_bytes(crafted)
    parts = small_parts(sharded[1])
    before = {name: one.clone() for name, one in parts.llm.trained_parameters().items()}
    with pytest.raises(CheckpointError, match="does not fit this run"):
        checkpoint.restore_llm(copied, parts)
    now = parts.llm.trained_parameters()
    assert all(torch.equal(one, now[name]) for name, one in before.items())
    assert not canary.exists()


def test_what_does_not_go_together_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"use trainer\.sharding=none"):
        small_config("trainer=grpo", SHARDED)
    with pytest.raises(ConfigError, match=r"takes adapters from whole weights"):
        compose(["sampler=vllm_server", "sampler.url=http://localhost:8000", SHARDED])
