"""Randomness by key.

Seeds are derived from what identifies a draw (the run's seed, its purpose, the iteration, the
prompt), never from a stream that is shared: schedules, batch orders, numbers of processes and
resumed runs then see the same numbers.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


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
