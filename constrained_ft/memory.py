"""How much memory a run will need, before it starts, and how much it took."""

import os
import sys
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path

import torch

from constrained_ft.config import Config
from constrained_ft.decoding import RETIRE_AT
from constrained_ft.distributed import World
from constrained_ft.frozen_layers import kept_bytes
from constrained_ft.fused import Labels, Tilt, buffered_rows, fused_losses
from constrained_ft.llm import LLM
from constrained_ft.machine import release_freed
from constrained_ft.packing import Tree
from constrained_ft.prompts import Prompts
from constrained_ft.randomness import seed_everything
from constrained_ft.sharding import own_part

_SAMPLING_BUFFERS = 4  # float32 tensors of [rows, vocabulary] when a token is drawn
_TREES, _TREE_TOKENS = 8, 32  # of the pass whose activations are counted
_PREPARED = 2**27  # bfloat16 products of other shapes that oneDNN keeps ready: 0 to 0.3 GiB here
_USABLE = 0.8  # of the spare memory: estimates err
_MAXRSS_BYTES = 1 if sys.platform == "darwin" else 2**10  # the unit of ru_maxrss


def activation_bytes(llm: LLM) -> float:
    """Bytes that a token keeps for the backward pass, all layers together, without checkpoints.

    What autograd saves in a small forward pass is counted, whatever the architecture.
    """
    longest = getattr(llm.module.config.get_text_config(), "max_position_embeddings", _TREE_TOKENS)
    ids = tuple(range(min(_TREE_TOKENS, longest, len(llm.head.weight_VD))))
    kept: dict[int, int] = {}
    weights = {tensor.untyped_storage().data_ptr() for tensor in llm.module.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    packed = llm.pack([Tree(stem=ids)] * _TREES)
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda same: same),
        llm.keeping_activations(),
    ):
        states_SD = llm.packed_states(packed)  # as long as it is here, nothing is freed
    assert states_SD.requires_grad
    return sum(kept.values()) / packed.ids_BL.numel()


def estimate_memory(
    llm: LLM,
    prompts: Prompts,
    config: Config,
    evaluation: int = 0,
    world: World | None = None,
) -> int | None:
    """Bytes at the peak of a run whose parts are loaded; None where the system does not tell.

    The passes of the largest update are rehearsed, as no count knows what an allocator leaves
    unused between tensors. To their peak comes what training adds for good; the other stages are
    reckoned from what is held now. Where weights are sharded, all ranks rehearse together, and what
    samples or measures has whole ones beside.

    Args:
        llm: before training.
        prompts: how long they are.
        config: the whole run.
        evaluation: bytes that measuring the base model took at its peak beside what is held;
            measuring the fine-tuned one takes them again.
        world: the ranks that train; None is this process alone.
    """
    world = world or World.alone()
    held = held_memory(llm.device)
    # One that cannot watch would leave the others waiting for its part of the weights.
    (blind,) = world.totals([float(held is None or not forget_peak(llm.device))])
    if held is None or (blind and llm.is_sharded):
        return None
    with world.together() if llm.is_sharded else nullcontext():
        rehearsed = peak_during(lambda: _rehearse_update(llm, prompts, config), llm.device)
    update = held + _update_bytes(llm, prompts, config) if rehearsed is None else rehearsed
    # The base model's completions hardly end before the last token. Once they do, rows are taken
    # out of the cache, which copies what stays, without the half of it that is room to grow.
    copied = int(RETIRE_AT / 2 * _cache_bytes(llm, config))
    again = evaluation + copied if evaluation else 0
    others = max(again, _sampling_bytes(llm, config), _whole_bytes(llm) + _export_bytes(llm))
    # What samples is a frozen copy; measuring the fine-tuned model needs two.
    others += held + _copy_bytes(llm)
    prepared = _PREPARED if llm.device.type == "cpu" and llm.bf16 else 0
    peak = _training_bytes(llm, prompts, config) + prepared + max(update, others)
    return max(peak, peak_memory(llm.device) or 0)


