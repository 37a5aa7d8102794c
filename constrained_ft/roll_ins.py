"""Guided roll-ins: completions whose beginning R guides, so that the LLM goes on from there.

Where a constraint is rarely satisfied, the LLM's own completions hardly ever come to a text so far
from which it can be. Some completions of an iteration therefore begin with tokens of q ∝ p R, with
the R of the iteration before, and p alone goes on: roll in with q, roll out with p. The label is
that of a continuation by p, so it is unbiased for R at the last guided token and after it. Before
that it is one of a better continuation, and R is not fitted to it. Rates, thresholds, tilts, what R
is measured by, and the prefixes of the update are those of the other completions alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from constrained_ft.decoding import Guide
from constrained_ft.prompts import Prompt
from constrained_ft.randomness import generator_for


@dataclass(frozen=True, kw_only=True)
class RollIns:
    """Which completions R guides, and how far."""

    guide: Guide
    share: float
    """Of the completions of each prompt, on average; one of them is never guided."""

    def lengths(
        self, prompts: Sequence[Prompt], samples: int, tokens: int, *, seed: int, iteration: int
    ) -> Int[Tensor, " B"]:
        """Guided tokens of each completion: 0, or at random from 1 to all of them.

        Args:
            prompts: each has `samples` completions, side by side.
            samples: completions of each.
            tokens: the longest completion.
            seed: of the random numbers, with the iteration and each prompt's id.
            iteration: see `seed`.
        """
        found = []
        for prompt in prompts:
            generator = generator_for(seed, "roll-ins", iteration, prompt.id)
            count = int(self.share * samples + float(torch.rand((), generator=generator)))
            own = torch.randint(1, tokens + 1, (samples,), generator=generator)
            own[min(count, samples - 1) :] = 0
            found.append(own)
        return torch.cat(found)
