"""Sample completions y ~ p(. | x) from a frozen LLM: by this package, transformers or a server.

Shape suffixes:  B rows of a batch, T completion positions, D hidden width.

Training samples at temperature 1 without truncation: q* is defined against the whole p. Every
rollout draws its own uniform numbers, keyed by (seed, purpose, iteration, prompt), so results do
not depend on the order of batches.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from constrained_ft.config import SamplerConfig
from constrained_ft.decoding import (
    Decoded,
    Guide,
    decode,
    decode_by_generate,
    read_completions,
)
from constrained_ft.distributed import StopRequest, World
from constrained_ft.llm import FrozenLLM
from constrained_ft.progress import Display
from constrained_ft.prompts import Prompt
from constrained_ft.randomness import generator_for, seed_everything, seed_for
from constrained_ft.roll_ins import RollIns
from constrained_ft.rollouts import Rollouts, joined, pack_rollouts, unpack_rollouts
from constrained_ft.sampling_server import SamplingServer, Version, Wanted


def sample(  # noqa: PLR0913
    llm: FrozenLLM,
    prompts: Sequence[Prompt],
    *,
    samples_per_prompt: int,
    max_new_tokens: int,
    sampler: SamplerConfig,
    seed: int,
    iteration: int,
    display: Display,
    stop: StopRequest,
    guide: Guide | None = None,
    roll_ins: RollIns | None = None,
    top_p: float = 1.0,
    world: World | None = None,
    each: Callable[[Rollouts], None] | None = None,
    server: SamplingServer | None = None,
) -> Rollouts:
    """Sample completions at temperature 1, without truncation unless asked for.

    Args:
        llm: the reference.
        prompts: each gets `samples_per_prompt` completions.
        samples_per_prompt: n.
        max_new_tokens: longest completion, T.
        sampler: the `sampler` section.
        seed: of the random numbers, with the iteration and each prompt's id.
        iteration: the LLM's version, kept with the rollouts.
        display: advanced by the rows finished.
        stop: polled between batches.
        guide: log R of every next token, added to the log-probabilities: guided decoding, always by
            this package's sampler.
        roll_ins: guides the beginnings of some completions instead.
        top_p: sample from the fewest tokens with this much probability; 1 is no truncation.
        world: who shares the work; every rank gets all completions. None is this process alone.
        each: called with this rank's completions of each batch as soon as they are there.
        server: samples instead of this process, where nothing guides; it truncates nothing.

    Raises:
        SamplingError: when the server gives nothing that can be used.
        Interrupted: when asked to stop.
    """
    world = world or World.alone()
    per_batch = max(1, sampler.batch_size // samples_per_prompt)
    # Prompts of similar length share a batch: less padding.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].token_ids))
    mine = world.share(order)
    asked = _Asked(samples=samples_per_prompt, steps=max_new_tokens, seed=seed, iteration=iteration)
    parts: list[Rollouts] = []
    with _version(server, llm, iteration, world) as version:
        for start in range(0, len(mine), per_batch):
            stop.check()
            batch = [prompts[i] for i in mine[start : start + per_batch]]
            if version is not None:
                parts.append(_by_server(version, llm, batch, asked, stop))
            elif sampler.kind == "hf" and guide is None:
                found = _by_generate(llm, batch, asked, top_p)
                parts.append(_rollouts(llm, batch, found, asked, "hf"))
            else:
                parts.append(_by_cft(llm, batch, asked, roll_ins or guide, top_p))
            if each is not None:
                each(parts[-1])
            display.advance(len(batch) * samples_per_prompt * world.size)  # others are as far
    packets = world.gather(pack_rollouts(parts)) if world.size > 1 else []
    for rank, packet in enumerate(packets):
        if rank != world.rank:
            parts += unpack_rollouts(packet, llm.device)
    return joined(parts, prompts)


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """What is asked for of every prompt."""

    samples: int
    steps: int
    seed: int
    iteration: int

    def uniforms(self, prompts: Sequence[Prompt]) -> Float[Tensor, "B T"]:
        """The numbers of the completions of some prompts."""
        keys = [(self.seed, "rollouts", self.iteration, prompt.id) for prompt in prompts]
        return torch.cat(
            [
                torch.rand(
                    self.samples, self.steps, generator=generator_for(*key), dtype=torch.float64
                )
                for key in keys
            ]
        )


def _version(
    server: SamplingServer | None, llm: FrozenLLM, iteration: int, world: World
) -> AbstractContextManager[Version | None]:
    return nullcontext() if server is None else server.serving(llm, iteration, world)


def _by_generate(llm: FrozenLLM, prompts: Sequence[Prompt], asked: _Asked, top_p: float) -> Decoded:
    ids = [prompt.id for prompt in prompts]
    with seed_everything(seed_for(asked.seed, "generate", asked.iteration, *ids)):
        return decode_by_generate(
            llm,
            [prompt.token_ids for prompt in prompts],
            repeats=asked.samples,
            max_new_tokens=asked.steps,
            top_p=top_p,
        )


def _by_cft(
    llm: FrozenLLM,
    prompts: Sequence[Prompt],
    asked: _Asked,
    guide: RollIns | Guide | None,
    top_p: float,
) -> Rollouts:
    uniforms_BT = asked.uniforms(prompts).to(llm.device)
    ids = [prompt.token_ids for prompt in prompts]
    if not isinstance(guide, RollIns):
        found = decode(llm, ids, uniforms_BT, guide=guide, top_p=top_p)
        return _rollouts(llm, prompts, found, asked, "cft")
    guided_B = guide.lengths(
        prompts, asked.samples, asked.steps, seed=asked.seed, iteration=asked.iteration
    ).to(llm.device)
    found = decode(llm, ids, uniforms_BT, guide=guide.guide, guided_B=guided_B, top_p=top_p)
    return replace(_rollouts(llm, prompts, found, asked, "cft"), guided_N=guided_B)


def _by_server(
    version: Version, llm: FrozenLLM, prompts: Sequence[Prompt], asked: _Asked, stop: StopRequest
) -> Rollouts:
    """Completions by a server, with hidden states by a forward pass here."""
    wanted = [
        Wanted(
            prompt=prompt.token_ids,
            samples=asked.samples,
            max_new_tokens=asked.steps,
            seed=seed_for(asked.seed, "server", asked.iteration, prompt.id),
        )
        for prompt in prompts
    ]
    said = [one for row in version.complete(llm, wanted, stop) for one in row]
    stems = [prompt.token_ids for prompt in prompts]
    found = read_completions(llm, stems, [one.ids for one in said])
    version.compare(llm, said, found)
    return _rollouts(llm, prompts, found, asked, version.name)


def _rollouts(
    llm: FrozenLLM, prompts: Sequence[Prompt], found: Decoded, asked: _Asked, sampled_by: str
) -> Rollouts:
    rows = zip(found.ids_BT.tolist(), found.mask_BT.tolist(), strict=True)
    said = [[token for token, real in zip(ids, mask, strict=True) if real] for ids, mask in rows]
    return Rollouts(
        prompts=tuple(prompts),
        prompt_N=torch.arange(len(prompts)).repeat_interleave(asked.samples).to(llm.device),
        ids_NT=found.ids_BT,
        mask_NT=found.mask_BT,
        hidden_NTD=found.hidden_BTD,
        texts=tuple(completion_texts(llm.tokenizer, said)),
        guided_N=torch.zeros_like(found.ids_BT[:, 0]),
        iteration=asked.iteration,
        sampled_by=sampled_by,
    )


def completion_texts(
    tokenizer: PreTrainedTokenizerBase, completions: Sequence[Sequence[int]]
) -> list[str]:
    """What is scored of completions given as tokens.

    The end-of-text token is the model's way to stop, not a part of what it says.
    """
    end = tokenizer.eos_token_id
    said = [list(ids[:-1] if ids and ids[-1] == end else ids) for ids in completions]
    texts: list[str] = tokenizer.batch_decode(said)
    return texts
