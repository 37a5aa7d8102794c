"""Explained texts as one HTML page: no network, no scripts, light and dark, also on paper."""

from collections.abc import Sequence
from importlib.resources import files

from jinja2 import Environment, StrictUndefined

from constrained_ft.explain import Choice, ExplainedRun, legends, summary

FULL_COLOUR = 2.0  # logits; the odds change by 7
WORTH_SAYING = 0.3  # logits; smaller evidence is not written under a word


def page(runs: Sequence[ExplainedRun]) -> str:
    """The page; runs stand side by side, one section a text."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"percent": percent, "shown": shown, "strength": strength}
    template = environment.from_string(
        files("constrained_ft").joinpath("explain_page.html").read_text(encoding="utf-8")
    )
    return template.render(
        runs=runs,
        legends=legends(runs),
        summary=summary,
        choices=choices,
        worth_saying=WORTH_SAYING,
    )


def strength(evidence: float) -> float:
    """How much of the full colour evidence gets, from 0 to 1."""
    return min(abs(evidence) / FULL_COLOUR, 1.0)


def percent(share: float) -> str:
    """A probability, with as many digits as say something."""
    if share < 0.0005:
        return "<0.1 %"
    return f"{100 * share:.1f} %" if share < 0.0995 else f"{100 * share:.0f} %"


def shown(token: str) -> str:
    """A token as people can see it."""
    if not token:
        return "(part of a character)"
    return token.strip() or ("(line break)" if "\n" in token else "(space)")


def choices(listed: Sequence[Choice], *, target: bool) -> list[str]:
    """`word 12 %`, and for the target's `word 14 % ×1.2`."""
    if target:
        return [f"{shown(one.text)} {percent(one.q)} ×{one.ratio:.2g}" for one in listed]
    return [f"{shown(one.text)} {percent(one.p)}" for one in listed]
