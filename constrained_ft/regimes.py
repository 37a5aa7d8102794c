"""Where a constraint leaves little to learn from, and the settings that help."""

import math

from constrained_ft.config import Config
from constrained_ft.results import QUANTILES, Evaluation

RARE, NEAR_CERTAIN = 0.02, 0.99
_WANTED = 8  # completions of the rarer kind in an iteration
_MOST = 4  # times the completions that there are: each costs time
_BEST_SHARE = 0.2
_CANDIDATES = 4
_GUIDED = 0.3
_GRADED = 1e-3  # scores differ by more than this


def base_rate(base: Evaluation) -> tuple[float, int]:
    """The share of the base model's completions that satisfy the constraint, and how many they are.

    Groups count by their completions that have a score.
    """
    scored = [group.samples - group.missing for group in base.groups.values()]
    satisfied = [
        group.satisfaction.mean * count
        for group, count in zip(base.groups.values(), scored, strict=True)
    ]
    return sum(satisfied) / sum(scored), sum(scored)


def is_graded(base: Evaluation) -> bool:
    """Whether scores take more values than the two of yes and no."""
    inner = [value for value in base.quantiles if _GRADED < value < 1 - _GRADED]
    return max(inner, default=0.0) - min(inner, default=0.0) > _GRADED


def advice(base: Evaluation, config: Config) -> str | None:
    """What to say about a constraint that the base satisfies hardly ever or nearly always."""
    rate, _ = base_rate(base)
    rarer = min(rate, 1 - rate)
    if RARE <= rate <= NEAR_CERTAIN or config.trainer.is_plain:
        return None
    overrides = _rare(base, config) if rate < RARE else _near_certain(base, config)
    graded = bool(overrides)
    if rate > NEAR_CERTAIN and config.prompts.candidates == 1:
        overrides.append(f"prompts.candidates={_CANDIDATES}")
    have = config.prompts.completions
    if not graded and rarer > 0 and have * rarer < _WANTED:
        wanted = math.ceil(_WANTED / rarer / config.prompts.prompts_per_iteration)
        each = min(wanted, _MOST * config.prompts.samples_per_prompt)
        overrides.append(f"prompts.samples_per_prompt={each}")
        if rate < RARE and config.sampler.kind == "cft" and not config.prompts.guided_roll_ins:
            overrides.append(f"prompts.guided_roll_ins={_GUIDED}")
        if rate >= RARE and config.constraint.has_hard_labels and not config.auxiliary.balanced:
            overrides.append("auxiliary.balanced=true")
    kind = "rarely satisfied" if rate < RARE else "nearly always satisfied"
    words = f"the constraint is {kind} by the base model ({rate:.1%})"
    return f"{words}; proposal: {' '.join(overrides)}" if overrides else words


def _rare(base: Evaluation, config: Config) -> list[str]:
    """Let the best completions of an iteration count, until enough satisfy."""
    terms = config.constraint.all_terms()
    if not is_graded(base) or any(
        term.anneal is not None or term.labels != "hard" for term in terms.values()
    ):
        return []
    return [f"{_where(config, name)}anneal={_BEST_SHARE}" for name in terms]


def _near_certain(base: Evaluation, config: Config) -> list[str]:
    """Ask for more: what the worst tenth of the base model's completions falls short of."""
    if config.constraint.scorer is None or not is_graded(base):
        return []
    stricter = base.quantiles[QUANTILES.index(0.1)]
    stricter = math.ceil(stricter * 1000) / 1000
    return [f"constraint.satisfied_at={stricter:g}"] if stricter < 1 else []


def _where(config: Config, name: str) -> str:
    return f"constraint.terms.{name}." if config.constraint.terms else "constraint."
