"""How much memory a run will need, before it starts, and how much it took."""

import ctypes
import sys
from contextlib import suppress

import torch

from constrained_ft.config import Config
from constrained_ft.fused import chunk_rows_for
from constrained_ft.llm import LLM

_BUFFERS = 3  # float32 tensors of [chunk rows, vocabulary] in one loss
_RUNTIME_BYTES = 600 * 2**20  # interpreter and libraries
_MAXRSS_BYTES = 1 if sys.platform == "darwin" else 2**10  # the unit of ru_maxrss


def estimate_memory(llm: LLM, config: Config) -> int:
    """Bytes at the peak: weights, optimizer, frozen copies, one chunk of logits, activations."""
    parameters = list(llm.module.parameters())
    weights = sum(p.numel() * p.element_size() for p in parameters)
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    # Gradient, two moments, and the frozen reference, float32 each.
    optimizer = 4 * 4 * trained
    size, width = llm.head.weight_VD.shape
    head = 0 if llm.head.weight_VD.requires_grad else 4 * size * width
    logits = 4 * _BUFFERS * chunk_rows_for(size, llm.device) * size
    # The auxiliary keeps its own float32 embeddings.
    auxiliary = 4 * size * (width + 2 * config.auxiliary.rank)
    text = llm.module.config.get_text_config()
    trainer = config.trainer
    # One pass holds corpus rows and completions, with a prompt of about the same length each.
    completions = -(-trainer.rollouts_per_step // trainer.gradient_accumulation_steps)
    tokens = trainer.per_device_train_batch_size * config.data.max_length
    tokens += completions * 2 * config.prompts.max_new_tokens
    per_token = 34 * text.hidden_size * (2 if llm.bf16 else 4)
    layers = 1 if config.llm.gradient_checkpointing else text.num_hidden_layers
    activations = tokens * per_token * layers
    rollouts = config.prompts.prompts_per_iteration * config.prompts.samples_per_prompt
    kept = config.auxiliary.replay_iterations + 1
    replay = rollouts * config.prompts.max_new_tokens * width * (2 if llm.bf16 else 4) * kept
    total: int = weights + optimizer + head + logits + auxiliary + activations + replay
    return total + _RUNTIME_BYTES


def memory_line(peak: int | None, estimate: int) -> str:
    """Peak memory beside the estimate that the run began with."""
    if peak is None:
        return f"memory: {estimate / 2**30:.1f} GiB estimated; this system does not tell the peak"
    return (
        f"memory: {peak / 2**30:.1f} GiB at the peak, {estimate / 2**30:.1f} GiB estimated "
        f"({estimate / peak - 1:+.0%})"
    )


def release_freed() -> None:
    """Give memory that nothing uses back to the system, where the C library can be asked to.

    What is freed is kept for the next tensors otherwise (`cli/settings.py`), in pieces that fit
    ever fewer of them: a process of 1.3 GiB grew to 6 in thirty iterations.
    """
    with suppress(OSError, AttributeError):  # another system, another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def peak_memory(device: torch.device) -> int | None:
    """Bytes at the peak: the allocator's on a GPU, else the process's; None where unknown."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if sys.platform == "win32":
        return None
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _MAXRSS_BYTES