def _rehearse_update(llm: LLM, prompts: Prompts, config: Config) -> None:
    """Forward and backward of as many tokens as a step may have; changes nothing."""
    trees = _largest_batch(llm, prompts, config)

    def compute() -> torch.Tensor:
        states_SD = llm.packed_states(llm.pack(trees))
        next_S = torch.zeros(len(states_SD), dtype=torch.long, device=llm.device)
        ones_S = torch.ones(len(states_SD), device=llm.device)
        size, rank = len(llm.head.weight_VD), config.auxiliary.rank
        count = config.num_auxiliaries
        tilt = Tilt(
            hidden_MD=states_SD.detach().clone(),
            head=llm.head.frozen(),
            factors_MJR=ones_S[:, None, None].expand(-1, count, rank),
            offset_MJ=ones_S[:, None].expand(-1, count),
            tokens_JVR=ones_S.new_zeros(count, size, rank),
            prior_JV=ones_S.new_zeros(count, size),
            limit=1.0,
            floor_M=None,
            weights_M=ones_S,
        )
        labels = Labels(next_M=next_S, weights_M=ones_S)
        return fused_losses(states_SD, llm.head, tilt=tilt, labels=labels).loss

    with seed_everything(0), llm.training():
        llm.inside(compute).backward()
    for parameter in llm.trained_parameters().values():
        parameter.grad = None


