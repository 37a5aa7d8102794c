"""The prompts of an iteration: as they come, or those likely to violate the constraint.

Where nearly every completion satisfies it, most prompts teach nothing. The auxiliary already says
how likely the completions of a prompt are to satisfy: R(x), one step of expectation from the
prompt, so that looking at a prompt costs a pass over it and no sampling. The prompts of an
iteration are then those with the lowest R(x) among several times as many. The training objective
becomes the mean over these; which prompts are drawn does not bias R, a function of the prompt.

Where adapters begin in the middle of a model, what is below them makes the same of a prompt in
every iteration: it is read once, and later passes begin there.
"""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from constrained_ft.auxiliary import FrozenAuxiliary
from constrained_ft.config import Config
from constrained_ft.distributed import pack, unpack
from constrained_ft.frozen_layers import StatesBelow, kept_bytes
from constrained_ft.fused import expected_satisfaction
from constrained_ft.llm import FrozenLLM
from constrained_ft.packing import Packed, Tree
from constrained_ft.parts import Parts
from constrained_ft.prompts import Prompt

_PROMPTS = 64  # in one forward pass
_LOOKED_AT = 4  # prompts of an iteration, where nothing is learned from what is sampled


def prompts_to_sample(
    parts: Parts, config: Config, reference: FrozenLLM, iteration: int
) -> tuple[Prompt, ...]:
    """The prompts of an iteration: as they come, or mined (`prompts.candidates`).

    All ranks get the same ones. The first iteration, before R has seen anything, takes them as they
    come.
    """
    count, seed = config.prompts.prompts_per_iteration, config.seed
    if config.trainer.is_plain and iteration <= config.trainer.iterations:  # no update reads them
        return parts.prompts.of_iteration(iteration, min(count, _LOOKED_AT), seed)
    looked_at = min(count * config.prompts.candidates, len(parts.prompts.training))
    if looked_at == count or iteration == 1:
        return parts.prompts.of_iteration(iteration, count, seed)
    candidates = parts.prompts.of_iteration(iteration, looked_at, seed)
    with parts.phases.during("mining"):
        found = list(range(count))
        if parts.world.leads:
            below = _states_below(parts, reference, looked_at)
            auxiliary = parts.auxiliary.frozen()
            log_satisfied_S = prompt_satisfaction(reference, auxiliary, candidates, below)
            found = sorted(log_satisfied_S.argsort(stable=True)[:count].tolist())
        if parts.world.size > 1:  # one decides: two devices need not round alike
            _, chosen = unpack(parts.world.gather(pack({}, found))[0])
            assert isinstance(chosen, list)
            found = chosen
    return tuple(candidates[i] for i in found)


@torch.no_grad()
def prompt_satisfaction(
    reference: FrozenLLM,
    auxiliary: FrozenAuxiliary,
    prompts: Sequence[Prompt],
    below: StatesBelow | None = None,
) -> Float[Tensor, " S"]:
    """log R(x) of prompts that nothing was sampled for.

    Args:
        reference: reads the prompts.
        auxiliary: R.
        prompts: what is looked at.
        below: of these prompts, where they were kept; None or empty reads the whole of them.
    """
    found = []
    for trees, packed in _batches(reference, prompts):
        below_SD = below.laid_out(trees, packed) if below else None
        last_S = torch.stack([stem[-1] for stem in packed.stems]).to(reference.device)
        hidden_SD = reference.packed_states(packed, below_SD)[last_S].float()
        # What the first token is, R at the first position does not read.
        ids_S1 = torch.zeros(len(trees), 1, dtype=torch.long, device=reference.device)
        evidence = auxiliary.read_examples(hidden_SD[:, None], ids_S1, torch.ones_like(ids_S1) > 0)
        guidance = auxiliary.table.guidance(
            reference.head, hidden_SD, evidence.factors_NTJR[:, 0], evidence.offset_NTJ[:, 0]
        )
        found.append(expected_satisfaction(guidance)[0])
    return torch.cat(found)


@torch.no_grad()
def _states_below(parts: Parts, reference: FrozenLLM, looked_at: int) -> StatesBelow:
    """`Parts.states_below`, of all training prompts at once; of none where keeping does not pay.

    Read in an order that the prompts alone decide, so that a resumed run has the same numbers.
    """
    prompts, width = parts.prompts.training, reference.head.weight_VD.shape[1]
    pays = kept_bytes([len(prompt.token_ids) for prompt in prompts], looked_at, width) > 0
    if not (pays and reference.has_frozen_layers) or parts.states_below:
        return parts.states_below
    for trees, packed in _batches(reference, prompts):
        states_SD = reference.states_below(packed)
        for tree, stem in zip(trees, packed.stems, strict=True):
            parts.states_below.keep(tree.stem, states_SD[stem.to(states_SD.device)])
    return parts.states_below


def _batches(
    reference: FrozenLLM, prompts: Sequence[Prompt]
) -> Iterator[tuple[Sequence[Tree], Packed]]:
    """Prompts of one forward pass, and how they lie in it."""
    for start in range(0, len(prompts), _PROMPTS):
        trees = [Tree(stem=prompt.token_ids) for prompt in prompts[start : start + _PROMPTS]]
        yield trees, reference.pack(trees)
