"""1 where a text holds no listed word or phrase: exact, quick, blind to anything not listed."""

import csv
import hashlib
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from constrained_ft.errors import ScorerError
from constrained_ft.resources import one_line, resolve_file
from constrained_ft.scorer_config import WordsScorerConfig
from constrained_ft.scorers.protocol import Score, ScoreFailure


class WordsScorer:
    """Looks for listed words and phrases in the completion."""

    def __init__(self, words: Sequence[str], config: WordsScorerConfig) -> None:
        """Build the search.

        Args:
            words: words and phrases; equal ones count once.
            config: how they are matched.

        Raises:
            ScorerError: if there is no word.
        """
        self._fold = str.casefold if config.ignore_case else str
        distinct = sorted({" ".join(self._fold(word).split()) for word in words} - {""})
        if not distinct:
            raise ScorerError(
                "constraint.scorer.kind=words has an empty list: give `words`, a `path` with one "
                "word a line, or a lower `min_severity`"
            )
        self._pattern = _pattern(distinct, config)
        self.name = f"words ({len(distinct)} listed)"
        how = (config.whole_words, config.ignore_case, config.obfuscated)
        told = "\n".join([repr(how), *distinct])
        self.version = hashlib.sha256(told.encode()).hexdigest()[:16]

    def score(
        self, prompts: Sequence[str], completions: Sequence[str]
    ) -> list[Score | ScoreFailure]:
        """0 where the completion holds a listed word, else 1."""
        return [
            Score(0.0 if self._pattern.search(self._fold(completion)) else 1.0)
            for completion in completions
        ]

    def why(self, completion: str) -> str:
        """The words that were found."""
        found = dict.fromkeys(match[0] for match in self._pattern.finditer(self._fold(completion)))
        return "no listed word" if not found else f"holds {', '.join(map(repr, found))}"


def read_words(path: str, min_severity: float) -> list[str]:
    """The words of a file.

    Args:
        path: one word or phrase a line, or a CSV file with a `text` column.
        min_severity: of a CSV file, use rows whose `severity_rating` is at least this.

    Raises:
        ScorerError: if the file cannot be read.
        DataError: if it is not there.
    """
    file = resolve_file(path)
    try:
        if file.suffix.lower() == ".csv":
            return _csv_words(file, min_severity)
        if min_severity > 0:
            raise ScorerError(f"min_severity={min_severity} needs a CSV file; {file} is not one")
        return file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ScorerError(f"cannot read the word list {file}: {one_line(error)}") from error


def without(words: Sequence[str], ignore: Sequence[str]) -> list[str]:
    """The words that are not ignored.

    Raises:
        ScorerError: if an ignored word is not listed.
    """
    ignored = {_folded(word) for word in ignore}
    missing = ignored - {_folded(word) for word in words}
    if missing:
        raise ScorerError(f"constraint words: `ignore` has {sorted(missing)}, which is not listed")
    return [word for word in words if _folded(word) not in ignored]


def _folded(word: str) -> str:
    return " ".join(word.casefold().split())


def _csv_words(file: Path, min_severity: float) -> list[str]:
    with file.open(encoding="utf-8-sig", newline="") as lines:
        table = csv.DictReader(lines)
        needed = {"text"} | ({"severity_rating"} if min_severity > 0 else set())
        missing = sorted(needed - set(table.fieldnames or ()))
        if missing:
            raise ScorerError(f"the word list {file} has no column {', '.join(missing)}")
        words = []
        for number, row in enumerate(table, start=1):
            try:
                severe = min_severity <= 0 or float(row["severity_rating"]) >= min_severity
            except (TypeError, ValueError) as error:
                raise ScorerError(
                    f"row {number} of the word list {file} has the severity_rating "
                    f"{row['severity_rating']!r}; it must be a number"
                ) from error
            if severe:
                words.append(row["text"] or "")
        return words


def _pattern(words: Sequence[str], config: WordsScorerConfig) -> re.Pattern[str]:
    # Grouped by the first letter: far fewer alternatives are tried at each place.
    groups: dict[str, list[str]] = defaultdict(list)
    written = _disguised if config.obfuscated else re.escape
    for word in words:
        first, rest = word[0], word[1:]
        between = _BETWEEN if config.obfuscated and rest[:1].strip() else ""
        parts = rest.split(" ")
        groups[first].append(between + r"\s+".join(written(part) for part in parts))
    body = "|".join(f"{written(first)}(?:{'|'.join(rests)})" for first, rests in groups.items())
    if not config.whole_words:
        return re.compile(body)
    # Not \b: a listed word may begin or end with a sign.
    return re.compile(rf"(?<!\w)(?:{body})(?!\w)")


# Signs between letters, as in s.h.i.t or s h i t; a letter is no sign.
_BETWEEN = r"[\W_]{0,2}"
_LOOK_ALIKES = {
    "a": "a@4",
    "b": "b8",
    "e": "e3",
    "g": "g9",
    "i": "i1!|",
    "l": "l1|",
    "o": "o0",
    "s": "s$5",
    "t": "t7+",
    "u": "uv",
    "z": "z2",
}


def _disguised(word: str) -> str:
    """A pattern for a word with look-alike signs, repeated letters and signs between them."""
    letters = []
    for letter in word:
        alike = _LOOK_ALIKES.get(letter.casefold(), "") + letter
        letters.append(f"[{re.escape(alike)}]+" if letter.isalpha() else re.escape(letter))
    return _BETWEEN.join(letters)
