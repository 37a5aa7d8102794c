"""Score completions while more are being sampled.

Scorers run in a thread of their own each, on the completions of one batch at a time: most of the
time of a slow scorer, one that asks a server for instance, passes while the LLM samples on.
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from types import TracebackType

from constrained_ft.distributed import StopRequest, World, pack, unpack
from constrained_ft.rollouts import Rollouts
from constrained_ft.scorers import Scorer, score_all

_POLL_SECONDS = 0.2

_Scores = dict[str, list[float]]


class Scoring:
    """Scores of one stage's completions.

        with Scoring([scorer], world, stop) as scoring:
            rollouts = sample(..., each=scoring.begin)
            (scores,) = scoring.finish(rollouts)

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
        self._pending: list[list[Future[_Scores]]] = [[] for _ in self._scorers]

    def __enter__(self) -> "Scoring":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for thread in self._threads:
            thread.shutdown(wait=True, cancel_futures=True)

    def begin(self, part: Rollouts) -> None:
        """Score some completions in the background.

        Raises:
            ScorerError: of completions before these.
        """
        for scorer, thread, pending in zip(
            self._scorers, self._threads, self._pending, strict=True
        ):
            if pending and pending[-1].done():
                pending[-1].result()
            pending.append(thread.submit(_scores_by_prompt, scorer, part))

    def finish(self, rollouts: Rollouts) -> list[list[float]]:
        """The scores of all ranks' completions, one list a scorer, in the order of `rollouts`.

        Raises:
            ScorerError: when a score is missing, not finite, outside [0, 1] or not one for each
                completion.
            Interrupted: when asked to stop.
        """
        own: list[_Scores] = []
        for pending in self._pending:
            found: _Scores = {}
            for future in pending:
                while not wait([future], _POLL_SECONDS).done:
                    self._stop.check()
                found |= future.result()
            own.append(found)
        if self._world.size > 1:
            everyones = [unpack(packet)[1] for packet in self._world.gather(pack({}, own))]
            own = [{} for _ in self._scorers]
            for theirs in everyones:
                assert isinstance(theirs, list)
                for scores, part in zip(own, theirs, strict=True):
                    scores |= part
        return [
            [score for prompt in rollouts.prompts for score in scores[prompt.id]] for scores in own
        ]


def _scores_by_prompt(scorer: Scorer, part: Rollouts) -> _Scores:
    found: _Scores = {prompt.id: [] for prompt in part.prompts}
    scores = score_all(scorer, part.prompt_texts, part.texts)
    for place, score in zip(part.prompt_N.tolist(), scores, strict=True):
        found[part.prompts[place].id].append(score)
    return found
