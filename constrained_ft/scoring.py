"""Score completions while more are being sampled.

Scorers run in a thread of their own each, on the completions of one batch at a time: most of the
time of a slow scorer, one that asks a server for instance, passes while the LLM samples on. What
failed is asked once more at the end; what fails again stays without a score.
"""

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from types import TracebackType

import torch
from jaxtyping import Bool
from torch import Tensor

from constrained_ft.config import PromptsConfig
from constrained_ft.distributed import StopRequest, World, pack, unpack
from constrained_ft.errors import MissingScoresError
from constrained_ft.prompts import Prompt
from constrained_ft.randomness import generator_for
from constrained_ft.rollouts import Rollouts
from constrained_ft.scorers import Score, ScoreFailure, Scorer, cancel, valid

_POLL_SECONDS = 0.2

_Results = dict[str, list[Score | ScoreFailure]]


@dataclass(frozen=True, kw_only=True)
class Scored:
    """What one scorer said of all completions."""

    scores: list[float | None]
    """In [0, 1], in the order of the rollouts; None where there is no score."""
    failure: str | None
    """Why the last of those has none."""
    seconds: float
    """Time the scorer took for one completion, on this rank."""


class Scoring:
    """Scores of one stage's completions.

        with Scoring([scorer], world, stop) as scoring:
            rollouts = sample(..., each=scoring.begin)
            (scored,) = scoring.finish(rollouts, most_missing=0.05)

    Leaving early drops what has not begun and waits for calls that have: they are paid for.
    """

    def __init__(self, scorers: Sequence[Scorer], world: World, stop: StopRequest) -> None:
        """Start a thread for each scorer.

        Args:
            scorers: asked about every completion.
            world: who shares the completions.
            stop: polled while scores are awaited.
        """
        self._stop = stop
        self._scorers = tuple(scorers)
        self._world = world
        self._threads = [ThreadPoolExecutor(1, f"scorer {one.name}") for one in self._scorers]
        self._pending: list[list[Future[_Results]]] = [[] for _ in self._scorers]
        self._parts: list[Rollouts] = []
        self._seconds = [0.0 for _ in self._scorers]
        self._counts = [0 for _ in self._scorers]

    def __enter__(self) -> "Scoring":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            for scorer in self._scorers:
                cancel(scorer)
        for thread in self._threads:
            thread.shutdown(wait=True, cancel_futures=True)

    def begin(self, part: Rollouts) -> None:
        """Score some completions in the background.

        Raises:
            ScorerError: when scores of completions before these could not be kept.
        """
        self._parts.append(part)
        for place, (thread, pending) in enumerate(zip(self._threads, self._pending, strict=True)):
            if pending and pending[-1].done():
                pending[-1].result()
            pending.append(thread.submit(self._ask, place, part))

    def finish(self, rollouts: Rollouts, most_missing: float) -> list[Scored]:
        """What each scorer said of all ranks' completions.

        Args:
            rollouts: all of them.
            most_missing: the share that may be without a score.

        Raises:
            MissingScoresError: when more are, or all.
            ScorerError: when scores could not be kept.
            Interrupted: when asked to stop.
        """
        own = [self._own(place) for place in range(len(self._scorers))]
        told = [{key: _plain(results) for key, results in one.items()} for one in own]
        if self._world.size > 1:
            everyones = [unpack(packet)[1] for packet in self._world.gather(pack({}, told))]
            told = [{} for _ in self._scorers]
            for theirs in everyones:
                assert isinstance(theirs, list)
                for mine, part in zip(told, theirs, strict=True):
                    mine |= part
        found = []
        for place, (scorer, one) in enumerate(zip(self._scorers, told, strict=True)):
            said = [result for prompt in rollouts.prompts for result in one[prompt.id]]
            failures = [result for result in said if isinstance(result, str)]
            scored = Scored(
                seconds=self._seconds[place] / max(self._counts[place], 1),
                scores=[None if isinstance(result, str) else result for result in said],
                failure=failures[-1] if failures else None,
            )
            _require_few_missing(scorer, scored, most_missing)
            found.append(scored)
        return found

    def _ask(self, place: int, part: Rollouts) -> _Results:
        """In the scorer's thread: the results of some completions by prompt."""
        started = time.monotonic()
        results = valid(self._scorers[place], part.prompt_texts, part.texts)
        self._seconds[place] += time.monotonic() - started
        self._counts[place] += len(results)
        found: _Results = {prompt.id: [] for prompt in part.prompts}
        for row, result in zip(part.prompt_N.tolist(), results, strict=True):
            found[part.prompts[row].id].append(result)
        return found

    def _own(self, place: int) -> _Results:
        """The results of this rank's completions, after a second try for what failed."""
        found: _Results = {}
        for future in self._pending[place]:
            found |= self._awaited(future)
        again = [(p, i) for p in found for i, r in enumerate(found[p]) if _failed(r)]
        if again:
            pairs = {
                prompt.id: (prompt.text, texts)
                for part in self._parts
                for prompt, texts in _texts_by_prompt(part)
            }
            prompts = [pairs[p][0] for p, _ in again]
            completions = [pairs[p][1][i] for p, i in again]
            scorer = self._scorers[place]
            second = self._threads[place].submit(lambda: {"": valid(scorer, prompts, completions)})
            for (p, i), result in zip(again, self._awaited(second)[""], strict=True):
                found[p][i] = result
        return found

    def _awaited(self, future: Future[_Results]) -> _Results:
        while not wait([future], _POLL_SECONDS).done:
            self._stop.check()
        return future.result()


