"""Brute force over every completion of a small language model, in float64 and with numpy alone.

The independent side of the tests of the mathematics: it shares no code with the package. Nothing
here is recursive or in log space; every quantity is its definition, a sum over all completions.

A language model is a list of tables. `tables[t]` has a row for each prefix of t tokens, the row
number being the prefix read in base V, and a column for each next token. Every completion has T
tokens; one that stops earlier repeats its stop token up to T.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Tables = list[Array]


def random_logits(rng: np.random.Generator, vocabulary: int, length: int) -> Tables:
    return [rng.normal(size=(vocabulary**t, vocabulary)) for t in range(length)]


def stopping(logits: Tables, stop: int) -> Tables:
    """The same model, but after the token `stop` nothing else can follow."""
    vocabulary = logits[0].shape[1]
    stopped = [table.copy() for table in logits]
    for t, table in enumerate(stopped):
        for row, prefix in enumerate(completions(vocabulary, t)):
            if stop in prefix:
                table[row] = -np.inf
                table[row, stop] = 0.0
    return stopped


def completions(vocabulary: int, length: int) -> npt.NDArray[np.int64]:
    """Every sequence, one a row, in the order of the tables' rows."""
    sequences = list(np.ndindex(*[vocabulary] * length))
    return np.array(sequences, dtype=np.int64).reshape(len(sequences), length)


def rows(vocabulary: int, length: int, t: int) -> npt.NDArray[np.int64]:
    """For each completion of `length` tokens, the row of its first t tokens."""
    return np.repeat(np.arange(vocabulary**t), vocabulary ** (length - t))


def softmax(logits: Tables) -> Tables:
    return [np.exp(table) / np.exp(table).sum(1, keepdims=True) for table in logits]


def completion_probs(next_probs: Tables) -> Array:
    """P(y) of every completion: the product of its tokens' probabilities."""
    length, vocabulary = len(next_probs), next_probs[0].shape[1]
    probs = np.ones(vocabulary**length)
    for t, tokens in enumerate(completions(vocabulary, length).T):
        probs *= next_probs[t][rows(vocabulary, length, t), tokens]
    return probs


def next_probs(completion_probs: Array, vocabulary: int, length: int) -> Tables:
    """The token-level factors of a distribution over completions; NaN for impossible prefixes."""
    with np.errstate(invalid="ignore"):
        return [
            prefix_sums(completion_probs, vocabulary, t + 1).reshape(-1, vocabulary)
            / prefix_sums(completion_probs, vocabulary, t)[:, None]
            for t in range(length)
        ]


def prefix_sums(values: Array, vocabulary: int, t: int) -> Array:
    """The sum over all completions of each prefix of t tokens."""
    sums: Array = values.reshape(vocabulary**t, -1).sum(1)
    return sums


def conditional_means(values: Array, probs: Array, vocabulary: int, length: int) -> list[Array]:
    """E[values | y_<t] for t = 0..T; 0 for an impossible prefix."""
    means = []
    for t in range(length + 1):
        mass = prefix_sums(probs, vocabulary, t)
        moment = prefix_sums(probs * values, vocabulary, t)
        means.append(np.divide(moment, mass, out=np.zeros_like(mass), where=mass > 0))
    return means


def kl(q: Array, p: Array) -> float:
    """KL(q || p) in nats, for two distributions over the same things."""
    support = q > 0
    return float(np.sum(q[support] * np.log(q[support] / p[support])))


def logit(prob: Array, limit: float = 60.0) -> Array:
    """The log-odds, kept within ±limit so that 0 and 1 have one."""
    with np.errstate(divide="ignore"):
        log_odds: Array = np.log(prob) - np.log1p(-prob)
    return np.clip(log_odds, -limit, limit)


def slope(function: Callable[[Tables], float], tables: Tables, step: float = 1e-5) -> Tables:
    """The gradient by central differences; 0 at entries that are not finite."""
    gradient = [np.zeros_like(table) for table in tables]
    for t, table in enumerate(tables):
        for index in zip(*np.nonzero(np.isfinite(table)), strict=True):
            ends = []
            for sign in (1, -1):
                moved = [other.copy() for other in tables]
                moved[t][index] += sign * step
                ends.append(function(moved))
            gradient[t][index] = (ends[0] - ends[1]) / (2 * step)
    return gradient
