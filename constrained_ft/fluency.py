"""What texts say of themselves: how varied they are, how often they repeat themselves.

Words are what white space separates.
"""

from collections.abc import Iterator, Sequence

from constrained_ft.errors import ConfigError

_REPEATED = 4  # words of the n-grams of `repetition`


def distinct(texts: Sequence[str], n: int) -> float:
    """Distinct word n-grams over all word n-grams (Li et al. 2016); 0 where there are none."""
    grams = [gram for text in texts for gram in _grams(text, n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def repetition(texts: Sequence[str]) -> float:
    """Mean share of 4-grams that stood in the text before (seq-rep-4, Welleck et al. 2020).

    Texts of fewer than four words do not count; 0 where there are no others.
    """
    shares = []
    for text in texts:
        grams = list(_grams(text, _REPEATED))
        if grams:
            shares.append(1 - len(set(grams)) / len(grams))
    return sum(shares) / len(shares) if shares else 0.0


def empty(texts: Sequence[str]) -> float:
    """Share of texts that say nothing."""
    return sum(not text.strip() for text in texts) / len(texts)


def self_bleu(texts_of_prompts: Sequence[Sequence[str]]) -> float:
    """Mean BLEU of a text with the others of its prompt as references, 0 to 100 (Zhu et al. 2018).

    High is bad: the texts of a prompt are alike.

    Raises:
        ConfigError: if sacrebleu is not installed.
    """
    require_sacrebleu()
    from sacrebleu.metrics.bleu import BLEU

    bleu = BLEU(effective_order=True)  # texts may have fewer than four words
    scores = [
        bleu.sentence_score(text, [*texts[:place], *texts[place + 1 :]]).score
        for texts in texts_of_prompts
        for place, text in enumerate(texts)
        if len(texts) > 1
    ]
    return sum(scores) / len(scores) if scores else 0.0


def require_sacrebleu() -> None:
    """See that self-BLEU can be computed.

    Raises:
        ConfigError: if sacrebleu is not installed.
    """
    try:
        import sacrebleu  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "evaluation.self_bleu=true needs sacrebleu: pip install 'constrained-ft[eval]' "
            f"({error})"
        ) from error


def _grams(text: str, n: int) -> Iterator[tuple[str, ...]]:
    words = text.split()
    return (tuple(words[i : i + n]) for i in range(len(words) - n + 1))
