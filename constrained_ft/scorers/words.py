"""1 where a text holds no listed word or phrase: exact, quick, blind to anything not listed."""

import csv
import hashlib
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from constrained_ft.errors import ScorerError
from constrained_ft.resources import one_line, resolve_file
from constrained_ft.scorers.protocol import Score, ScoreFailure


class WordsScorer:
    """Looks for whole words and phrases in the completion, whatever their case."""

    def __init__(self, words: Sequence[str]) -> None:
        distinct = sorted({_folded(word) for word in words} - {""})
        if not distinct:
            raise ScorerError(
                "constraint.scorer.kind=words has an empty list: give `words`, a `path` with one "
                "word a line, or a lower `min_severity`"
            )
        self._pattern = _pattern(distinct)
        self.name = f"words ({len(distinct)} listed)"
        self.version = hashlib.sha256("\n".join(distinct).encode()).hexdigest()[:16]

    def score(
        self, prompts: Sequence[str], completions: Sequence[str]
    ) -> list[Score | ScoreFailure]:
        """0 where the completion holds a listed word, else 1."""
        return [
            Score(0.0 if self._pattern.search(completion.casefold()) else 1.0)
            for completion in completions
        ]


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


def _pattern(words: Sequence[str]) -> re.Pattern[str]:
    # Grouped by the first letter: far fewer alternatives are tried at each place.
    groups: dict[str, list[str]] = defaultdict(list)
    for word in words:
        rest = r"\s+".join(re.escape(part) for part in word[1:].split(" "))
        groups[word[0]].append(rest)
    body = "|".join(f"{re.escape(first)}(?:{'|'.join(rests)})" for first, rests in groups.items())
    # Not \b: a listed word may begin or end with a sign.
    return re.compile(rf"(?<!\w)(?:{body})(?!\w)")