def to_be_scored(
    rollouts: Rollouts, prompts: Sequence[Prompt], config: PromptsConfig, seed: int
) -> Bool[Tensor, " N"]:
    """Which completions are scored, `prompts.scored_share`: the same whichever batch asks.

    The first ones of each prompt, since they are exchangeable, one more of some prompts by chance.
    What R guided is scored too: only R learns from that.

    Args:
        rollouts: all completions of some prompts; the rows of a prompt are neighbours.
        prompts: all prompts of the iteration.
        config: the `prompts` section.
        seed: of the chance, with the iteration.
    """
    own_N = rollouts.guided_N == 0
    if config.scored_share == 1:
        return torch.ones_like(own_N)
    total = config.scored(config.samples_per_prompt * len(prompts))
    each, more = divmod(total, len(prompts))
    generator = generator_for(seed, "scored", rollouts.iteration)
    order = torch.randperm(len(prompts), generator=generator).tolist()
    most = {prompts[i].id: each + (place < more) for place, i in enumerate(order)}
    most_S = torch.tensor([most[prompt.id] for prompt in rollouts.prompts], device=own_N.device)
    counts_S = torch.bincount(rollouts.prompt_N, minlength=len(rollouts.prompts))
    first_S = counts_S.cumsum(0) - counts_S
    before_N = own_N.cumsum(0) - own_N.long()
    place_N = before_N - before_N[first_S[rollouts.prompt_N]]  # among those of its prompt
    return ~own_N | (place_N < most_S[rollouts.prompt_N])


def _require_few_missing(scorer: Scorer, scored: Scored, most_missing: float) -> None:
    missing, total = scored.scores.count(None), len(scored.scores)
    if missing > most_missing * total or (missing and missing == total):
        raise MissingScoresError(
            f"the scorer {scorer.name} gave no score for {missing} of {total} completions "
            f"({missing / total:.1%}; constraint.max_missing_rate={most_missing:g}), at last: "
            f"{scored.failure}"
        )


def _failed(result: Score | ScoreFailure) -> bool:
    return isinstance(result, ScoreFailure)


def _plain(results: Sequence[Score | ScoreFailure]) -> list[float | str]:
    """Scores as numbers, failures as text, for other processes."""
    return [one.value if isinstance(one, Score) else one.error for one in results]


def _texts_by_prompt(part: Rollouts) -> list[tuple[Prompt, list[str]]]:
    found: list[tuple[Prompt, list[str]]] = [(prompt, []) for prompt in part.prompts]
    for place, text in zip(part.prompt_N.tolist(), part.texts, strict=True):
        found[place][1].append(text)
    return found
