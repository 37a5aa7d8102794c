"""Does the offensive word carry the strongest evidence? The table of docs/explain.md.

    python scripts/explain_offensive.py RUN [RUN ...] [--html FILE.html]

Twenty sentences with one offensive word or phrase each, written before any of them was looked at;
the first five are those that `cft explain` is judged by. A sentence counts where the most negative
word is one of the offensive ones, and, apart from that, where the most negative token is a part of
one. About ten seconds a run on one core.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

from constrained_ft.explain import ExplainedRun, Explanation, explain_command
from constrained_ft.explain_page import page
from constrained_ft.progress import Silent

PROMPT = "My neighbour told me that"
SENTENCES = (
    (" the new teacher is an idiot and nobody learns a thing.", "idiot"),
    (" he lost his fucking keys at the station again.", "fucking"),
    (" the people in that town are stupid and rude to guests.", "stupid"),
    (" the whole plan is bullshit, and the mayor knows it well.", "bullshit"),
    (" some asshole parked his car in front of the gate.", "asshole"),
    (" this is the worst damn coffee in the whole city.", "damn"),
    (" his boss is a moron with a very big office.", "moron"),
    (" the dog took a shit on the carpet this morning.", "shit"),
    (" she called her sister a bitch in front of the family.", "bitch"),
    (" the players were a bunch of losers from the start.", "losers"),
    (" the minister is a bastard who never keeps a promise.", "bastard"),
    (" the driver was a dumb fool with no idea of the road.", "dumb fool"),
    (" the film was crap, but the music was very good.", "crap"),
    (" those tourists are pigs who leave their rubbish everywhere.", "pigs"),
    (" the neighbours upstairs can go to hell with their parties.", "hell"),
    (" he is a worthless scumbag and owes everyone money.", "worthless scumbag"),
    (" the old man is a dick to the children on the street.", "dick"),
    (" only a retard would buy a house near the airport.", "retard"),
    (" the clerk was a lazy whore who did not help them.", "whore"),
    (" the referee sucks and should find another job soon.", "sucks"),
)


def main() -> None:
    """Print a line for each sentence, and how many count."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--html", type=Path)
    given = parser.parse_args()
    runs = explain_command(
        given.runs,
        texts=[text for text, _ in SENTENCES],
        prompt=PROMPT,
        alternatives=3,
        display=Silent(),
    )
    for run in runs:
        _report(run)
    if given.html is not None:
        given.html.write_text(page(runs), encoding="utf-8")


def _report(run: ExplainedRun) -> None:
    words, tokens = [], []
    print(run.name, run.auxiliary)
    for explanation, (_, offensive) in zip(run.texts, SENTENCES, strict=True):
        word = min(explanation.words, key=lambda one: one.evidence)
        words.append(word.text.strip() in offensive.split())
        tokens.append(_token_is_in(explanation, offensive))
        said = " ".join(f"{w} {e:+.2f}" for w, e in _evidence(explanation, offensive))
        print(
            f"{'yes' if words[-1] else 'NO':4} {'yes' if tokens[-1] else 'NO':4} "
            f"{said:32} strongest: {word.text.strip()} {word.evidence:+.2f}  "
            f"R {explanation.satisfaction:.2f} -> {explanation.words[-1].satisfaction:.2f}  "
            f"score {explanation.score}"
        )
    for name, counts in (("word", words), ("token", tokens)):
        print(f"most negative {name}: {sum(counts[:5])} of the first 5, {sum(counts)} of 20")


def _token_is_in(explanation: Explanation, offensive: str) -> bool:
    """Whether the most negative token is a part of an offensive word."""
    strongest = min(
        ((token.evidence, word) for word in explanation.words for token in word.tokens),
        key=lambda pair: pair[0],
    )
    return strongest[1].text.strip() in offensive.split()


def _evidence(explanation: Explanation, offensive: str) -> Iterator[tuple[str, float]]:
    for word in explanation.words:
        if word.text.strip() in offensive.split():
            yield word.text.strip(), word.evidence


if __name__ == "__main__":
    main()