def _largest_batch(llm: LLM, prompts: Prompts, config: Config) -> list[Tree]:
    """Corpus rows and completions of one pass, as long as they can be after a mean prompt."""
    trainer, size = config.trainer, len(llm.head.weight_VD)
    lengths = [len(prompt.token_ids) for prompt in prompts.training]
    stem = -(-sum(lengths) // len(lengths))
    completions = -(-trainer.rollouts_per_step // trainer.gradient_accumulation_steps)
    counts = [config.data.max_length] * (trainer.per_device_train_batch_size * trainer.corpus)
    counts += [stem + config.prompts.max_new_tokens] * (completions * (not trainer.is_plain))
    return [Tree(stem=tuple(token % size for token in range(count))) for count in counts]


def update_fits(llm: LLM, prompts: Prompts, config: Config, shards: int = 1) -> bool:
    """Whether the memory of an update is there; true where the system does not tell.

    Args:
        llm: whole, as it is loaded.
        prompts: how long they are.
        config: the whole run.
        shards: ranks among which weights will be divided: a rank keeps its part of the weights, of
            a gradient and of two moments of what is trained.
    """
    spare = spare_memory(llm.device)
    added = _training_bytes(llm, prompts, config) + _update_bytes(llm, prompts, config)
    weights = sum(weight.numel() * weight.element_size() for weight in llm.module.parameters())
    divided = weights + 4 * 3 * _num_trained(llm)
    added -= divided - divided // shards
    return spare is None or added < _USABLE * spare


def _training_bytes(llm: LLM, prompts: Prompts, config: Config) -> int:
    """Moments of what is trained, rollouts that are kept, and what frozen layers said."""
    sampled, width = config.prompts, llm.head.weight_VD.shape[1]
    kept = config.auxiliary.replay_iterations + 2
    tokens = sampled.completions * sampled.max_new_tokens
    below = _below_bytes(llm, prompts, config)
    own = sum(own_part(one).numel() for one in llm.trained_parameters().values())
    return 4 * 2 * own + kept * tokens * width * _state_bytes(llm) + below


def _below_bytes(llm: LLM, prompts: Prompts, config: Config) -> int:
    """What frozen layers said of mined prompts, and of the newest completions behind theirs."""
    sampled, width = config.prompts, llm.head.weight_VD.shape[1]
    found = 0
    if llm.frozen_layers is not None and sampled.candidates > 1:
        looked_at = sampled.prompts_per_iteration * sampled.candidates
        found += kept_bytes([len(one.token_ids) for one in prompts.training], looked_at, width)
    if llm.begins_above and config.trainer.schedule == "alternating":
        found += 4 * width * sampled.completions * sampled.max_new_tokens
    return found


def _num_trained(llm: LLM) -> int:
    return sum(parameter.numel() for parameter in llm.trained_parameters().values())


def _copy_bytes(llm: LLM) -> int:
    """A frozen copy of what is trained, or of all weights where this rank has a part of them."""
    head: int = llm.head.weight_VD.numel() * 4 * llm.is_sharded  # gathered by itself, tied or not
    return llm.copied_bytes() + head


def _whole_bytes(llm: LLM) -> int:
    """Whole weights, for what is exported, where this rank has a part of them."""
    weights = (p.numel() * p.element_size() for p in llm.module.parameters())
    return sum(weights) * llm.is_sharded


def _update_bytes(llm: LLM, prompts: Prompts, config: Config) -> int:
    """Gradients, activations of one pass, one chunk of logits, and the reference's head."""
    text, size = llm.module.config.get_text_config(), len(llm.head.weight_VD)
    tokens = sum(len(tree.stem) for tree in _largest_batch(llm, prompts, config))
    token_bytes = activation_bytes(llm)
    if llm.checkpoints:
        # The inputs of every layer, and one layer's activations at a time.
        layers = text.num_hidden_layers
        token_bytes = token_bytes / layers + layers * text.hidden_size * _state_bytes(llm)
    logits = buffered_rows(size, config.num_auxiliaries, llm.device) * size
    head = llm.head.weight_VD.numel() * llm.head.weight_VD.requires_grad  # copied if trained
    return int(tokens * token_bytes) + 4 * (_num_trained(llm) + logits + head)


def _sampling_bytes(llm: LLM, config: Config) -> int:
    """Keys and values, and the logits of one token."""
    logits = _SAMPLING_BUFFERS * _sampled_rows(config) * len(llm.head.weight_VD)
    return _cache_bytes(llm, config) + 4 * logits


def _sampled_rows(config: Config) -> int:
    """Completions that are sampled at once, at most."""
    prompts, evaluation = config.prompts, config.evaluation
    held_out = evaluation.max_prompts * evaluation.samples_per_prompt
    most = max(held_out, prompts.completions)
    return min(config.sampler.batch_size, most)


def _cache_bytes(llm: LLM, config: Config) -> int:
    """Keys and values with room to grow."""
    text = llm.module.config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    places = _sampled_rows(config) * 2 * 2 * config.prompts.max_new_tokens
    cache: int = 2 * places * text.num_hidden_layers * heads * head * _state_bytes(llm)
    return cache


def _export_bytes(llm: LLM) -> int:
    """The exported model, read back in float32, and its file, which a system may count as well.

    As much as the copy of the base that adapters are merged into, and what is made of it. All of it
    is in the memory of the CPU.
    """
    if llm.device.type != "cpu":
        return 0
    return 2 * 4 * sum(parameter.numel() for parameter in llm.module.parameters())


def _state_bytes(llm: LLM) -> int:
    return 2 if llm.bf16 else 4


def memory_words(llm: LLM, estimate: int | None) -> str:
    """The estimate, before a run."""
    if estimate is None:
        return "not known on this system"
    again = ", activations computed twice" if llm.checkpoints else ""
    return f"about {estimate / 2**30:.1f} GiB{again}"


def memory_line(peak: int | None, estimate: int | None) -> str:
    """Peak memory beside the estimate that the run began with."""
    if peak is None:
        return "memory: this system does not tell"
    if estimate is None:
        return f"memory: {peak / 2**30:.1f} GiB at the peak"
    return (
        f"memory: {peak / 2**30:.1f} GiB at the peak, {estimate / 2**30:.1f} GiB estimated "
        f"({estimate / peak - 1:+.0%})"
    )


def held_memory(device: torch.device) -> int | None:
    """Bytes in use now: the allocator's on a GPU, else the process's; None where unknown."""
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    release_freed()
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return peak_memory(device)  # no Linux: the most so far is all there is
    return pages * os.sysconf("SC_PAGE_SIZE")


def spare_memory(device: torch.device) -> int | None:
    """Bytes that this process could take in addition; None where unknown."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        spare = [int(line.split()[1]) * 2**10 for line in lines if line.startswith("MemAvail")]
        with suppress(OSError, ValueError):  # a container's limit, or "max"
            group = Path("/sys/fs/cgroup")
            limit = int((group / "memory.max").read_text())
            spare.append(limit - int((group / "memory.current").read_text()))
    except OSError:
        return None
    return min(spare, default=None)


def peak_during(work: Callable[[], object], device: torch.device) -> int | None:
    """Bytes at the peak of a piece of work; None, and the work not done, where unknown."""
    if not forget_peak(device):
        return None
    work()
    return recent_peak(device)


def forget_peak(device: torch.device) -> bool:
    """Let `recent_peak` begin anew; false where the system does not offer that."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    release_freed()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def recent_peak(device: torch.device) -> int:
    """Bytes at the peak since `forget_peak`, which has to have been true."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    # Not getrusage, whose peak is that of all time, and of the process that started this one.
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 2**10 for line in lines if line.startswith("VmHWM"))


def peak_memory(device: torch.device) -> int | None:
    """Bytes at the peak: the allocator's on a GPU, else the process's; None where unknown."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if sys.platform == "win32":
        return None
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _MAXRSS_BYTES
