"""What a row says: a text, a prompt with its completion, a labelled question, or a chat.

Rows come as `text`, as `prompt` + `completion`, or as chat `messages`. Nothing is tokenised here.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from constrained_ft.config import DataConfig, QuestionConfig, SourceConfig
from constrained_ft.errors import ConfigError, DataError
from constrained_ft.sources import rows_of, sources_of


@dataclass(frozen=True, kw_only=True)
class Text:
    """A plain text."""

    text: str


@dataclass(frozen=True, kw_only=True)
class Completion:
    """A prompt and what follows it."""

    prompt: str
    completion: str


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """A question whose answer a classification head gives."""

    question: str
    positive: bool


@dataclass(frozen=True, kw_only=True)
class Chat:
    """Messages, each with a role and content."""

    messages: tuple[dict[str, Any], ...]


@dataclass(frozen=True, kw_only=True)
class Record:
    """One row as it was read."""

    origin: str
    """For messages: `row 3 of FILE`."""
    group: str
    content: Text | Completion | Labelled | Chat
    weight: float = 1.0
    """What each trained token of it counts for."""

    @property
    def key(self) -> str:
        """What decides whether the row is held out."""
        match self.content:
            case Text(text=text):
                return text
            case Completion(prompt=prompt, completion=completion):
                return f"{prompt}\x1f{completion}"
            case Labelled(question=question, positive=positive):
                return f"{question}\x1f{positive}"
            case Chat(messages=messages):
                return json.dumps(messages, sort_keys=True, default=str)


@dataclass(frozen=True, kw_only=True)
class Draft:
    """A prompt that is not tokenised yet."""

    text: str
    group: str
    rendered: bool
    """Written by the chat template, with its own special tokens."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """What else its row says and was asked for."""


def grouped_records(config: DataConfig) -> dict[tuple[str, int], list[Record]]:
    """Records by group and by how often they come up."""
    groups: dict[tuple[str, int], list[Record]] = {}
    for name, source in sources_of(config, "corpus").items():
        for record in records_of(name, source):
            groups.setdefault((record.group, source.repeat), []).append(record)
    return groups


def records_of(name: str, source: SourceConfig) -> list[Record]:
    """The rows of one source, in its order; equal ones are all there.

    Raises:
        DataError: if the source is missing, empty or malformed.
    """
    records = []
    excluded = _excluded(name, source)
    for origin, row in rows_of(name, source):
        said = _content(row, source.text_column, origin)
        if _is_empty(said, origin, skip=source.skip_empty):
            continue
        if isinstance(said, Text) and said.text.strip() in excluded:
            continue
        if source.opening_words is not None and isinstance(said, Text):
            said = Text(text=opening(said.text, source.opening_words))
        asks = source.question
        content = said if asks is None else _asked(said, asks, row, origin)
        group = _group(row, name, origin)
        records.append(Record(origin=origin, group=group, content=content, weight=source.weight))
    if not records:
        raise DataError(f"{name}: {source.path or source.name} has no rows with text")
    return records


def _asked(
    content: Text | Completion | Chat, question: QuestionConfig, row: dict[str, Any], origin: str
) -> Completion | Labelled:
    """A labelled text as a question with its answer, or with its label."""
    if not isinstance(content, Text):
        raise DataError(f"{origin} is no plain text, so no question can be made of it")
    found = _field(row, question.label)
    if found is None:
        raise DataError(f"{origin} has no `{question.label}`, which `question.label` asks for")
    try:
        label = float(found)
    except (TypeError, ValueError):
        label = math.nan
    if math.isnan(label):
        raise DataError(
            f"{origin}: the label `{question.label}` is {found!r}, but must be a number, or true "
            "or false"
        )
    asked = question.template.replace("{text}", content.text)
    positive = label >= question.positive_from
    if question.by == "head":
        return Labelled(question=asked, positive=positive)
    return Completion(prompt=asked, completion=question.positive if positive else question.negative)


def _excluded(name: str, source: SourceConfig) -> set[str]:
    if source.exclude is None:
        return set()
    listed = SourceConfig(path=source.exclude, text_column="prompt", skip_empty=True)
    return {draft.text.strip() for draft in file_prompts(f"{name}.exclude", listed)}


def file_prompts(name: str, source: SourceConfig) -> list[Draft]:
    """The prompts of one source, in its order; equal ones are all there."""
    if source.repeat > 1:
        raise ConfigError(
            f"prompts: `repeat` of {name} is for the corpus; prompts are not repeated"
        )
    if source.weight != 1:
        raise ConfigError(f"prompts: `weight` of {name} is for the corpus")
    if source.question is not None:
        raise ConfigError(f"prompts: `question` of {name} is for the corpus")
    drafts = []
    for origin, row in rows_of(name, source):
        columns = (source.text_column, "prompt", "text")
        column = next((c for c in columns if _field(row, c) is not None), None)
        if column is None:
            found = ", ".join(key for key, value in row.items() if value is not None) or "nothing"
            raise DataError(
                f"{origin} has no prompt: it needs `{source.text_column}`; it has {found}. If the "
                "prompt has another name, set text_column"
            )
        text = _string(_field(row, column), column, origin)
        if _is_empty(Text(text=text), origin, skip=source.skip_empty):
            continue
        if source.opening_words is not None:
            text = opening(text, source.opening_words)
        more = {column: _column(row, column, origin) for column in source.columns}
        group = _group(row, name, origin)
        drafts.append(Draft(text=text, group=group, rendered=False, columns=more))
    if not drafts:
        raise DataError(f"{name}: {source.path or source.name} has no prompts")
    return drafts


def opening(text: str, words: int) -> str:
    """The first words of a text."""
    return " ".join(text.split()[:words])


def _content(row: dict[str, Any], text_column: str, origin: str) -> Text | Completion | Chat:
    text = _field(row, text_column)
    if text is not None and text_column != "text":
        return Text(text=_string(text, text_column, origin))
    if row.get("messages") is not None:
        return Chat(messages=_messages(row["messages"], origin))
    if row.get("prompt") is not None and row.get("completion") is not None:
        return Completion(
            prompt=_string(row["prompt"], "prompt", origin),
            completion=_string(row["completion"], "completion", origin),
        )
    if text is not None:
        return Text(text=_string(text, text_column, origin))
    found = ", ".join(key for key, value in row.items() if value is not None) or "nothing"
    raise DataError(
        f"{origin} has no text: it needs `{text_column}`, or `prompt` and `completion`, or "
        f"`messages`; it has {found}. If the text has another name, set text_column"
    )


def _is_empty(content: Text | Completion | Chat, origin: str, *, skip: bool) -> bool:
    match content:
        case Text():
            said = content.text
        case Completion():
            said = content.completion
        case _:
            said = "".join(message["content"] for message in content.messages)
    empty = not said.strip()
    if empty and not skip:
        raise DataError(f"{origin} is empty; remove it, or set skip_empty=true")
    return empty


def _field(row: dict[str, Any], column: str) -> Any:
    """A column, or the field b of the column a for `a.b`."""
    if column in row:
        return row[column]
    head, _, rest = column.partition(".")
    inner = row.get(head)
    return _field(inner, rest) if rest and isinstance(inner, dict) else None


def _column(row: dict[str, Any], column: str, origin: str) -> Any:
    found = _field(row, column)
    if found is None:
        raise DataError(f"{origin} has no `{column}`, which `columns` asks for")
    return found


def _string(value: object, column: str, origin: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{origin}: `{column}` is {type(value).__name__}, but must be a string")
    return value


def _group(row: dict[str, Any], name: str, origin: str) -> str:
    return name if row.get("group") is None else _string(row["group"], "group", origin)


def _messages(value: object, origin: str) -> tuple[dict[str, Any], ...]:
    if not isinstance(value, list):
        raise DataError(f"{origin}: `messages` is {type(value).__name__}, but must be a list")
    for number, message in enumerate(value, start=1):
        if not isinstance(message, dict):
            raise DataError(f"{origin}: message {number} is not an object with role and content")
        for key in ("role", "content"):
            _string(message.get(key), f"messages[{number}].{key}", origin)
    # A field that only other rows have was filled with None by the reader.
    return tuple({k: v for k, v in message.items() if v is not None} for message in value)
