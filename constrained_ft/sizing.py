"""The numbers behind a prediction: a run's model, its work, this machine. No weights are loaded."""

import json
import math
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from constrained_ft.config import Config, LLMConfig, LoraConfig
from constrained_ft.cost import Layout, Number, Shape, Work
from constrained_ft.distributed import default_device, multiplies_bf16_fast, wants_bf16
from constrained_ft.errors import ConfigError, ModelError
from constrained_ft.machine import processor, usable_cores
from constrained_ft.prediction import DEVICES, Device, Prediction, predict
from constrained_ft.resources import model_at_hand, one_line

_TINY = "tiny:"
_PROMPT_TOKENS = 16
_LAYER = re.compile(r"\.(\d+)\.")
_ROUNDS = 5
_CALLS = 300
_STATES = 2**20  # numbers of a tensor between products, which a cache may hold
_LOOPBACK, _LOOPBACK_TOLD, _MEETING = 1.0e9, 2.4e9, 1.0e-3  # of gloo between two processes
_LOOPBACK_SHARDS = 0.25e9  # of fully_shard and gloo together

REACHED = {
    True: {
        "mining": 0.472,
        "sampling": 0.377,
        "auxiliary": 0.312,
        "target": 0.348,
        "reference": 0.366,
        "update": 0.319,
    },
    False: {
        "mining": 0.685,
        "sampling": 0.62,
        "auxiliary": 0.258,
        "target": 0.551,
        "reference": 0.685,
        "update": 0.562,
    },
}
"""Of CPUs whose trunk multiplies in bfloat16 and of others, the shares of their ceilings, by phase,
that scripts/check_cost.py found in the default run on one of them."""
UNUSED = {True: 0.642, False: 0.607}
"""What the allocator left unused there, as a share of what the passes took."""
_LIBRARIES = 0.8e9
FIXED = ("calls", "link", "host", "meetings", "service")
"""Resources of which no share is reached: their seconds are measured as they are."""


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Mean tokens, which only the data tells."""

    prompt: Number
    completion: Number
    row: Number


def assumed_lengths(config: Config) -> Lengths:
    """Prompts of sixteen tokens; completions and corpus rows as long as they may become."""
    return Lengths(
        prompt=_PROMPT_TOKENS, completion=config.prompts.max_new_tokens, row=config.data.max_length
    )


def predict_run(config: Config, ranks: int, device: Device, lengths: Lengths) -> Prediction:
    """An iteration of a run.

    Args:
        config: the whole run.
        ranks: processes, of all machines.
        device: what each of them has.
        lengths: of its texts.

    Raises:
        ModelError: when the model is not on this disk.
        ConfigError: for runs that the cost model does not know, or with too few processes.
    """
    peers = config.placement.num_learning
    if peers >= ranks:
        raise ConfigError(f"placement.peers={peers} of {ranks} processes leaves none to update")
    overlapped = config.trainer.schedule == "overlapped"
    sharding = config.trainer.sharding
    layout = Layout(
        ranks=ranks,
        peers=peers,
        overlapped=overlapped,
        sharding=sharding,
        gloo=not device.asynchronous,
    )
    work = work_of(config, lengths, layout.updaters, on_paper=device in DEVICES.values())
    return predict(shape_of(config.llm), work, layout, device)


# The model.


def shape_of(config: LLMConfig) -> Shape:
    """A model's numbers, from its `config.json` and the headers of its weights.

    Raises:
        ModelError: when it is not on this disk, or is not one whose cost is known.
    """
    if config.model_name_or_path.startswith(_TINY):
        from constrained_ft.tiny import tiny_model  # loads transformers

        module = tiny_model(config.model_name_or_path.removeprefix(_TINY), seed=0)
        tensors = {name: tuple(tensor.shape) for name, tensor in module.named_parameters()}
        return shape_from(module.config.to_dict(), tensors, config.lora)
    folder = model_at_hand(config.model_name_or_path, config.revision)
    files = sorted(folder.glob("*.safetensors")) if folder else []
    if folder is None or not files:
        raise ModelError(f"{config.model_name_or_path.partition('#')[0]} is not on this disk yet")
    try:
        facts = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        tensors = {name: size for file in files for name, size in _header(file).items()}
        return shape_from(facts, tensors, config.lora)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{folder} does not tell the sizes of its model: {error!r}") from error


def _header(file: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of a safetensors file; nothing else of it is read."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header: dict[str, Any] = json.loads(opened.read(length))
    return {name: tuple(of["shape"]) for name, of in header.items() if name != "__metadata__"}


def shape_from(
    facts: Mapping[str, Any], tensors: Mapping[str, Sequence[int]], lora: LoraConfig | None
) -> Shape:
    """A model's numbers.

    Args:
        facts: its `config.json`.
        tensors: shapes of its weights by name.
        lora: adapters, or None to train all weights.

    Raises:
        ModelError: for mixtures of experts, of which each token reads a part.
    """
    text = facts.get("text_config", facts)
    if any("expert" in name for name in tensors):
        raise ModelError("the cost of mixtures of experts is not known")
    tied = text.get("tie_word_embeddings", True)
    tensors = {n: s for n, s in tensors.items() if not (tied and n.startswith("lm_head."))}
    linears = {
        name: (size[1], size[0]) if text["model_type"] == "gpt2" else (size[0], size[1])
        for name, size in tensors.items()
        if len(size) == 2 and _LAYER.search(name)
    }
    adapted = [name for name in linears if lora is not None and _carries(name, lora)]
    heads, hidden = (
        _first(text, "num_attention_heads", "n_head"),
        _first(text, "hidden_size", "n_embd"),
    )
    layers = _first(text, "num_hidden_layers", "n_layer")
    width = text.get("head_dim") or hidden // heads
    first = 0 if lora is None else lora.first_layer
    return Shape(
        parameters=sum(math.prod(size) for size in tensors.values()),
        products=sum(math.prod(size) for size in linears.values()),
        outputs=sum(out for out, _ in linears.values()),
        linears=len(linears),
        layers=layers,
        hidden=hidden,
        vocabulary=text["vocab_size"],
        heads=heads,
        queries=heads * width,
        keys=(text.get("num_key_value_heads") or heads) * width,
        adapters=sum(lora.r * sum(linears[name]) for name in adapted) if lora else 0,
        adapted=1 - first / layers,
    )


def _carries(name: str, lora: LoraConfig) -> bool:
    """Whether a linear layer of the trunk carries an adapter."""
    number = _LAYER.search(name)
    if number is None or int(number[1]) < lora.first_layer:
        return False
    module = "." + name.removesuffix(".weight")
    names = lora.target_modules
    return names == "all-linear" or any(module.endswith(f".{name}") for name in names)


def _first(facts: Mapping[str, Any], *names: str) -> int:
    found = [facts[name] for name in names if name in facts]
    if not found:
        raise KeyError(names[0])
    return int(found[0])


# The work.


def work_of(config: Config, lengths: Lengths, updaters: int, *, on_paper: bool = False) -> Work:
    """One iteration in numbers, once R is fitted to as many as it replays.

    Args:
        config: the whole run.
        lengths: of its texts.
        updaters: ranks with corpus rows of their own.
        on_paper: for a GPU that multiplies bfloat16 fast, whatever is here.

    Raises:
        ConfigError: for runs that the cost model does not know.
    """
    prompts, trainer, fit = config.prompts, config.trainer, config.auxiliary
    unknown = {
        "trainer.trl": trainer.trl is not None,
        "sampler=hf": config.sampler.kind == "hf",
        "auxiliary=transformer": fit.kind == "transformer",
        "auxiliary.terms=product": fit.terms == "product",
        "auxiliary.td_lambda": fit.td_lambda < 1,
        "auxiliary.consistency_weight": fit.consistency_weight > 0,
        f"trainer.divergence={trainer.divergence}": trainer.divergence
        not in ("forward_kl", "accepted", "none"),
    }
    for name, found in unknown.items():
        if found:
            raise ConfigError(f"the cost of {name} is not known")
    passes = trainer.gradient_accumulation_steps
    tiny = config.llm.model_name_or_path.startswith(_TINY)
    bf16 = wants_bf16(trainer.precision, tiny=tiny)
    bf16 |= on_paper and trainer.precision == "auto" and not tiny
    frozen_bf16 = config.llm.lora is not None and (
        config.llm.dtype == "bfloat16" or (config.llm.dtype == "auto" and bf16)
    )
    return Work(
        prompts=min(prompts.prompts_per_iteration, 4)
        if trainer.is_plain
        else prompts.prompts_per_iteration,
        samples=prompts.samples_per_prompt,
        prompt_tokens=lengths.prompt,
        new_tokens=lengths.completion,
        row_tokens=lengths.row,
        rows=trainer.per_device_train_batch_size * passes * updaters * trainer.corpus,
        pass_rows=trainer.per_device_train_batch_size,
        steps=trainer.steps_per_iteration,
        rollouts_per_step=trainer.rollouts_per_step,
        batch=config.sampler.batch_size,
        scored_share=prompts.scored_share,
        candidates=prompts.candidates,
        reference=trainer.reference,
        learns=trainer.learns_target,
        rank=fit.rank,
        epochs=fit.max_epochs,
        fit_batch=fit.batch_size,
        examples=(1 - fit.validation_share) * (fit.replay_iterations + 1),
        kept=fit.replay_iterations + 2,
        bf16=bf16,
        wide_head=not frozen_bf16 or on_paper or default_device().type != "cpu",
        checkpoints=config.llm.gradient_checkpointing is True,
        keeps_prompts=True,
        keeps_below=config.sampler.kind == "cft" and config.llm.gradient_checkpointing is not True,
    )


# This machine.


def this_device(per_node: int) -> Device:
    """What one of so many processes on this machine computes with, measured in half a second.

    Links between devices are not measured: those of CPUs are taken for a machine's own, those of
    GPUs for an H100's.

    Raises:
        ConfigError: for devices that are not known, or busy.
    """
    device = default_device()
    if device.type == "cpu":
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, usable_cores() // per_node))
        found, bf16 = ceilings(device, size=1024, megabytes=64), multiplies_bf16_fast(device)
        return cpu(found, per_node, REACHED[bf16], UNUSED[bf16])
    if device.type != "cuda":
        raise ConfigError(f"what a device of type {device.type} takes is not known")
    try:
        found = ceilings(device, size=4096, megabytes=512)
    except RuntimeError as error:
        raise ConfigError(f"the GPU cannot be measured: {one_line(error)}") from error
    return replace(
        DEVICES["h100"],
        name=torch.cuda.get_device_name(),
        products=found["bfloat16"],
        wide=found["float32"],
        memory_speed=found["memory"],
        elementwise=found["memory"],
        memory=float(torch.cuda.get_device_properties(device).total_memory),
        call=found["call"],
        per_node=per_node,
    )


def cpu(
    found: Mapping[str, float], per_node: int, reached: Mapping[str, float], unused: float
) -> Device:
    """One of so many processes that share this machine's processor.

    Args:
        found: its `ceilings`.
        per_node: processes.
        reached: by phase, the share of the ceilings.
        unused: what the allocator leaves unused, as a share of what the passes take.
    """
    return Device(
        name=f"{processor()}, threads: {torch.get_num_threads()}",
        products=found["bfloat16"],
        wide=found["float32"],
        memory_speed=found["memory"],
        elementwise=found["elementwise"],
        memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / per_node,
        call=found["call"],
        asynchronous=False,
        link=_LOOPBACK,
        network=_LOOPBACK,
        host_link=_LOOPBACK_TOLD,
        per_node=per_node,
        meeting=_MEETING,
        shard_link=_LOOPBACK_SHARDS,
        libraries=_LIBRARIES,
        unused=unused,
        efficiency=reached,
    )


def ceilings(
    device: torch.device,
    *,
    size: int,
    megabytes: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Operations a second of products in both precisions, bytes a second, seconds of a call.

    Bytes are those of a copy and of a nonlinear function; the call is that of a small module.

    Args:
        device: what is measured.
        size: of the square matrices that are multiplied.
        megabytes: of what is copied.
        clock: seconds.
    """

    def best(work: Callable[[], object], rounds: int = _ROUNDS) -> float:
        times = []
        for _ in range(rounds):
            started = clock()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(clock() - started)
        return min(times)

    found = {}
    for name in ("bfloat16", "float32"):
        a, b = torch.randn(2, size, size, device=device).to(getattr(torch, name))
        found[name] = 2 * size**3 / best(lambda a=a, b=b: a @ b)  # type: ignore[misc]
    source = torch.ones(megabytes * 2**18, device=device)  # written pages: others read too fast
    copied = torch.ones_like(source)
    found["memory"] = 2 * source.nbytes / best(lambda: copied.copy_(source))
    states, results = source[:_STATES], copied[:_STATES]
    found["elementwise"] = 2 * states.nbytes / best(lambda: torch.sigmoid(states, out=results))
    layer = torch.nn.Linear(16, 16, device=device).requires_grad_(requires_grad=False)
    small = torch.ones(1, 16, device=device)

    def calls() -> None:
        for _ in range(_CALLS):
            layer(small)

    return found | {"call": best(calls) / _CALLS}
