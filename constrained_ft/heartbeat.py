"""Who still lives, of several processes, and what each was doing when it was last heard of.

Every rank says once a second that it lives, from a thread that neither a stopped process nor one
that holds the interpreter's lock can run. A rank that works is heard of however long its phase
takes, so a slow service or a long batch is never taken for a frozen process.
"""

import json
import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

__all__ = ["Beats", "Heartbeat"]

_FACTOR = 20  # times the longest pause so far: machines may be busy
_STEP = 1.0  # a look counts for no longer: what stopped this process stopped the others, too


@runtime_checkable
class Beats(Protocol):
    """What of a store is needed."""

    def set(self, key: str, value: str) -> None:
        """Replace a value."""

    def check(self, keys: list[str]) -> bool:
        """Whether there are such keys."""
        ...

    def get(self, key: str) -> bytes:
        """A value that is there."""
        ...


class Heartbeat:
    """Tells that this rank lives, and listens to the others."""

    def __init__(
        self,
        store: Beats,
        rank: int,
        silence: float,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Nothing is told before `start`.

        Args:
            store: shared by all ranks.
            rank: this process's.
            silence: seconds; a rank that pauses for longer, and for 20 times its longest pause so
                far, counts as frozen.
            clock: seconds since some moment.
        """
        self.silence, self.factor = silence, _FACTOR
        self._store, self._rank, self._clock = store, rank, clock
        self._doing, self._count, self._longest = "starting", 0, 0.0
        self._heard: dict[int, tuple[int, float]] = {}  # beats of a rank, seconds without a new one
        self._looked = clock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="heartbeat")

    def start(self) -> None:
        """Begin to tell."""
        self._thread.start()

    def stop(self) -> None:
        """End it: this process is about to leave."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join(5.0)

    def begin(self, phase: str) -> None:
        """What this rank does from now on."""
        self._doing = phase

    def beat(self, pause: float) -> None:
        """Tell once.

        Args:
            pause: seconds for which this rank could not.
        """
        self._count, self._longest = self._count + 1, max(self._longest, pause)
        said = json.dumps([self._count, self._doing, self._longest])
        self._store.set(f"beat/{self._rank}", said)

    def _run(self) -> None:
        while True:
            before = self._clock()
            if self._ended.wait(1.0):
                return
            try:
                self.beat(self._clock() - before - 1.0)
            except RuntimeError:  # the store is gone: so are the others
                return

    def frozen(self, ranks: Sequence[int], at_most: float) -> str | None:
        """What to say of the first rank that has been silent for too long.

        Args:
            ranks: those that are waited for.
            at_most: seconds; no silence may be longer, whatever the pauses so far.
        """
        step = min(self._clock() - self._looked, _STEP)
        self._looked = self._clock()
        for rank in ranks:
            key = f"beat/{rank}"
            if not self._store.check([key]):
                continue
            count, doing, longest = json.loads(self._store.get(key))
            known, silent = self._heard.get(rank, (-1, 0.0))
            silent = silent + step if count == known else 0.0
            self._heard[rank] = count, silent
            limit = min(at_most, max(self.silence, self.factor * longest))
            if silent > limit:
                return (
                    f"rank {rank} has given no sign of life for {limit:.3g} s (placement.silence) "
                    f"while {doing}: it is stopped, or something holds its interpreter"
                )
        return None
