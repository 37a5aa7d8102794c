"""Which texts are held out, and in which order the others come up; there is no state to save.

What is held out is decided by a hash of the text, so it does not depend on the order of the rows,
and the same text cannot be on both sides. An order is a function of the seed and of how often
everything has come up, so a resumed run sees the same rows.
"""

import hashlib
from collections.abc import Sequence
from functools import lru_cache


@lru_cache(maxsize=4)
def permutation(total: int, seed: int, purpose: str, epoch: int) -> tuple[int, ...]:
    """The numbers below `total` in the order of a pass (counted from 0)."""
    # Imported late, so that files can be checked without loading torch.
    import torch

    from constrained_ft.randomness import generator_for

    order = torch.randperm(total, generator=generator_for(seed, purpose, epoch))
    return tuple(order.tolist())


def held_out_by_hash(keys: Sequence[str], share: float) -> list[bool]:
    """Which texts are held out: those whose hash, as a number in [0, 1), is below the share.

    Where that would leave a side empty, the text with the smallest or largest hash goes there.
    """
    draws = [
        int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big") / 2**56 for key in keys
    ]
    held = [draw < share for draw in draws]
    if share > 0 and len(set(draws)) > 1:
        if not any(held):
            held = [draw == min(draws) for draw in draws]
        elif all(held):
            held = [draw != max(draws) for draw in draws]
    return held
