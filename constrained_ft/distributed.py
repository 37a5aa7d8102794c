"""Randomness by key, devices, and what a process is asked to do from outside.

Seeds are derived from what identifies a draw (the run's seed, its purpose, the iteration, the
prompt), never from a stream that is shared: schedules, batch orders and resumed runs then see the
same numbers.
"""

import hashlib
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

import torch

from constrained_ft.errors import Interrupted


def seed_for(seed: int, *key: str | int) -> int:
    """A 63-bit seed that depends on the run's seed and on every part of the key."""
    text = "\x1f".join(str(part) for part in (seed, *key))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator_for(seed: int, *key: str | int) -> torch.Generator:
    """A CPU generator for one purpose, such as `generator_for(seed, "rollouts", 3, prompt.id)`."""
    return torch.Generator().manual_seed(seed_for(seed, *key))


@contextmanager
def seed_everything(seed: int) -> Iterator[None]:
    """Seed torch's global generator for code that takes none, and put it back afterwards."""
    with torch.random.fork_rng():
        torch.manual_seed(seed % 2**63)
        yield


def default_device() -> torch.device:
    """The first accelerator, or the CPU."""
    if torch.accelerator.is_available():
        return torch.accelerator.current_accelerator() or torch.device("cpu")
    return torch.device("cpu")


class StopRequest:
    """Remembers SIGINT, SIGTERM and SIGUSR1 until a loop asks.

    The first signal sets a flag, which `check` turns into `Interrupted` at a safe place, and says
    so on standard error; the second leaves at once with exit code 130.
    """

    def __init__(self) -> None:
        self._signal: int | None = None

    def install(self) -> None:
        """Take over the signals; only possible in the main thread."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._signal is not None:
            os._exit(130)
        self._signal = number
        # The handler may run in the middle of another write, so no buffered stream is used.
        with suppress(OSError):
            os.write(2, b"\nstopping at the next safe point; again to leave at once\n")

    def check(self) -> None:
        """Raise if a signal came.

        Raises:
            Interrupted: naming the signal.
        """
        if self._signal is not None:
            name = signal.Signals(self._signal).name
            raise Interrupted(f"stopped by {name}; nothing finished is lost")
