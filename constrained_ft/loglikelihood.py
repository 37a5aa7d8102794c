"""How likely continuations are, token by token summed; what they share is read once.

Shape suffixes:  M positions whose logits are needed.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from constrained_ft.distributed import StopRequest
from constrained_ft.errors import ModelError
from constrained_ft.llm import FrozenLLM
from constrained_ft.packing import Tree

_BATCH_TOKENS = 2048
_CHUNK_ROWS = 256


@dataclass(frozen=True, kw_only=True)
class Likelihood:
    """Of a continuation behind its context."""

    log: float
    """Sum over its tokens, nats."""
    greedy: bool
    """Whether each token was the likeliest."""


@dataclass(frozen=True, kw_only=True)
class _Stem:
    """A context with what continues it."""

    context: tuple[int, ...]
    places: list[int] = field(default_factory=list)
    """Of its continuations, among all that were asked for."""
    branches: dict[tuple[int, ...], int] = field(default_factory=dict)
    """What has to be read of the continuations: all but their last token. By number."""

    def tree(self) -> Tree:
        return Tree(stem=self.context, branches=tuple(self.branches))

    def __len__(self) -> int:
        return len(self.context) + sum(map(len, self.branches))


@torch.no_grad()
def loglikelihoods(
    llm: FrozenLLM,
    contexts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[int]],
    stop: StopRequest,
    advance: Callable[[int], None],
) -> list[Likelihood]:
    """Log-likelihood of each continuation behind its context, which must not be empty.

    Equal contexts are read once, and so are continuations that differ in their last token only. A
    context too long for the model loses tokens on the left.

    Args:
        llm: the model.
        contexts: token ids, for each continuation.
        continuations: token ids, at least one each.
        stop: polled between batches.
        advance: told how many continuations are done.

    Raises:
        ModelError: when a continuation alone is longer than the model's context.
        Interrupted: when asked to stop.
    """
    asked = [tuple(ids) for ids in continuations]
    longest = max(map(len, asked), default=0)
    if llm.context_length is not None and longest > llm.context_length:
        raise ModelError(
            f"a choice of {longest} tokens does not fit into the model's context of "
            f"{llm.context_length}; leave the benchmark out, or take a model with a longer context"
        )
    found: dict[int, Likelihood] = {}
    for batch in _batches(_stems(contexts, asked, llm.context_length)):
        stop.check()
        places = [place for stem in batch for place in stem.places]
        told = _read(llm, batch, [asked[place] for place in places])
        found |= dict(zip(places, told, strict=True))
        advance(len(places))
    return [found[place] for place in range(len(asked))]


def _stems(
    contexts: Sequence[Sequence[int]], asked: Sequence[tuple[int, ...]], longest: int | None
) -> list[_Stem]:
    """The different contexts, longest first."""
    stems: dict[tuple[int, ...], _Stem] = {}
    for place, (context, continuation) in enumerate(zip(contexts, asked, strict=True)):
        read = continuation[:-1]
        # The last token is not read, so there is room for one of the context at least.
        room = None if longest is None else longest - len(read)
        kept = tuple(context) if room is None else tuple(context[-room:])
        stem = stems.setdefault(kept, _Stem(context=kept))
        stem.places.append(place)
        stem.branches.setdefault(read, len(stem.branches))
    return sorted(stems.values(), key=len, reverse=True)


def _batches(stems: Sequence[_Stem]) -> Iterator[list[_Stem]]:
    batch: list[_Stem] = []
    for stem in stems:
        if batch and sum(map(len, batch)) + len(stem) > _BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(stem)
    if batch:
        yield batch


def _read(
    llm: FrozenLLM, stems: Sequence[_Stem], continuations: Sequence[tuple[int, ...]]
) -> list[Likelihood]:
    """Likelihoods of the continuations of some stems, in the order of the stems."""
    packed = llm.pack([stem.tree() for stem in stems])
    hidden_SD = llm.packed_states(packed)
    paths = iter(packed.paths)
    slots: list[torch.Tensor] = []
    asked = iter(continuations)
    for stem in stems:
        own = [next(paths) for _ in stem.branches]
        slots += [own[stem.branches[next(asked)[:-1]]] for _ in stem.places]
    tokens_M = torch.tensor([token for ids in continuations for token in ids], device=llm.device)
    slots_M = torch.cat(slots).to(llm.device)
    logs, likeliest = [], []
    for rows, tokens in zip(slots_M.split(_CHUNK_ROWS), tokens_M.split(_CHUNK_ROWS), strict=True):
        logits_MV = llm.head(hidden_SD[rows])
        logs.append(-F.cross_entropy(logits_MV, tokens, reduction="none"))
        likeliest.append(logits_MV.argmax(-1) == tokens)
    lengths = [len(ids) for ids in continuations]
    return [
        Likelihood(log=float(log.sum()), greedy=bool(greedy.all()))
        for log, greedy in zip(
            torch.cat(logs).split(lengths), torch.cat(likeliest).split(lengths), strict=True
        )
    ]
